"""diffusers' transformers: where a folder holds one, its network with its weights, and embeddings that it is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgen import files
from fastgen.cond import Cond
from fastgen.errors import UserError
from fastgen.nets.weights import fill, weight_files

PART = "transformer"


def part(folder: Path) -> Path:
    """The folder of the network itself: `transformer/` of a pipeline, else the folder."""
    return folder / PART if (folder / PART).is_dir() else folder


def class_of(folder: Path) -> str | None:
    """The class that the config of a folder's transformer names; None where there is none."""
    config = files.peek_json(part(folder) / "config.json")
    name = config.get("_class_name")
    # Before diffusers 0.29 one class stood for several; its loader tells them apart like this.
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        return "DiTTransformer2DModel"
    return name


def refuse_other_pipelines(folder: Path, known: str) -> None:
    """A pipeline of another class than `known` round the network: it feeds the network something else."""
    index = folder / "model_index.json"
    name = files.peek_json(index).get("_class_name")
    if name not in (None, known):
        raise UserError(f"{index}: pipeline {name} is not read by this family; known: {known}")


def read_net(folder: Path, kind: str) -> Any:
    """A transformer with its weights in float32; `kind` is its class in diffusers. What does not fit is a UserError."""
    where = part(folder)
    net = empty_net(where, kind)
    found = weight_files(where)
    fill(net, {name: tensor for file in found for name, tensor in files.load_tensors(file).items()}, found[0])
    return net.eval()


def empty_net(where: Path, kind: str) -> Any:
    """The network of a folder without memory for its weights; buffers that no file holds have their values."""
    import diffusers
    from accelerate import init_empty_weights

    file = where / "config.json"
    config = files.read_json(file)
    if not isinstance(config, dict) or class_of(where) != kind:
        raise UserError(f"{file}: not the config of a {kind}")
    maker = getattr(diffusers, kind)
    if config["_class_name"] != kind:  # the older class had more options; where one of them is set the weights differ
        config = {key: value for key, value in config.items() if key in inspect.signature(maker).parameters}
    try:
        with init_empty_weights(include_buffers=False):
            return maker.from_config(config)
    except (TypeError, ValueError, NotImplementedError, RuntimeError, ArithmeticError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{file}: no {kind} can be made of it ({told})") from error


def square(config: Any, file: Path) -> tuple[int, int]:
    """The size of the latents that a network's config names."""
    side = config.sample_size
    if not isinstance(side, int) or side < 1:
        raise UserError(f"{file}: no sample_size; write the latent size it was trained on there")
    return side, side


def embeddings(cond: Cond, widths: Mapping[str, int], family: str, like: Tensor) -> dict[str, Tensor]:
    """The entries of a condition that a network without text encoders is given, in the dtype and place of `like`.

    widths: size of the last dimension of each; a condition without it, or of another size, is a UserError.
    """
    for name, width in widths.items():
        found = None if cond is None else cond.get(name)
        if found is None or found.shape[-1] != width:
            told = "none was given" if found is None else f"this one has {found.shape[-1]}"
            raise UserError(
                f"this {family} network came without its text encoders: it needs the condition '{name}', an embedding "
                f"of width {width}, and {told}; make it with the stock pipeline's encode_prompt"
            )
    assert cond is not None
    return {name: cond[name].to(like) for name in widths}
