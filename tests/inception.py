"""A weight file of the Inception network with made-up values that keep every layer alive."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from fastgen.eval.inception import SIZE, Inception
from fastgen.eval.resize import tf1_bilinear


def smooth_images(count: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    """uint8 [count, 3, side, side]: noise of few pixels made large, so that images differ in more than texture."""
    noise = torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise.float(), size=(side, side), mode="bilinear").round().to(torch.uint8)


def as_samples(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def made_up() -> Inception:
    """He initialisation, and batch statistics taken from images: with torch's own start the features shrink to 4e-7."""
    torch.manual_seed(0)
    net = Inception()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean of what is seen
    with torch.no_grad():
        net.train()(tf1_bilinear(smooth_images(4, seed=9).float(), SIZE))
    return net.eval()


def save_pth(folder: Path, name: str = "made-up.pth") -> Path:
    torch.save(made_up().state_dict(), folder / name)
    return folder / name
