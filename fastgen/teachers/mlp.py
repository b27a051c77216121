"""The small residual MLP: teachers and students for points and tiny images, trained here."""

from __future__ import annotations

import math
from pathlib import Path as FilePath
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgen import files
from fastgen.cond import Cond
from fastgen.config import Model, plain, validate
from fastgen.denoiser import Denoiser, conventions
from fastgen.errors import UserError
from fastgen.nets.fresh import FreshNet
from fastgen.nets.mlp import EMBEDDING, ResidualMLP
from fastgen.nets.weights import load_weights

CONFIG, WEIGHTS = "net/config.json", "net/model.safetensors"


class MLPConfig(FreshNet):
    """width and depth (number of residual blocks); 512 x 4 on the digits is 2.7 million parameters."""

    family: Literal["mlp"] = "mlp"
    width: int = Field(default=512, ge=8)
    depth: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)


NetConfig = MLPConfig


class Architecture(Model):
    """`net/config.json`: the arguments of `ResidualMLP`."""

    shape: tuple[int, ...]
    width: int
    depth: int
    num_classes: int | None
    dropout: float

    def net(self) -> ResidualMLP:
        return ResidualMLP(self.shape, self.width, self.depth, self.num_classes, self.dropout)


class MLPDenoiser(Denoiser):
    """A `ResidualMLP` with its conventions; options as of `Denoiser`."""

    family = "mlp"
    net: ResidualMLP

    def __init__(self, architecture: Architecture, **options: Any) -> None:
        options = {"shape": architecture.shape, "num_classes": architecture.num_classes, **options}
        super().__init__(architecture.net(), **options)
        self.architecture = architecture

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        return self.net(x, time, self.label(cond, len(x)), extra)

    @property
    def embedding_width(self) -> int:
        return EMBEDDING

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.net.blocks)

    def write(self, folder: FilePath) -> None:
        files.make_folder(folder / "net")
        files.write_json(folder / CONFIG, plain(self.architecture))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.net.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)


def build(config: MLPConfig, shape: tuple[int, ...], num_classes: int | None) -> MLPDenoiser:
    """A fresh network; torch's generator decides its weights."""
    path, prediction = config.target()
    # The network wants its time in about [0, 1]; a quarter of the logarithm (EDM) lies in [-1.6, 1.1] already.
    log_time = config.path == "EDM"
    scale = {"VP": 1 / path.start, "TrigFlow": 2 / math.pi}.get(config.path, 1.0)
    architecture = Architecture(
        shape=shape, width=config.width, depth=config.depth, num_classes=num_classes, dropout=config.dropout
    )
    return MLPDenoiser(architecture, path=path, prediction=prediction, time_scale=scale, log_time=log_time)


def recognises(folder: FilePath) -> bool:
    """Never: only `fastgen.json` says on which path such a network lives."""
    return False


def read(folder: FilePath, data: dict[str, Any] | None) -> MLPDenoiser:
    """Read a folder written here; a network that does not fit its files or its description is a UserError."""
    if data is None:
        raise UserError(f"{folder}: no fastgen.json; an MLP's files alone do not say what it predicts")
    architecture = validate(Architecture, files.read_json(folder / CONFIG), str(folder / CONFIG))
    told = conventions(data)
    if (told["shape"], told["num_classes"]) != (architecture.shape, architecture.num_classes):
        raise UserError(f"{folder / CONFIG}: shape or num_classes differ from those in fastgen.json")
    denoiser = MLPDenoiser(architecture, **told)
    load_weights(denoiser.net, folder / WEIGHTS)
    return denoiser
