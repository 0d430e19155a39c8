"""The compiled way to a network's input, held to its definition."""

import numpy as np
import pytest

from engines.scaling import network_input, network_unit
from pipeline.physics import patch_input as module
from pipeline.physics.compiled import read_only
from pipeline.physics.noise import pixel_noise
from pipeline.physics.patch_input import compile_input, patch_input
from pipeline.physics.sensor import Sensor

SENSOR = Sensor(id="s", sigma_px=0.6, full_scale=4095, read_noise=3.0, gain=2.0)


@pytest.mark.parametrize("scaling", ["peak", "full_scale"])
@pytest.mark.parametrize("planes", [("signal",), ("signal", "noise"), ("sigma", "noise", "signal")])
@pytest.mark.parametrize("number", [0, 20])
def test_it_is_what_the_definition_says(scaling, planes, number):
    rng = np.random.default_rng(7)
    counts = rng.normal(300.0, 400.0, (number, 11, 11)).astype(np.float32)
    counts[: number // 2, 5, 5] = 4095.0  # saturated
    background = rng.normal(290.0, 5.0, counts.shape).astype(np.float32)
    if number:
        background[-1] = 5000.0  # nothing is above it
    usable = rng.random(counts.shape) > 0.05
    for array in (counts, background, usable):
        array.flags.writeable = False
    patch, unit = patch_input(counts, background, usable, SENSOR, scaling, planes)

    signal = np.where(usable, counts - background, np.float32(0.0))
    wanted = network_unit(signal, scaling, SENSOR.full_scale)
    noise = pixel_noise(counts, usable, SENSOR)
    np.testing.assert_allclose(unit, wanted, rtol=1e-6)
    given = network_input(signal, noise, SENSOR.sigma_px, wanted, planes)
    np.testing.assert_allclose(patch, given, rtol=2e-6, atol=1e-7)
    assert patch.dtype == unit.dtype == np.float32 and patch.flags.c_contiguous


def test_no_frame_waits_for_the_compiler():
    compile_input()
    compiled = len(module._make.signatures)
    image = np.zeros((3, 11, 11), np.float32)
    for counts in (image, image[::-1], read_only(image)):
        patch_input(counts, image, image == 0.0, SENSOR, "peak", ("signal", "noise"))
    assert len(module._make.signatures) == compiled


def test_read_only_is_one_kind_of_array_with_the_same_values():
    odd = np.zeros(1 + 24, np.uint8)[1:].view(np.float32).reshape(2, 3)
    odd[:] = np.arange(6.0).reshape(2, 3)
    for array in (odd, odd.T, np.asfortranarray(odd), odd.astype(np.float32)[::-1]):
        found = read_only(array)
        np.testing.assert_array_equal(found, array)
        flags = found.flags
        assert flags.aligned and flags.c_contiguous and not flags.writeable
    assert odd.flags.writeable
    assert read_only(np.arange(3), np.float64).dtype == np.float64
