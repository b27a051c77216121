"""A network seen as a pair (x0, eps), on its own path or on any other. Teachers and students are both denoisers."""

from __future__ import annotations

from dataclasses import asdict
from itertools import chain
from pathlib import Path as FilePath
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fastgen import cond as conditions
from fastgen.codec import Codec
from fastgen.cond import Cond, repeat
from fastgen.config import Model, explain
from fastgen.errors import UserError
from fastgen.layout import expand, wide
from fastgen.nets.scalar import Scalar
from fastgen.paths import EDM, Pair, Path, Prediction, path_from_dict, path_to_dict

# What a student may be told beside its time: the way to the time it steps to, and the guidance weight.
GAP, GUIDANCE = "gap", "guidance"


GUIDANCE_SCALE = 0.1  # what SANA-Sprint's weights are multiplied by (2503.09641): a few become less than 1
Levels = tuple[Tensor, Tensor]


def rf_time(levels: Levels) -> Tensor:
    """The rectified-flow time sigma / (alpha + sigma) of a level."""
    alpha, sigma = levels
    return sigma / (alpha + sigma)


class Denoiser(nn.Module):
    """net(x_t, t, cond), with what its input, its time and its output mean.

    path, prediction  the network's own path and target
    time_scale        the network's time argument is time_scale * t, or time_scale * ln(t) / 4 where log_time (EDM)
    shape             of one sample, without the batch: (C, H, W) or (D,)
    num_classes       cond["label"] is 0 .. num_classes - 1, or num_classes for the null label; None: unconditional
    null_label        False for a class-conditional network that was never trained without a label
    codec             what stands before and behind a latent network; shared by copies, and no part of its weights
    extra             embeddings of numbers that the network is told besides, added to that of its time: "gap", the
                      difference of rectified-flow times t - r (two-time students), and "guidance", a weight that
                      the network cannot take by itself. See `add_gap` and `add_guidance`

    cond["guidance"], float [B], is the guidance weight of a network that takes it as an input (1: the condition alone).

    A family of networks is a subclass (a file of `fastgen.teachers`) that says how to call, write and read its net.
    """

    family: ClassVar[str] = ""

    def __init__(
        self,
        net: nn.Module | None,
        path: Path,
        prediction: Prediction,
        *,
        shape: tuple[int, ...],
        num_classes: int | None = None,
        null_label: bool = True,
        codec: Codec | None = None,
        time_scale: float = 1.0,
        log_time: bool = False,
    ) -> None:
        super().__init__()
        if prediction.kind == "eps" and getattr(path, "zero_snr", False):
            raise ValueError("an eps prediction says nothing of x0 where alpha is 0: zero-terminal-SNR needs v or x0")
        if prediction.kind == "trig" and prediction.sd != getattr(path, "sd", prediction.sd):
            raise ValueError(f"a trig prediction with sd {prediction.sd} on {path}: the two must be the same")
        if prediction.kind == "cm" and not isinstance(path, EDM):
            raise ValueError(f"a cm prediction on {path}: its boundary is one of EDM levels")
        self.net, self.path, self.prediction = net, path, prediction
        self.shape, self.num_classes, self.null_label = tuple(shape), num_classes, null_label
        self.time_scale, self.log_time = time_scale, log_time
        self.codec = codec
        self.extra = nn.ModuleDict()

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        """The bare network: scaled input [B, ...], its time argument [B], and what is to be added to the embedding of
        that time, [B, `embedding_width`] or None, to its output [B, ...]."""
        raise NotImplementedError

    @property
    def embedding_width(self) -> int:
        """Size of the embedding of the time, to which `extra` is added."""
        raise UserError(f"this {self.family} network has no place for a second number beside its time")

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The network's blocks in order, whose outputs are its features: [B, C, H, W], [B, tokens, C] or [B, C]."""
        raise UserError(f"this {self.family} network has no blocks whose features could be looked at")

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, *, on: Path | None = None, r: Tensor | None = None
    ) -> Pair:
        """The pair at x [B, ...] and t [B] of the path `on` (None: its own); r [B] is the time a two-time network steps
        to (None: t itself, where its average velocity is the velocity), and a ValueError for any other.

        The pair has the dtype of x, float32 at least; so have times. A level beyond the network's last one is evaluated
        at the last one; then above it x0 is kept and eps re-derived from x, below it eps is kept and x0 re-derived, so
        that the pair closes: x = alpha x0 + sigma eps.
        """
        there = on or self.path
        t, r = wide(t), None if r is None else wide(r)
        levels = there.levels(t)
        to = levels if r is None else there.levels(r)
        if there == self.path:
            pair, _ = self._pair(x, t, levels, to, cond)
            return pair
        own_t = self.path.time(*levels)
        own = self.path.levels(own_t)
        own_to = own if r is None else self.path.levels(self.path.time(*to))
        ratio = torch.hypot(*own) / torch.hypot(*levels)
        pair, x_own = self._pair(x * expand(ratio, x).to(x.dtype), own_t, own, own_to, cond)
        return self._close(pair, x.to(x_own.dtype), own_t, levels)

    def _pair(self, x: Tensor, t: Tensor, levels: Levels, to: Levels, cond: Cond) -> tuple[Pair, Tensor]:
        scale = self.prediction.input_scale(*levels)
        scaled = x if scale is None else x * expand(scale, x).to(x.dtype)
        y = self.raw(scaled, self.time_input(t), cond, self._extra(levels, to, cond))
        # Targets are solved for in float32 at least: half precision loses the small alphas of VP's noisy end.
        x = wide(x)
        return self.prediction.to_pair(y.to(x.dtype), x, *levels), x

    def _extra(self, levels: Levels, to: Levels, cond: Cond) -> Tensor | None:
        """The sum of the embeddings in `extra`, [B, embedding_width]; None where there are none."""
        if GAP not in self.extra and to is not levels:
            raise ValueError("this network takes one time; it cannot be told the time it steps to")
        told = []
        if GAP in self.extra:
            told.append(self.extra[GAP](rf_time(levels) - rf_time(to)))
        if GUIDANCE in self.extra and cond is not None and GUIDANCE in cond:
            told.append(self.extra[GUIDANCE](GUIDANCE_SCALE * cond[GUIDANCE]))
        return sum(told[1:], told[0]) if told else None

    def _close(self, pair: Pair, x: Tensor, own_t: Tensor, levels: tuple[Tensor, Tensor]) -> Pair:
        alpha, sigma = levels
        above, below = own_t >= self.path.start, own_t <= self.path.end
        # Denominators are made safe before the division: a NaN in the unused branch would reach the gradient.
        eps = (x - expand(alpha, x) * pair.x0) / expand(torch.where(above, sigma, 1.0), x)
        x0 = (x - expand(sigma, x) * pair.eps) / expand(torch.where(below, alpha, 1.0), x)
        return Pair(torch.where(expand(below, x), x0, pair.x0), torch.where(expand(above, x), eps, pair.eps))

    def time_input(self, t: Tensor) -> Tensor:
        """The time argument the network was trained with, [B]."""
        return self.time_scale * (t.log() / 4 if self.log_time else t)

    def on(self, path: Path) -> View:
        """The same denoiser, called with x and t of another path."""
        return View(self, path)

    def add_gap(self) -> None:
        """Let the network be told the time it steps to; it answers as before until that is trained."""
        self._add(GAP)

    def add_guidance(self) -> None:
        """Let the network take a guidance weight as cond["guidance"]; it answers as before until that is trained."""
        self._add(GUIDANCE)

    def _add(self, name: str) -> None:
        if name not in self.extra:
            self.extra[name] = Scalar(self.embedding_width).to(self.device)

    @property
    def two_time(self) -> bool:
        """Whether the network is told the time it steps to."""
        return GAP in self.extra

    @property
    def takes_guidance(self) -> bool:
        """Whether cond["guidance"] reaches the network."""
        return GUIDANCE in self.extra

    @property
    def distilled(self) -> bool:
        """Whether the checkpoint says of itself that it is somebody's few-step student."""
        return False

    @property
    def usual_guidance(self) -> float | None:
        """The guidance that the stock pipeline of such a network samples with by default."""
        return None

    @property
    def needs_embeddings(self) -> bool:
        """Whether its conditions are embeddings of texts that only its caller can give it."""
        return False

    @property
    def reads(self) -> str | None:
        """The entry of a condition, other than a label, that the network is told ("text", "image"); None: none."""
        return "text" if self.num_classes is None and self.has_null else None

    @property
    def has_null(self) -> bool:
        """Whether there is a null condition, which guidance needs."""
        return self.num_classes is not None and self.null_label

    @property
    def no_null(self) -> str:
        """Why there is none, for messages."""
        return "no text encoder for the empty prompt" if self.codec is not None else "no null condition"

    @property
    def null(self) -> Cond:
        """One row of the null condition, or None where the network has no conditions, or none but labels."""
        return {"label": torch.tensor([self.num_classes], device=self.device)} if self.has_null else None

    def unconditional(self, cond: Cond) -> Cond:
        """The null condition beside each row of a condition."""
        return repeat(self.null, conditions.length(cond))

    def resized(self, height: int, width: int) -> Denoiser:
        """The same network for samples of another size in pixels; a UserError where its size is part of it."""
        raise UserError(f"size: this {self.family} network makes samples of shape {self.shape} and no other")

    def store_in(self, dtype: torch.dtype) -> None:
        """Keep the weights in half precision, in place, as far as the network computes in it."""
        self.to(dtype)

    def label(self, cond: Cond, n: int) -> Tensor | None:
        """Labels int64 [n] of a condition, null labels where there is none; None for an unconditional network."""
        if self.num_classes is None:
            return None
        cond = cond if cond is not None and "label" in cond else repeat(self.null, n)
        if cond is None:
            raise ValueError(f"this network needs a label, 0 .. {self.num_classes - 1}: it has no null label")
        return cond["label"]

    @property
    def device(self) -> torch.device:
        """Where the weights (or, without any, the buffers) lie."""
        tensor = next(chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, as plain data for `fastgen.json`."""
        return {
            "family": self.family,
            "path": path_to_dict(self.path),
            "prediction": asdict(self.prediction),
            "time_scale": self.time_scale,
            "log_time": self.log_time,
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "null_label": self.null_label,
            **({"extra": list(self.extra)} if self.extra else {}),
        }

    def write(self, folder: FilePath) -> None:
        """Write the network's own files (weights and architecture) into a folder."""
        raise NotImplementedError


class _Description(Model):
    """`Denoiser.describe()` as a file holds it."""

    path: dict[str, Any]
    prediction: dict[str, Any]
    time_scale: float
    log_time: bool
    shape: tuple[int, ...]
    num_classes: int | None
    null_label: bool


def conventions(data: dict[str, Any]) -> dict[str, Any]:
    """`Denoiser.describe()` read back as the arguments of the constructor (but the net); ValueError if damaged."""
    try:
        told = _Description.model_validate({name: data[name] for name in _Description.model_fields if name in data})
    except ValidationError as error:
        raise ValueError(explain(error, _Description)) from error
    return {**dict(told), "path": path_from_dict(told.path), "prediction": Prediction(**told.prediction)}


class View:
    """A denoiser (or a teacher) on a fixed path."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        self.model, self.path = model, path

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None, **options: Any) -> Pair:
        return self.model(x, t, cond, on=self.path, **options)
