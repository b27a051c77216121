"""Give a closed-form teacher weights: regress its exact velocity, so that methods can start "from the teacher".

    x0 from the teacher's own law, t ~ U(0, 1),   L = E | v(x_t, t, c) - v_teacher(x_t, t, c) |^2

The target is the conditional mean itself, not a noisy sample of it, so a small network learns it in few steps.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fastgen import cond as conditions
from fastgen.errors import UserError
from fastgen.student import SamplerSpec
from fastgen.teachers.mixture import Mixture
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn
from fastgen.trainers.flow_matching import RF, last_time, velocity_error


class Imitate(Method):
    """Networks: the copy. Frozen: the closed-form teacher. No data."""

    class Config(Method.Config):
        name: Literal["imitate"] = "imitate"
        drop_label: float = Field(default=0.1, ge=0, le=1)

    makes = "teacher"
    preview_steps = 8

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.teacher is None or not isinstance(self.teacher.denoiser, Mixture):
            raise UserError("method imitate copies a closed-form teacher; set teacher: {family: mixture, ...}")
        self.truth: Mixture = self.teacher.denoiser

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def loss(self, batch: Batch) -> Loss:
        truth, cond = self.truth, None
        if truth.num_classes is not None:
            cond = {"label": batch.integers("label", truth.num_classes)}
            cond = conditions.replace(cond, truth.null, batch.uniform("drop") < self.config.drop_label)
        x0 = truth.sample(batch.seed, "imitate", batch.rows, cond)
        t = last_time(self.student.path) * batch.uniform("t")
        x = RF.mix(x0, batch.normal("eps", truth.shape), t)
        return velocity_error(self.student(x, t, cond, on=RF).velocity, truth(x, t, cond, on=RF).velocity)

    def sampler(self) -> SamplerSpec:
        path = self.student.path
        return SamplerSpec(path=path, times={n: path.grid(n) for n in (1, 2, 4, 8, 25)}, init=path.init)
