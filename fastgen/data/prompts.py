"""Prompt files: .txt (one per line), .tsv with a column `Prompt` (PartiPrompts), .jsonl (GenEval), .csv."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.errors import UserError

if TYPE_CHECKING:  # prompts are read by commands that must start without torch
    from torch import Tensor

ENDINGS = (".txt", ".tsv", ".csv", ".jsonl")
KEYS = ("prompt", "text")


class Prompts:
    """A prompt file as a data set of texts alone, for methods that need no images."""

    num_classes: int | None = None
    shape: tuple[int, ...] = ()

    def __init__(self, path: str | Path):
        self.name = Path(path).name
        self.captions: Sequence[str] = read_prompts(path)

    def __len__(self) -> int:
        return len(self.captions)

    def get(self, index: Tensor) -> dict[str, Tensor]:
        """No tensors: a row is its caption."""
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"index outside 0 .. {len(self) - 1}")
        return {}

    @cached_property
    def captions_sha256(self) -> str:
        """Of the prompts in their order."""
        return texts_sha256(self.captions)


def texts_sha256(texts: Iterable[str]) -> str:
    """One hash of a list of texts: of the hashes of each, so that no two lists run together."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file in its order, outer blanks stripped; an empty or unreadable one is a UserError.

    Columns `prompt` or `text`, large or small; keys `prompt` or `text`. Quotes in a .tsv are part of the prompt, as
    PartiPrompts has them. Blank lines count nowhere.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a file of prompts; for images with captions set data.kind=captioned")
    kind = path.suffix.lower()
    if kind not in ENDINGS:
        raise UserError(f"{path}: prompts are read from {', '.join(ENDINGS)} files, not from '{path.suffix}'")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line}: not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    # Not str.splitlines: a form feed or U+2028 inside a prompt ends no line.
    lines = text.replace("\r\n", "\n").split("\n")
    readers = {".txt": _plain, ".tsv": _columns, ".csv": _columns, ".jsonl": _json}
    prompts = []
    for line, prompt in readers[kind](path, lines):
        if not prompt.strip():
            raise UserError(f"{path} line {line}: an empty prompt")
        prompts.append(prompt.strip())
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


def _plain(path: Path, lines: list[str]) -> Iterator[tuple[int, str]]:
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _columns(path: Path, lines: list[str]) -> Iterator[tuple[int, str]]:
    literal = path.suffix.lower() == ".tsv"
    # Line ends are handed on, because a quoted .csv field may span lines.
    rows = csv.reader(
        (line + "\n" for line in lines),
        delimiter="\t" if literal else ",",
        quoting=csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL,
        strict=not literal,
    )
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        key = next((name for name in KEYS if name in header), None)
        if key is None:
            raise UserError(f"{path}: no column 'Prompt' or 'text' in its first line ({', '.join(header) or 'empty'})")
        column = header.index(key)
        for row in rows:
            if any(row):
                yield rows.line_num, row[column] if column < len(row) else ""
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: {error}") from error


def _json(path: Path, lines: list[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number}: not JSON ({error})") from error
        found = [entry[key] for key in KEYS if isinstance(entry, dict) and isinstance(entry.get(key), str)]
        if not found:
            raise UserError(f"{path} line {number}: no text under 'prompt' or 'text'")
        yield number, found[0]
