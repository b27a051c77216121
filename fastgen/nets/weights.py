"""Weights into a network, all or nothing: a partial load would train on noise and never say so."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.files import load_tensors

logger = logging.getLogger("fastgen")


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
    half = sorted({str(t.dtype) for t in tensors.values() if t.dtype in (torch.float16, torch.bfloat16)})
    if half:
        logger.warning("%s: %s weights, kept in float32 from here on", file, " and ".join(half))
    net.load_state_dict(tensors)
