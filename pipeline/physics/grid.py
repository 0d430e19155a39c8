"""The sub-pixel grid of the unmixing networks: cells, the sampling matrix, maps and their peaks.

Each pixel is divided into c × c cells (c odd). Cell i has its centre at (i − (c − 1)/2)/c px.
Maps are (..., cH, cW), row = y, and hold intensity in each cell.
"""

from typing import NamedTuple

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

from pipeline.physics.arrays import Array
from pipeline.physics.psf import pixel_response


def cell_centres_px(size: int, c: int) -> NDArray[np.float64]:
    """Positions of the c · size cell centres along one axis, px."""
    return (np.arange(c * size) - (c - 1) / 2) / c


def cell_index(position_px: Array, c: int) -> Array:
    """Index of the cell that holds each position along one axis (floating point, whole numbers)."""
    return array_namespace(position_px).floor(position_px * c + c / 2)


def cell_variance_px2(cell_px: float) -> float:
    """Variance along one axis of a position known only to lie in a cell: cell²/12."""
    return cell_px**2 / 12.0


def sampling_matrix(size: int, c: int, sigma_px: float) -> NDArray[np.float64]:
    """Φ (size², (c·size)²): counts in each pixel from unit intensity at each cell's centre.

    Both sides are flattened row-major, so `counts = Φ @ map.ravel()`.
    """
    response = pixel_response(cell_centres_px(size, c), size, sigma_px)  # (c·size, size)
    result: NDArray[np.float64] = np.einsum("ar,bq->rqab", response, response).reshape(
        size**2, (c * size) ** 2
    )
    return result


def target_map(xy_px: Array, intensity: Array, size: int, c: int) -> Array:
    """The map a perfect on-grid network would give: each target's intensity in its cell.

    xy_px (B, K, 2), intensity (B, K), zero for padding → (B, c·size, c·size). Targets that fall
    outside the patch go to its nearest cell; two in one cell add up.
    """
    xp = array_namespace(xy_px, intensity)
    cells = c * size
    index = xp.astype(xp.clip(cell_index(xy_px, c), 0, cells - 1), xp.int64)  # (B, K, 2)
    axis = xp.arange(cells, dtype=xp.int64)
    if hasattr(xy_px, "device"):
        axis = xp.asarray(axis, device=xy_px.device)
    row = xp.astype(index[..., 1, None] == axis, intensity.dtype)  # (B, K, cells)
    column = xp.astype(index[..., 0, None] == axis, intensity.dtype)
    return xp.matmul(xp.matrix_transpose(row * intensity[..., None]), column)


class Peaks(NamedTuple):
    """Candidates read off maps, neighbours if of one map."""

    image: NDArray[np.int64]  # (N,) which map
    xy_px: NDArray[np.float64]  # (N, 2)
    intensity: NDArray[np.float64]  # (N,) summed
    value: NDArray[np.float64]  # (N,) of the cell; the stronger the surer
    p_exist: NDArray[np.float64]  # (N,) this and the next three: NaN where it is not said
    p_count: NDArray[np.float64]  # (N,) that the map holds this and those before it, at least
    cov_px2: NDArray[np.float64]  # (N, 3) xx, xy, yy
    intensity_sigma: NDArray[np.float64]  # (N,)

    @classmethod
    def on_grid(
        cls,
        image: NDArray[np.int64],
        xy_px: NDArray[np.float64],
        intensity: NDArray[np.float64],
        value: NDArray[np.float64],
    ) -> "Peaks":
        """Of a map that says no more than the cell."""
        unsaid = np.full(len(image), np.nan)
        unknown = np.full((len(image), 3), np.nan)
        return cls(image, xy_px, intensity, value, unsaid, unsaid, unknown, unsaid)

    def take(self, rows: NDArray[np.int64]) -> "Peaks":
        """Some of them."""
        return self._replace(**{name: getattr(self, name)[rows] for name in self._fields})


def grid_detections(map_BHW: NDArray[np.floating], c: int, threshold: float) -> Peaks:
    """Every cell at or above `threshold` is a detection at the cell's centre.

    The literature's reading of a map, on which its published CSO-mAP figures rest.
    """
    index, row, column = np.nonzero(map_BHW >= threshold)
    value = map_BHW[index, row, column].astype(np.float64)
    centres = cell_centres_px(map_BHW.shape[1] // c, c)
    xy_px = np.stack([centres[column], centres[row]], axis=1)
    return Peaks.on_grid(index, xy_px, value.copy(), value)


def local_maxima(
    map_BHW: NDArray[np.floating], c: int, threshold: float, *, separate: float
) -> Peaks:
    """Peaks of the maps with positions below the cell.

    A cell is a peak if it reaches `threshold` and `separate` (0–1) of the largest cell in its
    3 × 3 neighbourhood: two targets may lie in neighbouring cells, while an uncertain one spreads
    over both. What the other cells hold goes to the peaks they touch, in proportion to them. A
    peak's intensity is all it gathered, its position the centroid. Negative cells count as zero.
    """
    height, width = map_BHW.shape[1:]
    values = np.clip(map_BHW.astype(np.float64), 0.0, None)

    def neighbourhood(cells: NDArray[np.float64]) -> NDArray[np.float64]:
        padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)))
        return np.stack(
            [padded[:, dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
        )

    highest = neighbourhood(values).max(axis=0)
    is_peak = (values >= max(threshold, np.finfo(np.float64).tiny)) & (values >= separate * highest)
    peaks = np.where(is_peak, values, 0.0)
    claims = neighbourhood(peaks).sum(axis=0)
    spare = np.divide(values, claims, out=np.zeros_like(values), where=~is_peak & (claims > 0.0))

    centres_y = cell_centres_px(height // c, c)[None, :, None]
    centres_x = cell_centres_px(width // c, c)[None, None, :]
    index, row, column = np.nonzero(is_peak)
    here = (index, row, column)
    gathered, moment_x, moment_y = (
        values[here] * (1.0 if weight is None else np.broadcast_to(weight, values.shape)[here])
        + peaks[here] * neighbourhood(spare if weight is None else spare * weight).sum(axis=0)[here]
        for weight in (None, centres_x, centres_y)
    )
    xy_px = np.stack([moment_x, moment_y], axis=1) / gathered[:, None]
    return Peaks.on_grid(index, xy_px, gathered, values[here])
