"""SANA and SANA-Sprint: diffusers' `SanaTransformer2DModel` on DC-AE latents, conditioned on Gemma 2's hidden states.

Read are pipeline folders, and a transformer's folder alone (its conditions then come from a cache). What the network's
config says decides how it is called: `timestep_scale` (its time argument is 1000 r timestep_scale: the rectified-flow
time r itself in SANA-Sprint) and `guidance_embeds` (2503.09641).
"""

from __future__ import annotations

import logging
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor, nn

from fastgen import files
from fastgen.codecs.sana import SanaCodec
from fastgen.cond import Cond, repeat
from fastgen.denoiser import GUIDANCE, Denoiser, conventions
from fastgen.errors import UserError
from fastgen.nets import sana as changes
from fastgen.nets.scalar import added
from fastgen.nets.transformer import class_of, part, read_net, square
from fastgen.paths import Prediction, RectifiedFlow

logger = logging.getLogger("fastgen")
NET = "SanaTransformer2DModel"
PIPELINES = ("SanaPipeline", "SanaSprintPipeline")
GUIDANCE_USUAL = 4.5  # of both stock pipelines
DENSE = 0.001  # SANA-Sprint's timestep_scale


class SanaDenoiser(Denoiser):
    """cond: "text" [B, T, D] and "text_mask" [B, T], 1 where there is a token. Latents [B, C, h, w].

    cond["guidance"] goes to the network's own input where its config has `guidance_embeds`, and is needed there: the
    network has no answer without a weight. codec: None for a bare transformer.
    """

    family = "sana"
    net: Any
    codec: SanaCodec | None

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        told = dict(cond or {})
        weight = told.pop(GUIDANCE, None)
        texts = told or repeat(self.null, len(x))
        assert texts is not None
        dtype, options = self.net.dtype, {"return_dict": False}
        if self.takes_guidance:
            if weight is None:
                raise UserError("this SANA network takes the guidance weight as an input, and none was given")
            options["guidance"] = weight.to(x.device) * self.net.config.guidance_embeds_scale
        with added([changes.embedder(self.net)], extra):
            return self.net(
                x.to(dtype),
                timestep=time,
                encoder_hidden_states=texts["text"].to(x.device, dtype),
                encoder_attention_mask=texts["text_mask"].to(x.device),
                **options,
            )[0]

    @property
    def embedding_width(self) -> int:
        return changes.embedder(self.net).linear_2.out_features

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.net.transformer_blocks)

    @property
    def takes_guidance(self) -> bool:
        return bool(self.net.config.guidance_embeds)

    def add_guidance(self) -> None:
        """The network's own input, as SANA-Sprint has it; it answers as before until that is trained."""
        if not self.takes_guidance:
            changes.add_guidance(self.net)

    def prepare(self, *, qk_norm: bool) -> float:
        """A time argument of 0 .. 1 in place of 0 .. 1000, and QK-norm, where the network has not got them: both change
        what it computes until it is trained on (`trainers/prepare.py`). Returns the embedding's relative error."""
        off = 0.0
        if qk_norm and self.net.config.qk_norm is None:
            changes.add_qk_norm(self.net)
        if self.net.config.timestep_scale != DENSE:
            off = changes.make_time_dense(self.net, DENSE)
        self.time_scale = 1000 * self.net.config.timestep_scale
        return off

    @property
    def distilled(self) -> bool:
        return self.takes_guidance

    @property
    def usual_guidance(self) -> float | None:
        return None if self.takes_guidance else GUIDANCE_USUAL

    @property
    def has_null(self) -> bool:
        return self.codec is not None and self.codec.reads_text

    @property
    def null(self) -> Cond:
        """One row: the empty prompt."""
        if self.codec is None:
            raise UserError("the empty prompt cannot be encoded: this network came without a text encoder")
        return self.codec.null()

    def unconditional(self, cond: Cond) -> Cond:
        """The empty prompt beside each row."""
        assert cond is not None
        rows = repeat(self.null, len(cond["text"])) or {}
        return {name: value.to(cond[name]) for name, value in rows.items()}

    def resized(self, height: int, width: int) -> SanaDenoiser:
        """The same network for images of another size in pixels."""
        if self.codec is None:
            raise UserError("size: this network came without its VAE, so its size in pixels is not known")
        self.codec = self.codec.resized(height, width)
        self.shape = (self.shape[0], height // self.codec.factor, width // self.codec.factor)
        return self

    def write(self, folder: FilePath) -> None:
        """transformer/, scheduler/ and the codec's parts. No model_index.json: `fastgen export --to diffusers` writes
        one for students."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.net.save_pretrained(folder / "transformer")
        # 1000 whatever the network's scale is: the stock pipeline multiplies by `timestep_scale` itself.
        scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
        scheduler.save_pretrained(folder / "scheduler")
        if self.codec is not None:
            self.codec.write(folder)


def recognises(folder: FilePath) -> bool:
    """A pipeline whose transformer, or a bare config whose class, is `SanaTransformer2DModel`."""
    return class_of(folder) == NET


def read(folder: FilePath, data: dict[str, Any] | None) -> SanaDenoiser:
    """Read a folder written here (`data` from its fastgen.json) or a published pipeline's or transformer's."""
    _refuse_other_pipelines(folder)
    net = read_net(folder, NET)
    config, file = net.config, part(folder) / "config.json"
    if (config.out_channels or config.in_channels) != config.in_channels:
        raise UserError(
            f"{file}: {config.in_channels} channels in, {config.out_channels} out: no text-to-image network"
        )
    told = conventions(data) if data is not None else _conventions(config, file)
    codec = SanaCodec(folder, told["shape"]) if (folder / "vae").is_dir() else None
    if codec is None or not codec.reads_text:
        logger.warning("%s: no text encoder or no VAE here: prompts must be cached, latents stay latents", folder)
    _refuse_other_text(folder, config)
    return SanaDenoiser(net, codec=codec, **told)


def _conventions(config: Any, file: FilePath) -> dict[str, Any]:
    return {
        "path": RectifiedFlow(),
        "prediction": Prediction(kind="flow"),
        "shape": (config.in_channels, *square(config, file)),
        "time_scale": 1000 * config.timestep_scale,
    }


def _refuse_other_pipelines(folder: FilePath) -> None:
    index = folder / "model_index.json"
    name = files.peek_json(index).get("_class_name")
    if name not in (None, *PIPELINES):
        known = ", ".join(PIPELINES)
        raise UserError(f"{index}: pipeline {name} is not read by this family; known: {known}")


def _refuse_other_text(folder: FilePath, config: Any) -> None:
    """A text encoder of another width than the network's captions is a UserError; none at all is not looked at."""
    width = files.peek_json(folder / "text_encoder" / "config.json").get("hidden_size")
    if isinstance(width, int) and width != config.caption_channels:
        raise UserError(
            f"{folder}: the transformer takes texts of width {config.caption_channels}, the text encoder here has "
            f"{width}: parts of different families; put the transformer's own text encoder there"
        )
