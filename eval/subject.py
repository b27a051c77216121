"""A model opened, prepared for one variant, and measured cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from fastgen.errors import RunFailed, UserError
from fastgen.eval import variants
from fastgen.eval.hardware import Meter
from fastgen.eval.latency import Plan, Stages, Timing, time_call, watch_for
from fastgen.eval.roofline import Ceiling, Cost, bytes_read
from fastgen.eval.rows import Row
from fastgen.eval.variants import Unavailable, Variant
from fastgen.eval.workload import Workload, networks
from fastgen.student import Student
from fastgen.teacher import Teacher


class Cell(NamedTuple):
    """One row to be: what is called, with how many images, in how many steps."""

    scope: str
    batch: int
    steps: int


class Subject:
    """`options` of a workload: seed, guidance, solver. `ceiling` stays None where MFU would say nothing (a CPU)."""

    def __init__(
        self,
        model: Student | Teacher,
        variant: Variant,
        plan: Plan,
        *,
        cost: Cost,
        options: dict[str, Any],
    ) -> None:
        self.model, self.variant, self.plan, self.options = model, variant, plan, options
        self.cost = cost
        self.ceiling: Ceiling | None = None
        self.device = model.denoiser.device
        self.watch = watch_for(self.device)
        self.networks: list[nn.Module] = []
        self.notes: list[str] = []

    def works(self, cells: Sequence[Cell]) -> list[tuple[Cell, Workload]]:
        """What each cell calls. Inputs are recorded first: a compiled network cannot be listened to."""
        few = min(self.model.sampler.times) if isinstance(self.model, Student) else 1
        self.networks = networks(partial(self._work(1, few).run, "e2e"))
        variants.laid_out(self.networks, self.variant)
        found = [(cell, self._work(cell.batch, cell.steps)) for cell in cells]
        for cell, work in found:
            if cell.scope == "bare":
                work.record()
        self._say_dtypes()
        variants.compiled(self.networks, self.net, self.variant, self.notes.append)
        return found

    def _work(self, batch: int, steps: int) -> Workload:
        return Workload(self.model, batch=batch, steps=steps, stages=Stages(self.watch), **self.options)

    def _say_dtypes(self) -> None:
        own = dtype_of(self.net)
        for network in self.networks:
            if dtype_of(network) != own:
                self.notes.append(f"{type(network).__name__} works in {_short(dtype_of(network))}")

    @property
    def net(self) -> nn.Module:
        net = self.model.denoiser.net
        assert net is not None
        return net

    @property
    def dtype(self) -> str:
        """Of the denoiser's products."""
        return "tf32" if self.variant.parts.get("dtype") == "tf32" else _short(dtype_of(self.net))

    def measured(self, row: Row, cell: Cell, work: Workload) -> dict[str, Any]:
        """The figures of a row, by the names of its fields."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what earlier rows left in the allocator is not this row's
        meter = Meter(self.device)
        stages = work.stages if cell.scope == "e2e" else None
        timing = time_call(partial(work.run, cell.scope), self.watch, self.plan, stages=stages, around=meter)
        read, p50 = meter.reading, timing.device.p50_ms
        energy = None if read.energy_j is None else read.energy_j / (timing.device.n * cell.batch)
        return {
            **_times(timing),
            "images_per_s": cell.batch / p50 * 1000,
            "peak_alloc_mib": read.peak_alloc_mib,
            "peak_reserved_mib": read.peak_reserved_mib,
            "energy_j_per_img": energy,
            **self._bounds(cell, work.nfe, p50),
            "notes": (*row.notes, *self.notes, *_said(timing)),
        }

    def _bounds(self, cell: Cell, nfe: int, ms: float) -> dict[str, float]:
        flop = self.cost.flop(cell.scope, nfe, cell.batch)
        told = {"gflop": flop / 1e9}
        if self.ceiling is None:
            return told
        count = bytes_read(self.net, self.networks, cell.scope, nfe)
        peak = {"mfu": self.ceiling.mfu(flop, ms), "ceiling_tflops": self.ceiling.flop_per_s / 1e12}
        return {**told, **peak, "bytes_ms": self.ceiling.bytes_ms(count)}


def _times(timing: Timing) -> dict[str, Any]:
    device = vars(timing.device).copy()
    calls = device.pop("n")
    return {
        **device,
        "calls": calls,
        "warmup": timing.warmup,
        "wall_p50_ms": timing.wall.p50_ms,
        "launch_bound": timing.launch_bound,
        "first_call_ms": timing.first_call_ms,
        "stages_ms": timing.stages_ms,
    }


def _said(timing: Timing) -> list[str]:
    if not timing.launch_bound:
        return []
    excess = 1 - timing.device.p50_ms / timing.wall.p50_ms
    return [f"launch bound: {excess:.0%} of the caller's time is no work of the device; try cuda-graph"]


def dtype_of(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters()), torch.float32)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def refusals(variant: Variant) -> Iterator[None]:
    """What goes wrong inside becomes the reason of a row that is not there; a plain run may only be out of memory."""
    try:
        yield
    except (UserError, RunFailed, Unavailable):
        raise
    except torch.OutOfMemoryError as error:
        raise Unavailable("out of memory") from error
    except Exception as error:  # kernels and compilers raise whatever they like
        if variant.plain:
            raise
        lines = str(error).strip().splitlines() or [""]
        raise Unavailable(f"{type(error).__name__}: {lines[0][:200]}") from error
