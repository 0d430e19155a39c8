"""Detectors of frames by name: the shipped ones in engines/models/detectors, or any manifest."""

from engines.base import Engine, Options
from engines.detector_manifest import DetectorManifest, read_detector_manifest
from engines.loader import MODELS, named, open_model

DETECTORS = MODELS / "detectors"


def load_detector(
    name_or_path: str, backend: str | None = None, options: Options | None = None
) -> Engine[DetectorManifest]:
    """A warm detector; raises EngineError, one line, if there is none."""
    hint = "`trainer import-detector` writes one beside a model"
    path = named(name_or_path, DETECTORS, "detector", hint)
    return open_model(path, read_detector_manifest(path), backend, options)
