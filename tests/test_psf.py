"""The imaging model: pixel-integrated PSF, noise, censored measurement."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.integrate import quad
from scipy.stats import norm

from pipeline.physics import noise
from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.measurement import log_likelihood, measure
from pipeline.physics.psf import (
    peak_fraction,
    pixel_response,
    pixel_response_derivatives,
    render,
)
from pipeline.physics.sensor import Sensor

SIGMAS_PX = (0.3, 0.5, 0.8, 2.0)
POSITIONS_PX = np.array([4.0, 4.37, 5.5, 6.91, -0.4])
NOISY = Sensor(sigma_px=0.5, full_scale=16383, read_noise=5.0, gain=4.0)


# --- PSF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma_px", SIGMAS_PX)
def test_flux_is_conserved(sigma_px):
    response = pixel_response(np.array([20.0, 20.31, 19.5]), 41, sigma_px)
    assert_allclose(response.sum(axis=-1), 1.0, rtol=0, atol=1e-12)
    xy_px = np.array([[20.3, 19.6], [18.0, 22.49]])
    image = render(xy_px, np.array([700.0, 50.0]), (41, 41), sigma_px)
    assert_allclose(image.sum(), 750.0, rtol=1e-12)


def test_response_is_the_integral_of_the_gaussian_over_each_pixel():
    wanted = [quad(norm(4.37, 0.5).pdf, i - 0.5, i + 0.5)[0] for i in range(11)]
    assert_allclose(pixel_response(np.array(4.37), 11, 0.5), wanted, atol=1e-10)


def test_x_is_the_column_and_pixel_centres_are_integers():
    image = render(np.array([[7.0, 2.0]]), np.array([100.0]), (11, 13), 0.5)
    assert image.shape == (11, 13)
    assert np.unravel_index(image.argmax(), image.shape) == (2, 7)
    assert_allclose(image[2, 6], image[2, 8])
    assert_allclose(image[1, 7], image[3, 7])
    assert_allclose(image[2, 7], 100.0 * peak_fraction(0.5))
    assert_allclose(peak_fraction(0.5), math.erf(1.0 / math.sqrt(2.0)) ** 2)


def test_centroid_of_the_image_is_the_position():
    # Exact for a wide PSF; at sigma 0.5 the pixels' sampling shifts it by up to 2e-3 px.
    image = render(np.array([[20.3, 18.8]]), np.array([1.0]), (41, 41), 1.2)
    assert_allclose(image.sum(axis=0) @ np.arange(41), 20.3, atol=1e-9)
    assert_allclose(image.sum(axis=1) @ np.arange(41), 18.8, atol=1e-9)


def test_padding_contributes_nothing_and_batches_are_independent():
    xy_px = np.array([[[5.2, 4.1], [0.0, 0.0]], [[3.0, 3.0], [7.0, 7.0]]])
    intensity = np.array([[90.0, 0.0], [10.0, 20.0]])
    sigma_px = np.array([[0.5], [0.6]])
    batch = render(xy_px, intensity, (11, 11), sigma_px)
    assert_allclose(batch[0], render(xy_px[0, :1], intensity[0, :1], (11, 11), 0.5), rtol=1e-14)
    assert_allclose(batch[1], render(xy_px[1], intensity[1], (11, 11), 0.6), rtol=1e-14)


@pytest.mark.parametrize("sigma_px", SIGMAS_PX)
def test_derivatives_against_finite_differences(sigma_px):
    step = 1e-5
    found = pixel_response_derivatives(POSITIONS_PX, 11, sigma_px)
    assert_allclose(found.value, pixel_response(POSITIONS_PX, 11, sigma_px), atol=0)

    def slope(value):
        return (value(step) - value(-step)) / (2.0 * step)

    by_position = slope(lambda h: pixel_response(POSITIONS_PX + h, 11, sigma_px))
    by_sigma = slope(lambda h: pixel_response(POSITIONS_PX, 11, sigma_px + h))
    assert_allclose(found.d_position, by_position, atol=1e-7)
    assert_allclose(found.d_sigma, by_sigma, atol=1e-7)


@pytest.mark.parametrize("sigma_px", SIGMAS_PX)
def test_torch_and_its_autograd_agree_with_numpy(sigma_px):
    position = torch.tensor(POSITIONS_PX, requires_grad=True)
    sigma = torch.tensor(sigma_px, dtype=torch.float64, requires_grad=True)
    response = pixel_response(position, 11, sigma)
    wanted = pixel_response_derivatives(POSITIONS_PX, 11, sigma_px)
    assert_allclose(response.detach().numpy(), wanted.value, atol=1e-14)
    for pixel in range(11):
        d_position, d_sigma = torch.autograd.grad(
            response[:, pixel].sum(), (position, sigma), retain_graph=True
        )
        assert_allclose(d_position.numpy(), wanted.d_position[:, pixel], atol=1e-12)
        assert_allclose(d_sigma.item(), wanted.d_sigma[:, pixel].sum(), atol=1e-12)


def test_torch_renders_what_numpy_renders():
    rng = np.random.default_rng(3)
    xy_px = rng.uniform(0, 10, (6, 4, 2))
    intensity = rng.uniform(100, 900, (6, 4))
    wanted = render(xy_px, intensity, (11, 12), 0.55)
    found = render(torch.tensor(xy_px), torch.tensor(intensity), (11, 12), 0.55)
    assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-12)


# --- measurement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 100.0, 3000.0])
def test_measured_variance_is_that_of_the_noise_model(level):
    number = 400_000
    counts = measure(np.full(number, level + 200.0), NOISY, NumpyRandom(7))
    variance = noise.variance(np.array(level + 200.0), NOISY)
    assert_allclose(variance, 25.0 + (level + 200.0) / 4.0 + 1.0 / 12.0)
    # Standard errors of mean and variance of a normal sample; five of each.
    assert abs(counts.mean() - level - 200.0) < 5.0 * math.sqrt(variance / number)
    assert abs(counts.var() / variance - 1.0) < 5.0 * math.sqrt(2.0 / number)


def test_measurements_are_whole_counts_within_range():
    mean = np.linspace(-50.0, 300.0, 20_000)
    counts = measure(mean, Sensor(full_scale=255, read_noise=20.0), NumpyRandom(1))
    assert_allclose(counts, np.round(counts), atol=0)
    assert (counts.min(), counts.max()) == (0, 255)


def test_a_noiseless_sensor_only_rounds_and_clips():
    sensor = Sensor(full_scale=255)
    assert sensor.noiseless
    counts = measure(np.array([0.4, 0.6, 254.7, 400.0]), sensor, NumpyRandom(0))
    assert counts.tolist() == [0, 1, 255, 255]


def test_measurements_are_reproducible_from_the_seed():
    mean = np.full((5, 7), 500.0)
    first = measure(mean, NOISY, NumpyRandom(4))
    assert (first == measure(mean, NOISY, NumpyRandom(4))).all()
    assert (first != measure(mean, NOISY, NumpyRandom(5))).any()


@pytest.mark.parametrize("mean", [10.0, 240.0, 254.5, 260.0, 500.0, 5000.0])
def test_a_saturated_pixel_says_only_that_it_is_saturated(mean):
    sensor = Sensor(full_scale=255, read_noise=4.0, gain=10.0)
    deviation = math.sqrt(noise.variance(np.array(mean), sensor))
    found = float(log_likelihood(np.array(255.0), np.array(mean), sensor))
    assert math.isfinite(found)
    assert_allclose(found, norm.logsf(254.5, mean, deviation), rtol=1e-9, atol=1e-15)


def test_likelihood_below_full_scale_is_gaussian():
    counts, mean = np.array([200.0, 254.0]), np.array([190.0, 230.0])
    sensor = Sensor(full_scale=255, read_noise=4.0, gain=10.0)
    deviation = np.sqrt(16.0 + mean / 10.0 + 1.0 / 12.0)
    assert_allclose(log_likelihood(counts, mean, sensor), norm.logpdf(counts, mean, deviation))


def test_likelihoods_sum_to_one_over_all_counts():
    sensor = Sensor(full_scale=255, read_noise=9.0, gain=10.0)
    for mean in (128.0, 250.0, 257.0):
        counts = np.arange(0.0, 256.0)
        total = np.exp(log_likelihood(counts, np.full(256, mean), sensor)).sum()
        assert_allclose(total, 1.0, atol=1e-3)  # a sum over counts for an integral


def test_likelihood_has_a_gradient_in_torch():
    sensor = Sensor(full_scale=255, read_noise=4.0, gain=10.0)
    counts = torch.tensor([200.0, 255.0, 255.0], dtype=torch.float64)
    mean = torch.tensor([190.0, 250.0, 4000.0], dtype=torch.float64, requires_grad=True)
    total = log_likelihood(counts, mean, sensor).sum()
    (gradient,) = torch.autograd.grad(total, mean)
    step = 1e-4
    plain = mean.detach().numpy()
    difference = [
        log_likelihood(counts.numpy(), plain + step * unit, sensor).sum()
        - log_likelihood(counts.numpy(), plain - step * unit, sensor).sum()
        for unit in np.eye(3)
    ]
    assert_allclose(gradient.numpy(), np.array(difference) / (2.0 * step), atol=1e-6)


# --- sensor --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sensor", [Sensor(), NOISY, Sensor(id="a", full_scale=255, read_noise=1.0, ifov_rad=2e-4)]
)
def test_sensor_attributes_round_trip(sensor):
    assert Sensor.from_attributes(sensor.to_attributes()) == sensor


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sigma_px", 0.0),
        ("sigma_px", math.nan),
        ("full_scale", 0),
        ("full_scale", 65536),
        ("read_noise", -1.0),
        ("read_noise", math.inf),
        ("gain", 0.0),
        ("gain", math.nan),
        ("ifov_rad", 0.0),
    ],
)
def test_impossible_sensors_are_refused(field, value):
    with pytest.raises(ValueError, match=f"sensor.{field} must be"):
        Sensor(**{field: value})
