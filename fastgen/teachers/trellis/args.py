"""The `args` of a TRELLIS network's json, checked, and what every network does with them.

Defaults are those of the official constructors. What no released checkpoint uses and no reference can be trusted for
is refused here, in one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator
from torch import nn

from fastgen.config import Model, validate

AttentionMode = Literal["full", "swin"]
SERIALIZED = ("shift_window", "shift_sequence", "shift_order")  # windows along Z-order and Hilbert curves


class Args(Model):
    """Checked keyword arguments; unknown ones are UserErrors with the nearest name."""

    model_config = ConfigDict(protected_namespaces=())  # `model_channels` is the official name

    use_fp16: bool = False


class TransformerArgs(Args):
    """num_heads None: as many as heads of `num_head_channels` make up `model_channels`."""

    resolution: int = Field(ge=1)
    model_channels: int = Field(ge=6)
    num_blocks: int = Field(ge=0)
    num_heads: int | None = Field(default=None, ge=1)
    num_head_channels: int = Field(default=64, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    pe_mode: str = "ape"
    use_checkpoint: bool = False
    qk_rms_norm: bool = False

    @field_validator("pe_mode")
    @classmethod
    def _no_rope(cls, value: str) -> str:
        if value == "rope":
            raise ValueError("rotary positions are used by no released checkpoint and are not built; use 'ape'")
        if value != "ape":
            raise ValueError("the only position embedding here is 'ape'")
        return value

    @model_validator(mode="after")
    def _heads_fit(self) -> TransformerArgs:
        if self.model_channels % self.heads:
            raise ValueError(f"model_channels={self.model_channels} is no multiple of {self.heads} heads")
        return self

    @property
    def heads(self) -> int:
        return self.num_heads or max(1, self.model_channels // self.num_head_channels)


class FlowArgs(TransformerArgs):
    in_channels: int = Field(ge=1)
    cond_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    patch_size: int = Field(default=2, ge=1)
    share_mod: bool = False
    qk_rms_norm_cross: bool = False

    @property
    def block(self) -> dict[str, Any]:
        """Arguments of `FlowBlock`."""
        return {
            "channels": self.model_channels,
            "cond_channels": self.cond_channels,
            "heads": self.heads,
            "ratio": self.mlp_ratio,
            "share_mod": self.share_mod,
            "qk_norm": self.qk_rms_norm,
            "qk_norm_cross": self.qk_rms_norm_cross,
        }


class StructureFlowArgs(FlowArgs):
    @model_validator(mode="after")
    def _patches_fit(self) -> StructureFlowArgs:
        if self.resolution % self.patch_size:
            raise ValueError(f"resolution={self.resolution} is no multiple of patch_size={self.patch_size}")
        return self


class SLatFlowArgs(FlowArgs):
    """io_block_channels: widths of the convolutional stages before and behind the transformer, each of which halves the
    grid; None: no such stage. Released networks have one, and the original's caches of coordinates collide for more."""

    num_io_res_blocks: int = Field(default=2, ge=1)
    io_block_channels: tuple[int, ...] | None = None
    use_skip_connection: bool = True

    @model_validator(mode="after")
    def _stages_fit(self) -> SLatFlowArgs:
        stages = self.io_block_channels or ()
        if stages and self.share_mod:
            raise ValueError(
                "share_mod=true with io_block_channels: the original feeds its convolutions a vector six times too "
                "wide; no such network can exist"
            )
        if len(stages) > 1:
            raise ValueError(f"io_block_channels has {len(stages)} stages; the original is sound for one only")
        if stages and self.patch_size != 2 ** len(stages):
            raise ValueError(f"patch_size={self.patch_size}: one stage of io_block_channels means patch_size=2")
        return self


class TrunkArgs(TransformerArgs):
    """Of the encoder and the decoders of structured latents."""

    latent_channels: int = Field(ge=1)
    attn_mode: str = "swin"
    window_size: int = Field(default=8, ge=1)

    @field_validator("attn_mode")
    @classmethod
    def _known_mode(cls, value: str) -> str:
        if value in SERIALIZED:
            raise ValueError(
                "needs the CUDA extension vox2seq in the original, is used by no released checkpoint and is not built; "
                "use 'swin' or 'full'"
            )
        if value not in get_args(AttentionMode):
            raise ValueError(f"not one of {', '.join(get_args(AttentionMode))}")
        return value


class StructureVAEArgs(Args):
    """channels: the width of each level, in the order the data passes them; each level but the last changes the size by
    a factor of 2."""

    latent_channels: int = Field(ge=1)
    num_res_blocks: int = Field(ge=0)
    num_res_blocks_middle: int = Field(default=2, ge=0)
    channels: tuple[int, ...] = Field(min_length=1)
    norm_type: Literal["layer"] = "layer"


class Network(nn.Module):
    """A network of an official folder, made from the args of its json.

    torso: names of the parts whose linear and convolutional layers may be in half precision; all else stays float32.
    """

    Args: ClassVar[type[Args]]
    torso: ClassVar[tuple[str, ...]]
    converted: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv3d)
    input_layer: Any
    out_layer: Any

    def __init__(self, **args: Any) -> None:
        super().__init__()
        self.args: Any = validate(self.Args, args, type(self).__name__)

    def finish(self) -> None:
        """What ends every constructor: the torso in float16 where the args ask for it."""
        if self.args.use_fp16:
            self.to_torso(torch.float16)

    def to_torso(self, dtype: torch.dtype) -> None:
        """Bring the torso to a dtype, in place: float16 as released, bfloat16, or float32."""
        for layer in self._torso_layers():
            layer.to(dtype)

    @property
    def torso_dtype(self) -> torch.dtype:
        """What the blocks compute in."""
        layer = next(self._torso_layers(), self.input_layer)
        return next(iter(layer.parameters())).dtype

    def _torso_layers(self) -> Iterator[nn.Module]:
        parts = (getattr(self, part) for part in self.torso if hasattr(self, part))
        return (layer for part in parts for layer in part.modules() if isinstance(layer, self.converted))
