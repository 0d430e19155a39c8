"""The point-spread function: a Gaussian of `sigma_px`, integrated over each pixel.

In one dimension pixel i collects a_i(x) = Φ((i + ½ − x)/σ) − Φ((i − ½ − x)/σ) of a source at x;
in two dimensions the response is the product a_row(y) · a_column(x). Pixel centres are integers,
x is the column, y the row.
"""

import math
from typing import NamedTuple

from array_api_compat import array_namespace, device

from pipeline.physics.arrays import Array, erf

RAYLEIGH_PER_SIGMA = 1.9
"""Rayleigh distance over the sigma of the PSF (the convention of the CSIST benchmark)."""


class Response(NamedTuple):
    """Pixel response along one axis and its derivatives, each (..., size)."""

    value: Array
    d_position: Array
    d_sigma: Array


def _edges(position_px: Array, size: int, sigma_px: Array | float) -> tuple[Array, Array]:
    """Scaled distances (edge − x)/σ of the size + 1 pixel edges, and σ with room to broadcast."""
    xp = array_namespace(position_px)
    edge_px = xp.arange(size + 1, dtype=position_px.dtype, device=device(position_px)) - 0.5
    if isinstance(sigma_px, type(position_px)):  # asarray would be loud about autograd
        sigma = xp.astype(sigma_px, position_px.dtype, copy=False)
    else:
        sigma = xp.asarray(sigma_px, dtype=position_px.dtype, device=device(position_px))
    sigma = sigma[..., None]
    return (edge_px - position_px[..., None]) / sigma, sigma


def pixel_response(position_px: Array, size: int, sigma_px: Array | float) -> Array:
    """Share of a unit source collected by each of `size` pixels along one axis.

    position_px (...), sigma_px scalar or broadcastable to it → (..., size), sums to ≤ 1.
    """
    t, _ = _edges(position_px, size, sigma_px)
    cdf = 0.5 * erf(t / math.sqrt(2.0))
    return cdf[..., 1:] - cdf[..., :-1]


def pixel_response_derivatives(position_px: Array, size: int, sigma_px: Array | float) -> Response:
    """`pixel_response` with its derivatives by position (1/px) and by sigma (1/px)."""
    xp = array_namespace(position_px)
    t, sigma = _edges(position_px, size, sigma_px)
    cdf = 0.5 * erf(t / math.sqrt(2.0))
    pdf = xp.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
    t_pdf = t * pdf
    return Response(
        value=cdf[..., 1:] - cdf[..., :-1],
        d_position=(pdf[..., :-1] - pdf[..., 1:]) / sigma,
        d_sigma=(t_pdf[..., :-1] - t_pdf[..., 1:]) / sigma,
    )


def render(
    xy_px: Array, intensity: Array, shape: tuple[int, int], sigma_px: Array | float
) -> Array:
    """Expected counts of point sources without background: m = Σ_k g_k · a_row(y_k) · a_col(x_k).

    xy_px (..., K, 2) px, intensity (..., K) counts, sigma_px scalar or (..., K) → (..., H, W).
    A source of intensity 0 contributes nothing, so ragged groups are padded with zeros.
    """
    height, width = shape
    row = pixel_response(xy_px[..., 1], height, sigma_px)  # (..., K, H)
    column = pixel_response(xy_px[..., 0], width, sigma_px)  # (..., K, W)
    xp = array_namespace(xy_px)
    return xp.matmul(xp.matrix_transpose(row * intensity[..., None]), column)


def peak_fraction(sigma_px: float) -> float:
    """Share of a source's counts in its brightest pixel when it is centred on that pixel."""
    return math.erf(0.5 / (math.sqrt(2.0) * sigma_px)) ** 2
