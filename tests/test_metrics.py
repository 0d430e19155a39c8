"""Figures of merit: intervals by brute force, bounds by simulation, a perfect grid detector."""

import json
import math

import numpy as np
import pytest

from engines.base import Engine, Maps, Patches
from engines.manifest import Manifest
from engines.sensor_needs import SensorNeeds
from pipeline.formats.csist import CsistDataset
from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.grid import target_map
from pipeline.physics.groups import PROFILES, draw_patches
from pipeline.physics.sensor import Sensor
from trainer.errors import TrainerError
from trainer.evaluate import evaluate
from trainer.honesty import honesty_figures, true_bounds
from trainer.metrics import (
    count_accuracy,
    cso_map,
    cso_map_by_count,
    cso_map_difference_interval,
    cso_map_interval,
    group_bounds,
    matched_errors,
    nees,
)

FIELD = PROFILES["field"].sensor


def random_images(rng, number: int = 30) -> tuple[list, list]:
    """Truths, and detections near some of them with tied scores; some images have neither."""
    truths = [rng.uniform(0, 10, (rng.integers(0, 4), 3)) for _ in range(number)]
    detections = []
    for truth in truths:
        found = truth[rng.random(len(truth)) < 0.8].copy()
        found[:, :2] += rng.normal(0.0, 0.1, (len(found), 2))
        extra = rng.uniform(0, 10, (rng.integers(0, 2), 3))
        found = np.concatenate([found, extra])
        found[:, 2] = rng.integers(1, 6, len(found))
        detections.append(found)
    return detections, truths


def test_interval_is_that_of_scoring_resampled_images(rng) -> None:
    detections, truths = random_images(rng)
    number, resamples = len(truths), 16
    drawn = np.random.default_rng(5).multinomial(number, np.full(number, 1 / number), resamples)
    scores = []
    for weight in drawn:
        chosen = np.repeat(np.arange(number), weight)
        scores.append(cso_map([detections[i] for i in chosen], [truths[i] for i in chosen]).mean)
    expected = np.percentile(scores, [5.0, 95.0])
    found = cso_map_interval(detections, truths, level=0.9, resamples=resamples, seed=5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0] < found[1]


def test_interval_of_images_all_alike_is_a_point(rng) -> None:
    truth = rng.uniform(0, 10, (3, 3))
    detection = truth[:2] + np.array([0.12, 0.0, 0.0])
    score = cso_map([detection], [truth]).mean
    assert 0.0 < score < 1.0
    assert cso_map_interval([detection] * 20, [truth] * 20) == pytest.approx((score, score))


def test_interval_without_detections_or_truth() -> None:
    nothing, one = np.empty((0, 3)), np.array([[5.0, 5.0, 1.0]])
    assert cso_map_interval([nothing] * 4, [one] * 4) == (0.0, 0.0)
    assert cso_map_interval([nothing] * 4, [nothing] * 4) == (1.0, 1.0)
    assert cso_map_interval([one] * 4, [nothing] * 4) == (0.0, 0.0)


def test_difference_interval_scores_both_on_the_same_resampled_images(rng) -> None:
    better, truths = random_images(rng)
    worse = [rows[rng.random(len(rows)) < 0.7] for rows in better]
    number, resamples = len(truths), 16
    drawn = np.random.default_rng(5).multinomial(number, np.full(number, 1 / number), resamples)
    differences = []
    for weight in drawn:
        chosen = np.repeat(np.arange(number), weight)
        a, b = (
            cso_map([found[i] for i in chosen], [truths[i] for i in chosen]).mean
            for found in (better, worse)
        )
        differences.append(a - b)
    expected = np.percentile(differences, [5.0, 95.0])
    settings = {"level": 0.9, "resamples": resamples, "seed": 5}
    found = cso_map_difference_interval(better, worse, truths, **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    swapped = cso_map_difference_interval(worse, better, truths, **settings)
    np.testing.assert_allclose(swapped, [-expected[1], -expected[0]], rtol=1e-12)


def test_pairing_tells_apart_what_two_single_intervals_do_not(rng) -> None:
    better, truths = random_images(rng, 200)
    worse = [rows[1:] if image % 5 == 0 else rows for image, rows in enumerate(better)]
    low, high = cso_map_difference_interval(better, worse, truths)
    assert low > 0.0
    assert cso_map_interval(worse, truths)[1] > cso_map_interval(better, truths)[0]
    assert low <= cso_map(better, truths).mean - cso_map(worse, truths).mean <= high


def test_a_system_does_not_differ_from_itself(rng) -> None:
    detections, truths = random_images(rng)
    assert cso_map_difference_interval(detections, detections, truths) == (0.0, 0.0)


def test_intervals_refuse_lists_that_do_not_belong_together() -> None:
    one = np.array([[5.0, 5.0, 1.0]])
    with pytest.raises(ValueError, match="1 images of detections but 2 of truths"):
        cso_map_interval([one], [one] * 2)
    with pytest.raises(ValueError, match="3 images of detections but 2 of truths"):
        cso_map_difference_interval([one] * 2, [one] * 3, [one] * 2)
    with pytest.raises(ValueError, match="no images"):
        cso_map_interval([], [])


def test_by_count_scores_images_with_equally_many_targets(rng) -> None:
    detections, truths = random_images(rng)
    scored = cso_map_by_count(detections, truths)
    assert list(scored) == [0, 1, 2, 3]
    for count, score in scored.items():
        alike = [i for i, truth in enumerate(truths) if len(truth) == count]
        assert score == cso_map([detections[i] for i in alike], [truths[i] for i in alike])
    assert scored[0].mean == 0.0  # something was found in one of them
    assert cso_map_by_count([truths[0][:0]], [truths[0][:0]])[0].mean == 1.0
    assert cso_map_by_count([], []) == {}


def test_counts_and_matched_errors() -> None:
    true = [np.array([[2.0, 2.0, 100.0], [3.0, 2.0, 200.0]]), np.array([[5.0, 5.0, 100.0]])]
    found = [np.array([[2.1, 2.0, 110.0], [3.0, 1.8, 180.0]]), np.array([[6.0, 5.0, 1.0]] * 2)]
    assert count_accuracy(found, true) == 0.5
    which, error = matched_errors(found, true)
    assert which.tolist() == [[0, 0, 0], [0, 1, 1]]  # the second image's are farther than the gate
    np.testing.assert_allclose(error, [[0.1, 0.0, 0.1], [0.0, -0.2, -0.1]], atol=1e-12)


def test_bounds_follow_intensity_and_crowding() -> None:
    alone = np.array([[5.0, 5.0, 2000.0]])
    brighter = alone * [1.0, 1.0, 2.0]
    pair = np.array([[5.0, 5.0, 2000.0], [5.6, 5.0, 2000.0]])
    groups = [alone, np.empty((0, 3)), pair, brighter, pair[::-1]]
    bounds = group_bounds(groups, FIELD, 11, 1000.0)
    assert [len(bound) for bound in bounds] == [1, 0, 2, 1, 2]
    assert np.trace(bounds[3][0]) < 0.5 * np.trace(bounds[0][0])
    assert bounds[2][0, 0, 0] > 2.0 * bounds[2][0, 1, 1]  # the neighbour lies along x
    assert bounds[2][0, 1, 1] > 1.5 * bounds[0][0, 1, 1]
    np.testing.assert_allclose(bounds[4], bounds[2][::-1], rtol=1e-6, atol=1e-12)


def test_nees_of_honest_covariances_is_one(rng) -> None:
    factor = rng.normal(size=(4000, 2, 2))
    covariance = factor @ factor.transpose(0, 2, 1) + 0.1 * np.eye(2)
    error = (np.linalg.cholesky(covariance) @ rng.normal(size=(4000, 2, 1)))[..., 0]
    assert nees(error, covariance) == pytest.approx(1.0, abs=5 / math.sqrt(4000))
    assert nees(2.0 * error, covariance) == pytest.approx(4.0, abs=20 / math.sqrt(4000))
    assert math.isnan(nees(error[:0], covariance[:0]))


# --- evaluate --------------------------------------------------------------------------------


def dataset(name: str, number: int, seed: int = 11) -> CsistDataset:
    profile = PROFILES[name]
    image, groups = draw_patches(profile, number, NumpyRandom(seed))
    absent = np.arange(groups.intensity.shape[1]) >= groups.count[:, None]
    return CsistDataset(
        image=image.astype(np.uint16),
        target_count=groups.count.astype(np.uint8),
        target_xy_px=np.where(absent[..., None], np.nan, groups.xy_px).astype(np.float32),
        target_intensity=np.where(absent, np.nan, groups.intensity).astype(np.float32),
        sensor=profile.sensor,
        profile=name,
        seed=seed,
        background=profile.background,
    )


def manifest(**fields: object) -> Manifest:
    plain = {
        "name": "fake",
        "network": "fake",
        "settings": {},
        "size_px": 11,
        "c": 3,
        "sigma_px": 0.5,
        "scaling": "full_scale",
        "sensor": SensorNeeds(),
        "detection_threshold": 50 / 255,
        "separate": 0.0,
        "profile": "csist-100k",
        "seed": 0,
        "samples": 0,
        "training_s": 0.0,
        "loss": 0.0,
        "cso_map": 0.0,
        "parameters": 0,
        "onnx_sha256": "0" * 64,
        "weights_sha256": "0" * 64,
        "versions": {},
    }
    return Manifest.model_validate({**plain, **fields})


class FakeEngine(Engine):
    """Answers with given maps, one after another."""

    def __init__(self, maps: Maps, **fields: object) -> None:
        super().__init__(manifest(**fields))
        self._maps, self._next = maps, 0
        self.seen: list[Patches] = []

    def _begin(self, slot: int, patch_BHW: Patches) -> None:
        self.seen.append(patch_BHW.copy())

    def _finish(self, slot: int, map_BHW: Maps) -> None:
        map_BHW[:] = self._maps[self._next : self._next + len(map_BHW)]
        self._next += len(map_BHW)

    def close(self) -> None:
        pass


def perfect_maps(data: CsistDataset, unit: float) -> Maps:
    xy_px = np.nan_to_num(data.target_xy_px)
    intensity = np.nan_to_num(data.target_intensity) / np.float32(unit)
    return target_map(xy_px, intensity, 11, 3).astype(np.float32)


def test_perfect_detection_on_the_grid_scores_the_known_ceiling() -> None:
    data = dataset("csist-100k", 1000)
    steps: list[int] = []
    figures = evaluate(data, FakeEngine(perfect_maps(data, 255.0)), steps.append)
    assert steps[-1] == 1000
    assert 0.45 <= figures["cso_map"] <= 0.48
    low, high = figures["cso_map_interval"]
    assert low < figures["cso_map"] < high < low + 0.04
    assert list(figures["ap"]) == ["0.05", "0.10", "0.15", "0.20", "0.25"]
    assert np.mean(list(figures["ap"].values())) == pytest.approx(figures["cso_map"])
    # what is left is the cell: uniform over a third of a pixel along both axes
    assert figures["rmse_px"] == pytest.approx(math.sqrt(2 / 12) / 3, rel=0.05)
    assert figures["matched"] > 0.98 * figures["targets"]
    assert figures["count_accuracy"] > 0.9
    assert figures["intensity_rmse_relative"] < 0.2
    # errors are uniform within the cell, and the bound for crowded groups comes on top
    assert 0.3 < figures["nees"] < 1.05


def test_refined_detections_break_the_ceiling_of_the_grid() -> None:
    data = dataset("interior", 300)
    maps = perfect_maps(data, 255.0)
    grid = evaluate(data, FakeEngine(maps))
    refined = evaluate(data, FakeEngine(maps), refined=True)
    assert grid["cso_map"] < 0.5 < 0.65 < refined["cso_map"]
    assert refined["rmse_px"] < 0.8 * grid["rmse_px"]
    assert refined["refined"] is True


def test_the_model_alone_unmixes_and_the_rules_help_it() -> None:
    data = dataset("interior", 200)
    alone, ruled = (evaluate(data, None, priors=priors) for priors in (False, True))
    assert alone["engine"] == "model" and alone["refined"] and not alone["priors"]
    assert 0.4 < alone["cso_map"] < ruled["cso_map"]
    assert ruled["count_accuracy"] > alone["count_accuracy"]
    assert alone["psnr_db"] is None


def test_a_profile_of_sensors_has_no_rules() -> None:
    with pytest.raises(TrainerError, match="--priors: profile field"):
        evaluate(dataset("field", 4), None, priors=True)


def test_errors_at_the_bound_are_as_large_as_the_bound(rng) -> None:
    data = dataset("field", 400)
    true = data.truths()
    bounds = true_bounds(data, true)
    which = np.array([(i, k, k) for i, rows in enumerate(true) for k in range(len(rows))])
    bound = np.array([bounds[i][k] for i, _, k in which])
    error = np.array([rng.multivariate_normal([0, 0], one) for one in bound])
    # Of every seventh image one more is found than there is.
    more = [len(rows) + (i % 7 == 0) for i, rows in enumerate(true)]
    found = [np.zeros((number, 7)) for number in more]
    figures = honesty_figures(error, bound, bounds, which, found)
    for few in ("", "_few", "_few_counted"):
        assert figures[f"rmse_over_bound{few}"] == pytest.approx(1.0, abs=0.08)
        assert figures[f"nees{few}"] == pytest.approx(1.0, abs=0.15)
        assert figures[f"within_95{few}"] == pytest.approx(0.95, abs=0.03)
    miscounted = np.array([i % 7 == 0 for i, _, _ in which])
    error[miscounted] *= 2.0
    worse = honesty_figures(error, bound, bounds, which, found)
    assert worse["rmse_over_bound_few"] > 1.1
    assert worse["rmse_over_bound_few_counted"] == figures["rmse_over_bound_few_counted"]
    assert honesty_figures(2.0 * error, bound, bounds, which, found)["within_95"] < 0.6


def test_an_engine_that_finds_nothing_is_refined_to_nothing() -> None:
    data = dataset("interior", 20)
    maps = np.zeros((20, 33, 33), np.float32)
    figures = evaluate(data, FakeEngine(maps), refined=True)
    assert figures["cso_map"] == 0.0
    assert figures["rmse_px"] is None


def test_bound_grows_with_the_number_of_targets() -> None:
    data = dataset("csist-100k", 300)
    figures = evaluate(data, FakeEngine(perfect_maps(data, 255.0)))
    medians = [figures["crb_px_by_count"][str(count)] for count in range(1, 6)]
    assert medians == sorted(medians)
    assert medians[0] < figures["crb_px"] < medians[4]


def test_nothing_found_gives_nulls_not_nan() -> None:
    data = dataset("csist-100k", 20)
    figures = evaluate(data, FakeEngine(np.zeros((20, 33, 33), np.float32)))
    assert figures["cso_map"] == 0.0
    assert figures["rmse_px"] is None and figures["nees"] is None
    json.dumps(figures, allow_nan=False)


def test_network_sees_patches_without_background_in_its_units() -> None:
    data = dataset("field", 40)
    engine = FakeEngine(np.zeros((40, 33, 33), np.float32), scaling="peak")
    evaluate(data, engine)
    seen = np.concatenate(engine.seen)
    np.testing.assert_allclose(seen.max(axis=(1, 2)), 1.0, rtol=1e-5)
    corners = seen[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert abs(corners.mean()) < 0.02


def test_what_cannot_be_scored_is_refused() -> None:
    data = dataset("csist-100k", 4)
    with pytest.raises(TrainerError, match="is for patches of 13 px"):
        evaluate(data, FakeEngine(np.zeros((4, 39, 39), np.float32), size_px=13))
    empty = CsistDataset(
        data.image[:0],
        data.target_count[:0],
        data.target_xy_px[:0],
        data.target_intensity[:0],
        Sensor(full_scale=255),
        "csist-100k",
        0,
        0.0,
    )
    with pytest.raises(TrainerError, match="no images"):
        evaluate(empty, FakeEngine(np.zeros((0, 33, 33), np.float32)))
