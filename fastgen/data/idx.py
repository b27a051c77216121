"""MNIST's IDX layout: a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-...; each plain or gzipped.

A file is two zero bytes, a type (0x08: unsigned bytes), the number of dimensions, each dimension as a big-endian 32-bit
number, then the values (Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits").
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from fastgen.data.pixels import Memory
from fastgen.errors import UserError, suggestion

STEMS = {"train": "train", "test": "t10k"}


class Idx(Memory):
    """Grey images [1, H, W] with labels. path: the folder, or one file of images (its labels lie beside it).

    classes: how many there are; None takes the largest label + 1.
    """

    def __init__(self, path: str | Path, split: str = "train", classes: int | None = None):
        path = Path(path)
        image_file = path if path.is_file() else _find(path, split)
        label_file = _label_file(image_file)
        images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
        if len(images) != len(labels):
            raise UserError(f"{image_file} holds {len(images)} images, {label_file.name} {len(labels)} labels")
        if images.size == 0:
            raise UserError(f"{image_file}: holds no image")
        num_classes = classes or int(labels.max()) + 1
        if labels.max() >= num_classes:
            raise UserError(f"{label_file}: label {labels.max()} does not fit data.classes={num_classes}")
        name = path.name if path.is_file() else f"{path.name}/{split}"
        super().__init__(name, torch.from_numpy(images)[:, None], torch.from_numpy(labels).long(), num_classes)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """One IDX file as uint8 of its own shape; anything but exactly what its header promises is a UserError."""
    data = _content(path)
    expected = bytes([0, 0, 8, dimensions])
    if data[:4] != expected:
        raise UserError(f"{path}: an IDX file of {dimensions} dimensions begins {expected.hex()}, not {data[:4].hex()}")
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise UserError(f"{path}: truncated within its header; fetch it again")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    promised, found = math.prod(shape), len(data) - start
    if found != promised:
        state = "truncated" if found < promised else "longer than its header says"
        raise UserError(f"{path}: {state}: {promised} values promised, {found} there; fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            return file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: gzip data truncated or damaged ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def _variants(stem: str, what: str) -> list[str]:
    return [f"{stem}-{what}{dot}idx{3 if what == 'images' else 1}-ubyte{end}" for dot in "-." for end in ("", ".gz")]


def _find(folder: Path, split: str) -> Path:
    if split not in STEMS:
        raise UserError(f"data.split={split}: IDX files have no such split ({suggestion(split, STEMS)})")
    for name in _variants(STEMS[split], "images"):
        if (folder / name).is_file():
            return folder / name
    present = [s for s, stem in STEMS.items() if any((folder / n).is_file() for n in _variants(stem, "images"))]
    hint = f"; data.split={present[0]} is there" if present else ""
    raise UserError(f"{folder}: no {STEMS[split]}-images-idx3-ubyte (plain or .gz){hint}")


def _label_file(images: Path) -> Path:
    plain = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for name in (plain, plain + ".gz"):
        if name.removesuffix(".gz") != images.name.removesuffix(".gz") and images.with_name(name).is_file():
            return images.with_name(name)
    raise UserError(f"{images}: no file of labels beside it ({plain}, plain or .gz)")
