"""Low-rank adapters on a frozen network (2106.09685): W x + (alpha / rank) B A x; A and B are trained, B is 0 at first.

A network with adapters holds its base and the adapters side by side; `merged` gives the plain network it amounts to.
Several of them, and their frozen teacher, can hold one set of base weights: `add_lora(share(teacher), ...)`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fastgen.config import Model
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError, suggestion

# Attention, feed-forward, convolution and time layers of a U-Net: those of LCM-LoRA (2311.05556).
UNET_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
ADAPTER = "default"  # peft's name for the only adapter
Adapted = dict[str, Any]  # peft's layers by the path of the layer they stand for


class LoraConfig(Model):
    """`targets` are layers by the end of their path ("attn1.to_q" is fewer than "to_q"); each must match one.

    None: those of UNET_TARGETS that the network has.
    """

    rank: int = Field(default=64, ge=1)
    alpha: float | None = Field(default=None, gt=0)  # None: the rank, so that the factor is 1
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)


class StudentConfig(Model):
    """How the networks that are trained hold their weights, and what they keep for the backward pass."""

    lora: LoraConfig | None = None  # None: every weight is trained
    gradient_checkpointing: bool = False


def share(denoiser: Denoiser) -> Denoiser:
    """A copy whose parameters are the same tensors: adapters added to it leave the original as it is."""
    return copy.deepcopy(denoiser, {id(p): p for p in denoiser.parameters()})


def add_lora(denoiser: Denoiser, config: LoraConfig, seed: int) -> Denoiser:
    """Freeze a denoiser and put trainable float32 adapters into its network, in place; it computes the same at first.

    A is drawn from torch's generator with this seed; targets that match nothing are UserErrors naming near ones.
    """
    import peft

    net = denoiser.net
    if net is None or adapted(net):
        raise UserError(f"lora: this {denoiser.family} network {'has adapters already' if net else 'has no weights'}")
    targets = _targets(net, config)
    denoiser.requires_grad_(False)
    alpha = config.rank if config.alpha is None else config.alpha
    # peft's annotation says int; kohya's files hold fractions, and peft divides whatever it is given.
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(targets),
    )
    with torch.random.fork_rng(devices=[]), torch.device("meta" if denoiser.device.type == "meta" else "cpu"):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, net, ADAPTER)
    for layer in adapted(net).values():
        for half in (layer.lora_A, layer.lora_B):
            half.to(layer.get_base_layer().weight.device, torch.float32).requires_grad_(True)
    denoiser.train(denoiser.training)  # peft's layers come in train mode
    return denoiser


def load_lora(denoiser: Denoiser, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Denoiser:
    """Add the adapters that `lora_tensors` and `lora_settings` told of, in place; what does not fit is a UserError."""
    kept = {name: settings[name] for name in ("rank", "alpha", "targets") if name in settings}
    add_lora(denoiser, LoraConfig.model_validate(kept), seed=0)
    own = lora_tensors(denoiser)
    if odd := sorted(own.keys() ^ tensors.keys()):
        what = "no tensor" if odd[0] in own else "no place in the network for"
        raise UserError(f"lora: {what} '{odd[0]}' ({len(odd)} in all); the adapters are of another network or damaged")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, the network's {tuple(own[name].shape)}"
            raise UserError(f"lora: '{name}' is {shapes}; the adapters are of another network or of another rank")
        own[name].copy_(tensor)
    return denoiser


def merged(denoiser: Denoiser) -> Denoiser:
    """A plain copy, W + (alpha / rank) B A added up in float32; of a network without adapters just a copy."""
    plain = copy.deepcopy(denoiser)
    if plain.net is None or not adapted(plain.net):
        return plain
    for path, layer in adapted(plain.net).items():
        base = layer.get_base_layer()
        delta = layer.get_delta_weight(ADAPTER).float()
        base.weight.data = (base.weight.data.float() + delta).to(base.weight.dtype)
        plain.net.set_submodule(path, base)
    if hasattr(plain.net, "peft_config"):
        del plain.net.peft_config
    return plain


def lora_tensors(denoiser: Denoiser) -> dict[str, Tensor]:
    """{"unet.<path>.lora_A.weight": [rank, ...], "unet.<path>.lora_B.weight": ...}, as `load_lora_weights` reads them.

    The first word is the network's name in a pipeline; convolutions have A [rank, in, h, w] and B [out, rank, 1, 1].
    """
    assert denoiser.net is not None
    found = {}
    for path, layer in adapted(denoiser.net).items():
        for name in ("lora_A", "lora_B"):
            found[f"{_part(denoiser.net)}.{path}.{name}.weight"] = getattr(layer, name)[ADAPTER].weight.detach()
    return found


def lora_settings(denoiser: Denoiser) -> dict[str, Any]:
    """Rank, alpha and targets as plain data: the tensors alone do not tell alpha."""
    assert denoiser.net is not None and adapted(denoiser.net)
    layer = next(iter(adapted(denoiser.net).values()))
    config: Any = denoiser.net.peft_config
    targets = sorted(config[ADAPTER].target_modules)
    return {"rank": layer.r[ADAPTER], "alpha": float(layer.lora_alpha[ADAPTER]), "targets": targets}


def adapted(net: nn.Module) -> Adapted:
    """The layers that have adapters."""
    return {path: module for path, module in net.named_modules() if hasattr(module, "lora_A")}


def enable_gradient_checkpointing(denoiser: Denoiser) -> None:
    """Keep only the inputs of the network's blocks for the backward pass and compute the rest again: less memory, about
    a third more time, the same gradients. Also of use to a frozen network that gradients flow through."""
    net: Any = denoiser.net
    if not getattr(net, "_supports_gradient_checkpointing", False):
        mend = "has no blocks to compute again; leave it off"
        raise UserError(f"student.gradient_checkpointing: this {denoiser.family} network {mend}")
    net.enable_gradient_checkpointing()  # diffusers' own: use_reentrant=False, so frozen inputs pass gradients on


def _part(net: nn.Module) -> str:
    """What a diffusers pipeline calls this network."""
    return "unet" if type(net).__name__.startswith("UNet") else "transformer"


def _layers(net: nn.Module) -> Iterator[str]:
    """Paths of the layers that adapters can be put on."""
    return (path for path, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))


def _ends(net: nn.Module) -> list[str]:
    """Every end of every such path, the shortest first: what a target may be."""
    ends = {".".join(path.split(".")[-n:]) for path in _layers(net) for n in range(1, path.count(".") + 2)}
    return sorted(ends, key=lambda end: (end.count("."), end))


def _targets(net: nn.Module, config: LoraConfig) -> tuple[str, ...]:
    ends = _ends(net)
    named = [end for end in ends if not end.split(".")[0].isdigit()]
    if config.targets is None:
        found = tuple(target for target in UNET_TARGETS if target in ends)
        if not found:
            near = suggestion("", [end for end in named if "." not in end])
            raise UserError(f"lora.targets: the network has none of a U-Net's layers; name some of its own ({near})")
        return found
    for target in config.targets:
        if target not in ends:
            raise UserError(f"lora.targets: no linear or convolution layer '{target}' ({suggestion(target, named)})")
    return config.targets
