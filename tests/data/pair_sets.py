"""A small pair set whose every value is known, and what a whole one looks like."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fastgen import noise
from fastgen.data.shards import Manifest, PairShards, missing, plan, write_shard

MANIFEST = Manifest(
    teacher="0" * 64,
    solver="heun",
    steps=25,
    path={"name": "RectifiedFlow", "sigma_min": 0.0},
    shape=(1, 2, 2),
    num_classes=10,
    total=11,
    per_shard=4,
    seed=7,
    tag="pairs",
)


def pairs(rows) -> dict[str, torch.Tensor]:
    """Stands for a teacher: a known function of the regenerated noise."""
    row = torch.as_tensor(list(rows))
    return {
        "x0": noise.normal(7, "pairs", row, (1, 2, 2)).tanh(),
        "row": row,
        "cond.label": row % 10,
    }


def make(folder: Path, manifest=MANIFEST, worker: int = 0, workers: int = 1) -> None:
    plan(folder, manifest)
    for index in missing(folder, worker, workers):
        write_shard(folder, index, pairs(manifest.rows(index)), worker)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("shard-*"))}


def check_whole(folder: Path, whole: dict[str, str], total: int = 11) -> None:
    assert hashes(folder) == whole
    assert not list(folder.glob(".tmp-*"))
    data = PairShards(folder)  # before `missing`, which would write a line that is missing
    assert data.get(torch.arange(len(data)))["row"].tolist() == list(range(total))
    assert missing(folder) == []
