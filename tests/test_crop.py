"""Cropping: windows where they belong, the background under them, and what is flagged."""

import numpy as np
import pytest

from pipeline.component import Context
from pipeline.errors import PipelineError
from pipeline.imaging import windows
from pipeline.messages import Blobs, Flag, FrameInfo, Tiling
from pipeline.physics import noise
from pipeline.physics.background import plane_background
from pipeline.physics.psf import render
from pipeline.physics.sensor import Sensor
from pipeline.stages.crop import Crop

SENSOR = Sensor(full_scale=4095, read_noise=60.0)


def crop(pixels_HW, xy_px, flags=None, usable_HW=None, tiling=None, snr=None, sensor=SENSOR):
    xy_px = np.asarray(xy_px, dtype=np.float64).reshape(-1, 2)
    number = len(xy_px)
    corner = np.rint(xy_px).astype(np.int32) - 1
    blobs = Blobs(
        info=FrameInfo(0, "s", 0, "utc", pixels_HW.shape, tiling=tiling),
        pixels_HW=pixels_HW,
        usable_HW=np.ones(pixels_HW.shape, bool) if usable_HW is None else usable_HW,
        xy_px=xy_px,
        bbox_px=np.concatenate([corner, corner + 3], axis=1),
        snr=np.asarray(np.arange(number, 0, -1) if snr is None else snr, dtype=np.float32),
        flags=np.asarray(np.zeros(number) if flags is None else flags, dtype=np.uint16),
    )
    return Crop.build(Crop.Config(), Context(sensor)).process(blobs)


@pytest.fixture
def pixels_HW():
    return np.random.default_rng(1).integers(900, 1100, (60, 80)).astype(np.uint16)


def test_window_is_centred_on_the_blobs_pixel(pixels_HW):
    patches = crop(pixels_HW, [[20.4, 30.6], [50.0, 9.0]])
    np.testing.assert_array_equal(patches.origin_px, [[15, 26], [45, 4]])
    np.testing.assert_array_equal(patches.counts_BHW[0], pixels_HW[26:37, 15:26])
    np.testing.assert_array_equal(patches.counts_BHW[1], pixels_HW[4:15, 45:56])
    np.testing.assert_array_equal(patches.group, [0, 1])
    np.testing.assert_array_equal(patches.flags, [0, 0])
    assert patches.counts_BHW.dtype == patches.background_BHW.dtype == np.float32


@pytest.mark.parametrize(
    ("xy_px", "origin"),
    [([0.2, 0.1], [0, 0]), ([79.0, 59.0], [69, 49]), ([3.0, 30.0], [0, 25]), ([74, 54], [69, 49])],
)
def test_window_stays_in_the_frame_and_says_when_it_was_moved(pixels_HW, xy_px, origin):
    patches = crop(pixels_HW, [xy_px])
    np.testing.assert_array_equal(patches.origin_px, [origin])
    moved = xy_px != [74, 54]  # whose window just fits
    assert Flag(int(patches.flags[0])) == (Flag.EDGE if moved else Flag(0))


def test_window_on_a_mosaic_is_the_tile(pixels_HW):
    patches = crop(pixels_HW, [[0.0, 10.0], [26.0, 5.0], [37.0, 37.0]], tiling=Tiling(11, 16))
    np.testing.assert_array_equal(patches.origin_px, [[0, 0], [16, 0], [32, 32]])
    assert [Flag(flags) for flags in patches.flags.tolist()] == [Flag.EDGE, Flag.EDGE, Flag(0)]


def test_blobs_of_one_window_become_one_group(pixels_HW):
    patches = crop(
        pixels_HW,
        [[60.0, 40.0], [1.0, 3.0], [30.0, 30.0], [4.0, 2.0]],
        snr=[9, 5, 8, 7],
        flags=[0, 0, Flag.EXTENDED, 0],
    )
    np.testing.assert_array_equal(patches.origin_px, [[55, 35], [0, 0]])
    np.testing.assert_array_equal(patches.group, [0, 1])
    np.testing.assert_array_equal(patches.bbox_px[1], [0, 1, 6, 5])
    np.testing.assert_array_equal(patches.snr, [9, 7, 8])
    assert [Flag(flags) for flags in patches.flags.tolist()] == [
        Flag(0),
        Flag.EDGE | Flag.MERGED,
        Flag.EXTENDED,
    ]


def test_extended_and_left_out_blobs_are_groups_without_window(pixels_HW):
    flags = [Flag.EXTENDED, 0, Flag.OVERFLOW]
    patches = crop(pixels_HW, [[2.0, 2.0], [30.0, 30.0], [30.0, 30.0]], flags=flags)
    np.testing.assert_array_equal(patches.group, [1])
    np.testing.assert_array_equal(patches.flags, flags)
    assert len(patches.bbox_px) == len(patches.snr) == 3


def test_background_is_the_plane_under_the_target():
    y, x = np.mgrid[:40, :50]
    plane_HW = 1000.0 + 3.0 * x - 5.0 * y
    target_HW = render(np.array([[25.3, 18.6]]), np.array([3000.0]), (40, 50), 0.5)
    patches = crop((plane_HW + target_HW).astype(np.float32), [[25.3, 18.6]])
    np.testing.assert_allclose(patches.background_BHW[0], plane_HW[14:25, 20:31], atol=0.05)
    signal = patches.counts_BHW - patches.background_BHW
    assert signal.sum() == pytest.approx(3000.0, rel=1e-3)


def test_saturated_and_bad_pixels_are_flagged(pixels_HW):
    pixels_HW[10, 10] = 4095
    usable_HW = np.ones(pixels_HW.shape, bool)
    usable_HW[[28, 50], [33, 60]] = False
    pixels_HW[50, 60] = 4095  # bad, so its value says nothing
    patches = crop(pixels_HW, [[10, 10], [30, 30], [60, 50], [40, 10]], usable_HW=usable_HW)
    assert [Flag(flags) for flags in patches.flags.tolist()] == [
        Flag.SATURATED,
        Flag.BAD_PIXEL,
        Flag.BAD_PIXEL,
        Flag(0),
    ]
    assert not patches.usable_BHW[1, 3, 8] and patches.usable_BHW[1].sum() == 120


def test_a_pixel_without_a_value_holds_the_background():
    pixels_HW = np.full((30, 30), 500.0, np.float32)
    usable_HW = np.ones((30, 30), bool)
    pixels_HW[12, 15], usable_HW[12, 15] = np.nan, False
    patches = crop(pixels_HW, [[15, 15]], usable_HW=usable_HW)
    np.testing.assert_allclose(patches.counts_BHW, 500.0, rtol=1e-5)
    np.testing.assert_allclose(patches.background_BHW, 500.0, rtol=1e-5)


def test_no_blobs_no_patches(pixels_HW):
    patches = crop(pixels_HW, [])
    assert patches.counts_BHW.shape == patches.background_BHW.shape == (0, 11, 11)
    assert patches.origin_px.shape == (0, 2) and len(patches.flags) == 0


def test_tiles_smaller_than_a_window_are_refused(pixels_HW):
    with pytest.raises(PipelineError, match="8×8 px is smaller than the 11×11 window"):
        crop(pixels_HW, [[3, 3]], tiling=Tiling(8, 16))


def test_a_blob_on_a_horizon_is_a_group_without_window(pixels_HW):
    pixels_HW[31:] += 2000
    patches = crop(pixels_HW, [[20.0, 30.0], [50.0, 9.0]])
    assert [Flag(int(flags)) for flags in patches.flags] == [Flag.CLUTTER, Flag(0)]
    np.testing.assert_array_equal(patches.group, [1])
    np.testing.assert_array_equal(patches.origin_px, [[45, 4]])


@pytest.mark.parametrize(("gain", "flag"), [(0.3, 0), (30.0, Flag.CLUTTER)])
def test_noise_of_the_light_itself_is_no_clutter(pixels_HW, gain, flag):
    sensor = Sensor(full_scale=4095, read_noise=1.0, gain=gain)
    assert crop(pixels_HW, [[20.0, 30.0]], sensor=sensor).flags.tolist() == [flag]


def test_a_slope_is_no_clutter(pixels_HW):
    slope_HW = pixels_HW + 20 * np.arange(80, dtype=np.uint16)
    patches = crop(slope_HW, [[20.0, 30.0]])
    assert patches.flags.tolist() == [0]


def test_a_blob_outside_of_the_frame_is_refused(pixels_HW):
    with pytest.raises(IndexError, match="outside of the frame"):
        crop(pixels_HW, [[200.0, 10.0]], tiling=Tiling(16, 16))


def scattered(rng, dtype):
    """A frame with a horizon, bad and saturated pixels, and blobs all over it, some in pairs."""
    pixels_HW = rng.normal(1000.0, 60.0, (90, 120))
    pixels_HW[60:, 80:] += 1500.0
    pixels_HW[rng.random(pixels_HW.shape) < 0.002] = 4095.0
    usable_HW = rng.random(pixels_HW.shape) > 0.005
    pixels_HW = np.rint(pixels_HW / 16 if dtype is np.uint8 else pixels_HW).astype(dtype)
    if dtype is np.float32:
        pixels_HW[~usable_HW] = np.nan
    xy_px = rng.uniform([0.0, 0.0], [119.0, 89.0], (40, 2))
    xy_px[30:] = np.rint(xy_px[:10]) + rng.uniform(-0.4, 0.4, (10, 2))
    flags = rng.choice([0, 0, 0, Flag.EXTENDED, Flag.OVERFLOW], 40)
    return pixels_HW, usable_HW, xy_px, flags


@pytest.mark.parametrize("tiling", [None, Tiling(24, 30)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_compiled_it_is_what_array_operations_make(rng, dtype, tiling):
    pixels_HW, usable_HW, xy_px, flags = scattered(rng, dtype)
    snr = rng.uniform(5.0, 50.0, 40)
    found = crop(pixels_HW, xy_px, flags, usable_HW, tiling, snr)

    wanted = np.rint(xy_px).astype(int) - 5
    low = 0 if tiling is None else (wanted + 5) // 30 * 30
    size = np.array([120, 90] if tiling is None else [24, 24])
    origin = np.clip(wanted, low, low + size - 11)
    flags = np.where((origin != wanted).any(axis=1) & (flags == 0), Flag.EDGE, flags)
    groups: dict[tuple[int, ...], list[int]] = {}
    for n, place in enumerate(origin.tolist()):
        alone = flags[n] & (Flag.EXTENDED | Flag.OVERFLOW)
        groups.setdefault((n,) if alone else tuple(place), []).append(n)
    corner = np.rint(xy_px).astype(int) - 1
    patches = []
    for g, (place, members) in enumerate(groups.items()):
        flag = np.bitwise_or.reduce(flags[members]) | (Flag.MERGED if len(members) > 1 else 0)
        assert found.snr[g] == np.float32(snr[members].max())
        box = [*corner[members].min(axis=0), *corner[members].max(axis=0) + 3]
        np.testing.assert_array_equal(found.bbox_px[g], box)
        if len(place) == 2:
            here = np.s_[place[1] : place[1] + 11, place[0] : place[0] + 11]
            usable = usable_HW[here]
            counts = np.where(usable, pixels_HW[here], 0.0).astype(np.float32)
            centre = xy_px[members[0]] - place
            plane, rms = plane_background(counts[None].astype(float), centre[None], usable[None])
            flag |= 0 if usable.all() else Flag.BAD_PIXEL
            flag |= Flag.SATURATED if (usable & (counts >= 4095)).any() else 0
            cluttered = rms[0] > 5.0 * np.sqrt(noise.variance(plane.mean(), SENSOR))
            flag |= Flag.CLUTTER if cluttered else 0
            if not cluttered:
                patches.append((g, place, usable, np.where(usable, counts, plane[0]), plane[0]))
        assert Flag(int(found.flags[g])) == Flag(int(flag))
    assert len(found.flags) == len(groups) < 40 and any(found.flags & Flag.MERGED)
    names = "group", "origin_px", "usable_BHW", "counts_BHW", "background_BHW"
    for name, values in zip(names, zip(*patches, strict=True), strict=True):
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_no_frame_waits_for_the_compiler(rng, dtype):
    pixels_HW, usable_HW, xy_px, flags = scattered(rng, dtype)
    crop(pixels_HW, xy_px, flags, usable_HW)
    compiled = len(windows._cut_all.signatures)
    padded = np.zeros(1 + pixels_HW.nbytes, np.uint8)[1:].view(dtype).reshape(pixels_HW.shape)
    padded[:] = pixels_HW  # begins at an odd address
    pixels_HW.flags.writeable = usable_HW.flags.writeable = xy_px.flags.writeable = False
    crop(pixels_HW, xy_px, flags, usable_HW)
    crop(padded, xy_px, flags, usable_HW)
    crop(np.asfortranarray(pixels_HW), xy_px, flags, usable_HW)
    assert len(windows._cut_all.signatures) == compiled
