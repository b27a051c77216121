"""Small networks with weights everywhere, and what to feed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen.sparse import Voxels
from fastgen.teachers.trellis.args import Network
from fastgen.teachers.trellis.models import make
from fastgen.zoo.trellis import GAUSSIANS

STRUCTURE = dict(
    resolution=4,
    in_channels=3,
    out_channels=3,
    model_channels=24,
    cond_channels=8,
    num_blocks=2,
    num_heads=2,
    patch_size=1,
    qk_rms_norm=True,
)
SLAT = {**STRUCTURE, "patch_size": 2, "io_block_channels": [8]}
TRUNK = dict(resolution=8, model_channels=24, latent_channels=4, num_blocks=2, num_heads=2, window_size=4)
DECODERS = {
    "SLatGaussianDecoder": GAUSSIANS,
    "SLatRadianceFieldDecoder": dict(rank=4, dim=3),
    "SLatMeshDecoder": dict(use_color=True),
}


def small(name: str, **changes: Any) -> Any:
    """A network of this class with random weights, in float64."""
    args: dict[str, Any] = {
        "SparseStructureFlowModel": STRUCTURE,
        "SLatFlowModel": SLAT,
        "SparseStructureEncoder": dict(in_channels=1, latent_channels=4, num_res_blocks=1, channels=[4, 8]),
        "SparseStructureDecoder": dict(out_channels=1, latent_channels=4, num_res_blocks=1, channels=[8, 4]),
        "SLatEncoder": {**TRUNK, "in_channels": 6},
        **{name: {**TRUNK, "representation_config": config} for name, config in DECODERS.items()},
    }[name]
    if name == "SLatMeshDecoder":  # whose last norm has 32 groups
        args = {**args, "model_channels": 256}
    return shaken(make(name, {**args, **changes}, "here")).double().eval()


def shaken(net: Network) -> Network:
    """Random weights in every parameter: nothing left at zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            width = parameter[0].numel() if parameter.ndim > 1 else 10
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5 + (parameter.ndim == 1))
    return net


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def voxels(channels: int, *, size: int = 8, share: float = 0.2, batch: int = 2, seed: int = 0) -> Voxels:
    """Random occupancies; share = 1: full grids."""
    mask = torch.rand(batch, size, size, size, generator=torch.Generator().manual_seed(seed)) < share
    coords = mask.nonzero().int()
    return Voxels(normal(len(coords), channels), coords, batch)


def told(batch: int = 2, *, width: int = 8, length: int = 5) -> tuple[Tensor, Tensor]:
    """Network times [B] and a condition [B, L, width]."""
    return torch.linspace(900.0, 130.0, batch, dtype=torch.float64), normal(batch, length, width, seed=2)


def half_elements(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.dtype == torch.float16)
