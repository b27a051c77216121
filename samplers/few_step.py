"""The one sampler of every few-step student: plain data (`SamplerSpec`) and a few lines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.cond import Cond
from fastgen.denoiser import GUIDANCE, Denoiser
from fastgen.paths import Pair
from fastgen.student import SamplerSpec


def initial(spec: SamplerSpec, noise: Tensor, steps: int) -> Tensor:
    """The first state of an n-step run for unit noise [B, ...]; see `SamplerSpec.init`."""
    alpha, sigma = spec.path.levels(torch.tensor(spec.at(steps)[0], dtype=torch.float64))
    return noise * float(sigma if spec.init == "sigma" else torch.hypot(alpha, sigma))


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    spec: SamplerSpec,
    noise: Tensor,
    steps: int,
    cond: Cond = None,
    *,
    renoise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """x0 [B, ...] from unit noise [B, ...] in `steps` network calls: x' = alpha' x0 + sigma' (fresh or own eps).

    renoise(i) is the fresh unit noise [B, ...] of the state that enters call i = 1 .. steps - 1 (call 0 gets `noise`);
    specs with `renoise` need it. cond["guidance"] [B] is the weight for networks that take one, else the spec's. Step
    counts outside the student's list are UserErrors.
    """
    times = spec.at(steps)
    if spec.renoise and steps > 1 and renoise is None:
        raise ValueError(f"this sampler draws fresh noise between its {steps} steps: pass renoise")
    x = initial(spec, noise, steps)
    if spec.guidance is not None and GUIDANCE not in (cond or {}):
        cond = {**(cond or {}), GUIDANCE: times_of(x, spec.guidance)}
    for i, time in enumerate(times):
        now = times_of(x, time)
        following = times[i + 1] if i + 1 < steps else spec.path.end
        options = {"r": times_of(x, following)} if spec.two_time else {}
        pair = denoiser(x, now, cond, on=spec.path, **options)
        if i + 1 < steps:
            eps = renoise(i + 1) if spec.renoise and renoise is not None else pair.eps
            x = Pair(pair.x0, eps).at(*spec.path.levels(times_of(x, following)))
    return pair.x0


def times_of(x: Tensor, value: float) -> Tensor:
    """One time for every sample of x: [B], float64 where x is, else float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((len(x),), value, device=x.device, dtype=wide)
