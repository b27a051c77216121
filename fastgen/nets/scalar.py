"""A number that a network is told besides its time: its embedding, to be added to that of the time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Multiples of pi, as low as those of the residual MLP: what is embedded is differentiated along the path.
FREQUENCIES = (1.0, 2.0, 4.0)


class Scalar(nn.Module):
    """value [B], about 0 .. 1 -> [B, width]; 0 at first, so that a network stays what it was.

    The first layer is N(0, 0.02^2) and the last one 0 (2503.09641's guidance embedder): with zeros in both, nothing but
    the last bias would ever get a gradient, and the output could not come to depend on the value. The numbers come from
    a generator of their own, the same for every run.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.tensor(FREQUENCIES), persistent=False)
        self.inner = nn.Linear(1 + 2 * len(FREQUENCIES), width)
        self.outer = nn.Linear(width, width)
        nn.init.normal_(self.inner.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        for parameter in (self.inner.bias, self.outer.weight, self.outer.bias):
            nn.init.zeros_(parameter)

    def forward(self, value: Tensor) -> Tensor:
        angles = value[:, None] * self.frequencies.to(value.dtype)
        features = torch.cat([value[:, None], angles.sin(), angles.cos()], dim=1)
        return self.outer(nn.functional.silu(self.inner(features.to(self.inner.weight.dtype))))


@contextmanager
def added(modules: Iterable[nn.Module], extra: Tensor | None) -> Iterator[None]:
    """While it lasts, `extra` [B, width] is added to what these modules (time embeddings of a stock network) return.

    For one call of the network. Blocks that are computed again in the backward pass (gradient checkpointing) must lie
    behind these modules, not around them.
    """
    if extra is None:
        yield
        return
    handles = [m.register_forward_hook(lambda _module, _args, out: out + extra.to(out.dtype)) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fold(module: nn.Linear, extra: Tensor) -> None:
    """Make a constant addition to a linear layer's output, [width], part of its bias: a stock network needs no more."""
    assert module.bias is not None
    with torch.no_grad():
        module.bias.add_(extra.to(module.bias))
