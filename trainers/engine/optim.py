"""Optimisers per network, the learning rate as a function of the step, and the precision of the forward pass."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from fastgen.config import Model
from fastgen.errors import require

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Model):
    """One network's optimiser. Matrices are decayed by weight_decay; vectors (norms, biases) never are.

    adamw8bit keeps moments in 8 bits, block by block (2110.02861); tensors under 4,096 numbers keep 32.
    """

    name: Literal["adamw", "radam", "adamw8bit"] = "adamw"
    lr: float = Field(default=1e-3, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class ClipConfig(Model):
    """A limit of the gradient norm that follows the run: at most `most`, and once `window` finite norms are known, at
    most that percentile of the last `window` of them (TRELLIS's, 2412.01506: 1, 95, 1000)."""

    most: float = Field(default=1.0, gt=0)
    percentile: float = Field(default=95.0, gt=0, le=100)
    window: int = Field(default=1000, ge=1)


class ClipLimit:
    """One network's limit. Its state is the norms it has seen, oldest first."""

    def __init__(self, config: ClipConfig | float | None) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=config.window if isinstance(config, ClipConfig) else 0)

    @property
    def value(self) -> float:
        if not isinstance(self.config, ClipConfig):
            return self.config or math.inf
        if len(self.norms) < self.config.window:
            return self.config.most
        known = torch.tensor(self.norms, dtype=torch.float64)
        return min(self.config.most, float(torch.quantile(known, self.config.percentile / 100)))

    def see(self, norm: float) -> None:
        """Remember a norm before clipping; one that is not finite is no measure."""
        if math.isfinite(norm):
            self.norms.append(norm)


class ScheduleConfig(Model):
    """lr(step) = lr * warm-up * decay: linear over `warmup` steps, then constant, cosine or linear to `final`."""

    warmup: int = Field(default=0, ge=0)
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final: float = Field(default=0.0, ge=0)

    def factor(self, step: int, steps: int) -> float:
        """The multiplier at a step: a pure function, so a resumed run needs no state for it."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        u = (step - self.warmup) / max(steps - self.warmup, 1)
        falling = {"constant": 1.0, "linear": 1 - u, "cosine": (1 + math.cos(math.pi * u)) / 2}[self.decay]
        return self.final + (1 - self.final) * falling


def check(config: OptimConfig) -> None:
    """Refuse an optimiser whose package is missing, before anything is loaded."""
    if config.name == "adamw8bit":
        _bitsandbytes()


def _bitsandbytes() -> Any:
    return require("bitsandbytes", extra="8bit", purpose="optim.name=adamw8bit")


def make_optimizer(parameters: Sequence[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """An optimiser over all that is ever trained of a network: turns switch requires_grad, not membership."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.name == "radam":
        return torch.optim.RAdam(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, decoupled_weight_decay=True, foreach=True
        )
    if config.name == "adamw8bit":
        return _bitsandbytes().optim.AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class Precision:
    """Autocast round the loss; masters, gradients and optimiser states stay float32. fp16 also scales the loss."""

    def __init__(self, name: Literal["fp32", "bf16", "fp16"], device: torch.device) -> None:
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)
