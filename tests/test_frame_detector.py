"""Detectors of frames: manifests, what the network is given, and what its answers say."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_yolo import tiny_manifest, write_tiny_yolo

from engines.detectors import load_detector
from engines.errors import EngineError
from engines.frame_detector import FrameDetector, decode
from engines.frame_input import stretched

FULL_SCALE = 16383


class Answering:
    """An engine that gives what it is told to, and keeps what it was given."""

    def __init__(self, manifest, *answers):
        self.manifest, self._answers = manifest, answers

    def infer(self, tiles):
        self.tiles = tiles
        return np.stack([self._answers[n % len(self._answers)] for n in range(len(tiles))])

    def close(self):
        pass


def raw(columns, number=8):
    """A raw answer (4 + classes, N) of these columns, the rest empty."""
    answer = np.zeros((6, number), np.float32)
    answer[:, : len(columns)] = np.array(columns, np.float32).T
    return answer


def sky(rng, shape=(128, 160), level=1000.0, noise=10.0):
    return np.rint(rng.normal(level, noise, shape)).astype(np.uint16)


def test_a_raw_head_is_decoded():
    answer = raw([(20, 10, 8, 6, 0.9, 0.1), (50, 60, 20, 10, 0.2, 0.7), (5, 5, 2, 2, 0.4, 0.3)])
    found = decode(answer, tiny_manifest(candidates=8))
    np.testing.assert_allclose(found.box_px, [[16, 7, 24, 13], [40, 55, 60, 65]])
    assert found.label.tolist() == [0, 1]
    np.testing.assert_allclose(found.score, [0.9, 0.7], rtol=1e-6)


def test_corners_are_taken_as_they_are_when_the_manifest_says_so():
    answer = raw([(16, 7, 24, 13, 0.9, 0.1)])
    found = decode(answer, tiny_manifest(candidates=8, box="xyxy"))
    np.testing.assert_allclose(found.box_px, [[16, 7, 24, 13]])


def test_a_head_with_nms_is_decoded_and_unknown_classes_left_out():
    rows = [(16, 7, 24, 13, 0.9, 1), (0, 0, 4, 4, 0.3, 0), (1, 1, 5, 5, 0.8, 7), (0,) * 6]
    found = decode(np.array(rows, np.float32), tiny_manifest(output="nms", candidates=4))
    np.testing.assert_allclose(found.box_px, [[16, 7, 24, 13]])
    assert found.label.tolist() == [1]


def test_overlapping_boxes_of_any_class_become_one_best_first(rng):
    answer = raw(
        [
            (50, 50, 8, 8, 0.6, 0),
            (51, 50, 8, 8, 0, 0.8),
            (20, 20, 8, 8, 0.9, 0),
            (50, 20, 8, 8, 0.7, 0),
        ]
    )
    engine = Answering(tiny_manifest(candidates=8), answer)
    found = FrameDetector(engine, FULL_SCALE).detect(sky(rng))
    np.testing.assert_allclose(found.score, [0.9, 0.8, 0.7], rtol=1e-6)
    assert found.label.tolist() == [0, 1, 0]


def test_boxes_are_in_pixels_whose_centres_are_integers_and_end_with_the_frame(rng):
    answer = raw([(3, 120, 10, 20, 0.9, 0)])
    found = FrameDetector(Answering(tiny_manifest(candidates=8), answer), FULL_SCALE).detect(
        sky(rng)
    )
    np.testing.assert_allclose(found.box_px, [[-0.5, 109.5, 7.5, 127.5]])


def test_only_the_best_objects_are_kept(rng):
    columns = [(10 + 12 * n, 10, 8, 8, 0.5 + 0.04 * n, 0) for n in range(8)]
    engine = Answering(tiny_manifest(candidates=8, max_objects=3), raw(columns))
    found = FrameDetector(engine, FULL_SCALE).detect(sky(rng))
    np.testing.assert_allclose(found.score, [0.78, 0.74, 0.7], rtol=1e-6)


def test_a_frame_larger_than_the_input_is_cut_into_tiles_that_cover_it(rng):
    manifest = tiny_manifest(candidates=8)
    engine = Answering(manifest, raw([(80, 64, 8, 8, 0.9, 0)]))
    frame = sky(rng, (200, 300))
    found = FrameDetector(engine, FULL_SCALE).detect(frame)
    assert engine.tiles.shape == (6, 1, 128, 160)
    image = stretched(frame, "noise", FULL_SCALE)
    np.testing.assert_array_equal(engine.tiles[0, 0], image[:128, :160])
    np.testing.assert_array_equal(engine.tiles[-1, 0], image[-128:, -160:])
    middles = (found.box_px[:, :2] + found.box_px[:, 2:]) / 2.0
    expected = [(x + 79.5, y + 63.5) for y in (0, 72) for x in (0, 70, 140)]
    assert sorted(map(tuple, middles.tolist())) == sorted(expected)


def test_the_same_object_in_two_tiles_is_one(rng):
    left, right = raw([(150, 64, 8, 8, 0.9, 0)]), raw([(22, 64, 8, 8, 0.8, 0)])
    engine = Answering(tiny_manifest(candidates=8), left, right)
    found = FrameDetector(engine, FULL_SCALE).detect(sky(rng, (128, 288)))
    np.testing.assert_allclose(found.score, [0.9], rtol=1e-6)


def test_a_smaller_frame_is_padded_with_its_median(rng):
    engine = Answering(tiny_manifest(candidates=8), raw([]))
    frame = sky(rng, (40, 50))
    assert len(FrameDetector(engine, FULL_SCALE).detect(frame).score) == 0
    np.testing.assert_array_equal(
        engine.tiles[0, 0, :40, :50], stretched(frame, "noise", FULL_SCALE)
    )
    assert not engine.tiles[0, 0, 40:].any()
    assert not engine.tiles[0, 0, :, 50:].any()


@pytest.mark.parametrize("shape", [(512, 640), (64, 80), (100, 300), (300, 100), (128, 160)])
def test_a_letterboxed_frame_keeps_its_places(rng, shape):
    manifest = tiny_manifest(candidates=8, resize=True, stretch="percentile", channels=3)
    frame = np.full(shape, 1000, np.uint16)
    row, column = shape[0] // 3, shape[1] // 4
    frame[row - 8 : row + 8, column - 8 : column + 8] = 5000
    engine = Answering(manifest, raw([]))
    detector = FrameDetector(engine, FULL_SCALE)
    detector.detect(frame)
    assert engine.tiles.shape == (1, 3, 128, 160)
    bright = np.argwhere(engine.tiles[0, 0] > 0.9)
    (top, left), (bottom, right) = bright.min(axis=0), bright.max(axis=0) + 1
    box = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top, 0.9, 0)
    engine._answers = (raw([box]),)
    found = detector.detect(frame)
    scale = max(shape[0] / 128, shape[1] / 160)
    middle = (found.box_px[0, :2] + found.box_px[0, 2:]) / 2.0
    np.testing.assert_allclose(middle, [column - 0.5, row - 0.5], atol=0.6 * max(scale, 1.0))


def test_an_answer_that_is_not_finite_is_an_error_not_a_box(rng):
    answer = raw([(20, 10, 8, 6, 0.9, 0.1)])
    answer[2, 5] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        FrameDetector(Answering(tiny_manifest(candidates=8), answer), FULL_SCALE).detect(sky(rng))


@pytest.mark.parametrize(("level", "noise"), [(1000.0, 5.0), (9000.0, 80.0), (300.0, 40.0)])
def test_stretched_by_noise_every_sensor_looks_alike(rng, level, noise):
    image = stretched(sky(rng, (256, 320), level, noise), "noise", FULL_SCALE)
    assert image.dtype == np.float32
    assert abs(float(np.median(image))) < 0.02
    assert abs(float(np.sinh(image).std()) - 1.0) < 0.05


@pytest.mark.parametrize("stretch", ["noise", "percentile", "full_scale"])
@pytest.mark.parametrize("frame", ["constant", "hot", "float", "nan"])
def test_any_frame_is_finite_when_stretched(stretch, frame, rng):
    pixels = np.full((64, 70), 7, np.uint16)
    if frame == "hot":
        pixels[3, 4] = 65535
    if frame in ("float", "nan"):
        pixels = rng.normal(0.0, 1.0, (64, 70)).astype(np.float32)
    if frame == "nan":
        pixels[:5] = np.nan
        pixels[7, 7] = np.inf
    assert np.isfinite(stretched(pixels, stretch, FULL_SCALE)).all()


@pytest.mark.parametrize("batch", ["batch", 1])
def test_a_real_model_finds_what_is_bright(tmp_path, rng, batch):
    write_tiny_yolo(tmp_path, batch=batch)
    frame = sky(rng)
    for x, y in ((37, 52), (130, 90)):
        frame[y, x] = 1400
    with load_detector(str(tmp_path / "tiny.onnx")) as engine:
        found = FrameDetector(engine, FULL_SCALE).detect(frame)
        twice = FrameDetector(engine, FULL_SCALE).detect(np.hstack([frame, frame]))
    np.testing.assert_allclose(np.sort(found.box_px, axis=0)[:, 0], [31.5, 127.5])
    assert len(twice.score) >= 4


def test_what_is_wrong_with_a_detector_is_said_in_one_line(tmp_path):
    with pytest.raises(EngineError, match=r"no `none`; use yolo"):
        load_detector("none")
    with pytest.raises(EngineError, match="no manifest"):
        load_detector(str(tmp_path / "none.onnx"))
    path = write_tiny_yolo(tmp_path).with_suffix(".json")
    whole = json.loads(path.read_text())
    for field, value, said in (
        ("calibration", {"bird": [1.0, 0.0]}, "`bird` is none of point, extended"),
        ("classes", ["point", "point"], "a name is there twice"),
        ("prior", 1.0, "prior"),
        ("grid", 3, "unknown field `grid`"),
        ("candidates", 300, "gives maps of shape"),
    ):
        path.write_text(json.dumps({**whole, field: value}))
        with pytest.raises(EngineError, match=said):
            load_detector(str(path))


def test_scores_without_calibration_are_believed():
    manifest = tiny_manifest()
    odds = manifest.target_odds(np.array([0, 1]), np.array([0.9, 0.9]))
    np.testing.assert_allclose(odds, [np.log(9.0), -np.log(9.0)])
    assert manifest.prior_odds == 0.0


@given(
    score=st.floats(0.0, 1.0),
    a=st.floats(-5, 5),
    b=st.floats(-10, 10),
)
def test_odds_are_finite_whatever_the_score(score, a, b):
    manifest = tiny_manifest(calibration={"point": (a, b)})
    assert np.isfinite(manifest.target_odds(np.array([0]), np.array([score]))).all()


def test_the_shipped_detector_boxes_a_point_a_group_and_an_extended_object():
    from pipeline.physics.groups import PROFILES
    from trainer.yolo.scenes import CLASSES, SceneDraw, draw_frames

    frames = draw_frames(SceneDraw(256, 320, ("clouds",)), 6, 31)
    right = total = 0
    with load_detector("yolo") as engine:
        detector = FrameDetector(engine, PROFILES["field"].sensor.full_scale)
        assert engine.manifest.classes == CLASSES
        for frame in frames:
            found = detector.detect(frame.pixels_HW)
            middle = (found.box_px[:, :2] + found.box_px[:, 2:]) / 2.0
            sources = engine.manifest.is_point_source(found.label)
            for box in frame.box_px[frame.label <= 1]:
                near = np.abs(middle[sources] - (box[:2] + box[2:]) / 2.0).max(axis=1) < 2.0
                right, total = right + bool(near.any()), total + 1
    assert right >= 0.7 * total > 20
