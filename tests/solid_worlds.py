"""A world of solids for tests: a tiny text folder whose structures fill few voxels, so that meshes are made at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastgen.teachers.trellis.folder import STRUCTURE_DECODER, TrellisFolder

SHARE = 0.005  # of the voxels


def write(source: Path, target: Path) -> Path:
    """A copy of the tiny text folder `source` with another bias in its structure decoder."""
    shutil.copytree(source, target)
    folder = TrellisFolder.read(target)
    with torch.inference_mode():
        logits = folder.network(STRUCTURE_DECODER)(torch.randn(8, 8, 4, 4, 4, generator=torch.manual_seed(0)))
    file = folder.files(STRUCTURE_DECODER)[1]
    tensors = load_file(file)
    tensors["out_layer.2.bias"] -= logits.flatten().quantile(1 - SHARE)
    save_file(tensors, file)
    return target
