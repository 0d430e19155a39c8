"""Detectors of frames: the scenes they learn from, what scores are worth, training, import."""

import json
import os

import numpy as np
import onnx
import pytest
import torch
from conftest import assert_one_line_error, small_training
from scipy.special import expit, logit
from tiny_yolo import tiny_manifest, write_tiny_yolo

from engines.detectors import load_detector
from engines.frame_detector import FrameDetector
from pipeline.formats.recording import open_recording
from trainer.build import Wish
from trainer.errors import TrainerError
from trainer.yolo import calibrate
from trainer.yolo.compiled import compile_detector
from trainer.yolo.scenes import (
    CLASSES,
    CLUTTER,
    GROUP,
    MARGIN_PX,
    POINT,
    SceneDraw,
    draw_frames,
    point_like,
)

FRAMES = draw_frames(SceneDraw(), 40, 5)


def test_the_same_seed_draws_the_same_frames():
    for one, two in zip(FRAMES[:5], draw_frames(SceneDraw(), 5, 5), strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


def test_every_class_is_there_and_every_box_in_its_frame():
    labels = np.concatenate([frame.label for frame in FRAMES])
    assert set(labels.tolist()) == set(range(len(CLASSES)))
    for frame in FRAMES:
        height, width = frame.pixels_HW.shape
        assert (frame.box_px[:, :2] >= -0.5).all()
        assert (frame.box_px[:, 2:] <= [width - 0.5, height - 0.5]).all()
        assert (frame.box_px[:, 2:] > frame.box_px[:, :2]).all()


def test_boxes_of_targets_hold_them_with_a_margin():
    for frame in FRAMES:
        boxes = frame.box_px[frame.label <= GROUP]
        number = 0
        for box, label in zip(boxes, frame.label[frame.label <= GROUP], strict=True):
            low, high = box[:2] + MARGIN_PX - 1e-3, box[2:] - MARGIN_PX + 1e-3
            mine = ((frame.xy_px >= low) & (frame.xy_px <= high)).all(axis=1).sum()
            assert (mine == 1) == (label == POINT)
            number += mine
        assert number == len(frame.xy_px)


def test_targets_stand_out_and_so_does_what_is_called_clutter():
    for label, least in ((POINT, 0.7), (CLUTTER, 0.5)):
        seen = total = 0
        for frame in FRAMES:
            places = point_like(frame.pixels_HW.astype(float), frame.noise, 0.5, 4.0)
            for box in frame.box_px[frame.label == label]:
                near = np.abs(places - (box[:2] + box[2:]) / 2.0).max(axis=1) <= 4.0
                seen, total = seen + bool(near.any()), total + 1
        assert seen >= least * total


def test_generate_records_frames_of_clutter_with_their_truth(command, tmp_path):
    result = command(
        "trainer", "generate", "--profile", "clutter", "--count", 3, tmp_path / "c.zarr"
    )
    assert result.returncode == 0, result.stderr
    recording = open_recording(tmp_path / "c.zarr")
    assert (len(recording), recording.shape) == (3, (256, 320))
    assert recording.truth is not None
    assert len(np.unique(recording.truth.target_id)) == len(recording.truth.target_id) > 10
    for words, said in (
        (("clutter", "--backgrounds", "sea,moon"), "no `moon`"),
        (("field", "--backgrounds", "sea"), "are for --profile clutter"),
    ):
        result = command("trainer", "generate", "--profile", *words, "--count", 1, tmp_path / "x")
        assert_one_line_error(result, said)


def counted(score, is_target, label=None, boxless=(10, 80), places=(100, 100)):
    label = np.zeros(len(score), np.int32) if label is None else label
    offsets = np.full((30, 2), 0.5)
    return calibrate.Counted(
        label, score, is_target, offsets, np.array(boxless), np.array(places)
    )  # fmt: skip


def test_platt_scaling_finds_what_outcomes_were_drawn_from(rng):
    score = rng.uniform(0.02, 0.98, 20_000)
    is_target = rng.random(20_000) < expit(1.7 * logit(score) - 0.8)
    a, b = calibrate.platt_scaling(score, is_target)
    assert abs(a - 1.7) < 0.08
    assert abs(b + 0.8) < 0.08


@pytest.mark.parametrize("right", [True, False])
def test_platt_scaling_of_one_kind_of_outcome_is_finite(right, rng):
    a, b = calibrate.platt_scaling(rng.uniform(0.1, 1.0, 50), np.full(50, right))
    p = expit(a * logit(np.array([0.2, 0.9])) + b)
    assert ((p > 0.8) if right else (p < 0.2)).all()


def test_calibration_makes_scores_probabilities(rng):
    score, label = rng.uniform(0.1, 0.99, 8000), rng.integers(0, 2, 8000).astype(np.int32)
    p = np.where(label == 0, expit(2.0 * logit(score) + 0.5), expit(-logit(score) - 2.0))
    boxes = counted(score, rng.random(8000) < p, label)
    before = tiny_manifest()
    after = tiny_manifest(**calibrate.calibration(boxes, before.classes))
    assert calibrate.calibration_error(boxes, before) > 0.1
    assert calibrate.calibration_error(boxes, after) < 0.02
    assert after.missed == pytest.approx((11 / 102) / (81 / 102))
    assert after.centre_sigma_px == pytest.approx(0.5)
    assert after.prior == pytest.approx(p.mean(), abs=0.02)


def test_boxes_are_counted_once_each(tmp_path):
    write_tiny_yolo(tmp_path)
    with load_detector(str(tmp_path / "tiny.onnx")) as engine:
        boxes = calibrate.count_boxes(FrameDetector(engine, 16383), FRAMES)
    wanted = sum(int((frame.label <= GROUP).sum()) for frame in FRAMES)
    assert 0 < boxes.is_target.sum() == len(boxes.offset_px) <= wanted
    assert (np.abs(boxes.offset_px) <= calibrate.NEAR_PX).all()
    assert (boxes.boxless <= boxes.places).all()
    assert (boxes.places > 20).all()


def test_import_writes_a_manifest_that_runs(command, tmp_path):
    model = write_tiny_yolo(tmp_path)
    model.with_suffix(".json").unlink()
    words = ["--classes", "point,extended", "--point-sources", "point", "--no-resize"]
    words += ["--stretch", "noise", "--out", tmp_path / "here", "--calibrate", 6]
    result = command("trainer", "import-detector", model, *words)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "here" / "tiny.json").read_text())
    assert manifest["candidates"] == 320
    assert manifest["ece"] is not None
    with load_detector(str(tmp_path / "here" / "tiny.onnx")) as engine:
        assert engine.manifest.classes == ("point", "extended")


def test_weights_beside_a_model_come_into_it(command, tmp_path):
    apart = tmp_path / "apart.onnx"
    whole = onnx.load(str(write_tiny_yolo(tmp_path)))
    onnx.save_model(whole, str(apart), save_as_external_data=True, size_threshold=0)
    words = ["--classes", "point,extended", "--point-sources", "point", "--out"]
    result = command("trainer", "import-detector", apart, *words, tmp_path / "here")
    assert result.returncode == 0, result.stderr
    written = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert written == ["apart.json", "apart.onnx"]
    result = command("trainer", "import-detector", apart, *words, tmp_path)
    assert_one_line_error(result, "name another folder")


def test_what_cannot_be_imported_is_named(command, tmp_path):
    model = write_tiny_yolo(tmp_path)
    classes = ["--point-sources", "point", "--out", tmp_path / "here", "--classes"]
    result = command("trainer", "import-detector", model, *classes, "point,bird,plane")
    assert_one_line_error(result, "tiny.onnx: gives 6 rows, 3 classes need 7")
    result = command("trainer", "import-detector", model, *classes, "bird,plane")
    assert_one_line_error(result, "`point` is none of bird, plane")
    graph = onnx.load(str(model))
    graph.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    (tmp_path / "dynamic.onnx").write_bytes(graph.SerializeToString())
    result = command("trainer", "import-detector", tmp_path / "dynamic.onnx", *classes, "point,x")
    assert_one_line_error(result, "dynamic.onnx: takes (None, 1, None, 160)", "export it again")
    (tmp_path / "none.onnx").write_bytes(b"no model")
    result = command("trainer", "import-detector", tmp_path / "none.onnx", *classes, "point,x")
    assert_one_line_error(result, "none.onnx: not a readable ONNX model")


def test_compile_builds_a_detector_for_this_machine(command, tmp_path):
    model = write_tiny_yolo(tmp_path)
    words = ["trainer", "compile", model, "--target", "openvino", "--precision", "f32"]
    result = command(*words)
    assert result.returncode == 0, result.stderr
    with load_detector(str(tmp_path / "tiny.openvino.json")) as engine:
        build = engine.manifest.build
        assert (build.target, build.precision) == ("openvino", "f32")
        assert build.parity.error == 0.0
        assert build.latency[0].p50_ms > 0.0
    assert_one_line_error(command(*words[:4], "torch"), "--target torch", "openvino")
    with pytest.raises(TrainerError, match=r"int8: .* there in f32, bf16 \(int8 was slower"):
        compile_detector(model, Wish("openvino", "int8"), tmp_path, print)
    again = command(*words[:2], tmp_path / "tiny.openvino.onnx", *words[3:])
    assert_one_line_error(again, "is built already")


SMALL = {"settings": {"width": 4}, "height": 64, "width": 64, "batch": 2, "save_every": 2}


@pytest.fixture
def yolo():
    pytest.importorskip("libreyolo", reason="pip install --no-deps libreyolo")
    from trainer.yolo import export, fit, network

    with small_training():
        yield fit, export, network


def test_training_learns_and_goes_on_where_it_was_interrupted(yolo, tmp_path):
    fit, _, _ = yolo
    whole = fit.checked_fit({**SMALL, "batch": 8, "save_every": 6, "samples": 192}, "test")
    steps = []
    record = fit.fit_yolo(whole, tmp_path / "whole", steps.append)
    assert steps == list(range(1, 25))
    records = fit.load_run(tmp_path / "whole" / "checkpoint.pt")["records"]
    assert record == records[-1]
    assert records[-1]["loss"] < records[0]["loss"]

    class Interrupted(Exception):
        pass

    def interrupt(step):
        if step == 15:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit.fit_yolo(whole, tmp_path / "parts", interrupt)
    fit.fit_yolo(whole, tmp_path / "parts", lambda step: None)
    one, two = (
        fit.trained_network(fit.load_run(tmp_path / name / "checkpoint.pt")).state_dict()
        for name in ("whole", "parts")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=0)
    with pytest.raises(TrainerError, match="made with another config"):
        fit.fit_yolo(fit.checked_fit({**SMALL, "samples": 192}, "test"), tmp_path / "whole", print)


def test_an_exported_run_is_an_engine_of_the_same_answers(yolo, tmp_path, monkeypatch):
    fit, export, network = yolo
    monkeypatch.setattr(network, "FIRST_SCORE", 0.0)  # so that it has boxes without being trained
    monkeypatch.setattr(export, "HEIGHT", 128)
    monkeypatch.setattr(export, "WIDTH", 160)
    run = fit.checked_fit({**SMALL, "samples": 4}, "test")
    fit.fit_yolo(run, tmp_path / "run", lambda step: None)
    manifest, difference = export.export_yolo(
        tmp_path / "run" / "checkpoint.pt", tmp_path, "small", 2
    )
    assert difference < export.PARITY_TOLERANCE
    assert manifest.classes == CLASSES
    assert manifest.samples == 4
    assert 0.0 <= manifest.ece <= 1.0
    with load_detector(str(tmp_path / "small.onnx")) as engine:
        assert engine.manifest == manifest


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kinds": ["moon"]}, "no `moon`"),
        ({"sample": 3}, "unknown field `sample`"),
        ({"width": 100}, "width"),
    ],
)
def test_settings_that_cannot_be_are_named(yolo, fields, said):
    fit, _, _ = yolo
    with pytest.raises(TrainerError, match=said):
        fit.checked_fit(fields, "run.yaml")


def test_without_libreyolo_it_says_what_to_install(command, tmp_path, monkeypatch):
    (tmp_path / "libreyolo.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    result = command("trainer", "fit", "yolo", "--out", tmp_path / "run")
    assert_one_line_error(result, "needs libreyolo", "pip install --no-deps libreyolo")
