"""FLUX.1: diffusers' `FluxTransformer2DModel` on latents, as a bare network; conditions are cached embeddings, prompts
and VAE come later.

Read are pipeline folders (transformer/, scheduler/, model_index.json) and bare ones (config.json, weights, and a
scheduler_config.json beside them or in scheduler/).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.cond import Cond
from fastgen.denoiser import GUIDANCE, Denoiser, conventions
from fastgen.errors import UserError
from fastgen.nets import transformer
from fastgen.nets.scalar import added
from fastgen.schedulers import Convention, write_scheduler
from fastgen.teachers.sd3 import flow_conventions, resized, widths

KIND, PIPELINE = "FluxTransformer2DModel", "FluxPipeline"
PATCH = 2  # latents to a token, on each side
SIDE = 128  # of the latents, where nothing tells: 1024 pixels, as in the stock pipeline
UNIT = 1000.0  # the network multiplies its time and its guidance by this
USUAL = 3.5  # guidance of the stock pipeline


class FluxDenoiser(Denoiser):
    """cond: "text" [B, T, D] and "pooled" [B, P], as the stock pipeline's `encode_prompt` makes them. Latents
    [B, C, h, w], which are packed inside. The network's time is sigma.

    A network with guidance embeddings takes cond["guidance"]; without it, the stock pipeline's 3.5. That is no
    classifier-free guidance, which there is not: no null condition.
    """

    family = "flux"
    net: Any

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        x = x.to(self.net.dtype)
        height, width = x.shape[-2:]
        told = transformer.embeddings(cond, widths(self.net.config), self.family, x)
        weight = None
        if self.net.config.guidance_embeds:
            given = (cond or {}).get(GUIDANCE)
            weight = torch.full_like(time, USUAL) if given is None else given.to(time)
        with added([self.net.time_text_embed.timestep_embedder], extra), _exactly(self.net, time, weight):
            made = self.net(
                pack(x),
                told["text"],
                told["pooled"],
                time,
                img_ids=positions(height // PATCH, width // PATCH).to(x.device),
                txt_ids=torch.zeros(told["text"].shape[1], 3, device=x.device),
                guidance=weight,
                return_dict=False,
            )[0]
        return unpack(made, height, width)

    @property
    def needs_embeddings(self) -> bool:
        return True

    @property
    def embedding_width(self) -> int:
        return self.net.time_text_embed.timestep_embedder.linear_2.out_features

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """Tokens inside each block, since whole blocks return tuples: of the image between attention and feed-forward,
        in single blocks of text and image on the way in."""
        double = [block.norm2 for block in self.net.transformer_blocks]
        return (*double, *(block.norm.norm for block in self.net.single_transformer_blocks))

    @property
    def takes_guidance(self) -> bool:
        return self.net.config.guidance_embeds or super().takes_guidance

    def add_guidance(self) -> None:
        """Nothing is to be added to a network that takes its own."""
        if not self.net.config.guidance_embeds:
            super().add_guidance()

    @property
    def no_null(self) -> str:
        own = f'; its own guidance is an input, cond["guidance"], {USUAL} by default'
        return f"no null condition{own if self.net.config.guidance_embeds else ''}"

    def resized(self, height: int, width: int) -> FluxDenoiser:
        """The same network for images of another size in pixels; its positions have no end."""
        self.shape = resized(self.shape, height, width, PATCH, None)
        return self

    def write(self, folder: FilePath) -> None:
        """transformer/ and scheduler/. No model_index.json: a stock pipeline wants text encoders and a VAE."""
        self.net.save_pretrained(folder / transformer.PART)
        # Stock schedulers count in thousandths, and the pipeline divides by that again.
        convention = Convention(path=self.path, prediction=self.prediction, time_scale=UNIT * self.time_scale)
        write_scheduler(replace(convention, log_time=self.log_time), folder / "scheduler")


def pack(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h w / 4, 4 C]: one token of every 2 x 2 latents."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, h w / 4, 4 C] -> [B, C, h, w]."""
    n, _, c = tokens.shape
    x = tokens.view(n, height // 2, width // 2, c // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, height, width)


def positions(rows: int, columns: int) -> Tensor:
    """(0, row, column) of each token, float32 [rows columns, 3]; those of the text are (0, 0, 0)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).float()


@contextmanager
def _exactly(net: Any, time: Tensor, weight: Tensor | None) -> Iterator[None]:
    """While it lasts, the network embeds these numbers themselves and not what half precision leaves of them.

    The stock module takes its time to the dtype of its tokens first: in bfloat16, autocast included, 0.999 is 1.
    """
    least = torch.promote_types(net.dtype, torch.float32)
    told = [UNIT * value.to(least) for value in (time, weight) if value is not None]
    handle = net.time_text_embed.register_forward_pre_hook(lambda _module, args: (*told, args[-1]))
    try:
        yield
    finally:
        handle.remove()


def recognises(folder: FilePath) -> bool:
    """A pipeline whose transformer, or a bare config whose class, is `FluxTransformer2DModel`."""
    return transformer.class_of(folder) == KIND


def read(folder: FilePath, data: dict[str, Any] | None) -> FluxDenoiser:
    """Read a folder written here (`data` from its fastgen.json) or a stranger's, which states its own conventions."""
    if data is None:
        transformer.refuse_other_pipelines(folder, PIPELINE)
    net, where = transformer.read_net(folder, KIND), transformer.part(folder)
    made, wanted = net.out_channels, net.config.in_channels
    if made != wanted or wanted % PATCH**2:
        told = f"{wanted} channels in, {made} out"
        raise UserError(f"{where / 'config.json'}: {told}; a FLUX denoiser has four times its latents', in and out")
    if data is not None:
        return FluxDenoiser(net, **conventions(data))
    own = flow_conventions(folder, where)
    own["time_scale"] /= UNIT
    return FluxDenoiser(net, **own, shape=(wanted // PATCH**2, SIDE, SIDE))
