"""Small things that many tests share: a linear denoiser, and three methods that use every clause of the contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.config import Model
from fastgen.denoiser import Denoiser
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.student import SamplerSpec
from fastgen.trainers.engine.method import Average, Batch, Loss, Method, Turn

RF = RectifiedFlow()


class Toy(Denoiser):
    """A velocity network of a few weights on 2-D points, with dropout if asked."""

    family = "toy"

    def __init__(self, dropout: float = 0.0, width: int = 8) -> None:
        net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 2))
        super().__init__(net, RF, Prediction(kind="flow"), shape=(2,))

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        return self.net(torch.cat([x, time[:, None]], 1))


def toy(seed: int = 0, dropout: float = 0.0) -> Toy:
    torch.manual_seed(seed)
    return Toy(dropout)


class Points:
    """Data by row number: points on a ring away from the origin, so that there is something to learn at once."""

    def get(self, rows: Tensor) -> dict[str, Tensor]:
        angle = rows.float() * 2.4
        return {"x0": torch.stack([3 + angle.cos(), angle.sin()], 1)}


class ToyConfig(Model):
    name: str = "toy"


class Base(Method):
    def __init__(self, student: Denoiser) -> None:
        super().__init__(ToyConfig(), student)
        self.needs = frozenset({"x0"})

    def sampler(self) -> SamplerSpec:
        return SamplerSpec(path=RF, times={1: (1.0,)})

    def error(self, network: Any, batch: Batch, tag: str = "t") -> Tensor:
        """Flow matching error at one time a row, [B]."""
        t, eps = batch.uniform(tag), batch.normal(f"eps/{tag}", (2,))
        return (network(RF.mix(batch.x0, eps, t), t).velocity - (eps - batch.x0)).square().mean(1)


class ManyBackwards(Base):
    """Several backward passes before one optimiser step: the loss is an iterator of parts, as in rendering."""

    parts = 3

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def loss(self, batch: Batch) -> Iterator[Loss]:
        for i in range(self.parts):
            yield self.error(self.student, batch, f"t{i}").mean() / self.parts, {f"part{i}": float(i)}


class TwoNetworks(Base):
    """A weight network that steps with the student, and a critic with its own, more frequent, later turn."""

    def __init__(self, student: Denoiser) -> None:
        super().__init__(student)
        torch.manual_seed(7)
        self.networks |= {"weight": nn.Linear(1, 1), "critic": nn.Linear(2, 1)}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(trains=("student", "weight"), loss=self.student_loss),
            Turn(trains=("critic",), loss=self.critic_loss, repeat=2, every=2, start=1),
            Turn(trains=("critic",), loss=self.shared_loss, same_batch=True),
        )

    def student_loss(self, batch: Batch) -> Loss:
        logvar = self.networks["weight"](batch.uniform("t")[:, None]).squeeze(1)
        error = self.error(self.student, batch)
        batch.scratch["error"] = error.detach()
        return ((-logvar).exp() * error + logvar).mean(), {"logvar": logvar.mean()}

    def critic_loss(self, batch: Batch) -> Loss:
        return (self.networks["critic"](batch.x0).squeeze(1) - batch.uniform("target")).square().mean()

    def shared_loss(self, batch: Batch) -> Loss:
        error = batch.scratch["error"] if "error" in batch.scratch else batch.uniform("none")
        return (self.networks["critic"](batch.x0).squeeze(1) - error).square().mean()


class SlowTarget(Base):
    """A slow copy of the student as the target of the student, as in consistency distillation."""

    def __init__(self, student: Denoiser) -> None:
        super().__init__(student)
        self.averages = {"target": Average(of="student", decay=lambda step: min(0.9, step / 10))}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=("student",), loss=self.loss),)

    def loss(self, batch: Batch) -> Loss:
        t, eps = batch.uniform("t"), batch.normal("eps", (2,))
        x = RF.mix(batch.x0, eps, t)
        with torch.no_grad():
            target = self.slow["target"](RF.mix(batch.x0, eps, 0.9 * t), 0.9 * t).velocity
        return (self.student(x, t).velocity - target).square().mean() + self.error(self.student, batch).mean()
