"""What a report says of a frame's targets, compiled, held to its definitions."""

import numpy as np
import pytest
from msgspec.structs import fields, replace
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import ndtr

from pipeline.imaging import judgement
from pipeline.imaging.judgement import compile_judgement, independent_count, judge
from pipeline.messages import MAX_COUNT, Flag, FrameInfo, Patches, Unmixed
from pipeline.physics.candidates import count_probabilities, crowded, significant
from pipeline.physics.group_bounds import group_bounds
from pipeline.physics.sensor import Sensor

SENSOR = Sensor(full_scale=16383, read_noise=6.0, gain=8.0, sigma_error=0.1)
SIZES = np.array([1, 3, 2, 0, 9, 1])
LEAST = 4.0, 0.5


@pytest.fixture
def unmixed(rng) -> Unmixed:
    """Six patches of eight groups; some targets are faint, of some a covariance is said."""
    patch = np.repeat(np.arange(6), SIZES).astype(np.int32)
    number, said = len(patch), rng.random(len(patch)) < 0.5
    origin_px = rng.integers(0, 400, (6, 2)).astype(np.int32)
    place = np.arange(number) - np.repeat(np.cumsum(SIZES) - SIZES, SIZES)
    local_px = 2.0 + 2.5 * np.stack([place % 3, place // 3], axis=1)
    return Unmixed(
        patches=Patches(
            info=FrameInfo(0, "s", 0, "utc", (512, 640)),
            counts_BHW=np.zeros((6, 11, 11), np.float32),
            background_BHW=rng.uniform(900.0, 1100.0, (6, 11, 11)).astype(np.float32),
            usable_BHW=rng.random((6, 11, 11)) > 0.03,
            origin_px=origin_px,
            group=rng.permutation(8)[:6].astype(np.int32),
            bbox_px=np.zeros((8, 4), np.int32),
            snr=np.ones(8, np.float32),
            flags=rng.choice([0, Flag.EDGE], 8).astype(np.uint16),
        ),
        patch=patch,
        xy_px=local_px + rng.uniform(-0.5, 0.5, (number, 2)) + origin_px[patch],
        intensity=10.0 ** rng.uniform(1.8, 4.0, number),
        refined=rng.random(number) < 0.5,
        p_exist=np.where(said, rng.uniform(0.4, 1.0, number), np.nan),
        p_count=np.full(number, np.nan),
        cov_px2=np.where(said[:, None], rng.uniform(0.01, 0.02, (number, 3)), np.nan),
        intensity_sigma=np.where(said, 30.0, np.nan),
        joint_px2=np.empty((6, 0, 0)),
        cell_px=1 / 3,
        engine="e",
        source="s",
    )


def counted(unmixed: Unmixed) -> Unmixed:
    """With a number of targets that the method says."""
    place = np.arange(len(unmixed.patch)) - np.searchsorted(unmixed.patch, unmixed.patch)
    return replace(unmixed, p_count=0.99 * 0.9**place)


def defined(unmixed: Unmixed) -> dict[str, np.ndarray]:
    """The same, one definition after another."""
    patches, patch = unmixed.patches, unmixed.patch
    bounds = group_bounds(
        patch,
        unmixed.xy_px - patches.origin_px[patch],
        unmixed.intensity,
        patches.background_BHW.mean(axis=(1, 2), dtype=np.float64),
        patches.usable_BHW,
        SENSOR,
    )
    gridded = bounds.cov_px2 + np.array([1.0, 0.0, 1.0]) * unmixed.cell_px**2 / 12
    cov_px2 = np.where(np.isnan(unmixed.cov_px2), gridded, unmixed.cov_px2)
    unsaid = np.isnan(unmixed.intensity_sigma)
    sigma = np.where(unsaid, bounds.intensity_sigma, unmixed.intensity_sigma)
    keep = significant(bounds.snr, unmixed.p_exist, unmixed.p_count, *LEAST)
    p_model = ndtr(unmixed.intensity / sigma)
    p_exist = np.where(np.isnan(unmixed.p_exist), p_model, unmixed.p_exist)[keep]
    group, group_flags = patches.group[patch[keep]], patches.flags.copy()
    many = crowded(patch, unmixed.p_count, keep, 6)
    group_flags[patches.group[many]] |= np.uint16(Flag.CROWDED)
    if np.isnan(unmixed.p_count).any():
        posterior = independent_count(group, p_exist, 8)
    else:
        at_least = np.zeros((8, MAX_COUNT))
        place = np.arange(len(patch)) - np.searchsorted(patch, patch)
        few = place < MAX_COUNT
        at_least[patches.group[patch[few]], place[few]] = unmixed.p_count[few]
        posterior = count_probabilities(at_least)
    return {
        "refined": unmixed.refined[keep],
        "group": group,
        "xy_px": unmixed.xy_px[keep],
        "cov_px2": cov_px2[keep],
        "intensity": unmixed.intensity[keep],
        "intensity_sigma": sigma[keep],
        "p_exist": p_exist,
        "snr": bounds.snr[keep],
        "flags": group_flags[group],
        "count_posterior": posterior,
        "group_flags": group_flags,
    }


@pytest.mark.parametrize("form", [lambda unmixed: unmixed, counted])
def test_it_is_what_the_definitions_say(unmixed, form):
    unmixed = form(unmixed)
    rows, judged = judge(unmixed, SENSOR, *LEAST)
    wanted = defined(unmixed)
    assert 0 < len(rows) < len(unmixed.patch)
    assert (wanted["group_flags"] & Flag.CROWDED).any()
    assert_array_equal(unmixed.intensity[rows], judged.intensity)
    for name, values in wanted.items():
        found = getattr(judged, name)
        assert_allclose(found, values, rtol=1e-9, atol=1e-12, err_msg=name)
        assert found.dtype == values.dtype and found.flags.c_contiguous, name


def test_what_it_is_given_stays_as_it_was(unmixed):
    flags = unmixed.patches.flags.copy()
    judge(unmixed, SENSOR, *LEAST)
    assert_array_equal(unmixed.patches.flags, flags)


def test_targets_of_patches_that_are_not_there_are_refused(unmixed):
    astray = unmixed.patch.copy()
    astray[-1] = 6
    with pytest.raises(IndexError, match="patch that is not there"):
        judge(replace(unmixed, patch=astray), SENSOR, *LEAST)
    homeless = replace(unmixed.patches, group=unmixed.patches.group + np.int32(3))
    with pytest.raises(IndexError, match="group that is not there"):
        judge(replace(unmixed, patches=homeless), SENSOR, *LEAST)


def test_no_frame_waits_for_the_compiler(unmixed):
    compile_judgement()
    compiled = len(judgement._judge.signatures)
    judge(unmixed, SENSOR, *LEAST)
    for message in (unmixed, unmixed.patches):
        for field in fields(message):
            if isinstance(values := getattr(message, field.name), np.ndarray):
                values.flags.writeable = False  # as received
    judge(unmixed, SENSOR, *LEAST)
    assert len(judgement._judge.signatures) == compiled
