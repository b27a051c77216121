"""Parquet files of encoded images, as dataset hubs publish them: columns `image` and `label`, or `image` and `text`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.data.captions import TEXT_KEYS, BadSample, text_of
from fastgen.data.pixels import BadImage, Coded, OnBad
from fastgen.errors import UserError, require

# Encoded bytes held in memory: a small data set fits whole, of a large one the row groups used last.
CACHE_BYTES = 256 << 20


class Tables:
    """The rows of one split: images from `image` (a struct with `bytes`, or bytes) or a flat `image.bytes`.

    path: one file, or a folder whose files begin with the split's name (train-00000-of-00002.parquet). Rows are reached
    by row group, so a set larger than the cache is read best in small row groups.
    """

    def __init__(self, path: str | Path, split: str = "train"):
        self.pa = require("pyarrow", extra="data", purpose=f"reading {path}")
        self.paths = _files(Path(path), split)
        self._files = [self._open(file) for file in self.paths]
        groups = [(f, g) for f, file in enumerate(self._files) for g in range(file.metadata.num_row_groups)]
        counts = [self._files[f].metadata.row_group(g).num_rows for f, g in groups]
        self._groups, self._ends = groups, np.cumsum(counts)
        self._file_starts = np.cumsum([0] + [file.metadata.num_rows for file in self._files])
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._cached = 0
        self.name = Path(path).stem if Path(path).is_file() else f"{Path(path).name}/{split}"
        if not len(self):
            raise UserError(f"{path}: holds no row")

    def __len__(self) -> int:
        return int(self._file_starts[-1])

    def place(self, row: int) -> str:
        file = int(np.searchsorted(self._file_starts, row, side="right")) - 1
        return f"{self.paths[file]} row {row - self._file_starts[file]} (the first is 0)"

    def encoded(self, row: int) -> bytes:
        group = int(np.searchsorted(self._ends, row, side="right"))
        column = self._column(group)
        if isinstance(column, BadImage):
            raise BadImage(f"{self.place(row)}: {column}")
        data = column[row - (int(self._ends[group - 1]) if group else 0)].as_py()
        if data is None:
            raise BadImage(f"{self.place(row)}: holds no image bytes")
        return data

    def _open(self, path: Path) -> Any:
        parquet = require("pyarrow.parquet", extra="data", purpose=f"reading {path}")
        try:
            file = parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        except (OSError, self.pa.ArrowException) as error:
            raise UserError(f"{path}: not a whole parquet file ({_line(error)}); fetch it again") from error
        if not _image_column(file.schema_arrow):
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no column 'image' with encoded bytes; its columns are {names}")
        return file

    def _column(self, group: int) -> Any:
        """The encoded images of a row group, or the reason why they cannot be read."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        f, g = self._groups[group]
        column, nbytes = _image_column(self._files[f].schema_arrow), 0
        try:
            table = self._files[f].read_row_group(g, columns=[column])
            values: Any = table.column(0)
            if self.pa.types.is_struct(values.type):
                values = require("pyarrow.compute", extra="data", purpose="").struct_field(values, "bytes")
            nbytes = values.nbytes
        except (OSError, self.pa.ArrowException) as error:
            values = BadImage(f"its row group {g} cannot be read ({_line(error)})")
        self._cache[group], self._cached = values, self._cached + nbytes
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._cached -= getattr(old, "nbytes", 0)
        return values

    def columns(self, names: tuple[str, ...], usable: Callable[[Any], bool], needed: str) -> list[Any] | None:
        """A whole column of every file, under the first of the names that occurs; None where none of them does.

        usable: whether a column of this type will do; needed: what will, in words.
        """
        found = [_first(names, file.schema_arrow.names) for file in self._files]
        if not any(found):
            return None
        if None in found:
            raise UserError(
                f"{self.paths[found.index(None)]}: no column '{next(filter(None, found))}', which others have"
            )
        columns = []
        for path, file, name in zip(self.paths, self._files, found, strict=True):
            try:
                column = file.read(columns=[name]).column(name)
            except (OSError, self.pa.ArrowException) as error:
                raise UserError(
                    f"{path}: its column '{name}' cannot be read ({_line(error)}); fetch it again"
                ) from error
            if not usable(column.type):
                raise UserError(f"{path}: column '{name}' holds {column.type}, needed are {needed}")
            columns.append(column)
        return columns


class Parquet(Coded):
    """Images with labels from `label`, if there is such a column.

    classes: None takes the largest label + 1. A row without a label is a bad row.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int | None = None,
        channels: int = 3,
        classes: int | None = None,
        on_bad: OnBad = "refuse",
    ):
        self.tables = Tables(path, split)
        labels, bad = self._labels(classes)
        num_classes = None if labels is None else classes or int(labels.max()) + 1
        super().__init__(self.tables.name, len(self.tables), labels, num_classes, size, channels, on_bad, bad)

    def encoded(self, row: int) -> bytes:
        return self.tables.encoded(row)

    def place(self, row: int) -> str:
        return self.tables.place(row)

    def _labels(self, classes: int | None) -> tuple[torch.Tensor | None, dict[int, str]]:
        """All labels (-1 where a row has none) and the rows that are bad for their label."""
        columns = self.tables.columns(("label",), self.tables.pa.types.is_integer, "whole numbers from 0")
        if columns is None:
            return None, {}
        labels = np.concatenate([column.fill_null(-1).to_numpy().astype(np.int64) for column in columns])
        wrong = (labels < 0) | (labels >= (classes or np.iinfo(np.int64).max))
        if wrong.all():
            raise UserError(f"{self.tables.paths[0]}: not one label lies in 0 .. {classes or 'any'}")
        bad = {row: f"{self.place(row)}: no label in range" for row in np.flatnonzero(wrong).tolist()}
        return torch.from_numpy(labels), bad


class Texts:
    """The store of captioned images (`captions.Store`) in parquet files: the rows that have a text, in their order."""

    layout = "parquet"
    expected = "a row has its image's bytes in 'image' (or 'image.bytes') and its caption in 'text' (or 'caption')"

    def __init__(self, path: Path, split: str):
        self.tables = Tables(path, split)
        self.name, types = self.tables.name, self.tables.pa.types
        columns = self.tables.columns(
            TEXT_KEYS, lambda kind: types.is_string(kind) or types.is_large_string(kind), "strings"
        )
        if columns is None:
            raise UserError(f"{self.tables.paths[0]}: no column 'text' or 'caption'; {self.expected}")
        self.captions: list[str] = []
        self.problems: list[str] = []
        self._rows: list[int] = []
        # As bytes: one broken string would keep all of its column from being read as strings.
        kept = (value.as_py() for column in columns for value in column.cast("large_binary"))
        for row, data in enumerate(kept):
            try:
                self.captions.append(text_of(data))
                self._rows.append(row)
            except BadSample as error:
                self.problems.append(f"{self.tables.place(row)}: {error}")

    def encoded(self, row: int) -> bytes:
        return self.tables.encoded(self._rows[row])

    def place(self, row: int) -> str:
        return self.tables.place(self._rows[row])


def has_text(path: Path) -> bool:
    """Whether a parquet file has a column of captions; a file that cannot be read has none, and its reader says why."""
    try:
        parquet = require("pyarrow.parquet", extra="data", purpose=f"reading {path}")
        return _first(TEXT_KEYS, parquet.read_schema(path).names) is not None
    except (UserError, OSError, ValueError):  # ArrowInvalid is a ValueError
        return False


def _first(names: tuple[str, ...], there: list[str]) -> str | None:
    return next((name for name in names if name in there), None)


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    known = sorted(p for p in path.glob("*.parquet") if not p.name.startswith("."))
    files = [p for p in known if p.stem == split or p.name.startswith((f"{split}-", f"{split}_", f"{split}."))]
    if not files:
        names = ", ".join(p.name for p in known[:3]) or "none"
        raise UserError(f"{path}: no parquet file of split '{split}' (there: {names}); choose with data.split=")
    return files


def _image_column(schema: Any) -> str | None:
    """What to ask the file for: "image.bytes" reaches into the struct and is also the name of the flat column."""
    if "image.bytes" in schema.names:
        return "image.bytes"
    if "image" not in schema.names:
        return None
    kind = schema.field("image").type
    if str(kind) in ("binary", "large_binary"):
        return "image"
    inside = [kind.field(i).name for i in range(kind.num_fields)] if str(kind).startswith("struct") else []
    return "image.bytes" if "bytes" in inside else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
