"""CSIST datasets: patches of closely-spaced targets with their truth, as a zarr group.

Arrays: image uint8|uint16 (N, 11, 11), target_count uint8 (N,), target_xy_px float32 (N, 5, 2) and
target_intensity float32 (N, 5), both padded with NaN. Attributes: format "csist", format_version,
profile, seed, sigma_px, full_scale, read_noise, gain (null: no shot noise), background, and, where
σ is uncertain, sigma_error (left out: as the profile has it).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.formats import _checks
from pipeline.physics.arrays import NumpyRandom
from pipeline.physics.groups import MAX_TARGETS, PROFILES, SIZE_PX, Profile, draw_patches
from pipeline.physics.sensor import Sensor

FORMAT = "csist"
BLOCK = 1024
"""Images a chunk, and images drawn from one random stream."""


@dataclass(frozen=True)
class CsistDataset:
    """A dataset in memory; rows beyond an image's target_count are NaN."""

    image: NDArray[Any]  # (N, 11, 11) uint8 or uint16 counts
    target_count: NDArray[np.uint8]  # (N,)
    target_xy_px: NDArray[np.float32]  # (N, 5, 2)
    target_intensity: NDArray[np.float32]  # (N, 5) counts
    sensor: Sensor
    profile: str
    seed: int | None  # None: not drawn but imported
    background: float  # counts

    def __len__(self) -> int:
        return len(self.image)

    def truths(self) -> list[NDArray[np.float64]]:
        """For each image its targets (m, 3): x px, y px, intensity; as `cso_map` takes them."""
        rows = np.concatenate([self.target_xy_px, self.target_intensity[..., None]], axis=-1)
        rows = rows.astype(np.float64)
        return [row[:count] for row, count in zip(rows, self.target_count.tolist(), strict=True)]


def write_csist(
    path: Path,
    profile: Profile,
    count: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Draw `count` images of a profile and write them to `path`, which must not exist.

    Image i is drawn from the random stream (seed, i // 1024), so a larger dataset of the same seed
    begins with the smaller one. progress: called with the number of images written so far. Raises
    PipelineError if `path` exists, cannot be written, or count or seed make no sense.
    """
    if count < 1:
        raise PipelineError(f"{path}: count must be 1 or more, got {count}")
    if seed < 0:
        raise PipelineError(f"{path}: seed must be 0 or more, got {seed}")
    with _checks.new_group(path) as group:
        arrays = _create(group, count, profile.sensor, profile.name, seed, profile.background)
        for block, start in enumerate(range(0, count, BLOCK)):
            end = min(start + BLOCK, count)
            for name, values in _draw(profile, NumpyRandom([seed, block])).items():
                arrays[name][start:end] = values[: end - start].astype(arrays[name].dtype)
            if progress is not None:
                progress(end)


def save_csist(path: Path, dataset: CsistDataset) -> None:
    """Write a dataset held in memory to `path`, which must not exist; raises PipelineError."""
    with _checks.new_group(path) as group:
        arrays = _create(
            group,
            len(dataset),
            dataset.sensor,
            dataset.profile,
            dataset.seed,
            dataset.background,
        )
        for name, found in arrays.items():
            found[...] = getattr(dataset, name).astype(found.dtype)


def read_csist(path: Path) -> CsistDataset:
    """Read and check a whole dataset; raises PipelineError naming what is malformed."""
    return dataset_from(path, _checks.open_group(path))


def dataset_from(path: Path, group: zarr.Group) -> CsistDataset:
    """`read_csist` of a group that is open already."""
    _checks.check_format(path, group, FORMAT)
    attributes = group.attrs.asdict()
    profile = _checks.attribute(path, attributes, "profile")
    if not isinstance(profile, str):
        raise PipelineError(f"{path}: attribute `profile` must be a name, got {profile!r}")
    known = {"sigma_error": PROFILES[profile].sensor.sigma_error} if profile in PROFILES else {}
    sensor = _checks.sensor_from(path, {"id": FORMAT, **known, **attributes})
    seed = _checks.attribute(path, attributes, "seed")
    if seed is not None:
        seed = int(_checks.number_attribute(path, attributes, "seed", whole=True))
    background = _checks.number_attribute(path, attributes, "background")
    size = (SIZE_PX, SIZE_PX)
    stored = _checks.array(path, group, "image", _checks.UNSIGNED, (None, *size))
    number = stored.shape[0]
    dataset = CsistDataset(
        image=_checks.values(path, group, "image", stored.dtype.name, (number, *size)),
        target_count=_checks.values(path, group, "target_count", "uint8", (number,)),
        target_xy_px=_checks.values(
            path, group, "target_xy_px", "float32", (number, MAX_TARGETS, 2)
        ),
        target_intensity=_checks.values(
            path, group, "target_intensity", "float32", (number, MAX_TARGETS)
        ),
        sensor=sensor,
        profile=profile,
        seed=seed,
        background=background,
    )
    _check_values(path, dataset)
    return dataset


def _check_values(path: Path, dataset: CsistDataset) -> None:
    brightest = dataset.image.max(axis=(1, 2), initial=0)
    limit = dataset.sensor.full_scale
    _checks.refuse(path, "image", f"must not exceed full_scale {limit}", brightest > limit)
    count = dataset.target_count
    _checks.refuse(path, "target_count", f"must not exceed {MAX_TARGETS}", count > MAX_TARGETS)
    present = np.arange(MAX_TARGETS) < count[:, None]
    rule = "must be finite for the first target_count targets and NaN after"
    for name, values in (
        ("target_xy_px", dataset.target_xy_px),
        ("target_intensity", dataset.target_intensity[..., None]),
    ):
        right = np.where(present[..., None], np.isfinite(values), np.isnan(values))
        _checks.refuse(path, name, rule, ~right.all(axis=(1, 2)))


def _create(
    group: zarr.Group,
    count: int,
    sensor: Sensor,
    profile: str,
    seed: int | None,
    background: float,
) -> dict[str, zarr.Array[Any]]:
    """The attributes and the empty arrays of a dataset."""
    attributes = sensor.to_attributes()
    group.attrs.update(
        {
            "format": FORMAT,
            "format_version": _checks.FORMAT_VERSION,
            "profile": profile,
            "seed": seed,
            **{name: value for name, value in attributes.items() if name != "id"},
            "background": background,
        }
    )
    layout: dict[str, tuple[str, tuple[int, ...], float]] = {
        "image": (_checks.dtype_for(sensor), (SIZE_PX, SIZE_PX), 0),
        "target_count": ("uint8", (), 0),
        "target_xy_px": ("float32", (MAX_TARGETS, 2), np.nan),
        "target_intensity": ("float32", (MAX_TARGETS,), np.nan),
    }
    return {
        name: group.create_array(
            name, shape=(count, *shape), chunks=(BLOCK, *shape), dtype=dtype, fill_value=fill
        )
        for name, (dtype, shape, fill) in layout.items()
    }


def _draw(profile: Profile, rng: NumpyRandom) -> dict[str, NDArray[Any]]:
    """One block of images and truth, whole, so that what is drawn does not depend on the count."""
    image, groups = draw_patches(profile, BLOCK, rng)
    absent = np.arange(MAX_TARGETS) >= groups.count[:, None]
    return {
        "image": image,
        "target_count": groups.count,
        "target_xy_px": np.where(absent[..., None], np.nan, groups.xy_px),
        "target_intensity": np.where(absent, np.nan, groups.intensity),
    }
