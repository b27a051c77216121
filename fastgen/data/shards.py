"""Pairs of noise and the end point a teacher maps it to, in shards that a killed run resumes and any rank can make.

A pair set is a folder:

    manifest.json               what the pairs are; written once, every later run must agree with it
    shard-000000.safetensors    x0 [n, *shape], row int64 [n], cond.* [n, ...]; facts under the metadata key "fastgen"
    journal-0.jsonl             one line per finished shard, one file per worker: index, count, sha256, rejected rows

Shard i holds the rows i * per_shard up to (i + 1) * per_shard but for the rejected ones. The noise of a row is never
stored: `fastgen.noise.normal(seed, tag, row, shape)` makes it again, exactly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastgen import noise
from fastgen.config import Model, config_hash, plain, validate
from fastgen.errors import UserError
from fastgen.files import append_line, load_tensors, make_folder, read_json, sha256, write_atomic, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
COND = "cond."
RESUME = "run the same `fastgen pairs CONFIG` again: it makes only what is missing"


class Manifest(Model, extra="allow"):
    """What the pairs of a folder are; two runs may write into one folder only if every field agrees.

    Further keys are whatever else made the pairs: the share of dropped labels, the sha256 of a prompt file.
    """

    format: Literal[1] = 1
    teacher: str
    """sha256 of the teacher's weights."""
    solver: str
    steps: int = Field(ge=1)
    guidance: float | None = None
    path: dict[str, Any]
    shape: tuple[int, ...]
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    num_classes: int | None = None
    total: int = Field(ge=1)
    per_shard: int = Field(default=2000, ge=1)
    seed: int
    tag: str
    noise: Literal["philox4x32-10"] = "philox4x32-10"
    limit: float = Field(default=20.0, gt=0)
    """A row with a value beyond it, or not finite, is rejected: a few broken images spoil a squared error."""

    @property
    def shards(self) -> int:
        return -(-self.total // self.per_shard)

    def rows(self, index: int) -> range:
        """The noise rows of a shard."""
        return range(index * self.per_shard, min((index + 1) * self.per_shard, self.total))


def plan(folder: str | Path, manifest: Manifest | dict[str, Any]) -> None:
    """Create a pair set or join one; a folder with another manifest is a UserError naming the key.

    Any number of workers may call it at once with the same manifest.
    """
    if isinstance(manifest, dict):
        manifest = Manifest.model_validate(manifest)
    folder = make_folder(folder)
    stray = any(folder.glob("shard-*.safetensors"))  # before the next line: another worker may be quick
    if not (folder / MANIFEST).exists():
        if stray:
            raise UserError(f"{folder}: shards without {MANIFEST}; choose another out=FOLDER or delete them")
        _publish(folder, manifest)
    for staging in folder.glob(".tmp-plan-*"):
        shutil.rmtree(staging, ignore_errors=True)
    there, here = plain(read_manifest(folder)), plain(manifest)
    for key in {**here, **there}:
        if there.get(key) != here.get(key):
            raise UserError(
                f"{folder}: its pairs were made with {key}={there.get(key)!r}, asked for is {here.get(key)!r}; "
                "choose another out=FOLDER or delete this one"
            )


def _publish(folder: Path, manifest: Manifest) -> None:
    """Each worker writes a manifest of its own and renames it into place: nobody ever reads half of one."""
    staging = folder / f".tmp-plan-{uuid.uuid4().hex}"
    staging.mkdir()
    # A worker that finds the manifest of another tidies up all staging folders, this one perhaps among them.
    with contextlib.suppress(FileNotFoundError):
        write_json(staging / MANIFEST, plain(manifest))
        os.replace(staging / MANIFEST, folder / MANIFEST)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a pair set."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no pair set ({MANIFEST} is missing); `fastgen pairs CONFIG` makes one")
    return validate(Manifest, read_json(path), str(path))


def shard_path(folder: str | Path, index: int) -> Path:
    return Path(folder) / f"shard-{index:06d}.safetensors"


def missing(folder: str | Path, worker: int = 0, workers: int = 1) -> list[int]:
    """The shards that this worker (those with index mod workers = worker) still has to make, in ascending order.

    Removes what a killed writer left half done. A shard counts if its sha256 is in a journal; one that was renamed just
    before the kill is not in any yet: it is verified by its own checksum and gets its line.
    """
    if not 0 <= worker < workers:
        raise ValueError(f"worker {worker} of {workers}")
    folder, manifest = Path(folder), read_manifest(folder)
    lines = _journals(folder)
    todo = []
    for index in range(worker, manifest.shards, workers):
        path = shard_path(folder, index)
        path.with_name(f".tmp-{path.name}").unlink(missing_ok=True)
        if not path.exists():
            todo.append(index)
        elif index in lines:
            if sha256(path) not in lines[index]:
                log.warning("%s: differs from what was written; it is made again", path)
                todo.append(index)
        else:
            try:
                rejected = _verify(path, manifest, index)
            except UserError as error:
                log.warning("%s; it is made again", error)
                todo.append(index)
            else:
                _append(folder, worker, _line(manifest, index, path.read_bytes(), rejected))
    return todo


def write_shard(
    folder: str | Path, index: int, tensors: dict[str, Tensor], worker: int = 0, rejected: Sequence[int] = ()
) -> dict[str, Any]:
    """Write one shard, whole or not at all, and its line in the worker's journal, which is returned.

    tensors: x0 [n, *shape], row int64 [n], and any "cond.NAME" [n, ...], in any order of rows. rejected: rows that the
    caller could not make. Rows that are not finite or beyond the manifest's limit join them; together they must be
    exactly the shard's rows, which makes the bytes of a shard the same whoever writes it and when.
    """
    manifest = read_manifest(folder)
    cond = {name for name in tensors if name.startswith(COND)}
    if tensors.keys() - cond != {"x0", "row"} or {name.removeprefix(COND) for name in cond} & {"x0", "row", "eps"}:
        raise ValueError(f"a shard holds x0, row and cond.NAME, not {sorted(tensors)}")
    x0 = tensors["x0"].detach().cpu().to(getattr(torch, manifest.dtype))
    if tuple(x0.shape[1:]) != manifest.shape:
        raise ValueError(f"x0 is {tuple(x0.shape)}, the manifest's shape {manifest.shape}")
    rows = tensors["row"].cpu()
    whole = (x0.isfinite() & (x0.abs() <= manifest.limit)).flatten(1).all(1)
    lost = sorted([*rejected, *rows[~whole].tolist()])
    keep = torch.nonzero(whole).flatten()
    keep = keep[rows[keep].argsort()]
    if sorted([*lost, *rows[keep].tolist()]) != list(manifest.rows(index)):
        raise ValueError(f"shard {index} must account for every row of {manifest.rows(index)} once")
    kept = {"x0": x0[keep], **{name: value.detach().cpu()[keep] for name, value in tensors.items() if name != "x0"}}
    kept = {name: value.contiguous() for name, value in kept.items()}
    facts = {"index": index, "manifest": config_hash(manifest), "payload": payload(kept), "rejected": lost}
    # One metadata key: several would be written in an arbitrary order, and equal shards would have unequal sha256.
    data = save(kept, metadata={"fastgen": json.dumps(facts, sort_keys=True)})
    write_atomic(shard_path(folder, index), data)
    line = _line(manifest, index, data, lost)
    _append(Path(folder), worker, line)
    if lost:
        log.warning("%s: %d of %d rows rejected", shard_path(folder, index), len(lost), len(manifest.rows(index)))
    return line


class PairShards:
    """A finished pair set as a data set: sample i is the i-th row that was kept, in the order of rows.

    `rejected` are the rows that were not; `sha256` names manifest and content, whoever made which shard. Opening reads
    every shard's header. A shard's own sha256 is checked when its first sample is asked for (in shuffled order, within
    the first steps); then its tensors are mapped, not copied.
    An incomplete set and a damaged shard are UserErrors that say how to go on.
    """

    captions = None

    def __init__(self, folder: str | Path):
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        self.name, self.shape, self.num_classes = self.folder.name, self.manifest.shape, self.manifest.num_classes
        self._lines = _journals(self.folder)
        shards = range(self.manifest.shards)
        absent = [i for i in shards if i not in self._lines or not shard_path(folder, i).is_file()]
        if absent:
            first = shard_path(folder, absent[0]).name
            raise UserError(
                f"{folder}: {len(absent)} of {len(shards)} shards are missing, the first is {first}; {RESUME}"
            )
        headers = [_header(shard_path(folder, i), self.manifest, i) for i in shards]
        lost = [header["rejected"] for header in headers]
        self.rejected: list[int] = [row for rows in lost for row in rows]
        content = [config_hash(self.manifest), *(header["payload"] for header in headers)]
        self.sha256 = hashlib.sha256("\n".join(content).encode()).hexdigest()
        self._ends = np.cumsum([len(self.manifest.rows(i)) - len(lost[i]) for i in shards])
        self._open: dict[int, dict[str, Tensor]] = {}
        if not len(self):
            raise UserError(
                f"{folder}: every row was rejected: not finite, or beyond pairs.limit={self.manifest.limit:g}; look at "
                "the teacher, its guidance and solver"
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get(self, index: Tensor) -> dict[str, Tensor]:
        """{"x0", "eps": float32 [B, *shape], "row": int64 [B], and every condition by its name} for index int64 [B]."""
        wanted = index.numpy(force=True)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"index outside 0 .. {len(self) - 1}")
        shard = np.searchsorted(self._ends, wanted, side="right")
        batch: dict[str, Tensor] = {}
        for i in np.unique(shard).tolist():
            places = torch.from_numpy(np.flatnonzero(shard == i))
            inside = torch.from_numpy(wanted)[places] - (int(self._ends[i - 1]) if i else 0)
            for stored, values in self._shard(i).items():
                name = stored.removeprefix(COND)
                if name not in batch:
                    batch[name] = values.new_empty(len(wanted), *values.shape[1:])
                batch[name][places] = values[inside]
        batch["x0"] = batch["x0"].float()
        batch["eps"] = noise.normal(self.manifest.seed, self.manifest.tag, batch["row"], self.shape)
        return batch

    def _shard(self, index: int) -> dict[str, Tensor]:
        if index not in self._open:
            path = shard_path(self.folder, index)
            if sha256(path) not in self._lines[index]:
                raise UserError(f"{path}: damaged (its sha256 is not the one in the journal); delete it, then {RESUME}")
            self._open[index] = load_tensors(path)
        return self._open[index]


def payload(tensors: dict[str, Tensor]) -> str:
    """sha256 of named tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _line(manifest: Manifest, index: int, data: bytes, rejected: list[int]) -> dict[str, Any]:
    count = len(manifest.rows(index)) - len(rejected)
    return {"index": index, "count": count, "sha256": hashlib.sha256(data).hexdigest(), "rejected": rejected}


def _header(path: Path, manifest: Manifest, index: int) -> dict[str, Any]:
    """The facts of a shard, held against the manifest; a UserError names the shard."""
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["fastgen"])
            count = file.get_slice("row").get_shape()[0]
            same = facts["manifest"] == config_hash(manifest) and facts["index"] == index
            same &= count + len(facts["rejected"]) == len(manifest.rows(index))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, then {RESUME}") from error
    if not same:
        raise UserError(f"{path}: not the shard that its name and the manifest say; delete it, then {RESUME}")
    return facts


def _verify(path: Path, manifest: Manifest, index: int) -> list[int]:
    """Hold every byte of a shard against its own checksum; the rejected rows."""
    facts = _header(path, manifest, index)
    if payload(load_tensors(path)) != facts["payload"]:
        raise UserError(f"{path}: damaged (its content does not match its checksum); delete it, then {RESUME}")
    return facts["rejected"]


def _append(folder: Path, worker: int, line: dict[str, Any]) -> None:
    append_line(folder / f"journal-{worker}.jsonl", json.dumps(line))


def _journals(folder: Path) -> dict[int, set[str]]:
    """The sha256 that the journals name for each shard: several where it was made again on another machine.

    A line without its end, which a kill cut short, proves nothing: the next line to be written removes it.
    """
    lines: dict[int, set[str]] = {}
    for path in sorted(folder.glob("journal-*.jsonl")):
        for text in path.read_bytes().split(b"\n")[:-1]:
            try:
                line = json.loads(text)
                lines.setdefault(line["index"], set()).add(line["sha256"])
            except (ValueError, KeyError, TypeError):
                continue
    return lines
