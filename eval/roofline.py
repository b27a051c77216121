"""What the hardware allows: floating-point operations of a run, and the matmul rate and bandwidth measured beside it.

Operations are counted by torch's flop counter (a multiply-add is 2; matrix products, convolutions and attention only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.eval.latency import Watch, watch_for
from fastgen.eval.workload import Workload
from fastgen.student import Student
from fastgen.teacher import Teacher

SIDES = (4096, 8192, 16384)  # of the square matrices whose product gives the ceiling
COPIED = 1 << 30  # bytes
TIMES = 10


def flops(call: Callable[[], object]) -> int:
    """Operations of one call, on any device, meta included; attention is counted by its two matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the CPU's fused kernel, so attention is taken apart.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Cost:
    """Operations of one image: of one network call (guidance included), and of all the rest."""

    net: int
    rest: int

    def flop(self, scope: str, nfe: int, batch: int) -> int:
        return batch * (nfe * self.net + (0 if scope == "net" else self.rest))


def cost_of(model: Student | Teacher, *, guidance: float | None = None) -> Cost:
    """Counted on one image at the fewest steps; before xformers or a compiler hide operations from the counter."""
    steps = min(model.sampler.times) if isinstance(model, Student) else 1
    work = Workload(model, steps=steps, batch=1, guidance=guidance)
    whole = flops(lambda: work.run("e2e"))
    net = flops(lambda: work.run("net")) if model.denoiser.codec is not None else whole
    return Cost(net // work.nfe, whole - net)


def bytes_read(net: nn.Module, networks: Sequence[nn.Module], scope: str, nfe: int) -> int:
    """Bytes of weights that one call reads: the denoiser's at each of its calls, those of the others once."""
    rest = sum(bytes_of(module) for module in networks if module is not net)
    return nfe * bytes_of(net) + (0 if scope == "net" else rest)


def bytes_of(module: nn.Module) -> int:
    """Of its weights."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


@dataclass(frozen=True)
class Ceiling:
    """What this device reaches at its best: operations a second in a dtype, bytes a second."""

    flop_per_s: float
    bytes_per_s: float

    def mfu(self, flop: int, ms: float) -> float:
        """Share of the ceiling's operations, 0 .. 1."""
        return flop / (ms / 1000 * self.flop_per_s)

    def bytes_ms(self, count: int) -> float:
        """Milliseconds to read so many bytes: no run can be faster."""
        return count / self.bytes_per_s * 1000


def ceiling(device: torch.device, dtype: torch.dtype, sides: tuple[int, ...] = SIDES, copied: int = COPIED) -> Ceiling:
    """The best of some square matrix products, and a copy (which reads and writes)."""
    watch = watch_for(device)
    rate = max(2 * side**3 / _best_s(_product(device, dtype, side), watch) for side in sides)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    return Ceiling(rate, 2 * copied / _best_s(lambda: goal.copy_(source), watch))


def _product(device: torch.device, dtype: torch.dtype, side: int) -> Callable[[], object]:
    # Random numbers: a GPU multiplies zeros at a lower power and so at a higher clock.
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _best_s(call: Callable[[], object], watch: Watch) -> float:
    """The fastest of some calls in seconds, the first three left out."""
    for _ in range(3):
        call()
    marks = []
    for _ in range(TIMES):
        began = watch.mark()
        call()
        marks.append((began, watch.mark()))
    watch.synchronize()
    return max(min(watch.between(*pair) for pair in marks) / 1000, 1e-12)
