"""WebDataset tars: a sample is a run of members that share a name up to its first dot (KEY.jpg, KEY.txt, ...).

The headers are read once; from then on every image is reached by its offset. The layout is that of the `webdataset`
package (Aizman, Maltby, Breuel, "High performance I/O for large scale deep learning", 2001.01858).
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastgen.data.captions import BadSample, Files, Sample, json_object, text_in, text_of
from fastgen.data.pixels import ENDINGS
from fastgen.errors import UserError

BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """One file of a tar. plain: its bytes lie in one stretch (links and sparse files have none of their own)."""

    key: str
    ending: str
    name: str
    start: int
    length: int
    plain: bool


def tars(path: Path) -> Files:
    """One .tar, or all of a folder, as samples in the order of their keys; equal keys in the order of the tars."""
    files = [path] if path.is_file() else sorted(p for p in path.glob("*.tar") if not p.name.startswith("."))
    samples: list[Sample] = []
    problems: list[str] = []
    for tar in files:
        try:
            with open(tar, "rb") as file:
                _read(tar, file, samples, problems)
        except OSError as error:
            raise UserError(f"{tar}: {error.strerror or error}") from error
    expected = (
        "a sample is KEY.jpg, .jpeg, .png or .webp and beside it KEY.txt, or KEY.json with the key text or caption"
    )
    name = path.stem if path.is_file() else path.name
    return Files(name, f"WebDataset tar{'' if len(files) == 1 else 's'}", expected, samples, problems)


def _read(tar: Path, file: BinaryIO, samples: list[Sample], problems: list[str]) -> None:
    """Add the samples of one tar, and what is wrong with those that are none."""
    members, broken = _members(tar, file)
    problems += broken
    seen: set[str] = set()
    for key, run in itertools.groupby(members, lambda member: member.key):
        group = list(run)
        try:
            if key in seen:
                raise BadSample(f"{tar} member {group[0].name}: key '{key}' comes a second time")
            seen.add(key)
            samples.append(_sample(tar, file, key, group))
        except BadSample as error:
            problems.append(str(error))


def _sample(tar: Path, file: BinaryIO, key: str, members: list[Member]) -> Sample:
    there = ", ".join(member.ending or "no ending" for member in members)
    images = [member for member in members if f".{member.ending}" in ENDINGS]
    texts = {member.ending: member for member in members if member.ending in ("txt", "json")}
    for member in members:
        if not member.plain and (member in images or member in texts.values()):
            raise BadSample(f"{tar} member {member.name}: a link or a sparse file, not a plain one")
    if not images:
        raise BadSample(f"{tar} member {members[0].name}: sample '{key}' has no image (it has {there})")
    if len(images) > 1:
        raise BadSample(f"{tar} member {images[1].name}: sample '{key}' has two images")
    if not texts:
        raise BadSample(f"{tar} member {images[0].name}: no caption: sample '{key}' has {there}")
    text = texts.get("txt") or texts["json"]
    file.seek(text.start)
    data = file.read(text.length)
    try:
        caption = text_of(data) if text.ending == "txt" else text_in(json_object(data))
    except BadSample as error:
        raise BadSample(f"{tar} member {text.name}: {error}") from error
    return Sample(key, caption, tar, images[0].name, images[0].start, images[0].length)


def _members(tar: Path, file: BinaryIO) -> tuple[list[Member], list[str]]:
    """The whole files of a tar in its order, and a line if it breaks off or is damaged."""
    found: list[Member] = []
    size, end, last = file.seek(0, 2), 0, "its beginning"
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            for info in opened:
                end, last = opened.offset, f"member {info.name}"  # where the next header stands
                if not info.offset < end <= size:
                    return found, [f"{tar} member {info.name}: truncated, the tar ends within it; fetch it again"]
                found += _named(info)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        return found, [f"{tar}: not a whole tar (after {last}: {error}); fetch it again"]
    # tarfile takes any damaged header but the first for the end: only a block of zeros is one.
    file.seek(end)
    block = file.read(BLOCK)
    if len(block) < BLOCK or any(block):
        state = "truncated" if len(block) < BLOCK else "damaged"
        return found, [f"{tar}: {state} after {last}; fetch it again"]
    return found, []


def _named(info: tarfile.TarInfo) -> Iterator[Member]:
    """The member under its key and ending; folders and hidden files are none."""
    folder, slash, base = info.name.removeprefix("./").rpartition("/")
    if info.isdir() or base.startswith("."):
        return
    stem, _, ending = base.partition(".")
    plain = info.isreg() and not info.issparse()
    yield Member(folder + slash + stem, ending.lower(), info.name, info.offset_data, info.size, plain)
