"""Made-up images for smoke runs: gratings whose direction and tint tell the class."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The fractional parts of multiples of the golden ratio fill [0, 1) evenly: phases that differ without a generator.
GOLDEN = (math.sqrt(5) - 1) / 2


class Synthetic:
    """`rows` samples [C, H, W] in [-1, 1], a function of the index alone; labels cycle through the classes.

    Class k of K: a grating of two waves along the angle pi k / K, channel c times 0.6 + 0.4 cos(2 pi (k / K + c / C)).
    num_classes None: the same images of one class, without labels. captions: images with a text each in place of a
    label, which names the class; `get` also gives their framing then, as captioned images have it.
    """

    def __init__(
        self, shape: tuple[int, int, int], num_classes: int | None = None, rows: int = 4096, *, captions: bool = False
    ):
        self.name, self.shape, self.num_classes, self._rows = "synthetic", tuple(shape), num_classes, rows
        self._classes = num_classes or 1
        self.captions: Sequence[str] | None = None
        if captions:
            self.num_classes = None
            self.captions = [f"a grating, direction {i % self._classes}" for i in range(rows)]
        told = f"{self.shape} {num_classes} {rows}"
        self.content_sha256 = hashlib.sha256(f"synthetic {told}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._rows

    def get(self, index: Tensor) -> dict[str, Tensor]:
        """{"x0": float32 [B, C, H, W], "label": int64 [B] where there are classes} for index int64 [B]."""
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self._rows:
            raise IndexError(f"index outside 0 .. {self._rows - 1}")
        channels, height, width = self.shape
        label = index % self._classes
        share = label.double() / self._classes
        phase = 2 * math.pi * (index.double() * GOLDEN % 1)
        y = torch.arange(height, dtype=torch.float64)[:, None] / height
        x = torch.arange(width, dtype=torch.float64)[None] / width
        angle = math.pi * share[:, None, None]
        wave = torch.sin(4 * math.pi * (x * angle.cos() + y * angle.sin()) + phase[:, None, None])
        tint = 0.6 + 0.4 * torch.cos(2 * math.pi * (share[:, None] + torch.arange(channels) / channels))
        x0 = (wave[:, None] * tint[:, :, None, None]).float()
        if self.captions is not None:
            whole = torch.tensor([height, width]).expand(len(index), 2)
            return {"x0": x0, "original": whole, "corner": torch.zeros_like(whole)}
        return {"x0": x0} if self.num_classes is None else {"x0": x0, "label": label}
