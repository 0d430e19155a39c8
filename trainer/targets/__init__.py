"""What a portable model is built for: one file a kind of target, each with a function `build`."""

from pathlib import Path
from typing import NamedTuple


class BuildFacts(NamedTuple):
    """What a builder says of the model it wrote; see `engines.build.Build`."""

    library: str
    device: str
    compute_capability: str | None = None
    driver: str | None = None
    optimisation_level: int | None = None
    timing_cache_sha256: str | None = None


def cpu_name() -> str:
    """E.g. AMD EPYC 9554; its architecture where the system does not say."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
