"""Maps of networks off the grid, from what their cells are to say."""

import numpy as np
from scipy.special import logit

from pipeline.physics.grid import cell_centres_px


def cell_map(said: np.ndarray, c: int = 3) -> np.ndarray:
    """The map (B, 7 c², n, n) of cells (B, 7, cn, cn) that say p, x px, y px, intensity, sigmas."""
    said = said.astype(np.float64)
    batch, channels, side, _ = said.shape
    centre = cell_centres_px(side // c, c)
    raw = said.copy()
    raw[:, 0] = logit(np.clip(said[:, 0], 1e-12, 1.0 - 1e-12))
    raw[:, 1] = (said[:, 1] - centre) * c
    raw[:, 2] = (said[:, 2] - centre[:, None]) * c
    raw[:, 4:6] *= c
    raw[:, 4:] = np.log(np.maximum(raw[:, 4:] / np.sqrt(2.0), 1e-3))
    pixels = side // c
    shuffled = raw.reshape(batch, channels, pixels, c, pixels, c).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(
        shuffled.reshape(batch, channels * c * c, pixels, pixels), dtype=np.float32
    )
