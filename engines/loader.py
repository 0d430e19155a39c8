"""Engines by name: the shipped ones in engines/models, or any manifest beside its model."""

import logging
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol

import engines.backends
from engines.base import Engine, Kind, Options
from engines.build import BACKEND, SUFFIX, Build
from engines.errors import EngineError, NoEngineFits
from engines.manifest import EngineManifest, Manifest, read_manifest, sha256_of
from engines.sensor_needs import SensorLike

log = logging.getLogger(__name__)

MODELS = Path(__file__).parent / "models"
DEFAULT = "default"
PORTABLE = "openvino_cpu"
"""What runs a model that was not built for a target."""


class Backend(Protocol):
    """A class of engines/backends."""

    def __call__(self, manifest: Kind, model: Path, options: Options) -> Engine[Kind]:
        """Load the model beside its manifest."""
        ...

    def misfits(self, build: Build) -> list[str]:
        """See `Engine.misfits`."""
        ...


def resolve(name_or_path: str, sensor: SensorLike, models: Path = MODELS) -> Path:
    """The manifest that is meant.

    "default": of the shipped engines that fit the sensor the most specific one, then the one of
    best held-out CSO-mAP, and of that the build this machine can run. Another name: that shipped
    engine. A path: NAME.json, or the model beside it. Raises EngineError, NoEngineFits where there
    is no default; whether a named engine fits is left to `load`.
    """
    if name_or_path == DEFAULT:
        manifests = {path.stem: read_manifest(path) for path in _shipped(models).values()}
        return models / f"{_best_fit(manifests, sensor)}.json"
    hint = "`trainer export` writes model and manifest together"
    return named(name_or_path, models, "engine", hint, also=(DEFAULT,))


def named(
    name_or_path: str, models: Path, what: str, hint: str, also: tuple[str, ...] = ()
) -> Path:
    """The manifest of this path, or of this name in the folder.

    what, hint, also: for the one line of the EngineError: what is looked for, where a manifest
    comes from, and names there are besides.
    """
    if Path(name_or_path).suffix in (".json", *SUFFIX.values()):
        path = Path(name_or_path).with_suffix(".json")
        if not path.is_file():
            raise EngineError(f"{what}: no manifest {path}; {hint}")
        return path
    shipped = _shipped(models)
    if name_or_path not in shipped:
        raise EngineError(
            f"{what}: no `{name_or_path}`; use {', '.join([*also, *shipped])}, "
            "or the path of a .json or of the model beside it"
        )
    return shipped[name_or_path]


def _shipped(models: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(models.glob("*.json"))}


def _best_fit(manifests: dict[str, Manifest], sensor: SensorLike) -> str:
    portable = {name: m for name, m in manifests.items() if m.build is None}
    fitting = {name: m for name, m in portable.items() if not m.fits(sensor)}
    if not fitting:
        reasons = [f"{name} is {m.fits(sensor)[0]}" for name, m in portable.items()]
        raise NoEngineFits(
            f"engine: no shipped one fits this sensor ({'; '.join(reasons) or 'there is none'}); "
            "train one with `trainer fit` and `trainer export` and name its path, or use `model`, "
            "the imaging model without a network"
        )
    best = most_specific(list(fitting.items()))
    return _built_for_here(manifests, fitting[best]) or best


def most_specific(candidates: Sequence[tuple[str, Manifest]]) -> str:
    """Name of the engine that asks most of its sensor; among equals, of the best CSO-mAP."""
    return max(candidates, key=lambda item: (item[1].sensor.number, item[1].cso_map))[0]


def _built_for_here(manifests: dict[str, Manifest], portable: Manifest) -> str | None:
    """The build of a portable model that this machine runs best, if there is one."""
    builds = {
        m.build.target: (name, m.build)
        for name, m in manifests.items()
        if m.build is not None and m.onnx_sha256 == portable.onnx_sha256
    }
    for target in BACKEND:
        name, build = builds.get(target, ("", None))
        if build is None:
            continue
        reasons = misfits(build)
        if not reasons:
            return name
        log.info("engine %s is passed over: %s", name, reasons[0])
    return None


def misfits(build: Build) -> list[str]:
    """What of this machine is not what the model was built for, a line each; empty if it runs."""
    try:
        return _backend(BACKEND[build.target]).misfits(build)
    except EngineError as error:
        return [str(error)]


def fitting(name_or_path: str, sensor: SensorLike, models: Path = MODELS) -> tuple[Path, Manifest]:
    """`resolve`, and what the manifest says; raises EngineError if it is not for this sensor."""
    path = resolve(name_or_path, sensor, models)
    manifest = read_manifest(path)
    mismatches = manifest.fits(sensor)
    if mismatches:
        raise EngineError(
            f"engine {path}: {'; '.join(mismatches)}; use `--engine {DEFAULT}`, or correct the "
            "sensor's fields in the config"
        )
    return path, manifest


def load(
    name_or_path: str,
    sensor: SensorLike,
    backend: str | None = None,
    options: Options | None = None,
    models: Path = MODELS,
) -> Engine:
    """A warm engine for this sensor; raises EngineError, one line, if there is none."""
    path, manifest = fitting(name_or_path, sensor, models)
    told = replace(options or Options(), sigma_px=sensor.sigma_px)
    return open_model(path, manifest, backend, told)


def open_engine(
    manifest_path: Path, backend: str | None = None, options: Options | None = None
) -> Engine:
    """A warm engine for any sensor; see `open_model`."""
    return open_model(manifest_path, read_manifest(manifest_path), backend, options)


def open_model(
    manifest_path: Path,
    manifest: Kind,
    backend: str | None = None,
    options: Options | None = None,
) -> Engine[Kind]:
    """The model beside this manifest, of any kind, on the backend it is for.

    backend: for a portable model, without: OpenVINO. Raises EngineError if model and manifest do
    not agree, the model was built for another machine or backend, or its backend is not installed.
    """
    build, options = manifest.build, options or Options()
    wanted = BACKEND[build.target] if build else PORTABLE
    if build is not None and backend not in (None, wanted):
        raise EngineError(
            f"engine {manifest_path}: built for {build.target}, not for backend {backend}; use "
            f"backend {wanted}, or the portable model"
        )
    model = whole_model(manifest_path, manifest)
    made = _backend(backend or wanted)
    reasons = made.misfits(build) if build else []
    if build is not None and reasons:
        raise EngineError(
            f"engine {manifest_path}: {'; '.join(reasons)}; use the portable model, or run "
            f"`trainer compile MODEL.onnx --target {build.target}` on the machine it is to run on"
        )
    if "sigma_px" in manifest.conditions and options.sigma_px is None:
        raise EngineError(f"engine {manifest_path}: must be told the sensor's sigma_px; name one")
    return made(manifest, model, options)


def model_path(manifest_path: Path, build: Build | None) -> Path:
    """The model file beside a manifest."""
    return manifest_path.with_suffix(SUFFIX[build.target] if build else ".onnx")


def whole_model(manifest_path: Path, manifest: EngineManifest) -> Path:
    """The model file beside a manifest; raises EngineError if it is not the one that is meant."""
    build = manifest.build
    model = model_path(manifest_path, build)
    if not model.is_file():
        raise EngineError(f"{model}: the model is missing; put it beside {manifest_path.name}")
    if model.suffix != ".onnx":
        check_private(model)
    digest, sha256 = sha256_of(model), build.model_sha256 if build else manifest.onnx_sha256
    if digest != sha256:
        raise EngineError(
            f"{model}: truncated or altered (SHA-256 {digest[:12]}…, its manifest says "
            f"{sha256[:12]}…); copy it, or export or compile it again"
        )
    return model


def copied(manifest_path: Path, manifest: EngineManifest, folder: Path) -> Path:
    """The manifest of a copy of an engine, made in a new folder that is this user's alone.

    Raises EngineError if the engine is not whole, OSError if it cannot be copied.
    """
    model = whole_model(manifest_path, manifest)
    folder.mkdir(parents=True, mode=0o700)
    copy = folder / manifest_path.name
    manifest.write(copy)
    shutil.copyfile(model, folder / model.name)
    (folder / model.name).chmod(0o600)
    whole_model(copy, manifest)  # it may have been replaced while it was copied
    return copy


def check_private(model: Path) -> None:
    """Refuse a file that somebody else could have put there: such models are programs."""
    for path in (model, model.parent, model.resolve().parent):
        facts = path.stat()
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise EngineError(
                f"{path}: can be written to by others, and such a model runs as a program; "
                f"chmod go-w {path}"
            )
        if facts.st_uid not in (0, os.getuid()):
            raise EngineError(
                f"{path}: belongs to another user, and such a model runs as a program; copy it to "
                "a folder of your own"
            )


def available_backends() -> list[str]:
    """Names of all backends, whether or not their libraries are installed."""
    return sorted(
        module.name for module in iter_modules(engines.backends.__path__) if module.name[0] != "_"
    )


def _backend(name: str) -> Backend:
    if name not in available_backends():
        raise EngineError(f"backend: no `{name}`; use {', '.join(available_backends())}")
    try:
        module = import_module(f"engines.backends.{name}")
    except ImportError as error:
        raise EngineError(
            f"backend {name}: its library is not installed ({error}); see the extras of "
            "irst-pipeline in pyproject.toml"
        ) from error
    made: Backend = getattr(module, "".join(part.title() for part in name.split("_")))
    return made
