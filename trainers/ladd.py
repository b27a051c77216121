"""LADD: latent adversarial diffusion distillation, by an adversary in the teacher's features alone (2403.12015).

    x = g_theta(x_t, t, c)   t one of the student's step times, x_t real data noised to it (noise alone at the first)
    L(theta) = L_G(x)        and the heads' L_D(real, x): see `fastgen.trainers.engine.adversary`

Nothing binds a sample to its noise, and nothing but the data tells what is right: it sharpens what another method has
made, or is that method's regulariser (`scm` with `regulariser`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastgen.errors import UserError
from fastgen.layout import expand
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.adversary import Adversary, AdversaryConfig
from fastgen.trainers.engine.method import Batch, Loss, Method, Turn, needs_of
from fastgen.trainers.engine.trig import (
    condition_of,
    few_step_spec,
    first_states,
    trig_view,
)


class Ladd(Method):
    """Networks: the student, which starts as the teacher, and `heads`. Data: x0 (or pairs: the teacher's own)."""

    class Config(Method.Config):
        name: Literal["ladd"] = "ladd"
        adversary: AdversaryConfig = AdversaryConfig()
        every: int = Field(default=1, ge=1)  # steps of the heads for each step of the student
        sd: float = Field(default=0.5, gt=0)
        data_sd: float | None = Field(default=None, gt=0)  # of the view; None: 1 for latents, else sd
        null_share: float = Field(default=0.1, ge=0, le=1)  # of a class-conditional student's rows, without a label
        steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4), min_length=1)
        middle: float | None = None  # second angle of two steps; None: 1.1

    experimental = "alone it has no measured row"
    precisions = ("fp32", "bf16")  # the student's gradient comes through the teacher's activations

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.teacher is not None and self.teacher.guidance is not None:
            raise UserError(f"guidance={self.teacher.guidance}: method ladd only looks at features; leave it off")
        self.view = trig_view(self.student, self.config.data_sd, self.config.sd)
        self.adversary = Adversary(self.config.adversary, self.teacher, self.student, self.view, self.config.sd)
        self.networks["heads"] = self.adversary.heads
        self.frozen |= self.adversary.frozen
        self.needs = needs_of(self.student)
        self.spec = self.sampler()
        own = torch.tensor(sorted({t for times in self.spec.times.values() for t in times}), dtype=torch.float64)
        self.times = self.view.time(*self.spec.path.levels(own))

    @property
    def turns(self) -> tuple[Turn, ...]:
        heads = Turn(trains=("heads",), loss=self.heads_loss)
        return Turn(trains=("student",), loss=self.loss, every=self.config.every), heads

    def begin(self, batch: Batch) -> None:
        self.adversary.look(batch, batch.x0, condition_of(batch, self.student, self.config.null_share))

    def loss(self, batch: Batch) -> Loss:
        """The student's step."""
        cond = condition_of(batch, self.student, self.config.null_share)
        return self.adversary.student_loss(batch, self.generate(batch), cond)

    def heads_loss(self, batch: Batch) -> Loss:
        """The heads' step, on fresh rows."""
        with torch.no_grad():
            fake = self.generate(batch)
        cond = condition_of(batch, self.student, self.config.null_share)
        return self.adversary.heads_loss(batch, batch.x0, fake, cond)

    def generate(self, batch: Batch) -> Tensor:
        """The student's answer at one of its step times for each row, [B, ...]."""
        real = batch.x0
        noise, which = batch.normal("eps", real.shape[1:]), batch.integers("time", len(self.times))
        t = self.times.to(which.device)[which].to(torch.promote_types(real.dtype, torch.float32))
        _, alone = first_states(self.view, self.spec, noise)
        first = which == len(self.times) - 1
        x = torch.where(expand(first, real), alone, self.view.mix(real, noise, t))
        return self.student(x, t, condition_of(batch, self.student, self.config.null_share), on=self.view).x0

    def sampler(self) -> SamplerSpec:
        config = self.config
        return few_step_spec(self.student, self.view, config.steps, config.middle, follows=None)
