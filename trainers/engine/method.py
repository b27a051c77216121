"""What a distillation method is: networks and turns. The loop owns everything else.

Adding a method is one file in `trainers/`: a subclass of `Method` whose loss reads like the paper's algorithm box. It
never sees an optimiser, a device, a rank, a checkpoint or a precision; its randomness comes from the batch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from fastgen import noise
from fastgen.cond import Cond
from fastgen.config import Model
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError, suggestion
from fastgen.layout import Samples, normal_like
from fastgen.student import SamplerSpec
from fastgen.teacher import Teacher

Logs = Mapping[str, float | Tensor]
Loss = Tensor | tuple[Tensor, Logs]
Distance = Callable[[Tensor, Tensor], Tensor]


class Batch:
    """Some rows of a run: their data, their condition, and noise that belongs to them alone.

    rows     global row numbers, int64 [B]: the noise of a row does not depend on batch size, rank or resume
    scratch  shared between turns that run on the same batch (`Turn.same_batch`)
    """

    def __init__(
        self,
        data: Mapping[str, Tensor],
        rows: Tensor,
        *,
        seed: int,
        step: int,
        steps: int,
        scratch: dict[str, Any] | None = None,
    ) -> None:
        self.data, self.rows, self.seed, self.step, self.steps = data, rows, seed, step, steps
        self.scratch = {} if scratch is None else scratch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Tensor:
        return self.data[name]

    @property
    def x0(self) -> Tensor:
        """Data, end points of pairs, or a draw from the posterior of an encoder ("x0_std"): [B, ...]."""
        mean = self.data["x0"]
        if "x0_std" not in self.data:
            return mean
        return mean + self.data["x0_std"] * self.normal("posterior", mean.shape[1:])

    @property
    def cond(self) -> Cond:
        """The condition of each row: every entry named "cond.*" and the label, or None."""
        cond = {name.removeprefix("cond."): value for name, value in self.data.items() if name.startswith("cond.")}
        if "label" in self.data:
            cond["label"] = self.data["label"]
        return cond or None

    @property
    def progress(self) -> float:
        """How much of the run is done, in [0, 1)."""
        return self.step / self.steps

    def normal(self, tag: str, shape: tuple[int, ...], draw: int = 0) -> Tensor:
        """Standard normal float32 [B, *shape]."""
        return noise.normal(self.seed, tag, self.rows, shape, draw)

    def normal_like(self, tag: str, x: Samples, draw: int = 0) -> Samples:
        """Standard normal float32 in the form of samples: [B, ...], or voxels on the same sites."""
        return normal_like(x, self.seed, tag, self.rows, draw)

    def uniform(self, tag: str, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
        """Uniform float32 [B, *shape] in (0, 1)."""
        return noise.uniform(self.seed, tag, self.rows, shape, draw)

    def integers(self, tag: str, high: int, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
        """Uniform int64 [B, *shape] in 0 .. high - 1."""
        return noise.integers(self.seed, tag, self.rows, high, shape, draw)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One kind of update: `loss(batch)` is minimised over the networks named in `trains`.

    The loss is a tensor, a tensor with values to log, or an iterable of either: the parts are back-propagated one by
    one before the single optimiser step (progressive rendering). From step `start` on the turn comes every `every`
    steps and is repeated `repeat` times, each on fresh rows; `same_batch` takes rows and scratch of the turn before.
    """

    trains: tuple[str, ...]
    loss: Callable[[Batch], Loss | Iterable[Loss]]
    repeat: int = 1
    every: int = 1
    start: int = 0
    same_batch: bool = False

    def due(self, step: int) -> bool:
        return step >= self.start and (step - self.start) % self.every == 0


@dataclass(frozen=True, kw_only=True)
class Average:
    """A slow copy of a network, slow <- decay slow + (1 - decay) fast, which the loop keeps, saves and hands back."""

    of: str
    decay: float | Callable[[int], float]

    def decay_at(self, step: int) -> float:
        return self.decay(step) if callable(self.decay) else self.decay


class Method:
    """Base of every method.

    networks  what is trained, by name; "student" is what the run exports
    frozen    what is only evaluated, and must be placed on the device
    averages  slow copies the mathematics needs; the loop hands them back in `slow` by the same names
    needs     names of the data entries that a loss reads ("x0", "eps"); a property of this configured object
    """

    class Config(Model):
        name: str

    makes: ClassVar[Literal["teacher", "student"]] = "student"
    experimental: ClassVar[str] = ""  # what is still missing for the method to stand; empty: nothing
    preview_steps: ClassVar[int] = 1
    copies: ClassVar[
        tuple[str, ...]
    ] = ()  # networks that begin as the teacher; under LoRA they are handed in as adapters
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")  # of the forward pass, that the loss stands

    def __init__(
        self, config: Any, student: Denoiser, teacher: Teacher | None = None, *, distance: Distance | None = None
    ) -> None:
        self.config, self.student, self.teacher, self.distance = config, student, teacher, distance
        self.networks: dict[str, nn.Module] = {"student": student}
        self.frozen: dict[str, nn.Module] = {} if teacher is None else {"teacher": teacher}
        self.averages: dict[str, Average] = {}
        self.slow: dict[str, Any] = {}
        self.needs: frozenset[str] = frozenset()

    def begin(self, batch: Batch) -> None:
        """Called once, before the first step of a run or of its resumption, with all networks placed, in eval mode, and
        a few rows: look at what can only be tried (a derivative through the network), refuse what would fail later."""

    @property
    def turns(self) -> tuple[Turn, ...]:
        raise NotImplementedError

    def sampler(self) -> SamplerSpec:
        """How the trained student is to be sampled."""
        raise NotImplementedError

    def diagnose(self, student: Denoiser, batch: Batch) -> dict[str, float]:
        """Figures that do fall as the method learns, from a fixed batch; called with every preview."""
        return {}

    def finish(self, student: Denoiser, batch: Batch) -> dict[str, Any]:
        """Called once, at the end, with the network that is about to be written, in eval mode, and rows that were not
        trained on: facts that its folder shall tell. A RunFailed instead leaves no folder."""
        return {}


def parts_of(losses: Loss | Iterable[Loss]) -> Iterable[Loss]:
    """A loss, or the parts of one as they are computed."""
    single = isinstance(losses, Tensor) or (
        isinstance(losses, tuple) and len(losses) == 2 and isinstance(losses[1], Mapping)
    )
    return [cast(Loss, losses)] if single else cast(Iterable[Loss], losses)


def needs_of(student: Denoiser) -> frozenset[str]:
    """Data, and what a network reads beside a label: captions, pictures."""
    return frozenset({"x0"} if student.reads is None else {"x0", f"cond.{student.reads}"})


def methods() -> list[str]:
    """`ls trainers/`: the names of the methods."""
    import fastgen.trainers

    found = pkgutil.iter_modules(fastgen.trainers.__path__)
    return sorted(m.name for m in found if not m.ispkg and m.name != "pairs")


def find_method(name: str) -> type[Method]:
    """The method of a name: the one subclass of `Method` that `trainers/<name>.py` defines."""
    if name not in methods():
        raise UserError(f"no method '{name}' ({suggestion(name, methods())})")
    module = importlib.import_module(f"fastgen.trainers.{name}")
    (found,) = (
        kind
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Method) and kind.__module__ == module.__name__
    )
    return found
