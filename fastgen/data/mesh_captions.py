"""Captions of a folder of meshes: NAME.txt beside each, one caption per line, or captions.jsonl for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastgen.data.captions import BadSample, json_object, text_in, text_of
from fastgen.errors import UserError

CAPTIONS = "captions.jsonl"
MEND = f'write NAME.txt beside NAME.glb, one caption per line, or lines of {{"file": ..., "text": ...}} in {CAPTIONS}'


def captions_of(folder: Path, meshes: Mapping[str, Path]) -> dict[str, list[str]]:
    """The captions of each mesh by its relative name; a mesh without any, or with both kinds, is a UserError.

    captions.jsonl: a line {"file": "more/chair.glb", "text": "..."} per caption, file as it lies below the folder.
    Lines about files that are not among the meshes are passed over.
    """
    listed, found = _listed(folder / CAPTIONS), {}
    for name, path in meshes.items():
        beside = path.with_suffix(".txt")
        if name in listed and beside.exists():
            raise UserError(f"{beside}: {path.name} has captions in {CAPTIONS} as well; keep one of the two")
        found[name] = listed.get(name) or (_lines(beside) if beside.exists() else [])
    if without := [name for name, texts in found.items() if not texts]:
        raise UserError(
            f"{folder / without[0]}: no caption, and the flows read texts ({len(without)} of {len(meshes)} meshes have "
            f"none); {MEND}; or make latents alone: --no-conditions"
        )
    return found


def _listed(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if not path.exists():
        return found
    for number, line in enumerate(_bytes(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json_object(line)
            if not isinstance(name := entry.get("file"), str):
                raise BadSample("no file name under 'file'")
            found.setdefault(name, []).append(text_in(entry))
        except BadSample as error:
            raise UserError(f"{path} line {number}: {error}; a line is {{'file': 'chair.glb', 'text': ...}}") from error
    return found


def _lines(path: Path) -> list[str]:
    try:
        return [text_of(line) for line in _bytes(path).splitlines() if line.strip()]
    except BadSample as error:
        raise UserError(f"{path}: {error}") from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
