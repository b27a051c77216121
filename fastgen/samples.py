"""Where the images of a measurement come from: a model, batch by batch and resumably, or files that are there."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastgen import files, images, noise
from fastgen.api import Generator
from fastgen.data.pixels import ENDINGS, BadImage, decode, read_bytes
from fastgen.errors import UserError
from fastgen.eval.resize import centre_squares

logger = logging.getLogger("fastgen")
LOSSY = (".jpg", ".jpeg", ".webp")
RECORD = "samples.json"  # what a folder of samples was made by


class Batch(NamedTuple):
    """Images float32 [N, C, H, W] in [-1, 1], and what was asked for where a model made them."""

    images: Tensor
    labels: Tensor | None = None
    prompts: Sequence[str] | None = None


class Samples(Protocol):
    """A number of images of one shape (C, H, W), read in their order."""

    shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Batch]: ...


class Made:
    """Images number 0 .. num - 1 of a model; image i depends on (seed, i) only, whatever the batch.

    prompts: taken in their order, number i modulo how many there are. labels: "balanced" (0, 1, 2, ... in turn) or
    "uniform" (drawn at random by number), for class-conditional models.
    folder: each image is kept there as a PNG, and one that is there is not made again; what is measured is then what
    was kept, 8 bits a channel.
    """

    def __init__(
        self,
        model: Generator,
        num: int,
        *,
        seed: int,
        options: dict[str, Any],
        prompts: Sequence[str] | None = None,
        labels: str = "balanced",
        folder: Path | None = None,
        maker: str = "",
    ) -> None:
        self.model, self.num, self.seed, self.options = model, num, seed, options
        self.prompts, self.labels, self.folder = prompts, labels, folder
        self.shape = tuple(model.image_shape)
        self._record = self._told(maker)
        if folder is not None:
            self._check(folder)

    def __len__(self) -> int:
        return self.num

    def batches(self, size: int) -> Iterator[Batch]:
        if self.folder is not None and not (self.folder / RECORD).exists():
            files.make_folder(self.folder)
            files.write_json(self.folder / RECORD, self._record)
        for start in range(0, self.num, size):
            rows = torch.arange(start, min(start + size, self.num))
            prompts = None if self.prompts is None else [self.prompts[i % len(self.prompts)] for i in rows.tolist()]
            labels = self._labels(rows)
            made = self._kept(rows)
            if made is None:
                made = self._make(rows, labels, prompts)
            yield Batch(made, labels, prompts)

    def _make(self, rows: Tensor, labels: Tensor | None, prompts: Sequence[str] | None) -> Tensor:
        asked: dict[str, Any] = {"labels": labels} if prompts is None else {"prompts": prompts}
        made = self.model.sample(
            num=len(rows), first=int(rows[0]), seed=self.seed, batch=len(rows), **asked, **self.options
        )
        if self.folder is None:
            return made
        for row, image in zip(rows.tolist(), made, strict=True):
            images.save_png(self._file(row), image)
        return _float(images.to_uint8(made))

    def _kept(self, rows: Tensor) -> Tensor | None:
        """The images of earlier runs, if all of these are there."""
        if self.folder is None or not all(self._file(row).exists() for row in rows.tolist()):
            return None
        return torch.stack([_float(_read(self._file(row), self.shape[0])) for row in rows.tolist()])

    def _labels(self, rows: Tensor) -> Tensor | None:
        classes = self.model.model.denoiser.num_classes
        if classes is None:
            return None
        return rows % classes if self.labels == "balanced" else noise.integers(self.seed, "labels", rows, classes)

    def _file(self, row: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{row:06d}.png"

    def _told(self, maker: str) -> dict[str, Any]:
        """What the images depend on."""
        words = None if self.prompts is None else hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        return {"model": maker, "seed": self.seed, "labels": self.labels, "prompts_sha256": words, **self.options}

    def _check(self, folder: Path) -> None:
        """Find that the folder is another's; it is marked as this one's with the first images, not before."""
        record = folder / RECORD
        if record.exists():
            known, told = files.read_json(record), self._record
            for key in [*told, *(key for key in known if key not in told)]:  # an option left out is a change, too
                if known.get(key) != told.get(key):
                    raise UserError(
                        f"--samples {folder}: made with another {key} ({known.get(key)}, now {told.get(key)}); choose "
                        f"another folder, or leave the model out to measure what is there"
                    )
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"--samples {folder}: holds files of unknown making; choose another folder, or leave the model out to "
                f"measure what is there"
            )


class Found:
    """Images that are there: a folder of files (sub-folders count, in the order of their names), or a .npz whose
    `arr_0` is uint8 [N, H, W, C].

    crop: each image's centre square, by Lanczos to that side; without it all must have one size.
    """

    num_classes: int | None = None
    captions: Sequence[str] | None = None

    def __init__(
        self,
        place: Path,
        *,
        channels: int = 3,
        crop: int | None = None,
        num: int | None = None,
        option: str = "--samples",
    ) -> None:
        self.place, self.channels, self.crop, self.name = place, channels, crop, place.name
        self._array = _load_array(place) if place.suffix == ".npz" else None
        self._files = _image_files(place, option) if self._array is None else []
        count = len(self._files) if self._array is None else len(self._array)
        if option == "--samples" and any(file.suffix.lower() in LOSSY for file in self._files):
            logger.warning("%s: JPEG or WebP images; what their coding took away moves a Frechet distance", place)
        if num is not None and num > count:
            raise UserError(f"{option} {place}: {count} images, and --num {num}")
        self.num = count if num is None else num
        self.shape: tuple[int, ...] = ()
        self.shape = tuple(self._image(0).shape)

    def __len__(self) -> int:
        return self.num

    def batches(self, size: int) -> Iterator[Batch]:
        for index in torch.arange(self.num).split(size):
            yield Batch(self.get(index)["x0"])

    def get(self, index: Tensor) -> dict[str, Tensor]:
        """As a data set has it: {"x0": float32 [B, C, H, W] in [-1, 1]}."""
        return {"x0": torch.stack([_float(self._image(row)) for row in index.tolist()])}

    def _image(self, row: int) -> Tensor:
        """uint8 [C, H, W]"""
        if self._array is not None:
            image = torch.from_numpy(np.ascontiguousarray(self._array[row])).permute(2, 0, 1)
        else:
            image = _read(self._files[row], self.channels)
        image = image if self.crop is None else centre_squares(image[None], self.crop)[0]
        if self.shape and tuple(image.shape) != self.shape:
            name = self._files[row] if self._files else f"{self.place} row {row}"
            raise UserError(
                f"{name}: {image.shape[1]}x{image.shape[2]} pixels (height x width), the first image has "
                f"{self.shape[1]}x{self.shape[2]}; --crop N brings all to N x N"
            )
        return image


def _float(pixels: Tensor) -> Tensor:
    return pixels.float().div_(127.5).sub_(1)


def _read(path: Path, channels: int) -> Tensor:
    """uint8 [C, H, W]"""
    try:
        return torch.from_numpy(np.array(decode(read_bytes(path), str(path), None, channels).pixels))
    except BadImage as error:
        raise UserError(f"{error}; remove it, or make it again") from error


def _image_files(folder: Path, option: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: no such folder or .npz file")
    found = [p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS]
    found = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not found:
        raise UserError(f"{option} {folder}: no image in it ({', '.join(ENDINGS)})")
    return found


def _load_array(path: Path) -> np.ndarray:
    """`arr_0` of a .npz, uint8 [N, H, W, 3], as ADM and its followers write samples."""
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file["arr_0"]
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: no array arr_0 that can be read from it ({error})") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not len(array):
        raise UserError(f"{path}: arr_0 is {array.dtype} {list(array.shape)}; images are uint8 [N, height, width, 3]")
    return array
