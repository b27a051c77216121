"""Captioned images in a folder: each beside its own text file, or all of them told in one metadata.jsonl.

Whatever the layout, what comes out is the same: samples in the order of their names without endings (sub-folders
count), each with its text, and a list of what is wrong with the samples that had to be left out.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastgen.data import SPLIT_NAMES
from fastgen.data.pixels import ENDINGS, BadImage
from fastgen.errors import UserError

METADATA = "metadata.jsonl"
TEXT_KEYS = ("text", "caption")


class Store(Protocol):
    """Samples in a fixed order: texts in memory, images where they lie.

    layout    what kind of storage it is, in the user's words
    expected  what a sample consists of in this layout
    problems  one line for each sample that was left out
    """

    name: str
    layout: str
    expected: str
    captions: list[str]
    problems: list[str]

    def encoded(self, row: int) -> bytes:
        """The file of one image; BadImage if there is none."""
        ...

    def place(self, row: int) -> str:
        """Where a row lies, in the user's words."""
        ...


class BadSample(Exception):
    """One sample that cannot be used; the message names it and says why."""


class Sample(NamedTuple):
    """One image and its text. The image is all of `file`, or `length` bytes of it from `start` on: a tar's member."""

    key: str
    text: str
    file: Path
    member: str = ""
    start: int = 0
    length: int | None = None


class Files:
    """A store whose images are files, or stretches of files, in the order of their keys."""

    def __init__(self, name: str, layout: str, expected: str, samples: Iterable[Sample], problems: list[str]):
        self.name, self.layout, self.expected, self.problems = name, layout, expected, problems
        self.samples = sorted(samples, key=lambda sample: sample.key)
        self.captions = [sample.text for sample in self.samples]

    def encoded(self, row: int) -> bytes:
        sample = self.samples[row]
        try:
            with open(sample.file, "rb") as file:
                file.seek(sample.start)
                return file.read() if sample.length is None else file.read(sample.length)
        except OSError as error:
            raise BadImage(f"{self.place(row)}: {error.strerror or error}") from error

    def place(self, row: int) -> str:
        sample = self.samples[row]
        return f"{sample.file} member {sample.member}" if sample.member else str(sample.file)


def beside(root: Path) -> Files:
    """A folder, with sub-folders or without, where NAME.txt lies beside NAME.jpg, .jpeg, .png or .webp."""
    folders = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if folders and set(folders) <= SPLIT_NAMES:
        raise UserError(
            f"{root}: {', '.join(sorted(folders))} look like splits; data.path={root / min(folders)} is one"
        )
    samples, problems = [], []
    for key, (images, text) in sorted(_found(root).items()):
        try:
            samples.append(Sample(key, _text_beside(images, text), images[0]))
        except BadSample as error:
            problems.append(str(error))
    expected = "each image NAME.jpg, .jpeg, .png or .webp has its caption in NAME.txt beside it"
    return Files(root.name, "text files beside images", expected, samples, problems)


def any_image(root: Path) -> bool:
    """Whether an image lies in the folder or below it."""
    return any(images for _, images, _ in _walk(root))


def any_text_beside(root: Path) -> bool:
    """Whether at least one image has a text file of its name beside it."""
    return any({_stem(name) for name in images} & {_stem(name) for name in texts} for _, images, texts in _walk(root))


def metadata(root: Path) -> Files:
    """A folder with metadata.jsonl: a line {"file_name": ..., "text": ...} for each image, sub-folders allowed.

    Images that no line names are left out; an image may be named by several lines.
    """
    path = root / METADATA
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    samples, problems = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                samples.append(_entry(root, line))
            except BadSample as error:
                problems.append(f"{path} line {number}: {error}")
    expected = f'a line of {METADATA} is {{"file_name": "NAME.jpg", "text": "..."}}, its file inside the folder'
    return Files(root.name, f"a folder with {METADATA}", expected, samples, problems)


def text_of(data: bytes | str | None) -> str:
    """A caption without outer blanks; BadSample where there is none or it is not UTF-8."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data or ""
        text.encode()  # JSON may spell half of a surrogate pair
    except UnicodeError as error:
        raise BadSample("the caption is not UTF-8; save it as UTF-8") from error
    if not text.strip():
        raise BadSample("no caption" if data is None else "an empty caption")
    return text.strip()


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object; BadSample where the bytes are none."""
    try:
        entry = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("not UTF-8; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadSample(f"not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise BadSample("not a JSON object")
    return entry


def text_in(entry: dict[str, Any]) -> str:
    """The caption of a JSON object: under "text", else under "caption"."""
    found = [entry[key] for key in TEXT_KEYS if isinstance(entry.get(key), str)]
    if not found:
        raise BadSample("no text under 'text' or 'caption'")
    return text_of(found[0])


def _entry(root: Path, line: bytes) -> Sample:
    entry = json_object(line)
    name = entry.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        raise BadSample("no file name under 'file_name'")
    # By the name alone: the files of a hub's cache are links that lead out of their folder.
    inside = posixpath.normpath(name)
    if posixpath.isabs(inside) or inside.split("/")[0] == "..":
        raise BadSample(f"file_name '{name}' leads out of the folder")
    text = text_in(entry)
    if not os.path.isfile(root / inside):  # Path.is_file raises where a name is too long
        raise BadSample(f"file_name '{name}': no such file")
    return Sample(_stem(inside), text, root / inside)


def _text_beside(images: list[Path], text: Path | None) -> str:
    if not images:
        raise BadSample(f"{text}: no image beside it")
    if text is None:
        raise BadSample(f"{images[0]}: no caption (data.kind=folder reads images alone)")
    if len(images) > 1:
        raise BadSample(f"{images[1]}: {images[0].name} has the same caption file {text.name}")
    try:
        return text_of(text.read_bytes())
    except OSError as error:
        raise BadSample(f"{text}: {error.strerror or error}") from error
    except BadSample as error:
        raise BadSample(f"{text}: {error}") from error


def _found(root: Path) -> dict[str, tuple[list[Path], Path | None]]:
    """Key -> the images of that name and their text file, over all sub-folders."""
    found: dict[str, tuple[list[Path], Path | None]] = {}
    for folder, images, texts in _walk(root):
        below = folder.relative_to(root)
        for name in sorted(images):
            found.setdefault((below / _stem(name)).as_posix(), ([], None))[0].append(folder / name)
        for name in sorted(texts):
            key = (below / _stem(name)).as_posix()
            found[key] = (found[key][0] if key in found else [], folder / name)
    return found


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Every folder with the names of its images and texts; hidden files and folders are left out."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}") from error

    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        below[:] = sorted(name for name in below if not name.startswith("."))
        names = [name for name in names if not name.startswith(".")]
        images = [name for name in names if name.lower().endswith(ENDINGS)]
        yield Path(folder), images, [name for name in names if name.lower().endswith(".txt")]


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]
