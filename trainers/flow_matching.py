"""Train a teacher from data: regress the velocity of the straight line between noise and data (2210.02747, 2209.03003).

    t ~ `times`,   x_t = (1 - t) x0 + t eps,   L = E | v(x_t, t, c) - (eps - x0) |^2

On any path: x_t is mixed on the rectified-flow view and the network answers on its own path; where that ends before
pure noise, t is shrunk to what it reaches. Labels are dropped with probability `drop_label` (pictures and texts of a
network without a codec as well), so that the teacher can be guided and can generate without one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen import cond as conditions
from fastgen.cond import Cond
from fastgen.errors import UserError
from fastgen.layout import mean
from fastgen.paths import Path, RectifiedFlow
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn, needs_of
from fastgen.trainers.engine.times import TimesConfig

RF = RectifiedFlow()


class FlowMatching(Method):
    """Networks: the teacher-to-be (named "student" as every exported network)."""

    class Config(Method.Config):
        name: Literal["flow_matching"] = "flow_matching"
        drop_label: float = Field(default=0.1, ge=0, le=1)
        times: TimesConfig = TimesConfig(kind="uniform")

    makes = "teacher"
    preview_steps = 8

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.needs = needs_of(self.student)
        if self.config.drop_label and self.student.num_classes is not None and not self.student.has_null:
            raise UserError("the network has labels, but none that means 'no label': set method.drop_label=0")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def loss(self, batch: Batch) -> Loss:
        cond = self.condition(batch)
        t = last_time(self.student.path) * self.config.times.draw(batch)
        x0 = batch.x0
        eps = batch.normal_like("eps", x0)
        pair = self.student(RF.mix(x0, eps, t), t, cond, on=RF)
        return velocity_error(pair.velocity, eps - x0)

    def condition(self, batch: Batch) -> Cond:
        """What the network is told, some rows without; captions of latent networks are dropped where they are read."""
        cond, student = batch.cond, self.student
        if cond is None or student.num_classes is not None:
            null = student.null
        else:
            cond = {name: value for name, value in cond.items() if name != "label"} or None
            null = student.unconditional(cond) if cond and student.reads and student.codec is None else None
        return conditions.replace(cond, null, batch.uniform("drop") < self.config.drop_label)

    def sampler(self) -> SamplerSpec:
        path = self.student.path
        return SamplerSpec(path=path, times={n: path.grid(n) for n in (1, 2, 4, 8, 25)}, init=path.init)


def last_time(path: Path) -> float:
    """The rectified-flow time of a path's last level: 1, or less where it ends before pure noise (SD's betas: 0.936).

    Beyond it a network sees one level for every t, so a loss there would blend all of them into its last level.
    """
    return float(RF.time(*path.levels(torch.tensor(path.start, dtype=torch.float64))))


def velocity_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over coordinates and samples."""
    return torch.mean(mean((velocity - target).square()))
