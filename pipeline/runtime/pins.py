"""The files a run works with, copied into its folder: what is started again is what was running.

A file that is replaced, or half written, while a run goes on changes nothing in it. Another engine
comes by a swap, which tries it first, and by nothing else.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from engines.detector_manifest import read_detector_manifest
from engines.detectors import DETECTORS
from engines.errors import NoEngineFits
from engines.loader import copied, fitting, named
from pipeline.config import PipelineConfig
from pipeline.errors import RunError
from pipeline.formats.calibration import write_calibration
from pipeline.physics.model_only import MODEL
from pipeline.physics.sensor import Sensor
from pipeline.sensing import SensorSettings, stage_context
from pipeline.stages.recognise import Recognise


class Pinned(NamedTuple):
    """A configuration that names copies, and the folder of each original by that of its copy."""

    config: PipelineConfig
    originals: dict[str, str]


def told_of_originals(text: str, originals: dict[str, str]) -> str:
    """What is said of copies, with the files that a person knows."""
    for copy, original in originals.items():
        text = text.replace(copy, original)
    return text


def pinned(config: PipelineConfig, sensor: Sensor, run_dir: Path, generation: int) -> Pinned:
    """The configuration with its engines copied, for workers of this generation.

    Raises EngineError for an engine that is not whole or not for this sensor, RunError if there is
    no room for a copy.
    """
    folder = _folder(run_dir, generation)
    engine, stages = config.engine, dict(config.stages)
    originals = {}
    with contextlib.ExitStack() as undo, _room(run_dir):
        undo.callback(unpin, run_dir, generation)
        if "unmix" in config.stage_names and engine != MODEL:
            with contextlib.suppress(NoEngineFits):  # the imaging model alone unmixes then
                path, manifest = fitting(engine, sensor)
                copy = copied(path, manifest, folder / "engine")
                engine, originals[str(copy.parent)] = str(copy), str(path.parent)
        detector = stages.get("recognise")
        if isinstance(detector, Recognise.Config):
            path = named(detector.engine, DETECTORS, "detector", "")
            copy = copied(path, read_detector_manifest(path), folder / "detector")
            stages["recognise"] = detector.model_copy(update={"engine": str(copy)})
            originals[str(copy.parent)] = str(path.parent)
        undo.pop_all()
    return Pinned(replace(config, engine=engine, stages=stages), originals)


def unpin(run_dir: Path, generation: int) -> None:
    """Remove the engines of a generation of which no worker will be started again."""
    shutil.rmtree(_folder(run_dir, generation), ignore_errors=True)


def _folder(run_dir: Path, generation: int) -> Path:
    return run_dir / f"engines.{generation}"


def pinned_sensor(
    settings: SensorSettings, sensor: Sensor, shape: tuple[int, int], run_dir: Path
) -> SensorSettings:
    """The settings with the map of bad pixels and the calibration copied.

    Raises PipelineError for one that cannot be used, RunError if there is no room for a copy.
    """
    known = stage_context(settings, sensor, shape, "")
    copies = {}
    with _room(run_dir):
        if settings.bad_pixels is not None:
            copies["bad_pixels"] = run_dir / "bad_pixels.png"
            shutil.copyfile(settings.bad_pixels, copies["bad_pixels"])
        if known.calibration is not None:
            copies["calibration"] = run_dir / "calibration.zarr"
            write_calibration(copies["calibration"], known.calibration)
    return settings.model_copy(update=copies)


@contextlib.contextmanager
def _room(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{run_dir}: the run's engines and maps cannot be copied there ({error.strerror}); "
            "make room, or set TMPDIR to another place"
        ) from error
