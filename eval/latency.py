"""Latency of one call as its caller sees it: wall clock round whole calls, warm-up apart, nothing discarded."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call over `repeats` calls, and what a batch of it yields."""

    batch: int
    repeats: int
    p50_ms: float
    p90_ms: float
    min_ms: float
    images_per_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    call: Callable[[], object],
    *,
    batch: int,
    warmup: int = 3,
    repeats: int = 20,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
) -> Latency:
    """Time `call`, which makes `batch` images; the garbage collector rests meanwhile."""
    for _ in range(warmup):
        call()
    synchronize()
    times = []
    with _no_gc():
        for _ in range(repeats):
            began = clock()
            call()
            synchronize()
            times.append((clock() - began) * 1000)
    t = torch.tensor(times, dtype=torch.float64)
    p50 = float(t.quantile(0.5))
    return Latency(batch, repeats, p50, float(t.quantile(0.9)), float(t.min()), batch / p50 * 1000)


@contextmanager
def _no_gc() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
