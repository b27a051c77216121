"""What stands before and behind a latent network: prompts to conditions, images to latents, latents to images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastgen.cond import Cond


class Posterior(NamedTuple):
    """The encoder's Gaussian over the latents of one image, already in the network's units: [B, C, h, w] each."""

    mean: Tensor
    std: Tensor


class Framing(NamedTuple):
    """How a picture was brought to its size, int64 [B, 2] each: SDXL is told of it (2307.01952)."""

    original: Tensor  # (height, width)
    corner: Tensor  # (top, left) of the crop, in pixels of the resized image


class Codec(Protocol):
    """Frozen, read when first needed, and given up by `release`: a cached run holds neither text encoder nor VAE.

    image_shape   (3, H, W) of what `decode` makes of the network's own latent shape
    text_sha256   of all that decides a prompt's condition: weights, tokenizer, lengths
    image_sha256  of all that decides an image's latents
    tiling        decode in overlapping tiles: the memory of a tile, and slightly other pixels
    """

    image_shape: tuple[int, ...]
    tiling: bool

    @property
    def text_sha256(self) -> str: ...

    @property
    def image_sha256(self) -> str: ...

    @property
    def reads_text(self) -> bool:
        """Whether it has a text encoder."""
        ...

    def encode_prompts(self, prompts: Sequence[str], framing: Framing | None = None) -> Cond:
        """The conditions of n prompts, n rows each; words that do not fit are left out and named in a warning."""
        ...

    def null(self) -> Cond:
        """One row: the condition that guidance steers away from."""
        ...

    def time_ids(self, n: int, framing: Framing | None = None) -> Tensor | None:
        """What a network is told of the framing, n rows; None for those that are not told."""
        ...

    def encode(self, images: Tensor) -> Posterior:
        """Images [B, 3, H, W] in [-1, 1] to the posterior over their latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images float32 [B, 3, H, W] in [-1, 1], differentiable; not clamped."""
        ...

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Codec:
        """Where it works from now on, and how precisely; None: as before."""
        ...

    def modules(self) -> dict[str, torch.nn.Module]:
        """Its networks by name, read if they were not."""
        ...

    def release(self) -> None:
        """Drop the weights; the next call reads them again."""
        ...

    def write(self, folder: Path) -> None:
        """Its parts, in the layout of the pipeline they came from."""
        ...
