"""Fisher information of a group's parameters and the Cramér-Rao bound.

Parameters are ordered x₁, y₁, g₁, x₂, y₂, g₂, …, then the local background if it is unknown, then
σ if the sensor's is uncertain.
"""

import math

from array_api_compat import array_namespace

from pipeline.physics import noise
from pipeline.physics.arrays import Array, log_normal_cdf
from pipeline.physics.psf import pixel_response_derivatives
from pipeline.physics.sensor import Sensor


def jacobian(
    xy_px: Array,
    intensity: Array,
    shape: tuple[int, int],
    sigma_px: Array | float,
    *,
    with_background: bool = False,
    with_sigma: bool = False,
) -> Array:
    """Derivatives of the expected counts by each parameter.

    xy_px (..., K, 2), intensity (..., K) → (..., P, H·W) with P = 3K, and one more each with
    background and with σ.
    """
    xp = array_namespace(xy_px)
    height, width = shape
    row = pixel_response_derivatives(xy_px[..., 1], height, sigma_px)
    column = pixel_response_derivatives(xy_px[..., 0], width, sigma_px)
    g = intensity[..., None, None]
    d_x = g * row.value[..., :, None] * column.d_position[..., None, :]
    d_y = g * row.d_position[..., :, None] * column.value[..., None, :]
    d_g = row.value[..., :, None] * column.value[..., None, :]
    stacked = xp.stack([d_x, d_y, d_g], axis=-3)  # (..., K, 3, H, W)
    lead = tuple(stacked.shape[:-4])
    derivatives = xp.reshape(stacked, (*lead, 3 * xy_px.shape[-2], height * width))
    if with_background:
        derivatives = xp.concat([derivatives, xp.ones_like(derivatives[..., :1, :])], axis=-2)
    if with_sigma:
        of_row = g * row.d_sigma[..., :, None] * column.value[..., None, :]
        of_column = g * row.value[..., :, None] * column.d_sigma[..., None, :]
        d_sigma = xp.sum(of_row + of_column, axis=-3)
        d_sigma = xp.reshape(d_sigma, (*lead, 1, height * width))
        derivatives = xp.concat([derivatives, d_sigma], axis=-2)
    return derivatives


def censored_information(mean: Array, sensor: Sensor) -> Array:
    """Fisher information of one pixel about its own mean, 1/DN².

    1/v for a pixel far below full scale. With α = (full_scale − ½ − m)/√v a censored normal keeps
    the share Φ(α) − α φ(α) + φ(α)²/(1 − Φ(α)): 1 far below, 0 far above saturation. What the
    variance's own dependence on the mean would add (of order 1/(gain² v)) is left out.
    """
    xp = array_namespace(mean)
    var = noise.variance(mean, sensor)
    alpha = (sensor.full_scale - 0.5 - mean) / xp.sqrt(var)
    log_pdf = -0.5 * alpha**2 - 0.5 * math.log(2.0 * math.pi)
    tail = xp.exp(2.0 * log_pdf - log_normal_cdf(-alpha))
    share = xp.exp(log_normal_cdf(alpha)) - alpha * xp.exp(log_pdf) + tail
    return xp.clip(share, 0.0, 1.0) / var


def fisher_information(
    xy_px: Array,
    intensity: Array,
    background: Array | float,
    shape: tuple[int, int],
    sensor: Sensor,
    *,
    with_background: bool = False,
    usable: Array | None = None,
) -> Array:
    """Expected Fisher information (..., P, P) of groups of K targets on an H × W patch.

    xy_px (..., K, 2) px, intensity (..., K) counts, background scalar or (...) counts. usable
    (..., H, W): False for pixels that say nothing; None = all say something. If σ is uncertain,
    what is known of it, sensor.sigma_error, is part of the information.
    """
    xp = array_namespace(xy_px)
    derivatives = jacobian(
        xy_px,
        intensity,
        shape,
        sensor.sigma_px,
        with_background=with_background,
        with_sigma=sensor.sigma_error > 0.0,
    )
    # The intensity rows of the Jacobian, weighted, are the expected counts themselves.
    level = xp.asarray(background, dtype=xy_px.dtype)[..., None]
    signal_rows = derivatives[..., 2 : 3 * xy_px.shape[-2] : 3, :]
    mean = level + xp.sum(intensity[..., None] * signal_rows, axis=-2)
    weight = censored_information(mean, sensor)
    if usable is not None:
        weight = weight * xp.astype(xp.reshape(usable, weight.shape), weight.dtype)
    weighted = derivatives * weight[..., None, :]
    information = xp.matmul(weighted, xp.matrix_transpose(derivatives))
    if sensor.sigma_error:
        known = xp.zeros_like(information[..., 0, :])
        known[..., -1] = (sensor.sigma_error * sensor.sigma_px) ** -2
        information = information + known[..., None, :] * xp.eye(known.shape[-1], dtype=known.dtype)
    return information


def cramer_rao(information: Array, *, floor: float = 1e-12) -> Array:
    """Covariance bound (..., P, P): the inverse of Fisher information.

    Parameters are scaled to unit information first, and eigenvalues below `floor` of the largest
    are raised to it, so an unobservable direction gets a large finite variance, never a NaN.
    """
    xp = array_namespace(information)
    diagonal = xp.linalg.diagonal(information)
    tiny = 1e-30
    scale = 1.0 / xp.sqrt(xp.clip(diagonal, tiny, None))
    outer = scale[..., :, None] * scale[..., None, :]
    values, vectors = xp.linalg.eigh(information * outer)
    values = xp.clip(values, floor, None)
    inverse = xp.matmul(vectors / values[..., None, :], xp.matrix_transpose(vectors))
    return inverse * outer
