"""Counter-based noise: every random number is a pure function of (seed, tag, draw, row, position).

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64 tensor arithmetic, so
the integers are the same on every device, for every batch size, rank count and resume. `row` is a global sample
number, `tag` says what the noise is for, `draw` numbers repeated draws for the same purpose (the steps of a sampler).
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four 32-bit counter words (int64 tensors or ints) and two key words to four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves right once masked.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def bits(seed: int, tag: str, rows: Tensor, n: int, draw: int = 0) -> Tensor:
    """Random 32-bit words, int64 [B, n] with values in [0, 2^32), for the global sample numbers `rows` int64 [B]."""
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed {seed} is outside 0 .. 2^32 - 1")
    block = torch.arange(-(-n // 4), device=rows.device)[None]
    row = rows.long()[:, None]
    words = philox((block, row & _MASK, (row >> 32) & _MASK, draw & _MASK), (seed, zlib.crc32(tag.encode())))
    return torch.stack([word.expand(len(rows), -1) for word in words], dim=-1).flatten(1)[:, :n]


def uniform(seed: int, tag: str, rows: Tensor, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
    """Uniform float32 [B, *shape] in the open interval (0, 1), on a grid of 2^-24."""
    words = bits(seed, tag, rows, math.prod(shape), draw)
    return (((words >> 9).float() + 0.5) * 2.0**-23).reshape(len(rows), *shape)


def integers(seed: int, tag: str, rows: Tensor, high: int, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
    """Integers int64 [B, *shape], uniform in 0 .. high - 1 (high <= 2^31; the bias is below high / 2^32)."""
    if not 1 <= high <= 2**31:
        raise ValueError(f"high={high} is outside 1 .. 2^31")
    words = bits(seed, tag, rows, math.prod(shape), draw)
    return ((words * high) >> 32).reshape(len(rows), *shape)


def normal(seed: int, tag: str, rows: Tensor, shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """Standard normal float32 [B, *shape] by Box-Muller, in float64 where the device has it so that devices agree."""
    n = math.prod(shape)
    words = bits(seed, tag, rows, n + n % 2, draw)
    wide = torch.float32 if rows.device.type == "mps" else torch.float64
    u = (words.to(wide) + 0.5) * 2.0**-32
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), (2 * math.pi) * u[:, 1::2]
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    return pairs[:, :n].float().reshape(len(rows), *shape)
