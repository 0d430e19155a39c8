"""The compiled way to a network's input, held to its definition."""

import numpy as np
import pytest

from engines.scaling import network_input, network_unit
from pipeline.physics.noise import pixel_noise
from pipeline.physics.patch_input import patch_input
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
