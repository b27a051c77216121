"""The harness with a clock of its own: what counts, what does not, and how the figures are taken."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from itertools import count

import pytest

from fastgen.eval.latency import CPU_PLAN, LEAST, HostWatch, Plan, Stages, measure, summarise, time_call


class FakeClock:
    """Stands still but for what is slept."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, ms):
        self.now += ms / 1000


class Queue(HostWatch):
    """A device that works behind its caller: launching takes `launch`, the work `work` milliseconds."""

    behind = True

    def __init__(self, launch, work):
        self.clock = FakeClock()
        super().__init__(self.clock)
        self.done, self.launch, self.work = self.clock.now, launch, work
        self.mark = lambda: self.done

    def call(self):
        self.clock.sleep(self.launch)
        self.done = max(self.done, self.clock.now - self.launch) + self.work / 1000

    def synchronize(self):
        self.clock.now = max(self.clock.now, self.done)


def sleeper(clock, times):
    """A call that takes the times one after the other."""
    left = iter(times)
    return lambda: clock.sleep(next(left))


def test_percentiles_are_interpolated():
    told = summarise([float(ms) for ms in range(100, 0, -1)])
    assert (told.p50_ms, told.p90_ms, told.p99_ms) == pytest.approx((50.5, 90.1, 99.01), abs=1e-9)
    assert (told.n, told.min_ms, told.mean_ms) == (100, 1.0, 50.5)
    assert told.iqr_ms == pytest.approx(49.5)
    assert told.std_ms == pytest.approx(29.011491975882)  # the sample's: sqrt(100 * 101 / 12)


def test_one_call_has_no_spread():
    assert summarise([3.0]).std_ms == 0.0


def test_first_call_and_warm_up_are_in_no_figure():
    clock = FakeClock()
    call = sleeper(clock, [5000, 900, 800, *range(1, 101)])
    plan = Plan(warmup=2, warmup_s=0, calls=100, seconds=0, limit_s=1e9)
    timing = time_call(call, HostWatch(clock), plan)
    assert timing.first_call_ms == pytest.approx(5000)
    assert (timing.warmup, timing.device.n) == (2, 100)
    assert timing.device.p50_ms == pytest.approx(50.5)
    assert timing.device.p99_ms == pytest.approx(99.01)
    assert timing.wall == timing.device


def test_warm_up_lasts_calls_and_seconds_both():
    clock = FakeClock()
    timing = time_call(lambda: clock.sleep(125), HostWatch(clock), Plan(warmup=10, warmup_s=3, calls=1, seconds=0))
    assert timing.warmup == 24
    clock = FakeClock()
    timing = time_call(lambda: clock.sleep(1000), HostWatch(clock), Plan(warmup=10, warmup_s=3, calls=1, seconds=0))
    assert timing.warmup == 10


def test_a_slow_call_is_cut_short_but_not_below_the_least():
    clock = FakeClock()
    timing = time_call(lambda: clock.sleep(60_000), HostWatch(clock), Plan())
    assert (timing.warmup, timing.device.n) == (LEAST, LEAST)


@pytest.mark.parametrize(
    ("one_s", "calls"),
    [(1e-9, 2000), (0.01, 1000), (0.1, 100), (0.2, 50), (0.5, 50), (1.0, 30), (3.0, 10), (100.0, 5)],
)
def test_the_plan_wants_50_calls_and_10_seconds_within_30(one_s, calls):
    assert Plan().count(one_s) == calls


def test_stages_sum_up_to_the_call():
    clock = FakeClock()
    watch = HostWatch(clock)
    stages = Stages(watch)
    seen = []

    def call():
        for name, ms in (("text", 2), ("net", 30), ("decode", 7), ("copy", 1)):
            with stages(name):
                clock.sleep(ms)
        seen.append(stages.on)

    timing = time_call(call, watch, CPU_PLAN, stages=stages)
    assert timing.stages_ms == pytest.approx({"text": 2, "net": 30, "decode": 7, "copy": 1})
    assert list(timing.stages_ms) == ["text", "net", "decode", "copy"]
    assert sum(timing.stages_ms.values()) == pytest.approx(timing.device.p50_ms)
    # Off for the first call, the warm-up and all that are counted; on for a few of their own.
    assert seen == sorted(seen) and seen.index(True) == 1 + timing.warmup + timing.device.n


def test_only_calls_of_their_own_are_staged():
    clock = FakeClock()
    stages = Stages(HostWatch(clock))

    def call():
        with stages("net"):
            clock.sleep(7 if stages.on else 1)

    timing = time_call(call, HostWatch(clock), CPU_PLAN, stages=stages)
    assert timing.stages_ms == pytest.approx({"net": 7}) and timing.device.p50_ms == pytest.approx(1)


def test_stages_that_are_off_do_nothing():
    stages = Stages(HostWatch())
    with stages("net"):
        pass
    assert stages("net") is stages("decode")
    assert stages.medians() == Stages().medians() == {}


def test_work_behind_the_caller_is_timed_by_its_own_clock():
    watch = Queue(launch=1, work=20)
    timing = time_call(watch.call, watch, Plan(warmup=3, warmup_s=0, calls=10, seconds=0))
    assert timing.device.p50_ms == pytest.approx(20)
    assert timing.wall.p50_ms == pytest.approx(20)
    assert not timing.launch_bound


def test_a_caller_who_waits_for_launches_is_told():
    watch = Queue(launch=10, work=2)
    timing = time_call(watch.call, watch, Plan(warmup=3, warmup_s=0, calls=10, seconds=0))
    assert timing.wall.p50_ms == pytest.approx(10)
    assert timing.launch_bound


def test_only_the_counted_calls_lie_inside_what_surrounds_them():
    clock, calls, inside = FakeClock(), count(), []

    def call():
        clock.sleep(1)
        next(calls)

    @contextmanager
    def around():
        inside.append(next(calls))
        yield
        inside.append(next(calls))

    time_call(call, HostWatch(clock), Plan(warmup=4, warmup_s=0, calls=7, seconds=0), around=around)
    assert inside == [1 + 4, 1 + 4 + 1 + 7]


def test_the_garbage_collector_rests_and_comes_back():
    clock, seen = FakeClock(), []

    def call():
        clock.sleep(1)
        seen.append(gc.isenabled())

    time_call(call, HostWatch(clock), Plan(warmup=1, warmup_s=0, calls=2, seconds=0))
    assert seen == [True, False, False, False] and gc.isenabled()


def test_the_collector_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        time_call(lambda: 1 // 0, HostWatch(), CPU_PLAN)
    assert gc.isenabled()


def test_the_short_form_leaves_its_warm_up_out():
    clock = FakeClock()
    told = measure(sleeper(clock, [900, 800, 700, 1, 2, 3]), batch=4, warmup=3, repeats=3, clock=clock)
    assert (told.p50_ms, told.min_ms, told.repeats) == (pytest.approx(2), pytest.approx(1), 3)
    assert told.images_per_s == pytest.approx(2000)
