"""What a stage leaves beside its output: `begun.json`, `stage.json`, checkpoints; and how two records are compared."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgen import files
from fastgen.errors import UserError

BEGUN, RECORD = "begun.json", "stage.json"


def read(path: Path) -> dict[str, Any]:
    """`begun.json` or `stage.json`; one that is damaged is a UserError."""
    record = files.read_json(path)
    needed = {"key", "stage", "output", "sha256", "seconds"} if path.name == RECORD else {"key"}
    if not isinstance(record, dict) or not needed <= record.keys() or not isinstance(record["key"], dict):
        raise UserError(f"{path}: damaged; repeat the stage with --from {path.parent.name}")
    return record


def publish(path: Path, record: dict[str, Any]) -> None:
    """Write a record where many workers may write the same one at once: nobody ever reads half of it."""
    staging = path.with_name(f".tmp-{uuid.uuid4().hex}")
    files.write_json(staging, record)
    os.replace(staging, path)


def forget(folder: Path) -> None:
    """Remove the folder of a stage that stopped before it made anything."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [BEGUN]:
        remove(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint of a stage's folder."""
    found = sorted(path for path in (folder / "checkpoints").glob("step-*") if files.is_complete(path))
    return found[-1] if found else None


def left(folder: Path) -> list[str]:
    """What a stage that is not finished can be resumed from, in words."""
    checkpoint, shards = newest_checkpoint(folder), len(list(folder.glob("shards/shard-*.safetensors")))
    told = [str(checkpoint)] if checkpoint else []
    return [*told, f"{shards} shards in {folder / 'shards'}"] if shards else told


def changes(old: dict[str, Any], new: dict[str, Any], ignored: frozenset[str]) -> Iterator[str]:
    """What differs between two keys {config, run, inputs}, in words; `ignored` are dotted keys of the config."""
    for part in ("config", "run"):
        before, after = _leaves(old.get(part, {})), _leaves(new[part])
        for name in {**before, **after}:
            if name not in ignored and before.get(name) != after.get(name):
                yield f"{name} ({before.get(name)}, now {after.get(name)})"
    before = old.get("inputs", {})
    yield from (f"content of '{name}'" for name, value in new["inputs"].items() if before.get(name, value) != value)


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def refuse_foreign(folder: Path) -> None:
    """Only what a run made may be written into or removed by a run: anything else in its place is a UserError."""
    ours = not folder.exists() or (folder / BEGUN).exists() or (folder / RECORD).exists()
    if not ours and not (folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())):
        raise UserError(f"{folder}: something that no run of fastgen made; move it away, or choose another out=")


def remove(folder: Path) -> None:
    """Remove a stage's folder, out of sight by one rename: a kill leaves no half-removed stage that looks whole."""
    gone = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        os.rename(folder, gone)
        shutil.rmtree(gone)
