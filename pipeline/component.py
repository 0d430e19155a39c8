"""Sources, stages and detectors as plug-ins: one file each, loaded when its name is named.

The file `pipeline/stages/detect.py` holds the class `Detect` with a nested `Config`; in a
configuration it is called `detect`. To add one, add a file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.errors import PipelineError
from pipeline.formats.calibration import Calibration
from pipeline.formats.recording import Truth as Truth  # part of what a source offers
from pipeline.messages import BadMessage, Dropped, Frame, SentFrame
from pipeline.numbering import Position
from pipeline.physics.geometry import Geometry
from pipeline.physics.sensor import Sensor

In = TypeVar("In")
Out = TypeVar("Out")


class Settings(BaseModel):
    """A section of the configuration: typed, frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Context:
    """What a stage may be built with, beside its own settings."""

    sensor: Sensor
    bad_pixels_HW: NDArray[np.bool_] | None = None
    engine: str = "default"
    calibration: Calibration | None = None
    geometry: Geometry | None = None


class Stage(ABC, Generic[In, Out]):
    """Turns one message into the next; knows no sockets, clocks or files."""

    Config: ClassVar[type[Settings]]

    def __init__(self, config: Any, sensor: Sensor) -> None:
        self._config, self._sensor = config, sensor

    @classmethod
    def build(cls, config: Any, context: Context) -> Self:
        """Make the stage from its settings and what it needs of the context: mostly the sensor."""
        return cls(config, context.sensor)

    @abstractmethod
    def process(self, message: In) -> Out:
        """The next message; raises on what cannot be processed, and the frame is then dropped."""

    def process_all(self, messages: Sequence[In]) -> list[Out]:
        """`process` of several messages, for a stage that does them faster together.

        If it raises, they are processed one by one, so that each answers for itself.
        """
        return [self.process(message) for message in messages]

    def close(self) -> None:
        """Release what the stage holds."""


class Source(ABC):
    """Yields frames; made in the process that reads them."""

    Config: ClassVar[type[Settings]]
    sensor: Sensor
    shape: tuple[int, int]
    length: int | None = None  # number of frames, None if endless or unknown
    truth: Truth | None = None
    position: Position | None = None  # after the frame last given, if its sender numbers them

    @classmethod
    @abstractmethod
    def build(cls, config: Any, sensor: dict[str, Any]) -> Self:
        """Open the source; `sensor` holds the configured fields, which override its own."""

    @abstractmethod
    def frames(self) -> Iterator[Frame | Dropped]:
        """The frames in order, seq counting from 0; a `Dropped` for each known to be lost."""

    def resume(self, position: Position) -> bool:  # noqa: ARG002, for those that have one
        """Before `frames`: go on where another process was, whose frames ended before 0 here.

        False if what was lost between cannot be told.
        """
        return False

    def close(self) -> None:  # noqa: B027, most sources hold nothing
        """Release what the source holds; `frames` ends soon after."""


class Inbox(Protocol):
    """Where frames of other programs arrive; used by the thread that opened it."""

    def receive(self, timeout_s: float) -> SentFrame | BadMessage | None:
        """What came next, None if nothing came in time."""

    def close(self) -> None:
        """Listen no more."""


Listen = Callable[[str], Inbox]
"""Opens the inbox at an endpoint; raises PipelineError if nobody can listen there."""


class FedSettings(Settings):
    """Of a source that others send frames to: where it listens for them."""

    endpoint: str


class FedSource(Source):
    """A source that others send frames to: it knows no sockets, and is told how to listen."""

    listen: Listen


def configured_sensor(own: Sensor, overrides: dict[str, Any], where: str) -> Sensor:
    """The source's own sensor with the configured fields over it; `where` names the source."""
    try:
        return replace(own, **overrides)
    except ValueError as error:
        raise PipelineError(f"{where}: {error}") from error


Kind = Literal["source", "stage", "detector"]


def available(kind: Kind) -> list[str]:
    """Names of all components of a kind."""
    folder = Path(__file__).parent / f"{kind}s"
    return sorted(module.name for module in iter_modules([str(folder)]))


def component(kind: Kind, name: str) -> type[Any]:
    """The class of a component, e.g. ("stage", "detect") → pipeline.stages.detect.Detect."""
    if name not in available(kind):
        raise PipelineError(f"unknown {kind} `{name}`; use one of {', '.join(available(kind))}")
    module = import_module(f"pipeline.{kind}s.{name}")
    found: type[Any] = getattr(module, "".join(part.title() for part in name.split("_")))
    return found
