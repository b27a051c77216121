"""A folder of images: flat (unlabelled), or one sub-folder per class, numbered in the sorted order of their names."""

from __future__ import annotations

from pathlib import Path

import torch

from fastgen.data import SPLIT_NAMES
from fastgen.data.pixels import ENDINGS, Coded, OnBad, log, read_bytes
from fastgen.errors import UserError


class Folder(Coded):
    """PNG, JPEG and WebP images [C, size, size]: short side resized, centre crop, alpha over white (`pixels.decode`).

    Files with other endings and hidden ones are left out (how many is logged). Images lie directly in the folder or
    directly in the class folders; both at once, an empty class and folders named like splits are refused.
    """

    def __init__(self, path: str | Path, size: int | None = None, channels: int = 3, on_bad: OnBad = "refuse"):
        root = Path(path)
        if not root.is_dir():
            raise UserError(f"{root}: not a folder of images")
        flat, folders = _images(root), sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.class_names = tuple(p.name for p in folders)
        _check_layout(root, flat, self.class_names)
        if folders:
            groups = [_images(folder) for folder in folders]
            for folder, images in zip(folders, groups, strict=True):
                if not images:
                    raise UserError(f"{folder}: a class folder with no image ({', '.join(ENDINGS)}) directly in it")
            labels = torch.repeat_interleave(torch.tensor([len(images) for images in groups]))
            self.files = [file for images in groups for file in images]
        else:
            labels, self.files = None, flat
        classes = len(folders) or None
        super().__init__(root.name, len(self.files), labels, classes, size, channels, on_bad)

    def encoded(self, row: int) -> bytes:
        return read_bytes(self.files[row])

    def place(self, row: int) -> str:
        return str(self.files[row])


def _images(folder: Path) -> list[Path]:
    files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    images = sorted(p for p in files if p.name.lower().endswith(ENDINGS))
    if 0 < len(images) < len(files):
        log.info("%s: %d files are no images by their endings and left out", folder, len(files) - len(images))
    return images


def _check_layout(root: Path, flat: list[Path], classes: tuple[str, ...]) -> None:
    if not flat and not classes:
        raise UserError(f"{root}: no image here ({', '.join(ENDINGS)}) and no class folders")
    if flat and classes:
        raise UserError(f"{root}: images and folders side by side ({flat[0].name}, {classes[0]}/): labelled or not?")
    if classes and set(classes) <= SPLIT_NAMES:
        raise UserError(
            f"{root}: the folders {', '.join(classes)} look like splits; data.path={root / classes[0]} is one"
        )
