"""TRELLIS's occupancy VAE: a dense grid of 0 and 1, [B, 1, 4 R, 4 R, 4 R], to and from a latent [B, C, R, R, R]."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from fastgen.teachers.trellis.args import Network, StructureVAEArgs
from fastgen.teachers.trellis.blocks import Norm, zero

EPS = 1e-5  # of the norms here; the transformers' have 1e-6


class ChannelNorm(Norm):
    """Layer norm over the channels of [B, C, D, H, W], with weights."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).contiguous()


class ResBlock(nn.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))), the last convolution zero at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, 3, padding=1) for _ in range(2))
        zero(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))


class Down(nn.Module):
    """Half the size: a convolution over cubes of 2."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Up(nn.Module):
    """Twice the size: 8 times the channels, shuffled into cubes of 2 as ((c 2 + a) 2 + b) 2 + d to offset (a, b, d)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 8 * out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, _, *size = x.shape
        x = x.reshape(b, -1, 2, 2, 2, *size).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, -1, *(2 * n for n in size))


def _levels(channels: tuple[int, ...], count: int, change: type[Down] | type[Up]) -> nn.ModuleList:
    """`count` blocks per level, and a change of size between one level and the next."""
    found: list[nn.Module] = [ResBlock(channels[0]) for _ in range(count)]
    for here, following in pairwise(channels):
        found += [change(here, following), *(ResBlock(following) for _ in range(count))]
    return nn.ModuleList(found)


class _VAEHalf(Network):
    torso = ("middle_block", "blocks")

    def _build(self, channels: int, out: int, change: type[Down] | type[Up], middle: int) -> None:
        a = self.args
        self.input_layer = nn.Conv3d(channels, a.channels[0], 3, padding=1)
        self.blocks = _levels(a.channels, a.num_res_blocks, change)
        self.middle_block = nn.Sequential(*(ResBlock(middle) for _ in range(a.num_res_blocks_middle)))
        last = a.channels[-1]
        self.out_layer = nn.Sequential(ChannelNorm(last), nn.SiLU(), nn.Conv3d(last, out, 3, padding=1))
        self.finish()

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(self.input_layer.weight.dtype)
        return x, self.input_layer(x).to(self.torso_dtype)

    def _through(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


class EncoderArgs(StructureVAEArgs):
    in_channels: int = Field(ge=1)


class DecoderArgs(StructureVAEArgs):
    out_channels: int = Field(ge=1)


class SparseStructureEncoder(_VAEHalf):
    """mean, log-variance = net(occupancy): [B, in_channels, S, S, S] to twice [B, latent_channels, R, R, R]."""

    Args = EncoderArgs

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self._build(self.args.in_channels, 2 * self.args.latent_channels, Down, self.args.channels[-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, h = self._enter(x)
        mean, logvar = self.out_layer(self.middle_block(self._through(h)).to(x.dtype)).chunk(2, dim=1)
        return mean, logvar


class SparseStructureDecoder(_VAEHalf):
    """logits = net(z): [B, latent_channels, R, R, R] to [B, out_channels, S, S, S]; a cell is full where above 0."""

    Args = DecoderArgs

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self._build(self.args.latent_channels, self.args.out_channels, Up, self.args.channels[0])

    def forward(self, z: Tensor) -> Tensor:
        z, h = self._enter(z)
        return self.out_layer(self._through(self.middle_block(h)).to(z.dtype))


def occupied(logits: Tensor) -> Tensor:
    """The full cells of [B, 1, S, S, S], int32 [N, 4] = (batch, x, y, z), in that order."""
    return (logits > 0).argwhere()[:, [0, 2, 3, 4]].int()
