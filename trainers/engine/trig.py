"""Methods on the TrigFlow view: which angles a network knows, how they are drawn, and how the student is sampled.

x_t = cos t x0 + sin t z,   z = d eps,   d the deviation of the data (`TrigFlow(sd=d)`)
t = atan(exp(tau) / sd),   tau ~ N(mean, std^2)                                2410.11081, section 4.2
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen import cond as conditions
from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.layout import wide
from fastgen.paths import VP, Path, TrigFlow
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.method import Batch

# Kept from both ends of a path, in radians: at an end times are clamped, so a derivative along t would miss a part.
# On Stable Diffusion's table it is one index of a thousand.
MARGIN = 5e-4
MIDDLE = 1.1  # the second angle of two steps (2410.11081, section 5, at sd = 0.5: noise level 1 of EDM's)


def trig_view(student: Denoiser, data_sd: float | None, sd: float) -> TrigFlow:
    """The view whose angle is 45 degrees where noise and data are of one size; latents have deviation 1."""
    if data_sd is None:
        data_sd = 1.0 if student.codec is not None else sd
    return TrigFlow(sd=data_sd)


def angles(view: TrigFlow, *paths: Path) -> tuple[float, float]:
    """The least and the greatest angle that networks on all these paths know, `MARGIN` inside."""
    reach = [ends(view, path) for path in paths]
    return max(low for low, _ in reach) + MARGIN, min(high for _, high in reach) - MARGIN


def ends(view: TrigFlow, path: Path) -> tuple[float, float]:
    """The angles at which a path ends and starts."""
    times = torch.tensor([path.end, path.start], dtype=torch.float64)
    low, high = view.time(*path.levels(times)).tolist()
    return low, high


def draw_angle(batch: Batch, tag: str, law: tuple[float, float, float], within: tuple[float, float]) -> Tensor:
    """t = atan(exp(N(mean, std^2)) / sd) for law = (mean, std, sd), moved into `within`: [B]."""
    mean, std, sd = law
    tau = mean + std * batch.normal(tag, ())
    return torch.atan2(tau.exp(), torch.full_like(tau, sd)).clamp(*within)


def condition_of(batch: Batch, student: Denoiser, null_share: float) -> Cond:
    """The batch's condition; of a class-conditional student's rows `null_share` without their label."""
    if batch.cond is None or student.num_classes is not None:
        return conditions.replace(batch.cond, student.null, batch.uniform("drop") < null_share)
    return {name: value for name, value in batch.cond.items() if name != "label"} or None


def few_step_spec(
    student: Denoiser,
    view: TrigFlow,
    steps: tuple[int, ...],
    middle: float | None,
    *,
    follows: bool | None,
    guidance: float | None = None,
) -> SamplerSpec:
    """Fresh noise between the steps. A network with a table of levels is asked at its table's even grid, which a stock
    scheduler replays; any other at even angles, but for two steps at the start and at `middle`."""
    path = student.path
    if isinstance(path, VP):
        if middle is not None:
            raise UserError("method.middle: this network's steps are those of its table of levels; leave it off")
        times = {n: path.grid(n) for n in steps}
        return SamplerSpec(path=path, times=times, renoise=True, init=path.init, follows=follows, guidance=guidance)
    start, second = ends(view, path)[1], MIDDLE if middle is None else middle
    if not 0 < second < start:
        raise UserError(f"method.middle={second:g}: two steps begin at the angle {start:.4g}, and the second is less")
    times = {n: (start, second) if n == 2 else tuple(start * (1 - i / n) for i in range(n)) for n in steps}
    return SamplerSpec(path=view, times=times, renoise=True, follows=follows, guidance=guidance)


def first_states(view: TrigFlow, spec: SamplerSpec, z: Tensor) -> tuple[Tensor, Tensor]:
    """(angle [B], x [B, ...]) of the sampler's first state of unit noise z, as the view sees it."""
    first = torch.tensor(spec.at(min(spec.times))[0], dtype=torch.float64)
    t = view.time(*spec.path.levels(first))
    alpha, sigma = (float(level) for level in view.levels(t))
    scale = sigma if spec.init == "sigma" else (alpha**2 + sigma**2) ** 0.5
    return torch.full((len(z),), float(t), device=z.device, dtype=wide(z).dtype), scale * z
