"""The single-file layout of Stable Diffusion: its names for the tensors of diffusers and transformers.

The names are those of the modules of the original code (2112.10752), so they follow from the block structure: a level
of the U-Net's encoder is a run of numbered blocks [resnet, attention], a downsampler is a block of its own, and a level
of its decoder has its upsampler in its last block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Names = dict[str, str]
Text = Literal["clip", "open_clip"]
BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
UNET, VAE = "model.diffusion_model.", "first_stage_model."
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a `UNet2DConditionModel` under their single-file names."""
    return {UNET + renamed(name, unet_modules(config)): tensor for name, tensor in tensors.items()}


def vae(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an `AutoencoderKL`; its attention's linear layers were convolutions, [C, C, 1, 1]."""
    names, found = vae_modules(config), {}
    for name, tensor in tensors.items():
        old = renamed(name, names)
        linear = ".mid.attn_1." in old and tensor.ndim == 2
        found[VAE + old] = tensor[:, :, None, None] if linear else tensor
    return found


def clip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of OpenAI's CLIP text encoder: transformers' own names, as they were with the word text_model."""
    return {f"{prefix}transformer.text_model.{bare(name)}": tensor for name, tensor in tensors.items()}


def open_clip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of an OpenCLIP text encoder: query, key and value are one tensor, the projection is transposed."""
    own = {bare(name): tensor for name, tensor in tensors.items()}
    layers = 1 + max(int(name.split(".")[2]) for name in own if name.startswith("encoder.layers."))
    names, found = open_clip_modules(layers), {}
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [own.pop(f"encoder.layers.{i}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            found[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(parts)
    for name, whole in (("token_embedding", "token_embedding.weight"), ("position_embedding", "positional_embedding")):
        found[whole] = own.pop(f"embeddings.{name}.weight")
    if "text_projection.weight" in own:
        found["text_projection"] = own.pop("text_projection.weight").T
    found |= {renamed(name, names): tensor for name, tensor in own.items()}
    return {f"{prefix}model.{name}": tensor for name, tensor in found.items()}


def bare(name: str) -> str:
    """transformers before 5.6, and its encoders with a projection, put text_model before the encoder's names."""
    return name.removeprefix("text_model.")


def single_file(
    parts: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """All tensors of a checkpoint: parts unet, vae, text_encoder (and text_encoder_2) by their pipeline's names.

    SD 1.x has OpenAI's text encoder, 2.x OpenCLIP's, told apart by the activation (quick_gelu or gelu); XL has one of
    each. A learnt embedding of the guidance weight has no place in the layout and is refused with a ValueError.
    """
    if configs["unet"].get("time_cond_proj_dim") is not None:
        raise ValueError("the single-file layout has no place for time_embedding.cond_proj")
    found = unet(parts["unet"], configs["unet"]) | vae(parts["vae"], configs["vae"])
    if "text_encoder_2" in parts:
        found |= clip(parts["text_encoder"], "conditioner.embedders.0.")
        return found | open_clip(parts["text_encoder_2"], "conditioner.embedders.1.")
    layout = clip if configs["text_encoder"].get("hidden_act", "quick_gelu") == "quick_gelu" else open_clip
    return found | layout(parts["text_encoder"], "cond_stage_model.")


def renamed(name: str, modules: Names) -> str:
    """A tensor's name with its module's name exchanged, the longest that fits; KeyError where none does."""
    head = name
    while head:
        if head in modules:
            return modules[head] + name[len(head) :]
        head = head.rpartition(".")[0]
    raise KeyError(f"no single-file name for '{name}'")


def unet_modules(config: Mapping[str, Any]) -> Names:
    """{module of `UNet2DConditionModel`: its single-file name}; the attentions' insides have the same names in both."""
    names = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    for block, old in _unet_resnets(config):
        names |= {f"{block}.{new}": f"{old}.{part}" for new, part in RESNET.items()}
    return names | dict(_unet_others(config))


def _levels(config: Mapping[str, Any], way: Literal["down", "up"]) -> list[tuple[int, bool]]:
    """(resnets, whether they have attention) of each level as computed; a decoder's has one more resnet."""
    kinds, layers = config[f"{way}_block_types"], config["layers_per_block"]
    if odd := set(kinds) - BLOCKS:
        raise ValueError(f"the single-file layout has no place for {', '.join(sorted(odd))}")
    counts = [layers] * len(kinds) if isinstance(layers, int) else list(layers)
    counts = counts if way == "down" else [count + 1 for count in reversed(counts)]
    return [(count, "CrossAttn" in kind) for count, kind in zip(counts, kinds, strict=True)]


def _unet_resnets(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    number = 0
    for level, (layers, _) in enumerate(_levels(config, "down")):
        for layer in range(layers):
            number += 1
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0"
        number += 1  # the downsampler's
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.resnets.1", "middle_block.2"
    number = 0
    for level, (layers, _) in enumerate(_levels(config, "up")):
        for layer in range(layers):
            yield f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{number}.0"
            number += 1


def _unet_others(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Attentions, and the convolutions between the levels."""
    number = 0
    for level, (layers, attends) in enumerate(_levels(config, "down")):
        for layer in range(layers):
            number += 1
            if attends:
                yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{number}.1"
        number += 1
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
    number = 0
    for level, (layers, attends) in enumerate(_levels(config, "up")):
        for layer in range(layers):
            if attends:
                yield f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{number}.1"
            number += 1
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{number - 1}.{2 if attends else 1}.conv"


def vae_modules(config: Mapping[str, Any]) -> Names:
    """{module of `AutoencoderKL`: its single-file name}; the decoder's levels are counted from the finest there."""
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for half, way, count, between in (("encoder", "down", layers, "down"), ("decoder", "up", layers + 1, "up")):
        names |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for level in range(levels):
            new, old = f"{half}.{way}_blocks.{level}", f"{half}.{way}.{level if way == 'down' else levels - 1 - level}"
            names[f"{new}.{between}samplers.0.conv"] = f"{old}.{between}sample.conv"
            for layer in range(count):
                names |= _vae_resnet(f"{new}.resnets.{layer}", f"{old}.block.{layer}")
        for i in (0, 1):
            names |= _vae_resnet(f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}")
        attention = f"{half}.mid_block.attentions.0"
        names |= {f"{attention}.{new}": f"{half}.mid.attn_1.{old}" for new, old in VAE_ATTENTION.items()}
    return names


def _vae_resnet(new: str, old: str) -> Names:
    return {new: old, f"{new}.conv_shortcut": f"{old}.nin_shortcut"}


def open_clip_modules(layers: int) -> Names:
    """{module of a CLIP text encoder: its OpenCLIP name}, but those that are taken together (see `open_clip`)."""
    names = {"final_layer_norm": "ln_final"}
    for i in range(layers):
        new, old = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        names |= {f"{new}.{part}": f"{old}.{whole}" for part, whole in OPEN_CLIP_LAYER.items()}
    return names
