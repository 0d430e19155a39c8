"""The files a run works with, copied into its folder: what is started again is what was running.

A file that is replaced, or half written, while a run goes on changes nothing in it. Another engine
comes by a swap, which tries it first, and by nothing else.
"""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

from engines.detector_manifest import read_detector_manifest
from engines.detectors import DETECTORS
from engines.errors import EngineError
from engines.loader import copied, named, resolve
from engines.manifest import read_manifest
from pipeline.config import PipelineConfig
from pipeline.errors import PipelineError
from pipeline.physics.sensor import Sensor
from pipeline.sensing import SensorSettings, stage_context
from pipeline.stages.recognise import Recognise

UNUSABLE = (EngineError, PipelineError, OSError)
"""What then stays where it is; the node that is given it says what is wrong with which file."""


def pinned(
    config: PipelineConfig, sensor: Sensor, run_dir: Path, generation: int
) -> PipelineConfig:
    """The configuration with its engines copied, for workers of this generation."""
    unpin(run_dir, generation)  # of one that was refused
    folder = _folder(run_dir, generation)
    engine, stages = config.engine, dict(config.stages)
    with contextlib.suppress(*UNUSABLE):
        path = resolve(config.engine, sensor)
        manifest = read_manifest(path)
        if not manifest.fits(sensor):
            engine = str(copied(path, manifest, folder / "engine"))
    detector = stages.get("recognise")
    if isinstance(detector, Recognise.Config):
        with contextlib.suppress(*UNUSABLE):
            path = named(detector.engine, DETECTORS, "detector", "")
            copy = copied(path, read_detector_manifest(path), folder / "detector")
            stages["recognise"] = detector.model_copy(update={"engine": str(copy)})
    return replace(config, engine=engine, stages=stages)


def unpin(run_dir: Path, generation: int) -> None:
    """Remove the engines of a generation of which no worker will be started again."""
    shutil.rmtree(_folder(run_dir, generation), ignore_errors=True)


def _folder(run_dir: Path, generation: int) -> Path:
    return run_dir / f"engines.{generation}"


def pinned_sensor(
    settings: SensorSettings, sensor: Sensor, shape: tuple[int, int], run_dir: Path
) -> SensorSettings:
    """The settings with the map of bad pixels and the calibration copied."""
    copies = {}
    with contextlib.suppress(*UNUSABLE):
        stage_context(settings, sensor, shape, "")
        for name in ("bad_pixels", "calibration"):
            path = getattr(settings, name)
            if path is not None:
                copy = run_dir / name / path.name
                copy.parent.mkdir(parents=True)
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
                copies[name] = copy
        stage_context(settings.model_copy(update=copies), sensor, shape, "")
        return settings.model_copy(update=copies)
    return settings
