"""From pixels to angles: a pinhole with lens distortion, looking along a boresight.

Camera axes: x to the right, y down, z forward along the optical axis. A pixel is
u = cx + fx·x_d, v = cy + fy·y_d, where (x_d, y_d) is (x, y)/z bent by the lens as in Brown,
"Close-range camera calibration", 1971, with the coefficients and their order as in OpenCV:
x_d = x·(1 + k1 r² + k2 r⁴ + k3 r⁶) + 2 p1 x y + p2 (r² + 2x²), and y_d likewise.
Azimuth runs clockwise from north, elevation up; a positive roll turns the camera clockwise.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

STEP_PX = 1e-3
"""For the derivatives of the angles, by central differences: good to 1e-9 of their value."""

MAX_ITERATIONS = 100
CONVERGED = 1e-13

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Geometry:
    """A camera's intrinsics, in pixels, and where it looks when no frame says otherwise."""

    fx_px: float
    fy_px: float
    cx_px: float
    cy_px: float
    distortion: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)
    boresight: tuple[float, float, float] = (0.0, 0.0, 0.0)  # az, el, roll, radians

    def angles(
        self,
        xy_px: ArrayLike,
        cov_px2: ArrayLike,
        boresight: tuple[float, float, float] | None = None,
    ) -> tuple[Array, Array, Array]:
        """Azimuth (M,) in −π…π, elevation (M,), covariance (M, 3) az az, az el, el el; radians.

        xy_px (M, 2), cov_px2 (M, 3) xx, xy, yy; boresight: of this frame, instead of the own. The
        covariance is that of the position in the frame; what the boresight itself is unsure of
        is the same for all targets and not in it.
        """
        xy = np.asarray(xy_px, dtype=np.float64).reshape(-1, 2)
        xx, xy_, yy = np.asarray(cov_px2, dtype=np.float64).reshape(-1, 3).T
        step = STEP_PX * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
        direction = self._directions((xy + step[:, None, :]).reshape(-1, 2))
        world = direction @ _axes(*(boresight or self.boresight))
        az, el = _azimuth_elevation(world.reshape(5, -1, 3))
        az_x, az_y = (_wrapped(az[k] - az[k + 1]) / (2.0 * STEP_PX) for k in (1, 3))
        el_x, el_y = ((el[k] - el[k + 1]) / (2.0 * STEP_PX) for k in (1, 3))
        cov = np.stack(
            [
                az_x * az_x * xx + 2.0 * az_x * az_y * xy_ + az_y * az_y * yy,
                az_x * el_x * xx + (az_x * el_y + az_y * el_x) * xy_ + az_y * el_y * yy,
                el_x * el_x * xx + 2.0 * el_x * el_y * xy_ + el_y * el_y * yy,
            ],
            axis=-1,
        )
        return az[0], el[0], cov

    def _directions(self, xy_px: Array) -> Array:
        """Rays (M, 3) in camera axes, of any length."""
        bent = (xy_px - [self.cx_px, self.cy_px]) / [self.fx_px, self.fy_px]
        straight = self.undistorted(bent) if any(self.distortion) else bent
        return np.concatenate([straight, np.ones((len(straight), 1))], axis=1)

    def undistorted(self, bent: Array) -> Array:
        """Invert the lens for points (M, 2) of the plane z = 1, by fixed-point iteration.

        Raises ValueError where the distortion cannot be inverted.
        """
        k1, k2, p1, p2, k3 = self.distortion
        straight: Array = bent
        for _ in range(MAX_ITERATIONS):
            x, y = straight.T
            square = x * x + y * y
            radial = 1.0 + square * (k1 + square * (k2 + square * k3))
            sideways = np.stack(
                [
                    2.0 * p1 * x * y + p2 * (square + 2.0 * x * x),
                    p1 * (square + 2.0 * y * y) + 2.0 * p2 * x * y,
                ],
                axis=1,
            )
            with np.errstate(all="ignore"):
                following: Array = (bent - sideways) / radial[:, None]
            change = np.abs(following - straight).max(initial=0.0)
            straight = following
            if change < CONVERGED:
                return straight
            if not np.isfinite(change):
                break
        raise ValueError("the distortion cannot be inverted everywhere in the frame")


def _axes(az_rad: float, el_rad: float, roll_rad: float) -> Array:
    """The camera's x, y and z in east, north, up: one a row."""
    forward = np.array(
        [np.sin(az_rad) * np.cos(el_rad), np.cos(az_rad) * np.cos(el_rad), np.sin(el_rad)]
    )
    right = np.array([np.cos(az_rad), -np.sin(az_rad), 0.0])
    down = np.cross(forward, right)
    turned_right = np.cos(roll_rad) * right + np.sin(roll_rad) * down
    turned_down = np.cos(roll_rad) * down - np.sin(roll_rad) * right
    return np.stack([turned_right, turned_down, forward])


def _azimuth_elevation(world: Array) -> tuple[Array, Array]:
    east, north, up = np.moveaxis(world, -1, 0)
    return np.arctan2(east, north), np.arctan2(up, np.hypot(east, north))


def _wrapped(angle: Array) -> Array:
    """Into −π…π."""
    wrapped: Array = (angle + np.pi) % (2.0 * np.pi) - np.pi
    return wrapped
