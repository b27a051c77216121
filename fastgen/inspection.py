"""`fastgen inspect PATH`: what a path is, in words and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgen import files
from fastgen.errors import UserError


def inspect(path: Path) -> dict[str, Any]:
    """Facts about a model folder, a run, a pair set, or data; anything else is a UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / "config.yaml").exists() and not (path / "fastgen.json").exists():
        return _run(path)
    if (path / "manifest.json").exists():
        return _pairs(path)
    model = any((path / name).exists() for name in ("fastgen.json", "model_index.json", "mixture.json", "config.json"))
    return _model(path) if model else _data(path)


def _run(path: Path) -> dict[str, Any]:
    stages = {}
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        record = folder / "stage.json"
        if record.exists():
            told = files.read_json(record)
            stages[folder.name] = f"{told['stage']}, done in {told['seconds']:.0f} s"
        else:
            saved = sorted(p.name for p in (folder / "checkpoints").glob("step-*"))
            stages[folder.name] = f"not finished, newest checkpoint {saved[-1]}" if saved else "not finished"
    return {"kind": "run", "stages": stages}


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
