"""Engines by name: the shipped ones in engines/models, or any manifest beside its model."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import engines.backends
from engines.base import Engine, Options
from engines.errors import EngineError, NoEngineFits
from engines.manifest import Manifest, SensorLike, read_manifest, sha256_of

MODELS = Path(__file__).parent / "models"
DEFAULT = "default"


def resolve(name_or_path: str, sensor: SensorLike, models: Path = MODELS) -> Path:
    """The manifest that is meant.

    "default": of the shipped engines that fit the sensor the most specific one, then the one of
    best held-out CSO-mAP. Another name: that shipped engine. A path: NAME.json, or the NAME.onnx
    beside it. Raises EngineError, NoEngineFits where there is no default; whether a named engine
    fits is left to `load`.
    """
    if Path(name_or_path).suffix in (".json", ".onnx"):
        path = Path(name_or_path).with_suffix(".json")
        if not path.is_file():
            raise EngineError(
                f"engine: no manifest {path}; `trainer export` writes model and manifest together"
            )
        return path
    shipped = {path.stem: path for path in sorted(models.glob("*.json"))}
    if name_or_path == DEFAULT:
        manifests = {name: read_manifest(path) for name, path in shipped.items()}
        return shipped[_best_fit(manifests, sensor)]
    if name_or_path not in shipped:
        raise EngineError(
            f"engine: no `{name_or_path}`; use {', '.join([DEFAULT, *shipped])}, "
            "or the path of a .json or .onnx"
        )
    return shipped[name_or_path]


def _best_fit(manifests: dict[str, Manifest], sensor: SensorLike) -> str:
    fitting = {name: m for name, m in manifests.items() if not m.fits(sensor)}
    if not fitting:
        reasons = [f"{name} is {m.fits(sensor)[0]}" for name, m in manifests.items()]
        raise NoEngineFits(
            f"engine: no shipped one fits this sensor ({'; '.join(reasons) or 'there is none'}); "
            "train one with `trainer fit` and `trainer export` and name its path, or use `model`, "
            "the imaging model without a network"
        )
    return most_specific(list(fitting.items()))


def most_specific(candidates: Sequence[tuple[str, Manifest]]) -> str:
    """Name of the engine that asks most of its sensor; among equals, of the best CSO-mAP."""
    return max(candidates, key=lambda item: (item[1].sensor.number, item[1].cso_map))[0]


def load(
    name_or_path: str,
    sensor: SensorLike,
    backend: str = "openvino_cpu",
    options: Options | None = None,
    models: Path = MODELS,
) -> Engine:
    """A warm engine for this sensor; raises EngineError, one line, if there is none."""
    path = resolve(name_or_path, sensor, models)
    manifest = read_manifest(path)
    mismatches = manifest.fits(sensor)
    if mismatches:
        raise EngineError(
            f"engine {path}: {'; '.join(mismatches)}; use `--engine {DEFAULT}`, or correct the "
            "sensor's fields in the config"
        )
    return open_engine(path, backend, options)


def open_engine(
    manifest_path: Path, backend: str = "openvino_cpu", options: Options | None = None
) -> Engine:
    """A warm engine for any sensor; raises EngineError if model and manifest do not agree."""
    manifest = read_manifest(manifest_path)
    model = manifest_path.with_suffix(".onnx")
    if not model.is_file():
        raise EngineError(f"{model}: the model is missing; put it beside {manifest_path.name}")
    digest = sha256_of(model)
    if digest != manifest.onnx_sha256:
        raise EngineError(
            f"{model}: truncated or altered (SHA-256 {digest[:12]}…, its manifest says "
            f"{manifest.onnx_sha256[:12]}…); copy or export it again"
        )
    return _backend(backend)(manifest, model, options or Options())


def available_backends() -> list[str]:
    """Names of all backends, whether or not their libraries are installed."""
    return sorted(module.name for module in iter_modules(engines.backends.__path__))


def _backend(name: str) -> Callable[[Manifest, Path, Options], Engine]:
    if name not in available_backends():
        raise EngineError(f"backend: no `{name}`; use {', '.join(available_backends())}")
    try:
        module = import_module(f"engines.backends.{name}")
    except ImportError as error:
        raise EngineError(
            f"backend {name}: its library is not installed ({error}); see the extras of "
            "irst-pipeline in pyproject.toml"
        ) from error
    made: Callable[[Manifest, Path, Options], Engine] = getattr(
        module, "".join(part.title() for part in name.split("_"))
    )
    return made
