"""Stable Diffusion 3 and 3.5: diffusers' `SD3Transformer2DModel` on latents, as a bare network; conditions are cached
embeddings, prompts and VAE come later.

Read are pipeline folders (transformer/, scheduler/, model_index.json) and bare ones (config.json, weights, and a
scheduler_config.json beside them or in scheduler/). A `null.safetensors` beside them makes guidance possible.
"""

from __future__ import annotations

import logging
from pathlib import Path as FilePath
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from fastgen import files
from fastgen.cond import Cond, length, repeat
from fastgen.denoiser import Denoiser, conventions
from fastgen.errors import UserError
from fastgen.nets import transformer
from fastgen.nets.scalar import added
from fastgen.paths import RectifiedFlow
from fastgen.schedulers import find_scheduler, read_scheduler, write_scheduler

logger = logging.getLogger("fastgen")
KIND, PIPELINE = "SD3Transformer2DModel", "StableDiffusion3Pipeline"
NULL = "null.safetensors"  # one row of the empty prompt's condition: "text" [T, D], "pooled" [P]
VAE_FACTOR = 8  # pixels to a latent


class SD3Denoiser(Denoiser):
    """cond: "text" [B, T, D] and "pooled" [B, P], as the stock pipeline's `encode_prompt` makes them. Latents
    [B, C, h, w]. The network's time is 1000 sigma.

    null_row: the empty prompt's condition, one row; None: there is no guidance.
    """

    family = "sd3"
    net: Any

    def __init__(self, *args: Any, null_row: Cond = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.null_row = null_row

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        x = x.to(self.net.dtype)
        cond = repeat(self.null_row, len(x)) if cond is None else cond
        told = transformer.embeddings(cond, widths(self.net.config), self.family, x)
        with added([self.net.time_text_embed.timestep_embedder], extra):
            return self.net(x, told["text"], told["pooled"], time, return_dict=False)[0]

    @property
    def needs_embeddings(self) -> bool:
        return True

    @property
    def embedding_width(self) -> int:
        return self.net.time_text_embed.timestep_embedder.linear_2.out_features

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The image tokens inside each block, between attention and feed-forward: whole blocks return tuples."""
        return tuple(block.norm2 for block in self.net.transformer_blocks)

    @property
    def usual_guidance(self) -> float | None:
        return 7.0 if self.has_null else None

    @property
    def has_null(self) -> bool:
        return self.null_row is not None

    @property
    def no_null(self) -> str:
        return f"no null condition: no text encoder, and no {NULL} with the empty prompt's embeddings beside it"

    @property
    def null(self) -> Cond:
        """One row: the empty prompt, where it came with the network."""
        row = self.null_row
        return None if row is None else {name: value.to(self.device) for name, value in row.items()}

    def unconditional(self, cond: Cond) -> Cond:
        null, tokens = self.null, None if cond is None else cond["text"].shape[1]
        if null is not None and null["text"].shape[1] != tokens:
            told = f"{null['text'].shape[1]} tokens, the condition {tokens}"
            raise UserError(f"{NULL}: the empty prompt has {told}; encode both with one max_sequence_length")
        return repeat(null, length(cond))

    def resized(self, height: int, width: int) -> SD3Denoiser:
        """The same network for images of another size in pixels; its positions are cut out of one square."""
        largest = self.net.config.pos_embed_max_size * self.net.config.patch_size * VAE_FACTOR
        self.shape = resized(self.shape, height, width, self.net.config.patch_size, largest)
        return self

    def write(self, folder: FilePath) -> None:
        """transformer/ and scheduler/. No model_index.json: a stock pipeline wants text encoders and a VAE."""
        self.net.save_pretrained(folder / transformer.PART)
        write_scheduler(self, folder / "scheduler")
        if self.null_row is not None:
            save_file({name: row[0].cpu().contiguous() for name, row in self.null_row.items()}, folder / NULL)


def widths(config: Any) -> dict[str, int]:
    """Sizes of the embeddings in the condition of an SD3 or FLUX network."""
    return {"text": config.joint_attention_dim, "pooled": config.pooled_projection_dim}


def resized(shape: tuple[int, ...], height: int, width: int, patch: int, largest: int | None) -> tuple[int, ...]:
    """The shape of the latents of a picture in pixels; sizes that do not fit are UserErrors."""
    step = patch * VAE_FACTOR
    if height < step or width < step or height % step or width % step:
        raise UserError(f"size {height} x {width}: height and width must be multiples of {step} pixels")
    if largest is not None and max(height, width) > largest:
        raise UserError(f"size {height} x {width}: this network has positions for {largest} pixels at most")
    return (shape[0], height // VAE_FACTOR, width // VAE_FACTOR)


def recognises(folder: FilePath) -> bool:
    """A pipeline whose transformer, or a bare config whose class, is `SD3Transformer2DModel`."""
    return transformer.class_of(folder) == KIND


def read(folder: FilePath, data: dict[str, Any] | None) -> SD3Denoiser:
    """Read a folder written here (`data` from its fastgen.json) or a stranger's, which states its own conventions."""
    if data is None:
        transformer.refuse_other_pipelines(folder, PIPELINE)
    net, where = transformer.read_net(folder, KIND), transformer.part(folder)
    if net.out_channels != net.config.in_channels:
        told = f"{net.config.in_channels} channels in, {net.out_channels} out"
        raise UserError(f"{where / 'config.json'}: {told}; a denoiser has as many")
    if data is not None:
        own = conventions(data)
    else:
        own = flow_conventions(folder, where)
        own["shape"] = (net.config.in_channels, *transformer.square(net.config, where / "config.json"))
    return SD3Denoiser(net, null_row=_read_null(folder / NULL, widths(net.config)), **own)


def flow_conventions(folder: FilePath, where: FilePath) -> dict[str, Any]:
    """What the scheduler of a flow transformer says; how it shifts its times is a matter of sampling, and not read."""
    convention = read_scheduler(find_scheduler(folder, where))
    if not isinstance(convention.path, RectifiedFlow):
        raise UserError(f"{find_scheduler(folder, where)}: not of a rectified flow, which this network was trained on")
    if any((folder / name).is_dir() for name in ("vae", "text_encoder", "text_encoder_2")):
        logger.warning("%s: text encoders and VAE are not read yet: conditions must be embeddings", folder)
    return dict(vars(convention))


def _read_null(file: FilePath, sizes: dict[str, int]) -> Cond:
    """The empty prompt's condition as one row; None where there is no such file."""
    if not file.exists():
        return None
    rows = files.load_tensors(file)
    for name, size in sizes.items():
        if name not in rows or rows[name].ndim != 1 + (name == "text") or rows[name].shape[-1] != size:
            wanted = f"'text' [tokens, {sizes['text']}] and 'pooled' [{sizes['pooled']}]"
            raise UserError(f"{file}: not the empty prompt's condition, which is {wanted}")
    return {name: rows[name].float()[None] for name in sizes}
