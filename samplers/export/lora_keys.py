"""Names of a LoRA file's tensors: kohya's, which most programs read, and peft's.

What comes in is what `fastgen.nets.lora.lora_tensors` gives: `unet.<path>.lora_A.weight` and `.lora_B.weight`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastgen.errors import UserError, suggestion

Keys = Literal["kohya", "peft"]
FILE = "pytorch_lora_weights.safetensors"  # which `load_lora_weights` looks for in a folder
HALVES = (".lora_A.weight", ".lora_B.weight")


def lora_file(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], keys: Keys
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file in one of the two conventions; settings: rank, alpha."""
    if keys not in get_args(Keys):
        raise UserError(f"--keys {keys}: no such convention ({suggestion(keys, get_args(Keys))})")
    return kohya(tensors, settings) if keys == "kohya" else peft(tensors, settings)


def kohya(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`lora_unet_<path with underscores>.lora_down.weight`, `.lora_up.weight` and a scalar `.alpha`."""
    found: dict[str, Tensor] = {}
    for path, down, up in _layers(tensors):
        name = "lora_unet_" + path.replace(".", "_")
        if f"{name}.alpha" in found:
            raise ValueError(f"two layers would be called {name}")
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = down, up
        found[f"{name}.alpha"] = torch.tensor(float(settings["alpha"]))
    told = {"ss_network_dim": _number(settings["rank"]), "ss_network_alpha": _number(settings["alpha"])}
    return found, {"format": "pt", "ss_network_module": "networks.lora"} | told


def peft(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`unet.<path>.lora_A.weight` and `.lora_B.weight`, with the metadata that `save_lora_weights` writes.

    Programs that do not read the metadata take alpha for the rank. So alpha / rank is multiplied into B, and the
    metadata says alpha = rank: both kinds of reader add the same.
    """
    rank, found, paths = settings["rank"], {}, []
    for path, down, up in _layers(tensors):
        found[f"unet.{path}.lora_A.weight"] = down
        found[f"unet.{path}.lora_B.weight"] = up * (settings["alpha"] / rank)
        paths.append(path)
    told = {"unet.r": rank, "unet.lora_alpha": rank, "unet.target_modules": paths}
    return found, {"format": "pt", "lora_adapter_metadata": json.dumps(told)}


def _layers(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(path of the layer in the U-Net, A, B), every tensor once; anything else is a ValueError."""
    paths = {_path(name) for name in tensors}
    for path in sorted(paths):
        down, up = (tensors.get(f"unet.{path}{half}") for half in HALVES)
        if down is None or up is None:
            raise ValueError(f"layer {path} has one half of its adapter")
        yield path, down, up


def _path(name: str) -> str:
    half = next((half for half in HALVES if name.endswith(half)), None)
    # peft's own wrapper, base_model.model., must not come between: no reader knows the doubled prefix.
    if half is None or not name.startswith("unet.") or "base_model" in name:
        raise ValueError(f"'{name}' is no tensor of a U-Net's adapter")
    return name.removeprefix("unet.").removesuffix(half)


def _number(value: float) -> str:
    return f"{value:g}"
