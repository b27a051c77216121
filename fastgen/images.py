"""Sample tensors as PNG files: one image, or many in one grid.

Images are float tensors [N, C, H, W] (or [C, H, W] for one) in [-1, 1]; C is 1 (grey) or 3 (RGB).
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastgen.errors import RunFailed
from fastgen.files import write_atomic

# A tile smaller than this cannot be judged by eye: 8x8 digits grow to 64x64, 512x512 photographs stay as they are.
SMALLEST_TILE = 64


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0..255: (x + 1) * 127.5, rounded half to even, clamped; any shape. NaN is a RunFailed, not black."""
    images = images.detach().float()
    if torch.isnan(images).any():
        raise RunFailed("the images hold NaN: the model that made them is broken, nothing was drawn")
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def grid_png(images: Tensor, columns: int | None = None, upscale: int | None = None) -> bytes:
    """Images [N, C, H, W] in [-1, 1] -> PNG bytes of a grid, row by row, with transparent gaps and empty places.

    columns defaults to the square root of N, rounded up; upscale (a whole number, nearest neighbour) to what makes a
    tile at least 64 pixels wide or high.
    """
    n, channels, height, width = images.shape
    if n == 0 or channels not in (1, 3):
        raise ValueError(f"a grid needs [N >= 1, 1 or 3, H, W], not {tuple(images.shape)}")
    columns = min(columns or math.isqrt(n - 1) + 1, n)
    upscale = upscale or -(-SMALLEST_TILE // max(height, width))
    tiles = _pixels(images).repeat(upscale, axis=1).repeat(upscale, axis=2)
    height, width = tiles.shape[1:3]
    gap = min(8, max(1, max(height, width) // 24))
    rows = -(-n // columns)
    # Colour and alpha; alpha 0 wherever there is no image, so that a page's own background shows between the tiles.
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, channels + 1), np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width, :channels] = tile
        canvas[top : top + height, left : left + width, channels] = 255
    return _png(canvas)


def save_png(path: str | Path, image: Tensor) -> None:
    """Write one image [C, H, W] in [-1, 1] as PNG at its own size, whole or not at all."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"a picture needs [1 or 3, H, W], not {tuple(image.shape)}")
    write_atomic(path, _png(_pixels(image[None])[0]))


def _pixels(images: Tensor) -> np.ndarray:
    """[N, C, H, W] -> uint8 [N, H, W, C] on the CPU."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def _png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 1..4] (grey, grey + alpha, RGB, RGBA) -> PNG bytes."""
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images [N, C, H, W] in [-1, 1] as PIL images, one each at its own size."""
    return [Image.open(io.BytesIO(_png(pixels))) for pixels in _pixels(images)]
