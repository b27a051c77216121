"""Captioned images: four layouts that give the same rows for the same content, in the order of the samples' names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from fastgen.data import LAYOUTS
from fastgen.data.captions import METADATA, Store, any_image, any_text_beside, beside, metadata
from fastgen.data.parquet import Texts, has_text
from fastgen.data.pixels import BadImage, Coded, OnBad, decode, log
from fastgen.data.prompts import texts_sha256
from fastgen.data.tars import tars
from fastgen.errors import UserError

TOLD = 5  # of the samples that are left out, so many are named
BLOCK = 64  # encoded images held at once when all are read


class Captioned(Coded):
    """Images with a caption each: samples [C, size, size], short side resized and cropped in the centre.

    on_bad: with "skip" every image is decoded once at the start, and the samples that have no caption or no readable
    image are left out, so that row i of the images and caption i always belong together.
    """

    framed = True

    def __init__(self, store: Store, size: int, channels: int = 3, on_bad: OnBad = "refuse"):
        self._store = store
        self._rows = np.arange(len(store.captions))
        bad = list(store.problems)
        if on_bad == "skip":
            log.info("%s: reading all %d images once to leave out the bad ones", store.name, len(self._rows))
            found = {row: size for row, size in sizes(store) if isinstance(size, BadImage)}
            self._rows = np.setdiff1d(self._rows, list(found))
            bad += map(str, found.values())
        settle(store, bad, on_bad)
        if not len(self._rows):
            raise UserError(f"{store.name}: no sample that can be used; {store.expected}")
        self.captions: Sequence[str] = [store.captions[row] for row in self._rows.tolist()]
        super().__init__(store.name, len(self._rows), None, None, size, channels, "refuse")

    def encoded(self, row: int) -> bytes:
        return self._store.encoded(int(self._rows[row]))

    def place(self, row: int) -> str:
        return self._store.place(int(self._rows[row]))

    @cached_property
    def content_sha256(self) -> str:
        """Of the encoded images in row order, size and channels, whatever the layout; reads every image once."""
        digest = hashlib.sha256(f"size {self.size} channels {self.channels}".encode())
        for row in range(len(self)):
            try:
                digest.update(hashlib.sha256(self.encoded(row)).digest())
            except BadImage as error:
                self._report(row, error)
        return digest.hexdigest()

    @cached_property
    def captions_sha256(self) -> str:
        """Of the captions in row order."""
        return texts_sha256(self.captions)


def settle(store: Store, bad: list[str], on_bad: OnBad) -> None:
    """Refuse a store that has bad samples, naming the first and what is expected; or name some of those left out."""
    if not bad:
        return
    if on_bad == "refuse":
        more = f" ({len(bad) - 1} more are bad)" if len(bad) > 1 else ""
        mend = "mend or remove it, or leave such samples out with data.on_bad=skip"
        raise UserError(f"{bad[0]}{more}; {store.expected}; {mend}")
    for problem in bad[:TOLD]:
        log.warning("%s; left out", problem)
    log.warning("%s: %d of its samples are left out", store.name, len(bad))


def sizes(store: Store) -> Iterator[tuple[int, tuple[int, int] | BadImage]]:
    """Every row with its image's (height, width), or with what is wrong with it; all are decoded, on all cores."""

    def read(row: int) -> bytes | BadImage:
        try:
            return store.encoded(row)
        except BadImage as error:
            return error

    def size(row: int, data: bytes | BadImage) -> tuple[int, int] | BadImage:
        try:
            return data if isinstance(data, BadImage) else decode(data, store.place(row), None, 3).original
        except BadImage as error:
            return error

    count = len(store.captions)
    with ThreadPoolExecutor() as pool:
        for start in range(0, count, BLOCK):
            rows = range(start, min(start + BLOCK, count))
            yield from zip(rows, pool.map(size, rows, [read(row) for row in rows]), strict=True)


def open_store(path: Path, split: str = "train") -> Store:
    """The samples at a path, whichever of the four layouts it has; what is wrong with single ones is kept for later."""
    layout = _layout(path)
    if layout is None:
        raise UserError(f"{path}: no captioned images here; understood are {LAYOUTS}")
    if layout != "parquet" and split != "train":
        raise UserError(f"data.split={split} chooses among parquet files; {path} holds none")
    read = {"metadata": metadata, "tars": tars, "beside": beside}
    store: Store = Texts(path, split) if layout == "parquet" else read[layout](path)
    if not store.captions and not store.problems:
        raise UserError(f"{path}: holds no sample; {store.expected}")
    return store


def is_captioned(path: Path) -> bool:
    """Whether what lies at a path has captions, or at least one of its images has."""
    layout = _layout(path)
    if layout == "parquet":
        return has_text(path if path.is_file() else _ending(path, ".parquet")[0])
    return any_text_beside(path) if layout == "beside" else layout is not None


def _layout(path: Path) -> str | None:
    """Which of the four a path can be: "parquet", "metadata", "beside", "tars"; None: no images are there."""
    if path.is_file():
        return {".tar": "tars", ".parquet": "parquet"}.get(path.suffix)
    if _ending(path, ".parquet"):
        return "parquet"
    if (path / METADATA).exists():
        return "metadata"
    if any_image(path):  # before tars: an archive may lie beside what was unpacked from it
        return "beside"
    return "tars" if _ending(path, ".tar") else None


def _ending(folder: Path, ending: str) -> list[Path]:
    return sorted(p for p in folder.glob(f"*{ending}") if not p.name.startswith("."))
