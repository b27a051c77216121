"""`fastgen inspect PATH`: what a path is, in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen import files
from fastgen.data import shapes
from fastgen.errors import UserError
from fastgen.stages import records
from fastgen.teachers import trellis

# What only a model's folder has; one of these is enough.
MODEL = ("fastgen.json", "model_index.json", "mixture.json", "config.json", "transformer/config.json")


def inspect(path: Path) -> dict[str, Any]:
    """Facts about a model folder, a run, a pair set, latents, or data; anything else is a UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if any(path.glob(f"*/{records.BEGUN}")):
        return _run(path)
    if (path / records.BEGUN).exists():
        return {"kind": "stage", **_stage(path)}
    if shapes.recognises(path):
        manifest = shapes.read_manifest(path)
        return {"kind": "latents", **shapes.LatentShapes(path, mean=manifest.mean, std=manifest.std).describe()}
    if (path / "manifest.json").exists():
        return _pairs(path)
    if trellis.recognises(path):
        return _trellis(path)
    return _model(path) if any((path / name).exists() for name in MODEL) else _data(path)


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


def _trellis(path: Path) -> dict[str, Any]:
    """What a TRELLIS folder says, and its networks, whose files are held against them by their headers."""
    from fastgen.teacher import facts_of
    from fastgen.teachers.trellis.folder import TrellisFolder

    folder, networks = TrellisFolder.read(path), {}
    for role in folder.stems:
        net, (_, weights) = folder.checked(role), folder.files(role)
        count = sum(p.numel() for p in net.parameters())
        networks[role] = {"class": type(net).__name__, "parameters": count, "bytes": weights.stat().st_size}
    student = folder.student
    few = {} if student is None else {"steps": sorted(student.steps), "sampler": student.sampler}
    return {
        "kind": "teacher" if student is None else "student",
        "family": "trellis",
        **few,
        "flows": {part: folder.kind(part) for part in trellis.PARTS},
        "condition": folder.condition,
        "encoder": folder.encoder,
        "networks": networks,
        "structure_sampler": folder.structure.params,
        "latent_sampler": folder.latent.params,
        "facts": facts_of(path),
    }


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

    from fastgen.data import DataConfig, detect, open_data

    kind = detect(path)
    if kind == "captioned":
        return _captioned(path)
    data = open_data(DataConfig(path=str(path)))
    if kind == "prompts":
        return {
            "kind": "prompts",
            "name": data.name,
            "prompts": len(data),
            "longest_prompt_characters": _longest(data.captions),
        }
    for index in torch.arange(len(data)).split(256):  # reads every image: the first bad one is named
        data.get(index)
    return {
        "kind": "data",
        "name": data.name,
        "images": len(data),
        "shape": list(data.shape),
        "classes": data.num_classes,
    }


def _captioned(path: Path) -> dict[str, Any]:
    """Every sample is read: the first bad one is named, with what a sample of this layout consists of."""
    from fastgen.data import captioned
    from fastgen.data.pixels import BadImage

    store = captioned.open_store(path)
    bad, sizes = list(store.problems), []
    for _, found in captioned.sizes(store):
        if isinstance(found, BadImage):
            bad.append(str(found))
        else:
            sizes.append(found)
    captioned.settle(store, bad, "refuse")
    heights, widths = zip(*sizes, strict=True)
    return {
        "kind": "data",
        "name": store.name,
        "layout": store.layout,
        "sample": store.expected,
        "images": len(sizes),
        "captions": len(store.captions),
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
        "longest_caption_characters": _longest(store.captions),
    }


def _longest(texts: Sequence[str] | None) -> int:
    """In characters: a tokenizer of 77 places holds some 300."""
    return max(map(len, texts or [""]))
