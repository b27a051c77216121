"""Consistency models in diffusers' `ConsistencyModelPipeline` (2303.01469): one step, or two with fresh noise between.

`CMStochasticIterativeScheduler` spreads n of its N levels evenly over Karras' ramp, beginning at sigma_max. With N = 3
two steps are sigma_max and the middle of the ramp, and which level that is `rho` decides, of which the network knows
nothing. A call with three steps asks the network at sigma_min too, where it answers with its input; more raise.
"""

from __future__ import annotations

import math
from typing import Any

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import EDM
from fastgen.student import SamplerSpec

SCHEDULER, PIPELINE = "CMStochasticIterativeScheduler", "ConsistencyModelPipeline"
TIME_SCALE = 1000.0  # the scheduler tells 1000 ln(sigma) / 4
LEVELS = 3
NOTE = "a call with one step too many asks the network once more at sigma_min, where it answers with its input"


def plays(denoiser: Denoiser) -> bool:
    """Whether the pipeline calls such a network as it was trained; it passes labels, and knows squares alone."""
    told = denoiser.log_time and denoiser.time_scale == TIME_SCALE
    consistency = denoiser.family == "unet" and denoiser.prediction.kind == "cm" and not denoiser.extra
    return consistency and told and denoiser.shape[1] == denoiser.shape[2]


def config(denoiser: Denoiser, spec: SamplerSpec) -> dict[str, Any]:
    """The scheduler's arguments, with which the plain call visits the student's levels; a UserError where none do."""
    if not isinstance(spec.path, EDM) or spec.init != "sigma" or spec.two_time:
        raise UserError(f"sampler: {PIPELINE} begins with sigma_max times noise, on the levels of an EDM path")
    first, low = {run[0] for run in spec.times.values()}, denoiser.prediction.sigma_min
    if set(spec.times) - {1, 2} or len(first) > 1 or (2 in spec.times and not spec.renoise):
        raise UserError(f"sampler: {PIPELINE} makes one step, or two from the same level with fresh noise between them")
    (high,) = first
    least = math.sqrt(low * high)
    if 2 in spec.times and spec.times[2][1] <= least:
        raise UserError(
            f"sampler: {PIPELINE} has no place for a second step at {spec.times[2][1]:g}: set mid above {least:.3g}"
        )
    rho = middle(spec.times[2][1], low, high) if 2 in spec.times else 7.0
    return {
        "num_train_timesteps": LEVELS if 2 in spec.times else LEVELS - 1,
        "sigma_min": low,
        "sigma_max": high,
        "sigma_data": denoiser.prediction.sd,
        "rho": rho,
        "clip_denoised": False,
    }


def middle(level: float, low: float, high: float) -> float:
    """rho for which the middle of Karras' ramp from `high` to `low` is `level`: it falls from near `high` to the
    geometric mean."""
    least, most = 0.05, 1e6
    for _ in range(200):
        rho = math.sqrt(least * most)
        above = ((low ** (1 / rho) + high ** (1 / rho)) / 2) ** rho > level
        least, most = (rho, most) if above else (least, rho)
    return rho
