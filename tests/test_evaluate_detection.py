"""`pipeline evaluate-detection`: how it counts, which files it takes, what it refuses."""

import json

import cv2
import numpy as np
import pytest
from conftest import assert_one_line_error, small_training, write_scene

from pipeline.errors import PipelineError
from pipeline.evaluation.command import evaluate_detection
from pipeline.evaluation.frames import Pictures, RecordedFrames
from pipeline.evaluation.roc_picture import draw_roc
from pipeline.evaluation.run import UNKNOWN_CAMERA, all_detectors, evaluate, roc
from pipeline.evaluation.score import DetectionScore, groups_of, predicted_mask, regions_of
from pipeline.formats.pictures import Pair, paired, read_mask, read_picture
from pipeline.imaging.regions import find_regions
from pipeline.stages.detect import Detect
from trainer.clutter import draw_pictures, write_pictures
from trainer.clutter_commands import draw_clutter, fit_discriminant
from trainer.errors import TrainerError

KEYS = {"pd", "fa_pixels", "false_alarms_per_frame", "seconds_per_frame", "frames"}


@pytest.fixture(scope="module")
def clutter(tmp_path_factory):
    """42 pictures of synthetic clutter, six of a kind, of a seed nothing was fitted to."""
    folder = tmp_path_factory.mktemp("clutter")
    write_pictures(folder, 42, seed=901)
    return folder


def picture_of(size=(60, 80), at=(40, 30), sigma_px=1.2, height=90.0, dtype=np.uint8):
    y, x = np.mgrid[: size[0], : size[1]]
    bump = height * np.exp(-0.5 * ((x - at[0]) ** 2 + (y - at[1]) ** 2) / sigma_px**2)
    noise = np.random.default_rng(0).standard_normal(size)
    scale = np.iinfo(dtype).max / 255
    grey = np.rint((80 + bump + noise) * scale).astype(dtype)
    return grey, (bump > 0.4 * height)


def write_pair(folder, name="a.png", picture=None, mask=None, mask_name="a.png"):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(exist_ok=True)
    drawn, true = picture_of()
    cv2.imwrite(str(folder / "images" / name), drawn if picture is None else picture)
    true = 255 * true.astype(np.uint8) if mask is None else mask
    cv2.imwrite(str(folder / "masks" / mask_name), true)
    return folder / "images", folder / "masks"


# --- counting ------------------------------------------------------------------------------------


def blocks(*corners, size=3, shape=(40, 40)):
    mask = np.zeros(shape, bool)
    for x, y in corners:
        mask[y : y + size, x : x + size] = True
    return mask


def scored(true, predicted):
    score = DetectionScore()
    score.add(regions_of(true).xy_px, regions_of(predicted), true.size, 0.5)
    return score.to_json()


def test_regions_touch_by_corners_too():
    assert len(regions_of(blocks((5, 5), (8, 8))).pixels) == 1
    np.testing.assert_array_equal(regions_of(blocks((5, 5), (9, 8))).pixels, [9, 9])
    np.testing.assert_allclose(regions_of(blocks((5, 9))).xy_px, [[6.0, 10.0]])


def test_a_prediction_counts_below_three_pixels():
    assert scored(blocks((10, 10)), blocks((12, 12)))["pd"] == 1.0  # 2.83 px
    missed = scored(blocks((10, 10)), blocks((13, 10)))  # 3 px
    assert missed["pd"] == 0.0 and missed["fa_pixels"] == 9 / 1600


def test_each_truth_takes_one_prediction_and_each_prediction_serves_one_truth():
    result = scored(blocks((10, 10), (30, 30)), blocks((8, 10), (12, 10), size=2))
    assert result == {
        "pd": 0.5,
        "fa_pixels": 4 / 1600,
        "false_alarms_per_frame": 1.0,
        "seconds_per_frame": 0.5,
        "frames": 1,
        "targets": 2,
    }
    two = scored(blocks((10, 10), (14, 10)), blocks((12, 10)))
    assert two["pd"] == 0.5 and two["false_alarms_per_frame"] == 0.0


def test_without_any_target_pd_is_unknown():
    assert scored(blocks(), blocks((3, 3)))["pd"] is None


def test_true_targets_of_one_group_count_once():
    groups = groups_of(np.array([[10.0, 10], [12, 10], [14, 10], [30, 30]]))
    np.testing.assert_allclose(groups, [[12, 10], [30, 30]])
    assert groups_of(np.empty((0, 2))).shape == (0, 2)


def test_a_mask_holds_the_pixels_above_a_share_of_each_peak():
    y, x = np.mgrid[:40, :40]
    snr_HW = np.zeros((40, 40), np.float32)
    for at, height in (((10, 12), 20.0), ((30, 28), 8.0)):
        snr_HW += np.float32(height) * np.exp(-0.5 * ((x - at[0]) ** 2 + (y - at[1]) ** 2) / 4.0)
    mask_HW = predicted_mask(snr_HW, find_regions(snr_HW, 6.0))
    assert len(regions_of(mask_HW).pixels) == 2
    for at, height in (((10, 12), 20.0), ((30, 28), 8.0)):
        near = np.hypot(x - at[0], y - at[1]) < 8
        np.testing.assert_array_equal(mask_HW[near], snr_HW[near] >= 0.6 * height)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "jpg", "JPEG", "PNG"])
def test_pictures_of_every_format_are_read(suffix, tmp_path):
    images, masks = write_pair(tmp_path, f"a.{suffix}")
    score = evaluate(Pictures(images, masks), UNKNOWN_CAMERA).to_json()
    assert score["pd"] == 1.0 and score["false_alarms_per_frame"] == 0.0


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bits_colours_and_alpha(suffix, dtype, channels, tmp_path):
    grey, _ = picture_of(dtype=dtype)
    image = grey if channels == 1 else np.repeat(grey[:, :, None], 3, axis=2)
    if channels == 4:
        alpha = np.random.default_rng(1).integers(0, 255, (*grey.shape, 1)).astype(dtype)
        image = np.concatenate([image, alpha], axis=2)
    images, masks = write_pair(tmp_path, f"a.{suffix}", image)
    read = read_picture(images / f"a.{suffix}")
    assert read.dtype == dtype and read.shape == grey.shape
    np.testing.assert_allclose(read.astype(float), grey, atol=1)
    assert evaluate(Pictures(images, masks), UNKNOWN_CAMERA).to_json()["pd"] == 1.0


def test_floating_point_pictures_are_read(tmp_path):
    grey, _ = picture_of()
    images, masks = write_pair(tmp_path, "a.tif", grey.astype(np.float32) * 0.01)
    assert read_picture(images / "a.tif").dtype == np.float32
    assert evaluate(Pictures(images, masks), UNKNOWN_CAMERA).to_json()["pd"] == 1.0


def test_both_names_of_masks_and_masks_of_ones(tmp_path):
    _, true = picture_of()
    images, masks = write_pair(tmp_path, mask=true.astype(np.uint8), mask_name="a_pixels0.png")
    (pair,), others = paired(images, masks)
    assert pair.mask.name == "a_pixels0.png" and others == []
    np.testing.assert_array_equal(read_mask(pair, true.shape)[0], true)
    write_pair(tmp_path)
    assert paired(images, masks)[0][0].mask.name == "a.png"


def test_a_mask_of_another_resolution_is_scaled_and_of_other_proportions_refused(tmp_path):
    _, true = picture_of()
    large = cv2.resize(255 * true.astype(np.uint8), None, fx=2, fy=2, interpolation=0)
    images, masks = write_pair(tmp_path, mask=large)
    pair = Pair(images / "a.png", masks / "a.png")
    mask, scaled = read_mask(pair, true.shape)
    assert scaled
    np.testing.assert_array_equal(mask, true)
    write_pair(tmp_path, mask=large[:, :-8])
    with pytest.raises(PipelineError, match=r"masks/a.png: is 152×120, but its picture .* 80×60"):
        read_mask(pair, true.shape)


def test_what_is_left_out_or_scaled_is_said(capsys, tmp_path):
    images, masks = write_pair(tmp_path, mask=np.zeros((120, 160), np.uint8))
    (images / "notes.txt").write_text("a walk in the clouds")
    evaluate_detection(images, masks)
    said = capsys.readouterr()
    assert "left out, no pictures: notes.txt" in said.err
    assert "masks/a.png: scaled to the size of its picture" in said.err
    assert "Pd –" in said.out


def empty(images, masks):
    for path in images.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "fragments"),
    [
        (empty, ["images", "holds no picture"]),
        (lambda i, m: (m / "a.png").unlink(), ["a.png", "has no mask a.png or a_pixels0.png"]),
        (lambda i, m: (i / "a.png").write_text("no"), ["images/a.png", "no picture that can be"]),
        (lambda i, m: (i / "a.png").write_bytes(b""), ["images/a.png", "no picture that can be"]),
        (lambda i, m: (m / "a.png").write_text("no"), ["masks/a.png", "no picture that can be"]),
        (
            lambda i, m: cv2.imwrite(str(m / "a.png"), np.zeros((60, 70), np.uint8)),
            ["masks/a.png", "is 70×60", "80×60"],
        ),
        (
            lambda i, m: write_pair(i.parent, "a.png", np.zeros((6, 8), np.uint8), np.eye(6, 8)),
            ["images/a.png", "frame of 8×6 px is smaller than the 11×11 window"],
        ),
    ],
)
def test_bad_folders_are_refused(tmp_path, harm, fragments):
    images, masks = write_pair(tmp_path)
    harm(images, masks)
    assert_refused(fragments, images, masks)


def assert_refused(fragments, *arguments, **options):
    with pytest.raises(PipelineError) as refusal:
        evaluate_detection(*arguments, **options)
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_several_pictures_in_one_file_are_refused(tmp_path):
    grey, _ = picture_of()
    cv2.imwritemulti(str(tmp_path / "a.tif"), [grey, grey])
    with pytest.raises(PipelineError, match=r"a.tif: holds 2 pictures"):
        read_picture(tmp_path / "a.tif")


def test_wrong_arguments_are_one_line(command, tmp_path):
    images, masks = write_pair(tmp_path)
    none = tmp_path / "none"
    assert_refused(["none", "no such folder"], none, masks)
    assert_refused(["none", "no such folder"], images, none)
    assert_refused(["none: no such file"], none)
    assert_refused(["no such folder"], images, masks, out=none / "out.json")
    assert_refused(["cannot be written (Is a directory)"], images, masks, out=tmp_path)
    assert_refused(["roc.pdf", "a PNG"], images, masks, roc_picture=tmp_path / "roc.pdf")
    bad = tmp_path / "bad.yaml"
    bad.write_text("detect: {detector: {kind: magic}}\n")
    assert_refused(["bad.yaml", "unknown detector `magic`"], images, masks, config=bad)
    result = command("pipeline", "evaluate-detection", images)
    assert_one_line_error(result, "for a folder of pictures give MASKS_DIR")


# --- the whole -----------------------------------------------------------------------------------


def test_pictures_of_unseen_clutter_are_scored_into_json(command, clutter, tmp_path):
    out = tmp_path / "out.json"
    result = command(
        "pipeline", "evaluate-detection", clutter / "images", clutter / "masks", "--json", out
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    assert set(found) >= KEYS and found["frames"] == 42
    assert found["detector"] == {"kind": "local_contrast"}
    assert found["pd"] >= 0.6 and found["false_alarms_per_frame"] <= 0.2


def test_local_contrast_beats_the_others_on_unseen_clutter(clutter):
    frames = Pictures(clutter / "images", clutter / "masks")
    curves = roc(frames, all_detectors(frames), rates=(0.1, 3.0))
    assert "temporal" not in curves
    worth = {
        name: max(p["pd"] - p["false_alarms_per_frame"] for p in points)
        for name, points in curves.items()
    }
    assert max(worth, key=worth.get) == "local_contrast"


def test_a_configuration_chooses_the_detector(tmp_path):
    images, masks = write_pair(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text("detect: {detector: {kind: top_hat}, false_alarms_per_frame: 0.1}\n")
    out = tmp_path / "out.json"
    evaluate_detection(images, masks, out, config)
    assert json.loads(out.read_text())["detector"] == {"kind": "top_hat"}


def test_clouds_and_horizon_at_peak_snr_six(tmp_path):
    """The acceptance: Pd ≥ 0.95 at ≤ 0.5 false alarms a frame."""
    score = DetectionScore()
    for seed in (41, 42):
        path = tmp_path / f"{seed}.zarr"
        scene = write_scene(path, 3, seed=seed, snr=(6.0, 40.0), cloud_rms=60.0, horizon=0.8)
        one = evaluate(RecordedFrames(path), Detect.Config(), scene.bad_pixels_HW)
        for name in ("targets", "found", "false_alarms", "frames", "pixels"):
            setattr(score, name, getattr(score, name) + getattr(one, name))
    result = score.to_json()
    assert result["pd"] >= 0.95 and result["false_alarms_per_frame"] <= 0.5


def test_a_recording_is_scored_and_its_roc_drawn(scene_recording, tmp_path):
    out, picture = tmp_path / "out.json", tmp_path / "roc.png"
    evaluate_detection(scene_recording, out=out, roc_picture=picture)
    found = json.loads(out.read_text())
    assert found["detector"] == {"kind": "matched_filter"} and found["pd"] >= 0.9
    assert {"matched_filter", "top_hat", "local_contrast", "temporal"} <= set(found["roc"])
    for points in found["roc"].values():
        assert all(set(point) > KEYS for point in points)
        assert points[-1]["pd"] >= points[0]["pd"] - 0.05
    assert cv2.imread(str(picture)).shape == (600, 900, 3)


def test_a_roc_shows_every_curve_where_its_points_are():
    points = [{"false_alarms_per_frame": fa, "pd": pd} for fa, pd in ((0.0, 0.0), (1.0, 1.0))]
    blank, image = draw_roc({}), draw_roc({"one": points})
    changed = np.argwhere((blank != image).any(axis=2))[:, ::-1]
    for corner in ((80, 530), (555, 30)):
        assert np.hypot(*(changed - corner).T).min() <= 4


def test_a_recording_without_truth_is_refused(tmp_path):
    from pipeline.formats.recording import RecordingWriter
    from pipeline.physics.sensor import Sensor

    path = tmp_path / "plain.zarr"
    with RecordingWriter(path, (40, 50), Sensor()) as writer:
        writer.append(np.zeros((40, 50), np.uint16), 0)
    assert_refused(["plain.zarr", "holds no truth"], path)


# --- the generator -------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_pictures_and_every_one_has_a_target(tmp_path):
    draw_clutter(tmp_path / "a", 14, 5)
    for number, (pixels_HW, mask_HW) in enumerate(draw_pictures(14, 5)):
        written = read_picture(tmp_path / "a" / "images" / f"{number:04d}.png")
        np.testing.assert_array_equal(written, pixels_HW)
        assert 1 <= len(regions_of(mask_HW).pixels) <= 2
    with pytest.raises(TrainerError, match=r"images: exists already; remove it or"):
        draw_clutter(tmp_path / "a", 1, 5)


def test_pictures_are_drawn_all_or_none(tmp_path, monkeypatch):
    def interrupt(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pictures(tmp_path / "a", 3, 5, interrupt)
    assert list((tmp_path / "a").iterdir()) == []
    steps = []
    write_pictures(tmp_path / "a", 3, 5, steps.append)
    assert steps == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["images", "masks"]
    assert all(len(list(folder.iterdir())) == 3 for folder in (tmp_path / "a").iterdir())


def test_the_discriminant_can_be_fitted_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.discriminant.STEPS", 200)  # it is not asked how well it does
    out = tmp_path / "weights.json"
    with small_training():
        fit_discriminant(out, 14, 3)
    shipped = json.loads(_shipped().read_text(encoding="utf-8"))
    stored = json.loads(out.read_text())
    assert {key: np.shape(stored[key]) for key in stored if key not in ("score", "sigmas")} == {
        key: np.shape(shipped[key]) for key in shipped if key not in ("score", "sigmas")
    }
    assert np.all(np.diff(stored["score"]) > 0) and np.all(np.diff(stored["sigmas"]) > 0)


def _shipped():
    from pathlib import Path

    import pipeline.detectors

    return Path(pipeline.detectors.__file__).parent / "local_contrast.json"
