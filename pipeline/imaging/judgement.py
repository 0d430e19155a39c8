# mypy: allow-untyped-defs, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""What is published of a frame's targets, compiled: which of them, with what covariance and count.

`candidates.significant`, `crowded` and `count_probabilities`, `independent_count` and
`group_bounds` are the definition, and the tests hold this to them.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.messages import MAX_COUNT, Flag, Unmixed
from pipeline.physics.candidates import LIKELY
from pipeline.physics.compiled import compiled, read_only
from pipeline.physics.grid import cell_variance_px2
from pipeline.physics.group_bounds import bound_all, model_of
from pipeline.physics.groups import MAX_TARGETS
from pipeline.physics.sensor import Sensor

Vector = NDArray[np.float64]
CROWDED = int(Flag.CROWDED)
_ROOT2 = math.sqrt(2.0)


class Judged(NamedTuple):
    """The targets to publish (K,), by fields of `TargetReport`, and their groups (N,)."""

    refined: NDArray[np.bool_]  # (K,)
    group: NDArray[np.int32]  # (K,)
    xy_px: Vector  # (K, 2) in the frame
    cov_px2: Vector  # (K, 3) xx, xy, yy
    intensity: Vector  # (K,) counts
    intensity_sigma: Vector  # (K,) counts
    p_exist: Vector  # (K,)
    snr: Vector  # (K,)
    flags: NDArray[np.uint16]  # (K,)
    count_posterior: Vector  # (N, 6) over 0, 1, …, 4, 5 or more
    group_flags: NDArray[np.uint16]  # (N,)


def judge(
    unmixed: Unmixed, sensor: Sensor, min_snr: float, min_p_exist: float
) -> tuple[NDArray[np.int64], Judged]:
    """Rows (K,) of the targets to publish, and what is published of them.

    What the method says of a target goes before what the imaging model says of it. The count is
    what the method says, if it says how probable each target and those before it are; otherwise
    that of the targets published, taken as independent.
    """
    patches = unmixed.patches
    arrays = (
        unmixed.patch,
        unmixed.xy_px,
        unmixed.intensity,
        unmixed.refined,
        unmixed.p_exist,
        unmixed.p_count,
        unmixed.cov_px2,
        unmixed.intensity_sigma,
        patches.background_BHW,
        patches.usable_BHW,
        patches.origin_px,
        patches.group,
        patches.flags,
    )
    least = (min_snr, min_p_exist)
    cell_px2 = cell_variance_px2(unmixed.cell_px)
    given = (read_only(array) for array in arrays)
    rows, *fields = _judge(*given, cell_px2, least, *model_of(sensor))
    return rows, Judged(*fields)


def compile_judgement() -> None:
    """Have this compiled, or read from its cache, now instead of with the first frame."""
    vector, pairs, image = (np.zeros((0, *shape)) for shape in ((), (2,), (1, 1)))
    patch, background = vector.astype(np.int32), image.astype(np.float32)
    targets = (patch, pairs, vector, vector > 0.0, vector, vector, np.zeros((0, 3)), vector)
    windows = (background, image > 0.0, pairs.astype(np.int32), patch, vector.astype(np.uint16))
    given = (read_only(array) for array in (*targets, *windows))
    _judge(*given, 0.0, (0.0, 0.0), *model_of(Sensor()))


def independent_count(group: NDArray[np.int32], p_exist: Vector, groups: int) -> Vector:
    """Probability (N, 6) of 0, 1, …, 4 and 5 or more targets in each group.

    Targets taken as independent, each real with its own probability (Poisson-binomial).
    """
    posterior = np.zeros((groups, MAX_COUNT + 1))
    posterior[:, 0] = 1.0
    for row, p in zip(group, p_exist, strict=True):
        before = posterior[row].copy()
        posterior[row, 1:] = before[1:] * (1.0 - p) + before[:-1] * p
        posterior[row, 0] = before[0] * (1.0 - p)
        posterior[row, -1] += before[-1] * p
    return np.clip(posterior, 0.0, 1.0)


@compiled
def _judge(
    patch, xy_px, intensity, refined, p_said, p_count, cov_said, sigma_said, background, usable,
    origin, group, flags, cell_px2, least, sigma, camera,
):  # fmt: skip
    """Rows of the targets published, and all of `Judged`.

    cell_px2: variance of a position that is only known to lie in a cell of a grid.
    """
    local_px, level = _seen_from_windows(patch, xy_px, background, origin, group, len(flags))
    asked = np.empty(len(patch), np.bool_)
    for m in range(len(patch)):
        said = cov_said[m, 0] + cov_said[m, 1] + cov_said[m, 2] + sigma_said[m]
        asked[m] = math.isnan(said)
    snr, cov_px2, deviation = bound_all(
        patch, local_px, intensity, level, usable, asked, sigma, camera
    )
    rows, p_exist = np.empty(len(patch), np.int64), np.empty(len(patch))
    members = np.zeros(len(group), np.int64)
    kept = 0
    for m in range(len(patch)):
        unlikely = p_count[m] < LIKELY or p_said[m] < least[1]
        publish = snr[m] >= least[0] and not unlikely
        members[patch[m]] += publish if math.isnan(p_count[m]) else p_count[m] >= LIKELY
        if publish:
            rows[kept], snr[kept] = m, snr[m]
            for a in range(3):
                gridded = cov_px2[m, a] + (cell_px2 if a != 1 else 0.0)
                cov_px2[kept, a] = _first(cov_said[m, a], gridded)
            deviation[kept] = _first(sigma_said[m], deviation[m])
            above = 0.5 * math.erfc(-intensity[m] / deviation[kept] / _ROOT2)
            p_exist[kept] = _first(p_said[m], above)
            kept += 1
    flags = flags.copy()
    for b in range(len(group)):
        if members[b] > MAX_TARGETS:
            flags[group[b]] |= CROWDED
    own_refined, own_flags = np.empty(kept, np.bool_), np.empty(kept, np.uint16)
    owner, own_xy_px, own_intensity = np.empty(kept, np.int32), np.empty((kept, 2)), np.empty(kept)
    for k in range(kept):
        m = rows[k]
        owner[k] = group[patch[m]]
        own_flags[k] = flags[owner[k]]
        own_xy_px[k, 0], own_xy_px[k, 1] = xy_px[m, 0], xy_px[m, 1]
        own_intensity[k], own_refined[k] = intensity[m], refined[m]
    posterior = np.zeros((len(flags), MAX_COUNT + 1))
    _count(patch, p_count, group, owner, p_exist, posterior)
    return (
        rows[:kept], own_refined, owner, own_xy_px, cov_px2[:kept], own_intensity,
        deviation[:kept], p_exist[:kept], snr[:kept], own_flags, posterior, flags,
    )  # fmt: skip


@compiled
def _first(said, otherwise):
    """What the method says, if it says anything."""
    return otherwise if math.isnan(said) else said


@compiled
def _seen_from_windows(patch, xy_px, background, origin, group, groups):
    """Positions (M, 2) in the windows, px, and mean backgrounds (B,), counts."""
    local_px, level = np.empty(xy_px.shape), np.zeros(len(group))
    for b in range(len(group)):
        if not 0 <= group[b] < groups:
            raise IndexError("a patch is of a group that is not there")
        for i in range(background.shape[1]):
            for j in range(background.shape[2]):
                level[b] += background[b, i, j]
        level[b] /= background[b].size
    for m in range(len(patch)):
        if not 0 <= patch[m] < len(group):
            raise IndexError("a target is in a patch that is not there")
        for a in range(2):
            local_px[m, a] = xy_px[m, a] - origin[patch[m], a]
    return local_px, level


@compiled
def _count(patch, p_count, group, owner, p_exist, posterior):
    """Fill the posterior (N, 6), zero so far: see `judge`."""
    for row in range(len(posterior)):
        posterior[row, 0] = 1.0
    said = len(patch) > 0
    for m in range(len(patch)):
        said &= not math.isnan(p_count[m])
    first = 0
    for m in range(len(patch) if said else 0):
        first = m if patch[m] != patch[first] else first
        if m - first < MAX_COUNT:
            row = group[patch[m]]
            posterior[row, m - first] -= p_count[m]
            posterior[row, m - first + 1] = p_count[m]
    for k in range(0 if said else len(owner)):
        chances, p = posterior[owner[k]], p_exist[k]
        surplus = chances[-1] * p
        for n in range(MAX_COUNT, 0, -1):
            chances[n] = chances[n] * (1.0 - p) + chances[n - 1] * p
        chances[0] *= 1.0 - p
        chances[-1] += surplus
    for row in range(len(posterior)):
        for n in range(MAX_COUNT + 1):
            posterior[row, n] = min(max(posterior[row, n], 0.0), 1.0)
