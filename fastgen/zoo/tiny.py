"""A published architecture in a few megabytes: the same blocks with few channels and random weights, as a folder.

What `--smoke` stands in for a checkpoint, `teacher=zoo:sd15` by hand. It makes no pictures; everything else is as it
would be with the real one: classes, keys, shapes of conditions, schedulers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgen import files
from fastgen.errors import UserError, suggestion
from fastgen.zoo import sana, trellis
from fastgen.zoo.fresh import ARCHITECTURES, NETWORKS, network, write_configs

WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}  # stock code tells XL's two apart by them
POOLED = 32


def folder_of(name: str, cache: Path) -> Path:
    """The folder of a tiny architecture, made where it is not there yet; unknown names are UserErrors."""
    known = [*ARCHITECTURES, *trellis.FLOWS]
    if name not in known:
        raise UserError(f"zoo:{name}: no such architecture ({suggestion(name, known)})")
    folder = cache / "zoo" / f"{name}-tiny"
    if not files.is_complete(folder) and name in trellis.FLOWS:
        trellis.write(folder, name)
    elif not files.is_complete(folder):
        files.make_folder(folder.parent)
        configs = shrunk(ARCHITECTURES[name])
        with files.atomic_folder(folder) as temporary, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            write_configs(temporary, configs)
            for part in NETWORKS:
                if part in configs:
                    made: Any = network(part, configs[part], torch.device("cpu"))
                    made.save_pretrained(temporary / part)
    return folder


def shrunk(configs: dict[str, Any]) -> dict[str, Any]:
    """The same configs with few channels, layers and pixels."""
    if "transformer" in configs:
        return sana.shrunk(configs)
    unet, vae = configs["unet"], configs["vae"]
    encoders = [part for part in ("text_encoder", "text_encoder_2") if part in configs]
    changes = {
        "sample_size": 8,
        "block_out_channels": [32 * 2 ** min(i, 1) for i in range(len(unet["block_out_channels"]))],
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "cross_attention_dim": sum(WIDTHS[part] for part in encoders),
    }
    if "addition_time_embed_dim" in unet:
        changes |= {
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": POOLED + 6 * 8,
            "transformer_layers_per_block": 1,
        }
    small = {
        "unet": unet | changes,
        "vae": vae
        | {
            "block_out_channels": [16] * len(vae["block_out_channels"]),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "sample_size": 8 * 2 ** (len(vae["block_out_channels"]) - 1),
        },
        "scheduler": configs["scheduler"],
    }
    text = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": POOLED}
    return small | {part: configs[part] | text | {"hidden_size": WIDTHS[part]} for part in encoders}
