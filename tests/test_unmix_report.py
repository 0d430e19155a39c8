"""Patches to targets with an engine that answers perfectly, and what the report makes of them."""

from dataclasses import replace

import numpy as np
import pytest
from cell_maps import cell_map
from msgspec import structs
from numpy.testing import assert_allclose, assert_array_equal

from engines.base import Engine
from engines.manifest import Manifest
from engines.sensor_needs import SensorNeeds
from engines.spread import Spread
from pipeline.component import Context
from pipeline.imaging.judgement import independent_count
from pipeline.messages import Flag, FrameInfo, Patches, Unmixed
from pipeline.physics.bounds import cramer_rao, fisher_information
from pipeline.physics.candidates import Candidates
from pipeline.physics.cell_targets import count_at_least
from pipeline.physics.grid import cell_centres_px, target_map
from pipeline.physics.groups import MAX_TARGETS
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor
from pipeline.stages.refine import Refine
from pipeline.stages.report import Report
from pipeline.stages.unmix import MAX_PEAKS, Unmix
from pipeline.wire import check_wire, targets_message

SENSOR = Sensor(id="roof", sigma_px=0.5, full_scale=16383, read_noise=6.0, gain=8.0)
BACKGROUND = 1000.0


class PerfectEngine(Engine):
    """Knows the truth; remembers what it was shown."""

    def __init__(self, map_BHW, scaling: str) -> None:
        super().__init__(
            Manifest(
                name="perfect",
                network="dista_net",
                settings={},
                size_px=11,
                c=3,
                sigma_px=0.5,
                scaling=scaling,
                sensor=SensorNeeds(),
                detection_threshold=0.2,
                separate=0.5,
                profile="field",
                seed=0,
                samples=0,
                training_s=0.0,
                loss=0.0,
                cso_map=0.0,
                parameters=0,
                onnx_sha256="a" * 64,
                weights_sha256="b" * 64,
                versions={},
            )
        )
        self.map_BHW, self.seen = map_BHW.astype(np.float32), []

    def _begin(self, slot, patch_BHW) -> None:
        self.seen.append(patch_BHW.copy())

    def _finish(self, slot, map_BHW) -> None:
        unit = self.unit if self.manifest.scaling == "peak" else SENSOR.full_scale
        map_BHW[...] = self.map_BHW / unit

    def close(self) -> None:
        pass


def scene(groups):
    """Patches of groups given as lists of (x, y, intensity), and the true map in counts."""
    batch = len(groups)
    width = max(map(len, groups), default=0)
    padded = np.zeros((batch, width, 3))
    for row, group in zip(padded, groups, strict=True):
        row[: len(group)] = group
    xy_px, intensity = padded[..., :2], padded[..., 2]
    counts = BACKGROUND + render(xy_px, intensity, (11, 11), SENSOR.sigma_px)
    patches = Patches(
        info=FrameInfo(3, "roof", 0, "utc", (512, 640)),
        counts_BHW=counts.astype(np.float32),
        background_BHW=np.full_like(counts, BACKGROUND, dtype=np.float32),
        usable_BHW=np.ones(counts.shape, dtype=np.bool_),
        origin_px=np.array([[100 * k, 50] for k in range(batch)], dtype=np.int32).reshape(batch, 2),
        group=np.arange(batch, dtype=np.int32),
        bbox_px=np.zeros((batch, 4), dtype=np.int32),
        snr=np.ones(batch, dtype=np.float32),
        flags=np.zeros(batch, dtype=np.uint16),
    )
    return patches, target_map(xy_px, intensity, 11, 3)


CELL = cell_centres_px(11, 3)
GROUPS = [
    [(CELL[16], CELL[16], 2000.0)],
    [(CELL[15], CELL[15], 1500.0), (CELL[17], CELL[16], 1400.0)],
]


@pytest.mark.parametrize("scaling", ["full_scale", "peak"])
def test_counts_and_frame_coordinates_survive_the_network_units(scaling):
    patches, truth = scene(GROUPS)
    engine = PerfectEngine(truth, scaling)
    signal = patches.counts_BHW - patches.background_BHW
    engine.unit = signal.max(axis=(1, 2))[:, None, None]
    unmixed = Unmix(Unmix.Config(threshold=0.01), SENSOR, engine).process(patches)
    order = np.lexsort((unmixed.xy_px[:, 0], unmixed.patch))
    assert unmixed.patch[order].tolist() == [0, 1, 1]
    expected = np.array(
        [
            [CELL[16], 50 + CELL[16]],
            [100 + CELL[15], 50 + CELL[15]],
            [100 + CELL[17], 50 + CELL[16]],
        ]
    )
    assert_allclose(unmixed.xy_px[order], expected, atol=1e-6)
    assert_allclose(unmixed.intensity[order], [2000.0, 1500.0, 1400.0], rtol=1e-5)
    unit = SENSOR.full_scale if scaling == "full_scale" else engine.unit
    assert_allclose(engine.seen[0], signal / unit, rtol=1e-6)


def test_a_network_off_the_grid_says_where_how_sure_and_how_well():
    patches, _ = scene([[(5.04, 4.9, 2000.0)], [(5.3, 5.1, 1500.0), (4.8, 5.1, 1000.0)]])
    said = np.zeros((2, 7, 33, 33))
    said[0, :, 16, 16] = [0.9, 5.04, 4.9, 2000.0, 0.03, 0.05, 10.0]
    said[1, :, 16, 17] = [0.95, 5.3, 5.1, 1500.0, 0.06, 0.06, 10.0]
    said[1, :, 16, 15] = [0.85, 4.8, 5.1, 1000.0, 0.06, 0.06, 10.0]
    engine = PerfectEngine(cell_map(said), "peak")
    engine.unit = 1.0
    engine.manifest = engine.manifest.model_copy(update={"output": "cell-targets"})
    unmixed = Unmix(Unmix.Config(), SENSOR, engine).process(patches)
    assert unmixed.patch.tolist() == [0, 1, 1]
    assert_allclose(unmixed.xy_px, [[5.04, 54.9], [105.3, 55.1], [104.8, 55.1]], atol=1e-6)
    p_count = count_at_least(said[:, 0].reshape(2, -1), 2, Spread(sigma_px=0.5).count)
    assert_allclose(unmixed.p_exist, [0.9, 0.95, 0.85], rtol=1e-6)
    assert_allclose(unmixed.p_count, [p_count[0, 0], *p_count[1]], rtol=1e-6)
    report = Report(Report.Config(min_snr=0.0), SENSOR).process(unmixed)
    assert_array_equal(report.p_exist, unmixed.p_exist)
    assert_allclose(report.count_posterior[0, :2], [1.0 - p_count[0, 0], p_count[0, 0]], rtol=1e-6)
    assert_allclose(report.count_posterior[1, 2], p_count[1, 1])
    assert_allclose(report.cov_px2, [[0.0009, 0, 0.0025], [0.0036, 0, 0.0036], [0.0036, 0, 0.0036]])
    sure = Report(Report.Config(min_snr=0.0, min_p_exist=0.88), SENSOR).process(unmixed)
    assert_allclose(sure.p_exist, unmixed.p_exist[:2])
    assert len(sure.bbox_px) == 2
    peak = (patches.counts_BHW - patches.background_BHW).max(axis=(1, 2))
    assert_allclose(report.intensity_sigma, 10.0 * peak[[0, 1, 1]], rtol=1e-5)


def test_unusable_pixels_are_shown_as_background():
    patches, truth = scene(GROUPS[:1])
    patches.counts_BHW[0, 2, 2] = 16000.0
    patches.usable_BHW[0, 2, 2] = False
    engine = PerfectEngine(truth, "full_scale")
    Unmix(Unmix.Config(), SENSOR, engine).process(patches)
    assert engine.seen[0][0, 2, 2] == 0.0


def test_a_frame_without_groups_passes_all_stages():
    patches, truth = scene(GROUPS[:1])
    empty = Patches(
        patches.info,
        *(array[:0] for array in (patches.counts_BHW, patches.background_BHW, patches.usable_BHW)),
        *(array[:0] for array in (patches.origin_px, patches.group, patches.bbox_px)),
        patches.snr[:0],
        patches.flags[:0],
    )
    unmixed = Unmix(Unmix.Config(), SENSOR, PerfectEngine(truth, "peak")).process(empty)
    report = Report(Report.Config(), SENSOR).process(unmixed)
    message = targets_message(report, stage_ns={}, age_ns=1, gap=[], config="c")
    check_wire(message)
    assert message["targets"]["id"] == []
    assert message["groups"]["id"] == []


def test_of_a_crowded_patch_the_strongest_peaks_are_kept_and_its_group_flagged():
    patches, truth = scene([GROUPS[0], GROUPS[1], GROUPS[0]])
    patches.flags[1] = Flag.EDGE
    rows, columns = np.mgrid[1:33:3, 1:33:3].reshape(2, -1)  # 121 peaks, none beside another
    strength = np.random.default_rng(5).permutation(len(rows)) * 10.0 + 500.0
    truth[1] = 0.0
    truth[1, rows, columns] = strength
    unmixed = Unmix(
        Unmix.Config(threshold=0.01), SENSOR, PerfectEngine(truth, "full_scale")
    ).process(patches)
    assert unmixed.patch.tolist() == [0] + [1] * MAX_PEAKS + [2]
    kept = np.sort(strength)[-MAX_PEAKS:]
    assert_allclose(np.sort(unmixed.intensity[1:-1]), kept, rtol=1e-5)
    in_order = strength[strength >= kept[0]]
    assert_allclose(unmixed.intensity[1:-1], in_order, rtol=1e-5)
    report = Report(Report.Config(min_snr=0.0), SENSOR).process(unmixed)
    message = targets_message(report, stage_ns={}, age_ns=0, gap=[], config="c")
    assert message["groups"]["flags"] == [[], ["edge", "crowded"], []]


@pytest.mark.parametrize(
    ("number", "flags"), [(MAX_TARGETS, 0), (MAX_TARGETS + 1, Flag.CROWDED), (16, Flag.CROWDED)]
)
def test_as_many_as_a_group_may_have_are_no_crowd(number, flags):
    patches, truth = scene(GROUPS[:1])
    truth[0] = 0.0
    rows, columns = np.mgrid[1:33:8, 1:33:8].reshape(2, -1)
    truth[0, rows[:number], columns[:number]] = 900.0
    unmixed = Unmix(
        Unmix.Config(threshold=0.01), SENSOR, PerfectEngine(truth, "full_scale")
    ).process(patches)
    assert len(unmixed.patch) == number <= MAX_PEAKS
    report = Report(Report.Config(min_snr=0.0), SENSOR).process(unmixed)
    assert report.group_flags.tolist() == [flags]
    assert set(report.flags.tolist()) == {flags}
    few = np.arange(len(unmixed.patch)) < 3  # as a fit leaves of generous candidates
    fewer = structs.replace(
        unmixed, **{name: getattr(unmixed, name)[few] for name in Candidates._fields}
    )
    assert Report(Report.Config(), SENSOR).process(fewer).group_flags.tolist() == [0]


def unmixed_from(groups) -> Unmixed:
    patches, _ = scene(groups)
    rows = [(k, x + 100 * k, y + 50, g) for k, group in enumerate(groups) for x, y, g in group]
    table = np.array(rows)
    return Unmixed(
        patches=patches,
        patch=table[:, 0].astype(np.int32),
        xy_px=table[:, 1:3],
        intensity=table[:, 3],
        refined=np.zeros(len(table), dtype=np.bool_),
        p_exist=np.full(len(table), np.nan),
        p_count=np.full(len(table), np.nan),
        cov_px2=np.full((len(table), 3), np.nan),
        intensity_sigma=np.full(len(table), np.nan),
        joint_px2=np.full((len(groups), 0, 0), np.nan),
        cell_px=1 / 3,
        engine="abc",
        source="perfect",
    )


def test_without_an_engine_the_model_unmixes(caplog):
    patches, _ = scene([[(5.1, 4.8, 3000.0)], [(4.5, 5.0, 3000.0), (5.6, 5.2, 2500.0)]])
    wide = replace(SENSOR, sigma_px=2.0)
    fallen_back = Unmix.build(Unmix.Config(), Context(sensor=wide))
    assert "no shipped one fits" in caplog.text and "imaging model alone" in caplog.text
    assert fallen_back.process(patches).source == "model"
    asked = Unmix.build(Unmix.Config(), Context(sensor=SENSOR, engine="model"))
    found = asked.process(patches)
    asked.close()
    assert found.patch.tolist() == [0, 1, 1] and found.refined.all() and found.engine == ""
    order = np.lexsort((found.xy_px[:, 0], found.patch))
    assert_allclose(found.xy_px[order], [[5.1, 54.8], [104.5, 55.0], [105.6, 55.2]], atol=0.05)
    assert Refine(Refine.Config(), SENSOR).process(found) is found
    report = Report(Report.Config(), SENSOR).process(found)
    message = targets_message(report, stage_ns={}, age_ns=0, gap=[], config="c")
    check_wire(message)
    assert [len(values) for values in message["groups"]["joint_cov_px2"]] == [3, 10]
    xx, xy, xx2, xy2, yy, *_ = message["groups"]["joint_cov_px2"][1]
    assert_allclose([xx, xy, yy], report.cov_px2[1])
    assert xx2 != 0.0 and abs(xy2) < abs(xx2)


@pytest.mark.parametrize("engine", ["default", "dista_net_field", "model"])
def test_frames_together_are_unmixed_as_each_by_itself(engine):
    groups = [[(5.1, 4.8, 3000.0)], [(4.5, 5.0, 3000.0), (5.6, 5.2, 2500.0)]]
    frames = [scene(groups)[0], scene([])[0], scene(groups[1:])[0]]
    unmix = Unmix.build(Unmix.Config(), Context(sensor=SENSOR, engine=engine))
    for alone, found in zip(map(unmix.process, frames), unmix.process_all(frames), strict=True):
        assert_array_equal(found.patch, alone.patch)
        assert_allclose(found.xy_px, alone.xy_px, atol=2e-3)  # bf16 sums in another order
        assert_allclose(found.intensity, alone.intensity, rtol=2e-3)
        assert_array_equal(found.patches.counts_BHW, alone.patches.counts_BHW)
        assert (found.engine, found.source) == (alone.engine, alone.source)
    unmix.close()


def test_covariance_is_the_bound_of_the_whole_group_plus_the_cell():
    groups = [[(5.1, 4.8, 900.0)], [(4.7, 5.0, 1500.0), (5.3, 5.2, 700.0)]]
    report = Report(Report.Config(min_snr=0.0), SENSOR).process(unmixed_from(groups))
    row = 0
    for group in groups:
        array = np.array(group)
        bound = cramer_rao(
            fisher_information(
                array[:, :2], array[:, 2], BACKGROUND, (11, 11), SENSOR, with_background=True
            )
        )
        for k in range(len(group)):
            block = bound[3 * k : 3 * k + 3, 3 * k : 3 * k + 3]
            cell = (1 / 3) ** 2 / 12
            expected = [block[0, 0] + cell, block[0, 1], block[1, 1] + cell]
            assert_allclose(report.cov_px2[row], expected, rtol=1e-9)
            assert_allclose(report.intensity_sigma[row], np.sqrt(block[2, 2]), rtol=1e-9)
            row += 1
    assert report.group.tolist() == [0, 1, 1]


def test_a_bad_pixel_under_the_target_widens_its_covariance():
    whole, holed = (unmixed_from([[(5.3, 4.8, 900.0)]]) for _ in range(2))
    holed.patches.usable_BHW[0, 5, 5] = False
    reports = [Report(Report.Config(), SENSOR).process(unmixed) for unmixed in (whole, holed)]
    assert reports[1].intensity_sigma[0] > 1.2 * reports[0].intensity_sigma[0]
    assert (reports[1].cov_px2[0, [0, 2]] > reports[0].cov_px2[0, [0, 2]]).all()


def test_snr_of_an_isolated_target_is_that_of_the_matched_filter():
    intensity = 30.0  # faint: the noise is that of the background
    report = Report(Report.Config(min_snr=0.0), SENSOR).process(
        unmixed_from([[(5.0, 5.0, intensity)]])
    )
    psf = render(np.array([[5.0, 5.0]]), np.array([1.0]), (11, 11), SENSOR.sigma_px)
    deviation = np.sqrt(36.0 + BACKGROUND / 8.0 + 1 / 12)
    assert_allclose(report.snr[0], intensity * np.sqrt(np.sum(psf**2)) / deviation, rtol=0.02)


def test_insignificant_targets_are_left_out_and_their_group_stays():
    report = Report(Report.Config(min_snr=4.0), SENSOR).process(
        unmixed_from([[(5.0, 5.0, 10.0)], [(5.0, 5.0, 900.0)]])
    )
    assert report.group.tolist() == [1]
    assert len(report.bbox_px) == 2
    assert_allclose(report.count_posterior[0], [1, 0, 0, 0, 0, 0])
    assert report.count_posterior[1, 1] > 0.99


def test_flags_of_the_group_are_its_targets_flags():
    unmixed = unmixed_from([[(5.0, 5.0, 900.0)]])
    unmixed.patches.flags[0] = Flag.EDGE | Flag.SATURATED
    report = Report(Report.Config(), SENSOR).process(unmixed)
    message = targets_message(report, stage_ns={}, age_ns=0, gap=[1, 2], config="c")
    check_wire(message)
    assert message["targets"]["flags"] == [["edge", "saturated"]]
    assert message["groups"]["flags"] == [["edge", "saturated"]]
    assert message["gap"] == [1, 2]


def test_count_posterior_is_poisson_binomial():
    posterior = independent_count(np.array([1, 1, 1], dtype=np.int32), np.array([0.5, 0.2, 1.0]), 2)
    assert_allclose(posterior[0], [1, 0, 0, 0, 0, 0])
    assert_allclose(posterior[1], [0, 0.4, 0.5, 0.1, 0, 0], atol=1e-12)
    six = independent_count(np.zeros(6, dtype=np.int32), np.full(6, 1.0), 1)
    assert_allclose(six[0], [0, 0, 0, 0, 0, 1])


def test_stages_are_built_from_their_context():
    context = Context(sensor=SENSOR)
    assert isinstance(Report.build(Report.Config(), context), Report)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"frame_seq": "1"}, "frame_seq"),
        ({"age_ns": float("nan")}, "age_ns"),
        ({"surprise": 1}, "surprise"),
        ({"schema": "irst.targets/2"}, "schema"),
    ],
)
def test_a_message_that_does_not_fit_the_schema_is_named(change, field):
    report = Report(Report.Config(), SENSOR).process(unmixed_from(GROUPS))
    message = targets_message(report, stage_ns={}, age_ns=0, gap=[], config="c")
    with pytest.raises(ValueError, match=field):
        check_wire(message | change)


def test_nan_never_passes_the_schema():
    report = Report(Report.Config(), SENSOR).process(unmixed_from(GROUPS))
    message = targets_message(report, stage_ns={}, age_ns=0, gap=[], config="c")
    message["targets"]["x_px"][0] = float("nan")
    with pytest.raises(ValueError, match="x_px"):
        check_wire(message)


def test_refining_moves_targets_off_the_grid_and_says_so():
    truth = [[(5.2, 4.7, 3000.0)], [(4.7, 5.1, 2500.0), (5.5, 4.9, 1800.0)]]
    patches, _ = scene(truth)
    snapped = [[(5.0, 4.67, 2500.0)], [(4.67, 5.0, 2000.0), (5.67, 5.0, 2000.0)]]
    unmixed = structs.replace(unmixed_from(snapped), patches=patches)
    refined = Refine(Refine.Config(), SENSOR).process(unmixed)
    assert refined.patch.tolist() == [0, 1, 1]
    assert refined.refined.all()
    expected = [(x + 100 * k, y + 50) for k, group in enumerate(truth) for x, y, _ in group]
    assert_allclose(refined.xy_px, expected, atol=0.01)
    report = Report(Report.Config(), SENSOR).process(refined)
    message = targets_message(report, stage_ns={}, age_ns=0, gap=[], config="c")
    check_wire(message)
    assert message["targets"]["source"] == ["perfect+refine"] * 3
    assert report.cov_px2[0, 0] < (1 / 3) ** 2 / 12, "no longer that of a cell"


def test_where_the_fit_fails_the_networks_answer_is_kept():
    unmixed = unmixed_from([[(5.0, 5.0, 900.0)]])
    unmixed.patches.usable_BHW[:] = False  # nothing to fit to
    refined = Refine(Refine.Config(), SENSOR).process(unmixed)
    assert not refined.refined.any()
    assert_array_equal(refined.xy_px, unmixed.xy_px)
    assert_array_equal(refined.intensity, unmixed.intensity)


def test_refining_a_frame_without_targets_changes_nothing():
    unmixed = unmixed_from([[(5.0, 5.0, 900.0)]])
    empty = structs.replace(
        unmixed,
        patch=unmixed.patch[:0],
        xy_px=unmixed.xy_px[:0],
        intensity=unmixed.intensity[:0],
        refined=unmixed.refined[:0],
    )
    assert Refine(Refine.Config(), SENSOR).process(empty) is empty
