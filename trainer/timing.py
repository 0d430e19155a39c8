"""How long an engine takes."""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine
from engines.build import Latency

TIMED_S = 0.5
FEWEST = 5  # calls


def timed(
    engine: Engine[Any], batch: int, patch: NDArray[np.float32], seconds: float = TIMED_S
) -> Latency:
    """Of calls with so many patches at a time, for so long; patch: what to fill them with."""
    given = np.resize(patch, (batch, *patch.shape[1:]))
    out = engine.infer(given)
    spent: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(spent) < FEWEST:
        began = time.perf_counter()
        engine.infer(given, out)
        spent.append(time.perf_counter() - began)
    p50, p99 = np.percentile(spent, [50, 99]) * 1e3
    return Latency(batch=batch, p50_ms=round(float(p50), 4), p99_ms=round(float(p99), 4))
