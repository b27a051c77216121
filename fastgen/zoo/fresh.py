"""A published architecture with random weights, as the denoiser and codec that its checkpoint would give.

The tokenizer has one token a letter, since the vocabulary is data of the checkpoint's; the text is padded to the
same 77 tokens either way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgen import files
from fastgen.codecs.stable_diffusion import StableDiffusionCodec
from fastgen.errors import UserError, suggestion
from fastgen.schedulers import read_scheduler
from fastgen.teachers.stable_diffusion import StableDiffusionDenoiser
from fastgen.zoo.stable_diffusion import ARCHITECTURES

START, END = 49406, 49407  # of CLIP's vocabulary


def architecture(name: str) -> dict[str, Any]:
    """The configs of a published architecture; unknown names are UserErrors."""
    if name not in ARCHITECTURES:
        raise UserError(f"--random-weights {name}: no such architecture ({suggestion(name, ARCHITECTURES)})")
    return ARCHITECTURES[name]


def build(name: str, device: torch.device | str = "cpu") -> StableDiffusionDenoiser:
    """Random weights in float32 on a device ("meta": the architecture alone), by torch's global generator."""
    configs, device = architecture(name), torch.device(device)
    folder = tempfile.TemporaryDirectory(prefix="fastgen-")
    where = Path(folder.name)
    write_configs(where, configs)
    side = configs["unet"]["sample_size"]
    shape = (configs["unet"]["in_channels"], side, side)
    convention = read_scheduler(where / "scheduler" / "scheduler_config.json")
    codec = FreshCodec(folder, configs, shape, device)
    return StableDiffusionDenoiser(
        network("unet", configs["unet"], device), codec=codec, shape=shape, **vars(convention)
    )


class FreshCodec(StableDiffusionCodec):
    """The codec of a folder that holds configs and a tokenizer, and no weights: networks are made, not read."""

    def __init__(
        self, folder: tempfile.TemporaryDirectory[str], configs: dict[str, Any], shape: tuple[int, ...], device: Any
    ) -> None:
        super().__init__(Path(folder.name), shape)
        self._keep = folder  # removed when the codec is
        self.to(device)
        for part in ("text_encoder", "text_encoder_2", "vae"):
            if part in configs:
                self._parts[part] = network(part, configs[part], torch.device(device))


def network(part: str, config: dict[str, Any], device: torch.device) -> nn.Module:
    """One network by its config, frozen, in eval mode."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device(device):
        if part == "unet":
            made: nn.Module = UNet2DConditionModel.from_config(config)
        elif part == "vae":
            made = AutoencoderKL.from_config(config)
        else:
            kind: Any = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
            made = kind(CLIPTextConfig(**config))
    return made.requires_grad_(False).eval()


def write_configs(folder: Path, configs: dict[str, Any]) -> None:
    """What a pipeline's folder holds beside weights."""
    encoders = [part for part in ("text_encoder", "text_encoder_2") if part in configs]
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in encoders]
    for part in ("unet", "vae", "scheduler", *encoders, *tokenizers):
        (folder / part).mkdir()
    for part in ("unet", "vae", *encoders):
        files.write_json(folder / part / "config.json", configs[part])
    scheduler = {"_class_name": "DDIMScheduler", **configs["scheduler"]}
    files.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for part in tokenizers:
        _write_tokenizer(folder / part)
    _write_index(folder, encoders, tokenizers)


def _write_index(folder: Path, encoders: Sequence[str], tokenizers: Sequence[str]) -> None:
    xl = len(encoders) > 1
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    if xl:
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    index |= {part: ["transformers", "CLIPTokenizer"] for part in tokenizers}
    files.write_json(folder / "model_index.json", index)


def _write_tokenizer(folder: Path) -> None:
    """CLIP's byte-level tokenizer without merges: a letter is a token, start and end are where CLIP has them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, shown), *(chr(256 + i) for i in range(256 - len(shown)))]  # stand-ins of the 256 bytes (GPT-2)
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<|startoftext|>": START, "<|endoftext|>": END}
    files.write_json(folder / "vocab.json", vocabulary)
    files.write_atomic(folder / "merges.txt", "#version: 0.2\n")
    files.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
