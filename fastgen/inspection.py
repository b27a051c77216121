"""`fastgen inspect PATH`: what a path is, in words and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen import files
from fastgen.errors import UserError
from fastgen.stages import records


def inspect(path: Path) -> dict[str, Any]:
    """Facts about a model folder, a run, a pair set, or data; anything else is a UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if any(path.glob(f"*/{records.BEGUN}")):
        return _run(path)
    if (path / records.BEGUN).exists():
        return {"kind": "stage", **_stage(path)}
    if (path / "manifest.json").exists():
        return _pairs(path)
    model = any((path / name).exists() for name in ("fastgen.json", "model_index.json", "mixture.json", "config.json"))
    return _model(path) if model else _data(path)


def _run(path: Path) -> dict[str, Any]:
    begun = sorted(path.glob(f"*/{records.BEGUN}"), key=lambda file: file.stat().st_mtime)
    return {"kind": "run", "stages": {file.parent.name: _stage(file.parent) for file in begun}}


def _stage(folder: Path) -> dict[str, Any]:
    if (folder / records.RECORD).exists():
        told = records.read(folder / records.RECORD)
        return {"done": True, "stage": told["stage"], "seconds": told["seconds"], "output": told["output"]}
    saved = records.newest_checkpoint(folder)
    return {"done": False, "checkpoint": saved and saved.name}


def _pairs(path: Path) -> dict[str, Any]:
    from fastgen.data import shards

    manifest = shards.read_manifest(path)
    journal = [line for name in path.glob("journal-*.jsonl") for line in name.read_text().splitlines()]
    made = len(list(path.glob("shard-*.safetensors")))
    told = manifest.model_dump(mode="json")
    return {"kind": "pairs", "shards": f"{made} of {manifest.shards}", "journal_lines": len(journal), **told}


def _model(path: Path) -> dict[str, Any]:
    from fastgen.teacher import read_denoiser

    denoiser, data = read_denoiser(path)
    parameters = sum(p.numel() for p in denoiser.parameters())
    size = sum(p.numel() * p.element_size() for p in denoiser.parameters())
    told = {
        "kind": data.get("kind", "teacher"),
        **denoiser.describe(),
        "parameters": parameters,
        "bytes": size,
        "sha256": files.sha256(path),
    }
    if "sampler" in data:
        told["steps"] = sorted(int(n) for n in data["sampler"]["times"])
        told["sampler"] = data["sampler"]
    return {**told, "facts": data.get("facts", {})}


def _data(path: Path) -> dict[str, Any]:
    import torch

    from fastgen.data import DataConfig, open_data

    data = open_data(DataConfig(path=str(path)))
    for index in torch.arange(len(data)).split(256):  # reads every image: the first bad one is named
        data.get(index)
    return {
        "kind": "data",
        "name": data.name,
        "images": len(data),
        "shape": list(data.shape),
        "classes": data.num_classes,
    }
