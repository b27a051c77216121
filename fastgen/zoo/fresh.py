"""A published architecture with random weights, as the denoiser and codec that its checkpoint would give.

The tokenizers have one token a letter, since the vocabulary is data of the checkpoint's; the text is padded to the
same 77 or 300 tokens either way. The instruction that SANA's encoder reads besides has a token a line.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastgen import files
from fastgen.codecs.parts import PipelineCodec
from fastgen.codecs.sana import INSTRUCTION, SanaCodec
from fastgen.codecs.stable_diffusion import StableDiffusionCodec
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError, suggestion
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.schedulers import read_scheduler
from fastgen.teachers.sana import SanaDenoiser
from fastgen.teachers.stable_diffusion import StableDiffusionDenoiser
from fastgen.zoo import sana, stable_diffusion

ARCHITECTURES = stable_diffusion.ARCHITECTURES | sana.ARCHITECTURES
START, END = 49406, 49407  # of CLIP's vocabulary
NETWORKS = ("transformer", "unet", "vae", "text_encoder", "text_encoder_2")
MARKS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # the first of Gemma's vocabulary


def architecture(name: str) -> dict[str, Any]:
    """The configs of a published architecture; unknown names are UserErrors."""
    if name not in ARCHITECTURES:
        raise UserError(f"--random-weights {name}: no such architecture ({suggestion(name, ARCHITECTURES)})")
    return ARCHITECTURES[name]


def build(name: str, device: torch.device | str = "cpu") -> Denoiser:
    """Random weights in float32 on a device ("meta": the architecture alone), by torch's global generator."""
    configs, device = architecture(name), torch.device(device)
    folder = tempfile.TemporaryDirectory(prefix="fastgen-")
    where = Path(folder.name)
    write_configs(where, configs)
    part = "transformer" if "transformer" in configs else "unet"
    side, net = configs[part]["sample_size"], network(part, configs[part], device)
    shape = (configs[part]["in_channels"], side, side)
    codec: Any = SanaCodec(where, shape) if part == "transformer" else StableDiffusionCodec(where, shape)
    _fill(codec, folder, configs, device)
    if part == "unet":
        convention = read_scheduler(where / "scheduler" / "scheduler_config.json")
        return StableDiffusionDenoiser(net, codec=codec, shape=shape, **vars(convention))
    scale = 1000 * configs[part].get("timestep_scale", 1.0)
    flow = Prediction(kind="flow")
    return SanaDenoiser(net, RectifiedFlow(), flow, codec=codec, shape=shape, time_scale=scale)


def _fill(
    codec: PipelineCodec, folder: tempfile.TemporaryDirectory[str], configs: dict[str, Any], device: torch.device
) -> None:
    """Networks that are made, not read, for the codec of a folder of configs, which goes when the codec does."""
    codec.keep = folder
    codec.to(device)
    for part in ("text_encoder", "text_encoder_2", "vae"):
        if part in configs:
            codec.put(part, network(part, configs[part], device))


def network(part: str, config: dict[str, Any], device: torch.device) -> nn.Module:
    """One network by its config, frozen, in eval mode."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Gemma2Config, Gemma2Model

    with torch.device(device):
        if not part.startswith("text_encoder"):
            made: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        elif config.get("model_type") == "gemma2":
            made = Gemma2Model(Gemma2Config(**config))
        else:
            kind: Any = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
            made = kind(CLIPTextConfig(**config))
    return made.requires_grad_(False).eval()


def write_configs(folder: Path, configs: dict[str, Any]) -> None:
    """What a pipeline's folder holds beside weights."""
    parts = [part for part in NETWORKS if part in configs]
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text_encoder")]
    for part in (*parts, "scheduler", *tokenizers):
        (folder / part).mkdir()
    for part in parts:
        files.write_json(folder / part / "config.json", configs[part])
    scheduler = {"_class_name": "DDIMScheduler", **configs["scheduler"]}
    files.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for part in tokenizers:
        (_write_gemmas if "transformer" in configs else write_clip_tokenizer)(folder / part)
    if "transformer" in configs:
        _write_sana_index(folder)
    else:
        _write_index(folder, [part for part in parts if part.startswith("text_encoder")], tokenizers)


def _write_sana_index(folder: Path) -> None:
    index = {
        "_class_name": "SanaPipeline",
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
    }
    files.write_json(folder / "model_index.json", index)


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


def write_clip_tokenizer(folder: Path, words: Sequence[str] = ()) -> None:
    """CLIP's byte-level tokenizer: a letter is a token, start and end are where CLIP has them.

    words: of ASCII letters in lower case; each is merged from left to right into one token. Words that share the
    beginning of another's middle can keep it from being merged.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, shown), *(chr(256 + i) for i in range(256 - len(shown)))]  # stand-ins of the 256 bytes (GPT-2)
    ends = [(word[:i], word[i] + "</w>" * (i == len(word) - 1)) for word in words for i in range(1, len(word))]
    merges = list(dict.fromkeys(ends))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)} | {"<|startoftext|>": START, "<|endoftext|>": END}
    files.write_json(folder / "vocab.json", vocabulary)
    files.write_atomic(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    files.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})


def _write_gemmas(folder: Path) -> None:
    gemma_tokenizer().save_pretrained(folder)


def gemma_tokenizer() -> Any:
    """Gemma's tokenizer without merges: the marks, single bytes, and the lines of SANA's instruction."""
    from transformers import AddedToken, GemmaTokenizer

    words = [*MARKS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], add_bos_token=True)
    tokenizer.add_tokens([AddedToken(line, normalized=False) for line in INSTRUCTION.split("\n")])
    return tokenizer
