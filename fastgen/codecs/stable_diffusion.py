"""CLIP text encoders and the KL autoencoder of Stable Diffusion 1.x, 2.x and XL, from a pipeline's folder.

1.x and 2.x condition on the last hidden state of one encoder; XL (2307.01952) on the penultimate states of two beside
each other, on the second one's pooled embedding, and on how the picture was framed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import files
from fastgen.codec import Framing, Posterior
from fastgen.codecs.parts import PipelineCodec
from fastgen.cond import Cond

logger = logging.getLogger("fastgen")
TEXT_PARTS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")


class StableDiffusionCodec(PipelineCodec):
    """See `fastgen.codec.Codec`. `folder` is the pipeline's; its parts are read when first needed.

    slicing      decode image by image: the memory of one
    tiling       decode in overlapping tiles: the memory of a tile, and slightly other pixels
    """

    def __init__(self, folder: Path, latent: tuple[int, ...]) -> None:
        super().__init__(folder, latent, _kinds, channels="block_out_channels")
        self.xl = (folder / "text_encoder_2").is_dir()
        self._null_on: dict[torch.device, dict[str, Tensor]] = {}

    @cached_property
    def text_sha256(self) -> str:
        """Weights, tokenizers and the pipeline's rule for the empty prompt."""
        return self._parts.digest(TEXT_PARTS, str(self._zero_null))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], framing: Framing | None = None) -> Cond:
        """{"text": [n, 77, D]}, for XL also "pooled" [n, P] and "time_ids" [n, 6]; float32.

        framing: how the pictures were made; None: taken whole at this size. Words beyond the 77th token are named in a
        warning.
        """
        self.need_text()
        last = self._hidden("tokenizer", "text_encoder", prompts)
        if not self.xl:
            return {"text": last.last_hidden_state.float()}
        second = self._hidden("tokenizer_2", "text_encoder_2", prompts)
        text = torch.cat([last.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        found = {"text": text.float(), "pooled": second.text_embeds.float()}
        return found | self._ids(len(text), framing)

    def null(self) -> Cond:
        """One row: the condition of the empty prompt, all zeros where the pipeline says so (XL)."""
        device = self._parts.device
        if device not in self._null_on:  # asked for at every guided call
            self._null_on[device] = {name: value.to(device) for name, value in self._null_row.items()}
        return self._null_on[device] | self._ids(1, None)

    @cached_property
    def _null_row(self) -> dict[str, Tensor]:
        row = {name: value.cpu() for name, value in (self.encode_prompts([""]) or {}).items() if name != "time_ids"}
        return {name: torch.zeros_like(value) for name, value in row.items()} if self._zero_null else row

    def _ids(self, n: int, framing: Framing | None) -> dict[str, Tensor]:
        ids = self.time_ids(n, framing)
        return {} if ids is None else {"time_ids": ids}

    def time_ids(self, n: int, framing: Framing | None = None) -> Tensor | None:
        """XL's (original height, width, crop top, left, target height, width), float32 [n, 6]; None for the others."""
        if not self.xl:
            return None
        size = torch.tensor(self.image_shape[1:])
        whole = Framing(size.expand(n, 2), torch.zeros(n, 2, dtype=torch.int64))
        original, corner = framing or whole
        ids = torch.cat([original.cpu(), corner.cpu(), size.expand(n, 2)], dim=1)
        return ids.float().to(self._parts.device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """Images [B, 3, H, W] in [-1, 1] to mean and standard deviation of their latents, in the network's units."""
        vae = self._parts["vae"]
        found = vae.encode(images.to(self._parts.device, vae.dtype)).latent_dist
        shift, scale = self._affine(vae)
        return Posterior((found.mean.float() - shift) * scale, found.std.float() * scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images float32 [B, 3, H, W] in [-1, 1]; differentiable, not clamped."""
        vae = self._parts["vae"]
        vae.use_tiling, vae.use_slicing = self.tiling, self.slicing
        shift, scale = self._affine(vae)
        x = latents.to(self._parts.device, torch.float32) / scale + shift
        return vae.decode(x.to(vae.dtype), return_dict=False)[0].float()

    def modules(self) -> dict[str, torch.nn.Module]:
        """The networks by name, read if they were not: what a benchmark compiles or counts."""
        names = ["text_encoder", *(["text_encoder_2"] if self.xl else []), "vae"]
        return {name: self._parts[name] for name in names if (self.folder / name).is_dir()}

    def write(self, folder: Path) -> None:
        """Copies of the parts as they are in the pipeline's folder, pickled weights left out."""
        self._parts.write(folder, (*TEXT_PARTS, "vae"))

    @property
    def _zero_null(self) -> bool:
        """`force_zeros_for_empty_prompt`, which is XL's default."""
        index = self.folder / "model_index.json"
        told = files.read_json(index) if index.exists() else {}
        return bool(told.get("force_zeros_for_empty_prompt", self.xl))

    def _affine(self, vae: Any) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale): network units = (latent - shift) scale."""
        config, scale = vae.config, vae.config.scaling_factor
        if getattr(config, "latents_mean", None) is None:
            return config.shift_factor or 0.0, scale
        mean, std = (
            torch.tensor(value, device=self._parts.device).view(1, -1, 1, 1)
            for value in (config.latents_mean, config.latents_std)
        )
        return mean, scale / std

    def _hidden(self, tokenizer: str, encoder: str, prompts: Sequence[str]) -> Any:
        ids = self._tokens(self._parts[tokenizer], prompts)
        network = self._parts[encoder]
        return network(ids.to(network.device), output_hidden_states=True)

    def _tokens(self, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
        length = tokenizer.model_max_length
        tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for prompt, filled in zip(prompts, tokens.attention_mask.all(1).tolist(), strict=True):
            if filled and len(ids := tokenizer(prompt, truncation=False, verbose=False).input_ids) > length:
                lost = tokenizer.decode(ids[length - 1 : -1])
                logger.warning("prompt '%s...': only %d tokens fit; lost: '%s'", prompt[:40], length, lost)
        return tokens.input_ids


def _kinds(name: str) -> Any:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    kinds = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    return CLIPTokenizer if name.startswith("tokenizer") else kinds[name]
