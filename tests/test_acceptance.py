"""The main job, measured: fresh scenes and fresh benchmark data through the shipped engines."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import write_scene
from scipy.spatial.distance import cdist

from engines.loader import MODELS
from engines.manifest import read_manifest
from pipeline.component import Context
from pipeline.config import load_config
from pipeline.formats.csist import write_csist
from pipeline.messages import Flag, Frame, FrameInfo
from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.groups import PROFILES
from pipeline.physics.measurement import measure
from pipeline.physics.psf import render
from pipeline.physics.score import match_at_gate
from pipeline.runtime import replay
from pipeline.sources.zarr_recording import ZarrRecording
from pipeline.stages.crop import Crop
from pipeline.stages.detect import Detect
from pipeline.stages.report import Report
from pipeline.stages.unmix import Unmix
from pipeline.summary import Summary, score

FRESH_SEED = 7_000_001


def replayed(path, config_file=None, engine=None):
    source = {"kind": "zarr_recording", "path": str(path)}
    config = load_config(config_file, source=source, engine=engine)
    source = ZarrRecording.build(config.source, {})
    summary = Summary()
    for message in replay.in_process(config, source):
        summary.add(message)
    source.close()
    assert summary.balanced
    return summary, source.truth


@pytest.fixture(scope="module")
def scene_run(tmp_path_factory):
    return replayed(scene_path(tmp_path_factory))


@pytest.fixture(scope="module")
def grid_run(tmp_path_factory):
    return replayed(scene_path(tmp_path_factory), engine="dista_net_field")


def scene_path(tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "acceptance" / "scene.zarr"
    if not path.exists():
        path.parent.mkdir()
        scene = write_scene(path, 40, seed=FRESH_SEED)
        bad_pixels = scene.bad_pixels_HW.astype(np.uint8) * 255
        cv2.imwrite(str(path.with_name("bad_pixels.png")), bad_pixels)
    return path


def test_seeds_of_the_tests_were_never_trained_on():
    for path in MODELS.glob("*.json"):
        assert read_manifest(path).seed < FRESH_SEED


def test_isolated_targets_are_found_within_a_quarter_pixel(scene_run):
    summary, truth = scene_run
    hits = total = 0
    for seq, found in summary.found.items():
        true = truth.of_frame(seq)
        distance = np.hypot(*np.moveaxis(true[:, None] - true[None], -1, 0))
        np.fill_diagonal(distance, np.inf)
        isolated = true[distance.min(axis=1) > 11.0]
        hits += len(match_at_gate(found, isolated, 0.25))
        total += len(isolated)
    assert total > 300
    assert hits / total >= 0.97


def test_false_alarms_are_rarer_than_one_a_frame(scene_run):
    assert score(*scene_run).false_alarms_per_frame <= 1.0


def test_off_the_grid_far_more_of_the_tight_groups_are_resolved(scene_run, grid_run):
    ours, grid = score(*scene_run), score(*grid_run)
    assert ours.cso_map > 1.4 * grid.cso_map
    assert ours.pd > grid.pd + 0.08


def test_refining_resolves_far_more_of_what_a_grid_engine_finds(
    tmp_path_factory, tmp_path, grid_run
):
    path = scene_path(tmp_path_factory)
    shipped = Path(__file__).parents[1] / "configs" / "refine.yaml"
    settings = yaml.safe_load(shipped.read_text())
    settings["sensor"] = {"bad_pixels": str(path.with_name("bad_pixels.png"))}
    config = tmp_path / "refine.yaml"
    config.write_text(yaml.safe_dump(settings))
    grid, refined = score(*grid_run), score(*replayed(path, config, engine="dista_net_field"))
    assert refined.cso_map > 1.25 * grid.cso_map
    assert refined.pd > grid.pd + 0.05
    assert refined.false_alarms_per_frame <= 1.0


def test_the_benchmark_engine_reaches_the_grid_on_fresh_data(tmp_path):
    path = tmp_path / "csist.zarr"
    write_csist(path, PROFILES["csist-100k"], 512, FRESH_SEED)
    summary, truth = replayed(path)
    assert summary.frames == 2
    assert score(summary, truth).cso_map >= 0.40


def test_a_hot_pixel_beside_a_target_is_no_target():
    """A target every 32 pixels, each with an unmapped hot pixel within its 3 × 3."""
    profile = PROFILES["field"]
    sensor, shape, rng = profile.sensor, (512, 640), NumpyRandom(FRESH_SEED)
    xy_px = np.stack(np.meshgrid(np.arange(15, 640, 32), np.arange(15, 512, 32)), -1).reshape(-1, 2)
    hot = xy_px + np.floor(3 * rng.uniform(xy_px.shape)).astype(int) - 1
    true = xy_px + rng.uniform(xy_px.shape) - 0.5
    mean = profile.background + render(true, np.full(len(true), 1000.0), shape, sensor.sigma_px)
    pixels = measure(mean, sensor, rng).astype(np.uint16)
    pixels[hot[:, 1], hot[:, 0]] = 5000
    message = Frame(FrameInfo(0, "s", 0, "utc", shape), pixels)
    context = Context(sensor)
    for stage in (Detect, Crop, Unmix, Report):
        message = stage.build(stage.Config(), context).process(message)
    distance = cdist(true, message.xy_px)
    assert (distance.min(axis=1) < 0.25).mean() > 0.9
    assert (distance.min(axis=0) > 0.5).mean() < 0.02
    assert (message.flags & Flag.BAD_PIXEL).all()
