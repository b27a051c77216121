"""DINOv2's tensors under the names of facebookresearch's checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

# transformers' name of a block's part, and the original's.
PARTS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def original_names(stored: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The file of the original for transformers' file."""
    made = {name: stored[f"embeddings.{name}"] for name in ("cls_token", "mask_token", "register_tokens")}
    made["pos_embed"] = stored["embeddings.position_embeddings"]
    for kind in ("weight", "bias"):
        made[f"patch_embed.proj.{kind}"] = stored[f"embeddings.patch_embeddings.projection.{kind}"]
        made[f"norm.{kind}"] = stored[f"layernorm.{kind}"]
    for i in range(layers):
        here = f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            for theirs, ours in PARTS.items():
                made[f"blocks.{i}.{ours}.{kind}"] = stored[f"{here}.{theirs}.{kind}"]
            joint = [stored[f"{here}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            made[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(joint)
        for n in (1, 2):
            made[f"blocks.{i}.ls{n}.gamma"] = stored[f"{here}.layer_scale{n}.lambda1"]
    return made
