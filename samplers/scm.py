"""SANA-Sprint's schedule (2503.09641; diffusers' `SCMScheduler`): times on TrigFlow, fresh noise between the steps.

The stock pipeline multiplies latents by `sigma_data` and divides them by it before every call, so that the network sees
TrigFlow with sd = 1 whatever that number is.
"""

from __future__ import annotations

import math

import torch

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import TrigFlow
from fastgen.student import SamplerSpec

PIPELINE = "SanaSprintPipeline"
PATH = TrigFlow(sd=1.0)
CONFIG = {"prediction_type": "trigflow", "sigma_data": 0.5}
MIDDLE = 1.3  # the second of two times, the stock scheduler's default
GUIDANCE = 4.5  # the stock pipeline's default
NEAR = 1e-5  # the stock first time is 1.57080, 3.7e-6 beyond the end of the path


def times(steps: int) -> tuple[float, ...]:
    """The times of a run of so many steps: what `SCMScheduler` visits when told the number, and `arguments`."""
    if steps == 2:
        return (PATH.start, MIDDLE)
    return tuple(PATH.start * (1 - i / steps) for i in range(steps))


def arguments(steps: int) -> tuple[str, ...]:
    """What the stock pipeline must be told besides: its own second time is for two steps, and refuses all others."""
    return () if steps == 2 else ("intermediate_timesteps=None",)


def refuse_other(denoiser: Denoiser, spec: SamplerSpec) -> None:
    """A UserError for a student that `SanaSprintPipeline` would run otherwise than it was trained, with the mend."""
    mend = "prepare the teacher first (fastgen distill prepare/sana), and start from what that makes"
    if denoiser.time_scale != 1:
        raise UserError(f"this SANA network counts time to {denoiser.time_scale:g}, SanaSprintPipeline to 1: {mend}")
    if not denoiser.takes_guidance:
        raise UserError(
            "this SANA network has no input for the guidance weight, which SanaSprintPipeline gives: use method scm "
            "with several weights, method.guidance=[4,4.5,5]"
        )
    if spec.guidance is None:
        raise UserError(
            "sampler: no guidance weight, which SanaSprintPipeline gives the network: set method.guidance=[4,4.5,5]"
        )
    if not spec.renoise or spec.two_time or denoiser.extra:
        raise UserError(
            "sampler: SanaSprintPipeline draws fresh noise between its steps, and tells one time: use method scm"
        )
    for n, run in spec.times.items():
        angles = PATH.time(*spec.path.levels(torch.tensor(run, dtype=torch.float64))).tolist()
        if not all(math.isclose(a, b, rel_tol=0, abs_tol=NEAR) for a, b in zip(angles, times(n), strict=True)):
            told, known = (", ".join(f"{t:.4g}" for t in each) for each in (angles, times(n)))
            raise UserError(f"sampler: {n} step(s) at the angles {told}; SanaSprintPipeline visits {known}: use those")
