"""Parquet files of encoded images, as dataset hubs publish them: columns `image` and `label`."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.data.pixels import BadImage, Coded, OnBad
from fastgen.errors import UserError, require

# Encoded bytes held in memory: a small data set fits whole, of a large one the row groups used last.
CACHE_BYTES = 256 << 20


class Parquet(Coded):
    """Images from `image` (a struct with `bytes`, or bytes) or a flat `image.bytes`, labels from `label` if it exists.

    path: one file, or a folder whose files begin with the split's name (train-00000-of-00002.parquet). Rows are reached
    by row group, so a set larger than the cache is read best in small row groups. classes: None takes the largest
    label + 1. A row without a label is a bad row.
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
        self._pa = require("pyarrow", extra="data", purpose=f"reading {path}")
        self.paths = _files(Path(path), split)
        self._files = [self._open(file) for file in self.paths]
        groups = [(f, g) for f, file in enumerate(self._files) for g in range(file.metadata.num_row_groups)]
        counts = [self._files[f].metadata.row_group(g).num_rows for f, g in groups]
        self._groups, self._ends = groups, np.cumsum(counts)
        self._file_starts = np.cumsum([0] + [file.metadata.num_rows for file in self._files])
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._cached = 0
        rows = int(self._file_starts[-1])
        if rows == 0:
            raise UserError(f"{path}: holds no row")
        labels, bad = self._labels(classes)
        num_classes = None if labels is None else classes or int(labels.max()) + 1
        name = Path(path).stem if Path(path).is_file() else f"{Path(path).name}/{split}"
        super().__init__(name, rows, labels, num_classes, size, channels, on_bad, bad)

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
        except (OSError, self._pa.ArrowException) as error:
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
            if self._pa.types.is_struct(values.type):
                values = require("pyarrow.compute", extra="data", purpose="").struct_field(values, "bytes")
            nbytes = values.nbytes
        except (OSError, self._pa.ArrowException) as error:
            values = BadImage(f"its row group {g} cannot be read ({_line(error)})")
        self._cache[group], self._cached = values, self._cached + nbytes
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._cached -= getattr(old, "nbytes", 0)
        return values

    def _labels(self, classes: int | None) -> tuple[torch.Tensor | None, dict[int, str]]:
        """All labels (-1 where a row has none) and the rows that are bad for their label."""
        has = ["label" in file.schema_arrow.names for file in self._files]
        if not any(has):
            return None, {}
        if not all(has):
            raise UserError(
                f"{self.paths[has.index(False)]}: no column 'label', which {self.paths[has.index(True)]} has"
            )
        columns = []
        for path, file in zip(self.paths, self._files, strict=True):
            try:
                column = file.read(columns=["label"]).column("label")
            except (OSError, self._pa.ArrowException) as error:
                raise UserError(f"{path}: its labels cannot be read ({_line(error)}); fetch it again") from error
            if not self._pa.types.is_integer(column.type):
                raise UserError(f"{path}: column 'label' holds {column.type}, needed are whole numbers from 0")
            columns.append(column.fill_null(-1).to_numpy().astype(np.int64))
        labels = np.concatenate(columns)
        wrong = (labels < 0) | (labels >= (classes or np.iinfo(np.int64).max))
        if wrong.all():
            raise UserError(f"{self.paths[0]}: not one label lies in 0 .. {classes or 'any'}")
        bad = {row: f"{self.place(row)}: no label in range" for row in np.flatnonzero(wrong).tolist()}
        return torch.from_numpy(labels), bad


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
