"""Pixels as samples: 8-bit images in memory, and images decoded when asked for.

Values 0 .. white become value / (white / 2) - 1, in [-1, 1].
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastgen.errors import UserError

log = logging.getLogger(__name__)

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
# Pillow knows fifty formats; only those named here are ever opened, whatever the file's ending says.
FORMATS = ("PNG", "JPEG", "WEBP")

# A data set whose pixels fit is decoded once: 0.2 ms for a small JPEG would hold up every step of a small network.
KEPT_BYTES = 1 << 30

OnBad = Literal["refuse", "skip"]


class BadImage(Exception):
    """One image that cannot be read; the message names it and says why."""


class Picture(NamedTuple):
    """A decoded image and how it was brought to its size; heights and widths count pixels."""

    pixels: np.ndarray  # uint8 [C, H, W]
    original: tuple[int, int]  # (height, width) as the picture is shown, before it was resized
    corner: tuple[int, int]  # (top, left) of the crop in the resized picture


class Memory:
    """Images kept whole in memory as uint8 [N, C, H, W]; labels int64 [N] in 0 .. num_classes - 1, or None."""

    captions: Sequence[str] | None = None

    def __init__(self, name: str, images: Tensor, labels: Tensor | None, num_classes: int | None, white: int = 255):
        self.name, self.num_classes = name, num_classes
        self.images, self.labels, self.white = images, labels, white

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def get(self, index: Tensor) -> dict[str, Tensor]:
        """{"x0": float32 [B, C, H, W] in [-1, 1], "label": int64 [B]} for index int64 [B] in 0 .. len - 1."""
        batch = {"x0": to_sample(self.images.index_select(0, index), self.white)}
        if self.labels is not None:
            batch["label"] = self.labels.index_select(0, index)
        return batch


class Coded:
    """Images kept as files or bytes and decoded when asked for; `encoded(row)` is what a kind of storage adds.

    size: the square that images are brought to; None: all must have the first image's height and width.
    bad: rows known not to be usable before any image is read.
    """

    captions: Sequence[str] | None = None
    framed: ClassVar[bool] = False  # whether `get` tells how each picture was brought to its size

    def __init__(
        self,
        name: str,
        count: int,
        labels: Tensor | None,
        num_classes: int | None,
        size: int | None,
        channels: int,
        on_bad: OnBad,
        bad: dict[int, str] | None = None,
    ):
        self.name, self.num_classes = name, num_classes
        self.labels, self.size, self.channels, self.on_bad = labels, size, channels, on_bad
        self._count = count
        self._bad: set[int] = set()
        for row, reason in sorted((bad or {}).items()):
            self._report(row, BadImage(reason))
        self.shape: tuple[int, ...] = (channels, size, size) if size else ()
        if not size:
            self.shape = self._good(0)[1].pixels.shape
        # Row -> the good row in its place, and its pixels, once decoded; pages that are never filled take no memory.
        self._used = np.full(count, -1, np.int64)
        self._kept = np.empty((count, *self.shape), np.uint8) if count * math.prod(self.shape) <= KEPT_BYTES else None
        self._framing = np.zeros((count, 4), np.int32)

    def encoded(self, row: int) -> bytes:
        """The file of one image; BadImage if there is none."""
        raise NotImplementedError

    def place(self, row: int) -> str:
        """Where a row lies, in the user's words."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._count

    def get(self, index: Tensor) -> dict[str, Tensor]:
        """{"x0": float32 [B, C, H, W] in [-1, 1], "label": int64 [B]} for index int64 [B] in 0 .. len - 1.

        framed: also "original" and "corner", int64 [B, 2] each; see `Picture`.
        """
        wanted = index.numpy(force=True)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self._count:
            raise IndexError(f"index outside 0 .. {self._count - 1}")
        # In the order of storage, so that each block of a file is read once per batch.
        rows, slots = np.unique(wanted, return_inverse=True)
        pixels, used = self._decoded(rows)
        batch = {"x0": to_sample(torch.from_numpy(pixels[slots]), 255)}
        if self.labels is not None:
            batch["label"] = self.labels[torch.from_numpy(used[slots])]
        if self.framed:
            framing = torch.from_numpy(self._framing[used[slots]]).long()
            batch["original"], batch["corner"] = framing[:, :2], framing[:, 2:]
        return batch

    def _decoded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For distinct rows int64 [R]: pixels uint8 [R, C, H, W], and the good row whose they are."""
        fresh = rows if self._kept is None else rows[self._used[rows] < 0]
        pixels = np.empty((len(rows) if self._kept is None else 0, *self.shape), np.uint8)
        for i, row in enumerate(fresh.tolist()):
            used, picture = self._good(row)
            self._used[row], self._framing[used] = used, picture.original + picture.corner
            if self._kept is None:
                pixels[i] = picture.pixels
            else:
                self._kept[used] = picture.pixels
        return (pixels if self._kept is None else self._kept[self._used[rows]]), self._used[rows]

    def _good(self, row: int) -> tuple[int, Picture]:
        """The row itself or, where bad rows are skipped, the next good one (the first follows the last)."""
        for step in range(self._count):
            candidate = (row + step) % self._count
            if candidate in self._bad:
                continue
            try:
                return candidate, self._picture(candidate)
            except BadImage as error:
                self._report(candidate, error)
        raise UserError(f"{self.name}: not one of its {self._count} images can be read")

    def _report(self, row: int, error: BadImage) -> None:
        if self.on_bad == "refuse":
            raise UserError(f"{error}; mend or remove it, or leave such images out with data.on_bad=skip") from error
        log.warning("%s: skipped, the next good image takes its place", error)
        self._bad.add(row)

    def _picture(self, row: int) -> Picture:
        picture = decode(self.encoded(row), self.place(row), self.size, self.channels)
        if self.shape and picture.pixels.shape != self.shape:
            found, (height, width) = picture.pixels.shape[1:], self.shape[1:]
            raise UserError(
                f"{self.place(row)}: {found[0]}x{found[1]} pixels (height x width), the first image has "
                f"{height}x{width}; data.size=N brings all to N x N"
            )
        return picture


def to_sample(pixels: Tensor, white: int) -> Tensor:
    """uint8 0 .. white -> float32 in [-1, 1]."""
    return pixels.float().div_(white / 2).sub_(1)


def decode(data: bytes, place: str, size: int | None, channels: int) -> Picture:
    """An encoded image as a picture of its own size or of `size` x `size`; BadImage names `place`.

    Turned as its EXIF says; transparent pixels are laid over white; grey is repeated for three channels, colour
    becomes luma (ITU-R 601) for one; 16-bit grey keeps its upper 8 bits.
    """
    try:
        if data.startswith(b"\x89PNG"):
            # Decoding passes over the checksums of the pixels: without this, damage changes them unseen.
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.verify()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            flat = _flatten(ImageOps.exif_transpose(image)).convert("RGB" if channels == 3 else "L")
    except Exception as error:  # what Pillow raises for broken bytes has no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        if "cannot identify image file" in reason:
            reason = "none of PNG, JPEG and WebP, or broken from its first bytes"
        raise BadImage(f"{place}: not a readable image ({reason})") from error
    fitted, corner = _fit(flat, size) if size else (flat, (0, 0))
    pixels = np.asarray(fitted)
    return Picture(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), (flat.height, flat.width), corner)


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def _fit(image: Image.Image, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """Short side to `size`, centre crop; the crop's (top, left) in whole pixels of the resized picture.

    The box does both in one pass: a 1 x 10,000 image never grows to 512 x 5M.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    corner = round(top * size / side), round(left * size / side)
    if image.size == (size, size):
        return image, corner
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box), corner


def read_bytes(path: Path) -> bytes:
    """A file's content; BadImage where the system refuses it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"{path}: {error.strerror or error}") from error
