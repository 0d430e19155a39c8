"""Settings of the running system: who does what, who may have it, how long to wait for whom."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from pipeline.component import Settings
from pipeline.runtime.topology import Overflow

LOCAL_ENDPOINT = (
    r"ipc://[^@\0][^\0]*"
    r"|tcp://(127(\.[0-9]{1,3}){3}|localhost|\[::1\]):(?P<port>[0-9]{1,5}|\*)"
)
TCP_ENDPOINT = r"tcp://(\*|[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):(?P<port>[0-9]{1,5}|\*)"
METRICS_ENDPOINT = r"(127(\.[0-9]{1,3}){3}|localhost):(?P<port>[0-9]{1,5})"
LAST_PORT = 65535
NAME = r"^[A-Za-z0-9_.-]+$"


class NodeSettings(Settings):
    """Changes to one row of the topology."""

    stages: tuple[str, ...] | None = None
    replicas: int | None = Field(None, ge=1, le=64)
    queue: int | None = Field(None, ge=1, le=1024)
    overflow: Overflow | None = None
    budget_ms: float | None = Field(None, gt=0.0, le=1e6)
    cores: tuple[Annotated[int, Field(ge=0, le=4095)], ...] | None = Field(None, min_length=1)
    batch: int | None = Field(None, ge=1, le=256)
    batch_ms: float | None = Field(None, ge=0.0, le=1e5)


def _port_exists(endpoint: str | None, pattern: str) -> bool:
    found = re.fullmatch(pattern, endpoint or "")
    if not found:
        return False
    port = found["port"] or "*"
    if port != "*" and not 1 <= int(port) <= LAST_PORT:
        raise ValueError(f"the port must be 1…{LAST_PORT}, or * for any that is free")
    return True


def _local(endpoint: str | None) -> str | None:
    if endpoint is not None and not _port_exists(endpoint, LOCAL_ENDPOINT):
        raise ValueError("must be ipc://PATH or tcp://127.0.0.1:PORT")
    return endpoint


class PublishSettings(Settings):
    """Where target messages go out, and who may have them."""

    keys: Path | None = Field(None, description="DIR/server, made by `pipeline keys DIR`")
    endpoint: str | None = None
    queue: int = Field(
        1000, ge=1, le=1_000_000, description="messages a slow subscriber may fall behind"
    )
    heartbeat_s: float = Field(1.0, ge=0.1, le=3600.0)
    wait_for: int = Field(0, ge=0, description="subscribers to wait for before the first frame")
    frames: Annotated[str | None, AfterValidator(_local)] = Field(
        None, description="where `pipeline record` gets the frames: ipc or loopback"
    )

    @field_validator("endpoint")
    @classmethod
    def _strangers_need_keys(cls, endpoint: str | None, info: ValidationInfo) -> str | None:
        """Without authentication the stream stays on this machine, an ipc one with its owner."""
        if endpoint is None or _port_exists(endpoint, LOCAL_ENDPOINT):
            return endpoint
        if info.data.get("keys") is None:
            raise ValueError(
                "must be ipc://PATH or tcp://127.0.0.1:PORT: without keys nobody else is let in "
                "(make some with `pipeline keys DIR`, set publish.keys to DIR/server)"
            )
        if not _port_exists(endpoint, TCP_ENDPOINT):
            raise ValueError("must be ipc://PATH or tcp://ADDRESS:PORT")
        return endpoint


class SupervisorSettings(Settings):
    """How long to wait for what, and how often to try again."""

    name: str | None = Field(None, max_length=64, pattern=NAME, description="null: the sensor's id")
    max_age_ms: float = Field(
        1000.0, ge=1.0, le=1e6, description="live: what is not published in this time is dropped"
    )
    beside_ms: float = Field(
        100.0,
        ge=1.0,
        le=1e6,
        description="live: so long after a frame came in, what a node beside the flow says of it "
        "is waited for",
    )
    stall_s: float = Field(
        5.0, ge=0.2, le=3600.0, description="a node that is silent so long is restarted"
    )
    silent_s: float | None = Field(
        None,
        ge=1.0,
        le=86_400.0,
        description="live: the front is restarted if its source gives nothing for so long; "
        "null: never",
    )
    start_s: float = Field(120.0, ge=1.0, le=3600.0, description="for a node to become ready")
    restarts: int = Field(5, ge=0, le=10_000, description="of one node, within `within_s`")
    within_s: float = Field(60.0, ge=1.0, le=86_400.0)


class TelemetrySettings(Settings):
    """What the run tells of itself."""

    metrics: str | None = Field(None, description="ADDRESS:PORT for Prometheus, loopback only")
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    log_json: bool = False

    @field_validator("metrics")
    @classmethod
    def _loopback(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not _port_exists(endpoint, METRICS_ENDPOINT):
            raise ValueError("must be 127.0.0.1:PORT; let a proxy with TLS carry it further")
        return endpoint


class DeadLetterSettings(Settings):
    """Where malformed messages are kept with their cause."""

    folder: Path | None = None
    keep: int = Field(100, ge=1, le=100_000, description="the oldest is deleted for the next")
    keep_mb: float = Field(64.0, ge=2.0, le=1e6, description="of all of them, at most")


class SwapSettings(Settings):
    """What another engine must show on live frames before it takes over, see `parity`."""

    frames: int = Field(50, ge=0, le=100_000, description="with targets, to compare; 0: none")
    matched: float = Field(0.95, ge=0.0, le=1.0, description="share of targets found by both")
    within_px: float = Field(0.1, gt=0.0, le=10.0, description="how near the two must be")
    counted: float = Field(0.95, ge=0.0, le=1.0, description="share of groups of the same number")
    answered: float = Field(
        0.95, ge=0.0, le=1.0, description="share of the old detector's answers, by their number"
    )
    slower: float = Field(1.5, ge=1.0, le=1000.0, description="than the old one, beyond the budget")
    within_s: float = Field(60.0, ge=1.0, le=3600.0, description="then it is refused")
