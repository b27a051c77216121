"""diffusers' `UNet2DModel`: pixel or latent U-Nets without text, from checkpoints or trained here.

Read are pipeline folders (model_index.json, unet/, scheduler/) and bare ones (config.json, weights, and a
scheduler_config.json beside them or in scheduler/). The scheduler's config says which path the network lives on and
what it predicts.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path as FilePath
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from fastgen import files
from fastgen.cond import Cond
from fastgen.denoiser import Denoiser, conventions
from fastgen.errors import UserError
from fastgen.nets.fresh import FreshNet
from fastgen.nets.scalar import added
from fastgen.nets.weights import fill, modern, weight_files
from fastgen.paths import RectifiedFlow
from fastgen.schedulers import find_scheduler, read_scheduler, write_scheduler

logger = logging.getLogger("fastgen")


class UNetConfig(FreshNet):
    """Channels from the finest level to the coarsest, each level half the size of the one before."""

    family: Literal["unet"] = "unet"
    path: Literal["RectifiedFlow", "EDM", "VP"] = "RectifiedFlow"
    block_out_channels: tuple[int, ...] = Field(default=(64, 128, 128), min_length=1)
    layers_per_block: int = Field(default=2, ge=1)
    attention: tuple[int, ...] | None = None  # levels with self-attention, 0 the finest; None: the coarsest only
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("block_out_channels")
    @classmethod
    def _channels(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(channels < 8 or channels % 8 for channels in value):
            raise ValueError("every number of channels is a multiple of 8")
        return value


NetConfig = UNetConfig


class UNetDenoiser(Denoiser):
    """A `UNet2DModel` with its conventions; options as of `Denoiser`."""

    family = "unet"
    net: Any

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        label = self.label(cond, len(x))
        with added([self.net.time_embedding], extra):
            return self.net(x.to(self.net.dtype), time, class_labels=label, return_dict=False)[0]

    @property
    def embedding_width(self) -> int:
        return self.net.time_embedding.linear_2.out_features

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return unet_features(self.net)

    def write(self, folder: FilePath) -> None:
        """unet/ and scheduler/, and where a stock pipeline runs the two (unconditional, not EDM) model_index.json."""
        import diffusers

        self.net.save_pretrained(folder / "unet")
        scheduler = write_scheduler(self, folder / "scheduler")
        # DDPMPipeline neither passes labels nor scales its input, as EDM's scheduler would ask it to.
        if self.num_classes is None and not self.log_time:
            index = {
                "_class_name": "DDPMPipeline" if isinstance(self.path, RectifiedFlow) else "DDIMPipeline",
                "_diffusers_version": diffusers.__version__,
                "scheduler": ["diffusers", scheduler],
                "unet": ["diffusers", "UNet2DModel"],
            }
            files.write_json(folder / "model_index.json", index)


def build(config: UNetConfig, shape: tuple[int, ...], num_classes: int | None) -> UNetDenoiser:
    """A fresh network with a null label; its output is zero at first, torch's generator decides the rest."""
    from diffusers import UNet2DModel

    channels, levels = config.block_out_channels, len(config.block_out_channels)
    attention = (levels - 1,) if config.attention is None else config.attention
    if any(not 0 <= level < levels for level in attention):
        raise UserError(f"net.attention={attention}: block_out_channels has the levels 0 .. {levels - 1}")
    if len(shape) != 3 or any(side % 2 ** (levels - 1) for side in shape[1:]):
        raise UserError(
            f"net.block_out_channels: {levels} levels halve an image {levels - 1} times, which {shape} does not allow"
        )
    down = ["AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(levels)]
    up = ["AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(range(levels))]
    groups = math.gcd(32, *channels)
    net: Any = UNet2DModel(
        sample_size=shape[1] if shape[1] == shape[2] else shape[1:],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        add_attention=bool(attention),
        attention_head_dim=groups,
        norm_num_groups=groups,
        dropout=config.dropout,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )
    nn.init.zeros_(net.conv_out.weight)
    nn.init.zeros_(net.conv_out.bias)
    path, prediction = config.target()
    return UNetDenoiser(
        net,
        path,
        prediction,
        shape=shape,
        num_classes=num_classes,
        # cm's is that of diffusers' CMStochasticIterativeScheduler, 1000 ln(sigma) / 4.
        time_scale=1000.0 if config.path == "RectifiedFlow" or prediction.kind == "cm" else 1.0,
        log_time=config.path == "EDM",
    )


def unet_features(net: Any) -> tuple[nn.Module, ...]:
    """Layers of a diffusers U-Net after which features are read: the residual layers on the way down, and the middle.

    Whole down-blocks return tuples.
    """
    down = [layer for block in net.down_blocks for layer in block.resnets]
    return (*down, net.mid_block) if net.mid_block is not None else tuple(down)


def recognises(folder: FilePath) -> bool:
    """A pipeline whose unet, or a bare config whose class, is `UNet2DModel`."""
    index, config = files.peek_json(folder / "model_index.json"), files.peek_json(folder / "config.json")
    return index.get("unet") == ["diffusers", "UNet2DModel"] or config.get("_class_name") == "UNet2DModel"


def read(folder: FilePath, data: dict[str, Any] | None, *, null_label: bool = False) -> UNetDenoiser:
    """Read a folder written here (`data` from its fastgen.json) or a stranger's, which states its conventions itself.

    A stranger's class-conditional network has labels only, unless `null_label` says that its last one means "none".
    """
    where = folder / "unet" if (folder / "unet").is_dir() else folder
    net = _read_net(where)
    if data is not None:
        return UNetDenoiser(net, **conventions(data))
    _refuse_parts(folder / "model_index.json")
    config, file = net.config, where / "config.json"
    if config.sample_size is None:
        raise UserError(f"{file}: no sample_size; write the image size that the network was trained on there")
    side = config.sample_size
    size = (side, side) if isinstance(side, int) else tuple(side)
    classes = config.num_class_embeds
    if classes is not None and not null_label:
        logger.info("%s: %d classes, none of them known to mean 'no label': no guidance", folder, classes)
    return UNetDenoiser(
        net,
        **vars(read_scheduler(find_scheduler(folder, where))),
        shape=(config.in_channels, *size),
        num_classes=classes - 1 if classes is not None and null_label else classes,
        null_label=null_label or classes is None,
    )


def _refuse_parts(index: FilePath) -> None:
    parts = [name for name, part in files.peek_json(index).items() if isinstance(part, list) and part[0] is not None]
    extra = sorted(set(parts) - {"unet", "scheduler"})
    if extra:
        raise UserError(
            f"{index}: the pipeline also has {', '.join(extra)}; this family is a U-Net and a scheduler alone"
        )


def _read_net(where: FilePath) -> Any:
    """The network with its weights, a head for learned variances cut off; what does not fit is a UserError."""
    from diffusers import UNet2DModel

    config = files.read_json(where / "config.json")
    _check(config, where / "config.json")
    try:
        net: Any = UNet2DModel.from_config(config)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{where / 'config.json'}: no UNet2DModel can be made of it ({error})") from error
    found = weight_files(where)
    tensors = {name: tensor for file in found for name, tensor in files.load_tensors(file).items()}
    fill(net, {modern(name): tensor for name, tensor in tensors.items()}, found[0])
    wanted, made = net.config.in_channels, net.config.out_channels
    if made == 2 * wanted:
        logger.info("%s: the second half of the output, learned variances, is cut off", where)
        _cut(net, wanted)
    elif made != wanted:
        raise UserError(
            f"{where / 'config.json'}: {made} channels out for {wanted} in; a denoiser has as many, or twice"
        )
    return net


def _check(config: Any, file: FilePath) -> None:
    if not isinstance(config, dict) or config.get("_class_name") != "UNet2DModel":
        raise UserError(f"{file}: not the config of a UNet2DModel")
    for key, values in {"time_embedding_type": ("positional",), "class_embed_type": (None,)}.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"{file}: {key} {config[key]} is not supported")


def _cut(net: Any, channels: int) -> None:
    """Keep the first output channels only (improved DDPM's mean; 2102.09672), in the weights and in the config."""
    layer = nn.Conv2d(net.conv_out.in_channels, channels, kernel_size=3, padding=1)
    kept = {name: tensor[:channels].clone() for name, tensor in net.conv_out.state_dict().items()}
    layer.load_state_dict(kept, assign=True)  # a network of shapes alone has nothing to copy
    net.conv_out = layer
    net.register_to_config(out_channels=channels)
