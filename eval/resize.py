"""How images reach the size a network wants. The recipe changes a Frechet distance by several points, so it has a name.

tf     TensorFlow 1's bilinear resize of the graph of 2015: no antialias, pixel corners (not centres) on a grid. The
       numbers of ADM, EDM, torch-fidelity and torchmetrics(antialias=False) are made with it.
clean  PIL's bicubic on floats, one channel at a time, antialiased (Parmar et al. 2022, 2104.11222): clean-fid.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RECIPES = {"tf": "tf1-bilinear", "clean": "pil-bicubic-float"}


def tf1_bilinear(x: Tensor, size: int) -> Tensor:
    """Float [N, C, H, W] -> [N, C, size, size]. Output pixel i reads the input at i * in / out, borders repeated."""
    return _lerp(_lerp(x, 3, size), 2, size)  # columns first, as the kernel does: the same bits


def _lerp(x: Tensor, dim: int, size: int) -> Tensor:
    length = x.shape[dim]
    # TensorFlow's kernel multiplies in float32; in float64 a few pixels would fall on the other side of a whole number.
    at = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(length / size, dtype=torch.float32)
    low = at.long().clamp_max(length - 1)
    high = (low + 1).clamp_max(length - 1)
    weight = (at - low).to(x.dtype).reshape([-1 if d == dim else 1 for d in range(x.ndim)])
    first, second = x.index_select(dim, low), x.index_select(dim, high)
    return first + (second - first) * weight


def pil_bicubic(x: Tensor, size: int) -> Tensor:
    """Float [N, C, H, W] in 0 .. 255 -> [N, C, size, size], clipped to 0 .. 255 and not rounded; on x's device."""
    planes = x.detach().float().cpu().numpy()
    out = np.empty((*planes.shape[:2], size, size), np.float32)
    for n, c in np.ndindex(planes.shape[:2]):
        image = Image.fromarray(planes[n, c]).resize((size, size), Image.Resampling.BICUBIC)
        out[n, c] = np.asarray(image).clip(0, 255)
    return torch.from_numpy(out).to(x.device)


RESIZERS: dict[str, Callable[[Tensor, int], Tensor]] = {"tf": tf1_bilinear, "clean": pil_bicubic}


def centre_squares(x: Tensor, size: int) -> Tensor:
    """uint8 [N, 3, H, W] -> uint8 [N, 3, size, size]: the centre square of the short side, then PIL's Lanczos.

    DMD2's COCO evaluation does so to real and generated images alike. Squares of that size come back as they are.
    """
    if x.shape[2:] == (size, size):
        return x
    side = min(x.shape[2:])
    # torchvision's center_crop rounds half to even.
    top, left = (round((length - side) / 2) for length in x.shape[2:])
    squares = x[:, :, top : top + side, left : left + side].permute(0, 2, 3, 1).contiguous().cpu().numpy()
    done = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)) for image in squares]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).to(x.device)


def recipe_name(resize: str, size: int, crop: int | None) -> str:
    """What a result says of its images' way to the network."""
    return f"{RECIPES[resize]}-{size}" if crop is None else f"square-lanczos-{crop}, {RECIPES[resize]}-{size}"
