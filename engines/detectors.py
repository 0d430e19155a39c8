"""Detectors of frames by name: the shipped ones in engines/models/detectors, or any manifest."""

from pathlib import Path

from engines.base import Engine, Options
from engines.build import SUFFIX
from engines.detector_manifest import DetectorManifest, read_detector_manifest
from engines.errors import EngineError
from engines.loader import MODELS, open_model

DETECTORS = MODELS / "detectors"


def load_detector(
    name_or_path: str, backend: str | None = None, options: Options | None = None
) -> Engine[DetectorManifest]:
    """A warm detector; raises EngineError, one line, if there is none."""
    if Path(name_or_path).suffix in (".json", *SUFFIX.values()):
        path = Path(name_or_path).with_suffix(".json")
        if not path.is_file():
            raise EngineError(
                f"detector: no manifest {path}; `trainer import-detector` writes one beside a model"
            )
    else:
        shipped = {path.stem: path for path in sorted(DETECTORS.glob("*.json"))}
        if name_or_path not in shipped:
            raise EngineError(
                f"detector: no `{name_or_path}`; use {', '.join(shipped)}, or the path of a .json "
                "or of the model beside it"
            )
        path = shipped[name_or_path]
    return open_model(path, read_detector_manifest(path), backend, options)
