"""How like the map of the true targets an unmixed map is: PSNR and SSIM, as of 8-bit images.

Both maps (B, H, W) are in network units, 1.0 = full scale; × 255, clipped to 0–255 and rounded they
become images. An evaluator released with the CSIST benchmark (arXiv:2505.19148) cuts the fraction
off instead, and takes SSIM in a uniform 7 × 7 window with sample covariances: for a DISTA-Net that
is 0.3 dB more and the same SSIM within 0.001, and published figures can be compared no closer.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from trainer.errors import TrainerError

__all__ = ["IDENTICAL_DB", "psnr_db", "ssim"]

IDENTICAL_DB = 100.0
"""PSNR of identical images, which is infinite, as it enters an average."""

_PEAK = 255
_WINDOW_SIGMA, _WINDOW_RADIUS = 1.5, 5  # 11 × 11 cells
_LUMINANCE, _CONTRAST = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
_MAPS_AT_ONCE = 512

Images = NDArray[np.uint8]


def psnr_db(map_BHW: NDArray[np.floating], truth_BHW: NDArray[np.floating]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio (B,) in dB: 10 log₁₀(255² / mean square difference), 0–100.

    Raises ValueError for shapes that differ, TrainerError for maps that are not finite.
    """
    image_BHW, true_BHW = _as_images(map_BHW, truth_BHW)
    difference = image_BHW.astype(np.int32) - true_BHW
    mean_square = np.mean(difference**2, axis=(1, 2))
    differ = mean_square > 0.0
    ratio_db = np.full(len(mean_square), IDENTICAL_DB)
    ratio_db[differ] = 10.0 * np.log10(_PEAK**2 / mean_square[differ])
    return ratio_db


def ssim(map_BHW: NDArray[np.floating], truth_BHW: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean structural similarity (B,), −1 to 1 for identical maps.

    Wang, Bovik, Sheikh and Simoncelli, IEEE Trans. Image Process. 13 (2004) 600: Gaussian window
    of 11 × 11 cells, σ 1.5, K₁ 0.01, K₂ 0.03, L 255, averaged over the cells whose window lies
    within the map: scipy.ndimage.gaussian_filter, its outer 5 cells cut away. NaN for maps smaller
    than the window. Raises ValueError for shapes that differ, TrainerError for maps that are not
    finite.
    """
    image_BHW, true_BHW = _as_images(map_BHW, truth_BHW)
    similarity = np.full(len(image_BHW), np.nan)
    if min(image_BHW.shape[1:]) > 2 * _WINDOW_RADIUS:
        for start in range(0, len(image_BHW), _MAPS_AT_ONCE):
            part = slice(start, start + _MAPS_AT_ONCE)
            similarity[part] = _similarity(image_BHW[part], true_BHW[part]).mean(axis=(1, 2))
    return similarity


def _similarity(image_BHW: Images, true_BHW: Images) -> NDArray[np.float64]:
    """SSIM at each cell whose window lies within the map (B, H − 10, W − 10)."""
    a, b = image_BHW.astype(np.float64), true_BHW.astype(np.float64)
    mean_a, mean_b = _in_window(a), _in_window(b)
    product, squares = mean_a * mean_b, mean_a**2 + mean_b**2
    covariance = _in_window(a * b) - product
    variances = _in_window(a**2 + b**2) - squares
    luminance = (2.0 * product + _LUMINANCE) / (squares + _LUMINANCE)
    return luminance * (2.0 * covariance + _CONTRAST) / (variances + _CONTRAST)


def _in_window(values_BHW: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean in the window around each cell, where the window lies within the map."""
    inner = slice(_WINDOW_RADIUS, -_WINDOW_RADIUS)
    mean = gaussian_filter(values_BHW, _WINDOW_SIGMA, radius=_WINDOW_RADIUS, axes=(1, 2))
    result: NDArray[np.float64] = mean[:, inner, inner]
    return result


def _as_images(
    map_BHW: NDArray[np.floating], truth_BHW: NDArray[np.floating]
) -> tuple[Images, Images]:
    if map_BHW.ndim != 3 or map_BHW.shape != truth_BHW.shape:
        raise ValueError(f"maps (B, H, W) {map_BHW.shape} but true maps {truth_BHW.shape}")
    if not (np.isfinite(map_BHW).all() and np.isfinite(truth_BHW).all()):
        raise TrainerError("maps: hold values that are not finite; train the network again")
    return _as_image(map_BHW), _as_image(truth_BHW)


def _as_image(map_BHW: NDArray[np.floating]) -> Images:
    return np.rint(np.clip(map_BHW * _PEAK, 0, _PEAK)).astype(np.uint8)
