"""How long one call takes: warmed up, timed by the device's clock and by the caller's, nothing discarded.

The device's clock (CUDA events round each call, one synchronise at the end) says what the work costs when calls follow
each other; the caller's (wall clock, a synchronise after each call) says how long one answer takes. On a CPU they are
the same.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

LEAST = 5  # calls of a pass that its limit of seconds cuts short
MOST = 2000  # calls of a pass, however short they are
STAGED = 10  # calls whose stages are timed
LAUNCH_BOUND = 0.1  # the share of the caller's time that the device's clock does not see
OFF: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True)
class Summary:
    """Milliseconds of n calls; percentiles by linear interpolation."""

    n: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    mean_ms: float
    std_ms: float
    iqr_ms: float


def summarise(times_ms: list[float]) -> Summary:
    """All of them count; std is the sample's (0 for one call)."""
    t = torch.tensor(times_ms, dtype=torch.float64)
    q25, p50, q75, p90, p99 = t.quantile(torch.tensor([0.25, 0.5, 0.75, 0.9, 0.99], dtype=torch.float64)).tolist()
    std = float(t.std()) if len(t) > 1 else 0.0
    return Summary(len(t), p50, p90, p99, float(t.min()), float(t.mean()), std, q75 - q25)


class Watch(Protocol):
    """Marks in a device's work, and the caller's clock beside it. `behind`: the device works on when a call is back."""

    behind: bool

    def mark(self) -> Any:
        """This point of the work."""
        ...

    def between(self, first: Any, second: Any) -> float:
        """Milliseconds between two marks; only after `synchronize`."""
        ...

    def wall(self) -> float:
        """The caller's clock, in seconds."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        ...


class HostWatch:
    """A device that works while it is called: the caller's clock serves for both."""

    behind = False

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.wall = clock
        self.mark = clock

    def between(self, first: float, second: float) -> float:
        return (second - first) * 1000

    def synchronize(self) -> None:
        pass


class CudaWatch:
    """CUDA events on the current stream."""

    behind = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second)

    def wall(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


def watch_for(device: torch.device) -> Watch:
    return CudaWatch(device) if device.type == "cuda" else HostWatch()


class Stages:
    """`with stages("decode"): ...` marks a part of a call while it is on, and does nothing while it is off."""

    def __init__(self, watch: Watch | None = None) -> None:
        self.watch, self.on = watch, False
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self._timed(name) if self.on else OFF

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        assert self.watch is not None
        began = self.watch.mark()
        yield
        self._marks.setdefault(name, []).append((began, self.watch.mark()))

    def medians(self) -> dict[str, float]:
        """Median milliseconds by stage, in the order of the call; only after a synchronise."""
        watch = self.watch
        if watch is None:
            return {}
        return {name: statistics.median(watch.between(*pair) for pair in pairs) for name, pairs in self._marks.items()}


@dataclass(frozen=True)
class Plan:
    """How much is warmed up and timed: at least so many calls and so many seconds.

    limit_s  of each pass: a slow call is cut short there, after LEAST calls; the row says how many there were
    """

    warmup: int = 10
    warmup_s: float = 3.0
    calls: int = 50
    seconds: float = 10.0
    limit_s: float = 30.0

    def count(self, one_s: float) -> int:
        """Calls of a pass when one takes so many seconds."""
        one_s = max(one_s, 1e-9)
        wanted = max(self.calls, math.ceil(min(self.seconds / one_s, MOST)))
        return min(wanted, MOST, max(LEAST, math.floor(min(self.limit_s / one_s, MOST))))


CPU_PLAN = Plan(warmup=2, warmup_s=0.0, calls=5, seconds=1.0, limit_s=10.0)


@dataclass(frozen=True)
class Timing:
    """What was measured of one call. first_call_ms is the cold one, with compilation, and part of nothing else."""

    device: Summary
    wall: Summary
    first_call_ms: float
    warmup: int
    stages_ms: dict[str, float] = field(default_factory=dict)

    @property
    def launch_bound(self) -> bool:
        """The caller waits over 10 % longer than the device works: launching is the bottleneck; graphs would help."""
        return self.wall.p50_ms - self.device.p50_ms > LAUNCH_BOUND * self.wall.p50_ms


def first_call(call: Callable[[], object], watch: Watch) -> float:
    """Milliseconds of the cold call."""
    watch.synchronize()
    began = watch.wall()
    call()
    watch.synchronize()
    return (watch.wall() - began) * 1000


def time_call(
    call: Callable[[], object],
    watch: Watch,
    plan: Plan,
    *,
    stages: Stages | None = None,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Timing:
    """Time `call` by the plan; `around` surrounds the pass of the device's clock (energy and memory are read there)."""
    first = first_call(call, watch)
    with no_gc():
        warm = _walls(call, watch, lambda n, spent: _warm(plan, n, spent))
        count = plan.count(statistics.median(warm[len(warm) // 2 :]) / 1000) if warm else plan.calls
        with around():
            device = _marks(call, watch, count)
        wall = _walls(call, watch, lambda n, spent: n >= min(count, plan.calls)) if watch.behind else device
        if stages is not None:
            _stages(call, watch, stages, min(count, STAGED))
    return Timing(summarise(device), summarise(wall), first, len(warm), stages.medians() if stages else {})


def _warm(plan: Plan, n: int, spent: float) -> bool:
    return (n >= plan.warmup and spent >= plan.warmup_s) or (n >= min(plan.warmup, LEAST) and spent >= plan.limit_s)


def _walls(call: Callable[[], object], watch: Watch, enough: Callable[[int, float], bool]) -> list[float]:
    """Milliseconds of calls each waited for, until there are enough."""
    times: list[float] = []
    while not enough(len(times), sum(times) / 1000):
        began = watch.wall()
        call()
        watch.synchronize()
        times.append((watch.wall() - began) * 1000)
    return times


def _marks(call: Callable[[], object], watch: Watch, count: int) -> list[float]:
    """Milliseconds between marks round each of the calls, which nobody waits for."""
    pairs = []
    watch.synchronize()
    for _ in range(count):
        began = watch.mark()
        call()
        pairs.append((began, watch.mark()))
    watch.synchronize()
    return [watch.between(*pair) for pair in pairs]


def _stages(call: Callable[[], object], watch: Watch, stages: Stages, count: int) -> None:
    stages.on = True
    try:
        for _ in range(count):
            call()
        watch.synchronize()
    finally:
        stages.on = False


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
    """Wall-clock time of `call`, which makes `batch` images: the short form, for the reports of a run."""
    for _ in range(warmup):
        call()
    synchronize()
    times = []
    with no_gc():
        for _ in range(repeats):
            began = clock()
            call()
            synchronize()
            times.append((clock() - began) * 1000)
    t = summarise(times)
    return Latency(batch, repeats, t.p50_ms, t.p90_ms, t.min_ms, batch / t.p50_ms * 1000)


@contextmanager
def no_gc() -> Iterator[None]:
    """The garbage collector rests."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
