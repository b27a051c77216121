"""Weights into a network, all or nothing: a partial load would train on noise and never say so."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.files import load_tensors, read_json

logger = logging.getLogger("fastgen")


def weight_files(where: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """The safetensors files of a diffusers or transformers folder: one, a half-precision variant, or its shards."""
    for name in (stem, f"{stem}.fp16", f"{stem}.bf16"):
        if (where / f"{name}.safetensors").exists():
            return [where / f"{name}.safetensors"]
    for name in (f"{stem}.safetensors.index.{variant}json" for variant in ("", "fp16.", "bf16.")):
        if (where / name).exists():
            index = read_json(where / name)
            names = set(index.get("weight_map", {}).values()) if isinstance(index, dict) else set()
            if not names or any(Path(part).name != part for part in names):
                raise UserError(f"{where / name}: damaged; it maps tensors to files beside it")
            return [where / part for part in sorted(names)]
    pickled = next((p.name for p in sorted(where.glob("*")) if p.suffix in (".bin", ".ckpt", ".pt", ".pth")), None)
    if pickled:
        raise UserError(
            f"{where / pickled}: a pickle, which can run code when read; convert it to {stem}.safetensors first"
        )
    raise UserError(f"{where / stem}.safetensors: no such file; fetch or make it again")


def load_weights(net: nn.Module, file: Path) -> None:
    """Load a safetensors file; half-precision tensors become float32 (said), anything missing or odd is a UserError."""
    fill(net, load_tensors(file), file)


def fill(net: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Give a network exactly these tensors; `file` is where they came from, for messages."""
    own = net.state_dict()
    for name in own:
        if name not in tensors:
            raise UserError(f"{file}: no tensor '{name}'; the file is not of this network, or not whole")
    for name, tensor in tensors.items():
        if name not in own:
            raise UserError(f"{file}: tensor '{name}' has no place in this network; config and weights do not match")
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, the network's {tuple(own[name].shape)}"
            raise UserError(f"{file}: tensor '{name}' is {shapes}; config and weights do not match")
    halves = (torch.float16, torch.bfloat16)
    widened = (t for name, t in tensors.items() if t.dtype in halves and own[name].dtype not in halves)
    half = sorted({str(t.dtype) for t in widened})
    if half:
        logger.warning("%s: %s weights, kept in float32 from here on", file, " and ".join(half))
    # A network on the meta device gets its memory here; one that is given `files.shapes_only` goes there.
    meta = any(tensor.is_meta for tensor in (*own.values(), *tensors.values()))
    net.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}, assign=meta)


def modern(name: str) -> str:
    """Attention layers were named otherwise before diffusers 0.18; its own loader renames them too."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\b", lambda m: m[1] + old[m[2]], name)
