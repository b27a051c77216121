"""TRELLIS's sampler: Euler on a rectified flow over a warped grid of times, guided inside an interval of them.

It is `ode.py`'s Euler solver; what is here are the official names, defaults and conventions of its settings.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from fastgen.cond import Cond
from fastgen.config import Model, validate
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError, suggestion
from fastgen.paths import RectifiedFlow, shift_time
from fastgen.samplers import ode
from fastgen.teacher import Teacher

# Which settings each of the official samplers takes: the rest are off.
NAMES = {
    "FlowEulerSampler": ("steps", "rescale_t"),
    "FlowEulerCfgSampler": ("steps", "rescale_t", "cfg_strength"),
    "FlowEulerGuidanceIntervalSampler": ("steps", "rescale_t", "cfg_strength", "cfg_interval"),
}


class FlowEuler(Model):
    """Settings by their official names.

    rescale_t     r: the times are r s / (1 + (r - 1) s) for s = 1 - i / steps, so that r > 1 spends more near noise
    cfg_strength  w of v = (1 + w) v_cond - w v_null: "guidance scale" 1 + w elsewhere; 0: no guidance
    cfg_interval  of times, both ends included, inside which it is guided; conditional elsewhere
    """

    steps: int = Field(default=25, ge=1)
    rescale_t: float = Field(default=1.0, gt=0)
    cfg_strength: float = 0.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)

    @field_validator("cfg_interval")
    @classmethod
    def _holds_a_time(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] <= value[1]:
            raise ValueError("an interval of times is [low, high]")
        return value

    def times(self) -> tuple[float, ...]:
        """Of the evaluations, from 1 downwards; the last step ends at 0."""
        return tuple(shift_time(1 - i / self.steps, self.rescale_t) for i in range(self.steps))

    def weight(self, time: float) -> float:
        """The weight of guidance at a time, by fastgen's convention: 1 is the conditional prediction."""
        low, high = self.cfg_interval
        return 1 + self.cfg_strength if low <= time <= high else 1.0

    @property
    def guided(self) -> int:
        """How many of its evaluations are guided."""
        return sum(self.weight(time) != 1 for time in self.times())


def from_pipeline(name: str, params: dict[str, Any], where: str) -> FlowEuler:
    """The settings of a sampler in a pipeline.json, by its name and its params; mistakes are UserErrors."""
    if name not in NAMES:
        raise UserError(f"{where}: no sampler is called '{name}' ({suggestion(name, NAMES)})")
    for key in params:
        if key in FlowEuler.model_fields and key not in NAMES[name]:
            raise UserError(f"{where}: '{key}' is no setting of {name}; it takes {', '.join(NAMES[name])}")
    return validate(FlowEuler, params, where)


def sample(model: Teacher | Denoiser, noise: Tensor, settings: FlowEuler, cond: Cond = None) -> Tensor:
    """x at time 0 from unit noise [B, ...] (or `Voxels`); a guided step evaluates both conditions in one batch.

    The end lies at the path's levels (1, sigma_min), as published. A model that cannot be guided and settings that
    guide are a UserError.
    """
    path = model.path
    if not isinstance(path, RectifiedFlow):
        raise ValueError(f"flow Euler runs on a rectified flow, not on {path}")
    if settings.guided and not isinstance(model, Teacher):
        model = Teacher(model)
    guidance = settings.weight if settings.guided else None
    options = {"times": settings.times(), "final": (1.0, path.sigma_min)}
    return ode.solve(model, noise, solver="euler", cond=cond, guidance=guidance, **options)
