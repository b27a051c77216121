"""A small residual MLP for points and tiny images, cheap on a CPU and smooth in time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

# Multiples of pi. Time derivatives of the network stay small: 2410.11081 (section 4.1) traces the instability of
# continuous-time consistency training to Fourier features of scale 16.
FREQUENCIES = (1.0, 2.0, 4.0)
EMBEDDING = 128


class ResidualMLP(nn.Module):
    """x [B, *shape], time [B] in about [0, 1], label int64 [B] in 0 .. num_classes (the last is null), and an addition
    to the embedding of the time [B, EMBEDDING] -> [B, *shape].

    `depth` pre-norm blocks h + B silu(A (scale * norm(h) + shift)); time and label give every block its scale and
    shift, computed for all blocks in one matrix product. Beside the blocks each coordinate of x reaches the output
    through a factor of its own, which time and label decide: a velocity holds all of the noise, and that need not fit
    through `width`. The output is zero at first.
    """

    frequencies: Tensor

    def __init__(
        self, shape: tuple[int, ...], width: int, depth: int, num_classes: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        self.register_buffer("frequencies", math.pi * torch.tensor(FREQUENCIES), persistent=False)
        self.time = nn.Sequential(
            nn.Linear(1 + 2 * len(FREQUENCIES), EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING)
        )
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, EMBEDDING)
        self.modulation = nn.Linear(EMBEDDING, depth * 2 * width)
        self.inner = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outer = nn.Linear(width, size)
        self.skip = nn.Linear(EMBEDDING, size)
        for layer in (self.modulation, self.outer, self.skip):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        angles = time[:, None] * self.frequencies.to(time.dtype)
        features = torch.cat([time[:, None], angles.sin(), angles.cos()], dim=1)
        embedding = self.time(features.to(self.inner.weight.dtype))
        if self.label is not None:
            embedding = embedding + self.label(label)
        if extra is not None:
            embedding = embedding + extra
        embedding, flat = functional.silu(embedding), x.flatten(1)
        modulation = self.modulation(embedding).chunk(len(self.blocks), dim=1)
        h = self.inner(flat)
        for block, scale_shift in zip(self.blocks, modulation, strict=True):
            h = block(h, scale_shift)
        return torch.addcmul(self.outer(self.norm(h)), self.skip(embedding), flat).view_as(x)


class Block(nn.Module):
    """One residual block: h [B, width], scale and shift side by side [B, 2 width] -> [B, width]."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.expand = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(width, width)

    def forward(self, h: Tensor, scale_shift: Tensor) -> Tensor:
        scale, shift = scale_shift.chunk(2, dim=1)
        normed = self.norm(h)
        return h + self.contract(
            self.dropout(functional.silu(self.expand(normed + torch.addcmul(shift, normed, scale))))
        )
