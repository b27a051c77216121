"""SANA's text encoder (Gemma 2) and autoencoder (DC-AE), from a pipeline's folder (2410.10629, sections 2.1 and 2.4).

A prompt stands behind an instruction to enhance it, of which the encoder is asked nothing but its hidden states: kept
are those of the first token and of the last 299, so the instruction is read and left out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.codec import Framing, Posterior
from fastgen.codecs.parts import PipelineCodec
from fastgen.cond import Cond

logger = logging.getLogger("fastgen")
LENGTH = 300  # tokens of a condition
# Word for word what the stock pipelines put before a prompt (their `complex_human_instruction`).
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    )
)


class SanaCodec(PipelineCodec):
    """See `fastgen.codec.Codec`. Text encoder and VAE in float32, or as `to` says: Gemma 2 leaves float16's range, so
    half precision is bfloat16."""

    def __init__(self, folder: Path, latent: tuple[int, ...]) -> None:
        super().__init__(folder, latent, _kinds, channels="encoder_block_out_channels")
        self._null_on: dict[torch.device, dict[str, Tensor]] = {}

    @cached_property
    def text_sha256(self) -> str:
        """Weights, tokenizer, instruction and length."""
        return self._parts.digest(("tokenizer", "text_encoder"), f"{LENGTH} {INSTRUCTION}")

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], framing: Framing | None = None) -> Cond:
        """{"text": [n, 300, D], "text_mask": [n, 300]}, float32; the mask is 1 where there is a token, 0 behind the
        last. Words that do not fit are named in a warning; what `framing` tells is nothing to this network."""
        return self._encoded([prompt.lower().strip() for prompt in prompts], INSTRUCTION)

    def null(self) -> Cond:
        """One row: the empty prompt, without the instruction."""
        device = self._parts.device
        if device not in self._null_on:  # asked for at every guided call
            self._null_on[device] = {name: value.to(device) for name, value in self._null_row.items()}
        return dict(self._null_on[device])

    @cached_property
    def _null_row(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: value.cpu() for name, value in self._encoded([""], "").items()}

    def time_ids(self, n: int, framing: Framing | None = None) -> Tensor | None:
        return None

    @torch.no_grad()
    def encode(self, images: Tensor) -> Posterior:
        """Images [B, 3, H, W] in [-1, 1] to their latents in the network's units; DC-AE has one, without a spread."""
        vae = self._parts["vae"]
        found = vae.encode(images.to(self._parts.device, vae.dtype), return_dict=False)[0].float()
        return Posterior(found * vae.config.scaling_factor, torch.zeros_like(found))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images float32 [B, 3, H, W] in [-1, 1]; differentiable, not clamped."""
        vae = self._parts["vae"]
        vae.use_tiling, vae.use_slicing = self.tiling, self.slicing
        x = latents.to(self._parts.device, torch.float32) / vae.config.scaling_factor
        return vae.decode(x.to(vae.dtype), return_dict=False)[0].float()

    def modules(self) -> dict[str, torch.nn.Module]:
        """The networks by name, read if they were not: what a benchmark compiles or counts."""
        return {name: self._parts[name] for name in ("text_encoder", "vae") if (self.folder / name).is_dir()}

    def write(self, folder: Path) -> None:
        """Copies of the parts as they are in the pipeline's folder, pickled weights left out."""
        self._parts.write(folder, ("tokenizer", "text_encoder", "vae"))

    def _encoded(self, prompts: Sequence[str], instruction: str) -> dict[str, Tensor]:
        self.need_text()
        tokenizer, encoder = self._parts["tokenizer"], self._parts["text_encoder"]
        tokenizer.padding_side = "right"
        # The instruction's own first token, and the two marks that stock code allows for, are among the 300.
        length = LENGTH + (len(tokenizer.encode(instruction)) - 2 if instruction else 0)
        texts = [instruction + prompt for prompt in prompts]
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for prompt, text, full in zip(prompts, texts, tokens.attention_mask.all(1).tolist(), strict=True):
            if full and len(ids := tokenizer(text, truncation=False, verbose=False).input_ids) > length:
                lost = tokenizer.decode(ids[length:])
                logger.warning("prompt '%s...': only %d tokens fit; lost: '%s'", prompt[:40], LENGTH, lost)
        ids, mask = tokens.input_ids.to(encoder.device), tokens.attention_mask.to(encoder.device)
        hidden = encoder(ids, attention_mask=mask)[0].float()
        kept = [0, *range(length - LENGTH + 1, length)]
        return {"text": hidden[:, kept], "text_mask": mask[:, kept].float()}


def _kinds(name: str) -> Any:
    from diffusers import AutoencoderDC
    from transformers import Gemma2Model, GemmaTokenizer

    return {"vae": AutoencoderDC, "text_encoder": Gemma2Model, "tokenizer": GemmaTokenizer}[name]
