"""Solvers of a teacher's probability-flow ODE, on any path, with any prediction.

Written in the levels (alpha, sigma) the ODE is dx = x0 d alpha + eps d sigma, with (x0, eps) the pair at x. So Euler's
step is a rectified flow's on that path and DDIM's on VP, and the trapezoid rule is Heun's method on a rectified flow
and algorithm 1 of 2206.00364 on EDM. The multistep solvers are diffusers'.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError, suggestion
from fastgen.layout import sumsq
from fastgen.paths import Pair, Path, RectifiedFlow
from fastgen.samplers.few_step import times_of
from fastgen.teacher import Teacher

# `fastgen list samplers` reads this table from the source: keep its values plain strings.
SOLVERS = {
    "euler": "first order, one call a step: Euler on a rectified flow, DDIM on VP",
    "heun": "second order, two calls a step, one for the last (2206.00364, algorithm 1)",
    "dpm++": "DPM-Solver++ 2M (2211.01095), one call a step; diffusers' in float32",
    "unipc": "UniPC of order 2 (2302.04867), one call a step; diffusers' in float32",
}
Level = tuple[float, float]
CLEAN: Level = (1.0, 0.0)
Model = Callable[[Tensor, float], Pair]
Guidance = float | Tensor | Callable[[float], float] | None


def nfe(solver: str, steps: int) -> int:
    """Network calls of a run (guidance doubles the batch, not the calls)."""
    return 2 * steps - 1 if _known(solver) == "heun" else steps


def solve(teacher: Teacher | Denoiser, noise: Tensor, **options: Any) -> Tensor:
    """The end point [B, ...] of the ODE from unit noise [B, ...]; options are those of `trajectory`."""
    return deque(trajectory(teacher, noise, **options), maxlen=1).pop()


@torch.no_grad()
def trajectory(
    teacher: Teacher | Denoiser,
    noise: Tensor,
    *,
    steps: int | None = None,
    solver: str = "heun",
    cond: Cond = None,
    guidance: Guidance = None,
    path: Path | None = None,
    times: Sequence[float] | None = None,
    init: Literal["sigma", "unit"] | None = None,
    final: Level = CLEAN,
) -> Iterator[Tensor]:
    """The states [B, ...] of a run one by one, from the first (scaled noise) to the end point: steps + 1 of them.

    path      on which x and times are meant; default the teacher's own
    times     of evaluation, falling; default path.grid(steps). The last step ends at the levels `final`, by Euler
    init      the first state is noise times sigma or ("unit") hypot(alpha, sigma) there; default path.init
    guidance  a weight, one per sample [B], or what a time's is; default the teacher's own
    """
    _known(solver)
    if guidance is not None and not isinstance(teacher, Teacher):
        raise ValueError("guidance needs a Teacher, which knows the null condition")
    path = path or teacher.path
    times = _times(path, steps, times)
    alphas, sigmas = path.levels(torch.tensor(times, dtype=torch.float64))
    levels = [*zip(alphas.tolist(), sigmas.tolist(), strict=True), final]
    x = noise * (levels[0][1] if (init or path.init) == "sigma" else math.hypot(*levels[0]))
    yield x
    run = {"euler": _euler, "heun": _heun}.get(solver, partial(_multistep, solver))

    def model(x: Tensor, time: float) -> Pair:
        weight = guidance(time) if callable(guidance) else guidance
        return teacher(x, times_of(x, time), cond=cond, on=path, **({} if weight is None else {"guidance": weight}))

    yield from run(model, x, times, levels)


def straightness(
    teacher: Teacher | Denoiser,
    noise: Tensor,
    *,
    steps: int = 100,
    cond: Cond = None,
    guidance: float | Tensor | None = None,
) -> float:
    """S = int_0^1 E |(Z1 - Z0) - v(Z_t, t)|^2 dt on the rectified-flow view (2209.03003); 0 iff straight.

    Summed over coordinates, averaged over the noises [B, ...]; left Riemann sum over an Euler run of `steps` steps.
    There Z1 - Z0 is the mean of the velocities, so S is their variance over time and needs no stored trajectory.
    """
    path = RectifiedFlow()
    options = {} if guidance is None else {"guidance": guidance}
    x, mean, total = noise, torch.zeros_like(noise), torch.zeros(len(noise), device=noise.device)
    with torch.no_grad():
        for i, time in enumerate(path.grid(steps)):
            v = teacher(x, times_of(x, time), cond, on=path, **options).velocity
            x = x - v / steps
            # Welford's update: no cancellation when all velocities are nearly the same.
            off = v - mean
            mean = mean + off / (i + 1)
            total = total + sumsq(off) * (i / (i + 1))
    return float(total.mean()) / steps


def _known(solver: str) -> str:
    if solver not in SOLVERS:
        raise UserError(f"solver={solver}: not one of ours ({suggestion(solver, SOLVERS)})")
    return solver


def _times(path: Path, steps: int | None, times: Sequence[float] | None) -> tuple[float, ...]:
    if (steps is None) == (times is None):
        raise ValueError("give either steps or times")
    if steps is not None and steps < 1:
        raise UserError(f"steps={steps}: at least 1")
    chosen = path.grid(steps) if steps is not None else tuple(float(t) for t in times or ())
    falling = all(earlier > later for earlier, later in pairwise(chosen))
    if steps is not None and not falling:
        raise UserError(f"steps={steps}: more than {path} has levels")
    # All of them, so that a NaN in the list fails too.
    if not chosen or not falling or not all(path.end <= t <= path.start for t in chosen):
        raise UserError(f"times={list(chosen)}: they must fall, inside {path.start} .. {path.end}")
    return chosen


def _at(pair: Pair, level: Level) -> Tensor:
    return level[0] * pair.x0 + level[1] * pair.eps


def _euler(model: Model, x: Tensor, times: Sequence[float], levels: list[Level]) -> Iterator[Tensor]:
    for time, following in zip(times, levels[1:], strict=True):
        x = _at(model(x, time), following)
        yield x


def _heun(model: Model, x: Tensor, times: Sequence[float], levels: list[Level]) -> Iterator[Tensor]:
    for i, time in enumerate(times):
        pair = model(x, time)
        ahead = _at(pair, levels[i + 1])
        if i + 1 < len(times):
            mean = pair.lerp(model(ahead, times[i + 1]), 0.5)
            (alpha, sigma), (alpha_next, sigma_next) = levels[i], levels[i + 1]
            ahead = x + (alpha_next - alpha) * mean.x0 + (sigma_next - sigma) * mean.eps
        x = ahead
        yield x


def _multistep(solver: str, model: Model, x: Tensor, times: Sequence[float], levels: list[Level]) -> Iterator[Tensor]:
    """A diffusers scheduler on rectified-flow levels sigma / (alpha + sigma), fed with x0.

    Both solvers see a path only through ln(alpha / sigma) and the scale of x, so one setting serves every path.
    """
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kind: Any = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[solver]
    scheduler = kind(use_flow_sigmas=True, prediction_type="sample", final_sigmas_type="zero", solver_order=2)
    scheduler.set_timesteps(len(times))
    scheduler.set_begin_index(0)
    flow = [sigma / (alpha + sigma) for alpha, sigma in levels]
    if solver == "unipc":
        flow[0] = min(flow[0], 1 - 1e-6)  # as diffusers does: its corrector takes the logarithm of alpha
    scheduler.sigmas = torch.tensor(flow, dtype=torch.float32)
    for i, time in enumerate(times):
        x0 = model(x, time).x0
        ahead = scheduler.step(x0, scheduler.timesteps[i], x / sum(levels[i])).prev_sample
        x = ahead * sum(levels[i + 1])
        yield x
