"""A student as a folder that a stock pipeline of diffusers loads by its path alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen import files
from fastgen.codecs.sana import SanaCodec
from fastgen.codecs.stable_diffusion import TEXT_PARTS, StableDiffusionCodec
from fastgen.denoiser import Denoiser
from fastgen.samplers import cm
from fastgen.samplers.export import ldm
from fastgen.teachers.stable_diffusion import GUIDANCE_DIM

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CLASSES = {
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "vae": "AutoencoderKL",
}
Tensors = dict[str, Tensor]


def network_tensors(denoiser: Denoiser, output_scale: float = 1.0) -> Tensors:
    """A plain U-Net's tensors, the last layer's multiplied by `output_scale`."""
    assert denoiser.net is not None
    tensors = dict(denoiser.net.state_dict())
    if output_scale != 1:
        for name in ("conv_out.weight", "conv_out.bias"):
            tensors[name] = tensors[name] * output_scale
    return tensors


def write_pixels(folder: Path, denoiser: Denoiser, tensors: Tensors, scheduler: Any, dtype: str) -> None:
    """unet/, scheduler/ and the model_index.json of a pipeline of pixels."""
    _write_unet(folder / "unet", denoiser, tensors, dtype)
    known = {"DDIMScheduler": "DDIMPipeline", cm.SCHEDULER: cm.PIPELINE}
    name = known.get(type(scheduler).__name__, "DDPMPipeline")
    _finish(folder, name, {"unet": ["diffusers", "UNet2DModel"]}, scheduler)


def write_stable_diffusion(
    folder: Path,
    denoiser: Denoiser,
    tensors: Tensors,
    scheduler: Any,
    dtype: str,
    *,
    guided: bool = False,
    told: bool = False,
) -> None:
    """All parts of StableDiffusionPipeline or of XL's, the safety checker left out.

    Unless `guided`, the network says that it takes the guidance weight as an input: then no stock pipeline doubles the
    batch for guidance, whatever weight it is called with. It multiplies it by zeros, but for a network that is `told`
    its weight: that one's input is the real one, and LCM's own pipeline its place (XL has no other than its usual one).
    """
    codec = denoiser.codec
    assert isinstance(codec, StableDiffusionCodec)
    _write_unet(folder / "unet", denoiser, tensors, dtype, takes_guidance=not guided, told=told)
    for name, module in codec.modules().items():
        config = files.read_json(codec.folder / name / "config.json")
        stem = "diffusion_pytorch_model" if name == "vae" else "model"
        own = dict(module.state_dict())
        if name != "vae":
            # The names that every transformers reads: since 5.6 it drops the first word of its own accord.
            head = "text_projection."
            own = {key if key.startswith(head) else f"text_model.{ldm.bare(key)}": own[key] for key in own}
            config = _plain_text_config(config, dtype)
        write_network(folder / name, own, config, stem=stem, dtype=dtype)
    parts = [name for name in (*TEXT_PARTS, "vae") if (codec.folder / name).is_dir()]
    for name in (name for name in parts if name.startswith("tokenizer")):
        _copy_words(codec.folder / name, folder / name)
    library = {name: "diffusers" if name == "vae" else "transformers" for name in parts}
    index: dict[str, Any] = {name: [library[name], CLASSES[name]] for name in parts}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "feature_extractor": [None, None]}
    index |= {"image_encoder": [None, None]}
    if codec.xl:
        _finish(folder, "StableDiffusionXLPipeline", index | {"force_zeros_for_empty_prompt": True}, scheduler)
    else:
        unsafe = {"safety_checker": [None, None], "requires_safety_checker": False}
        name = "LatentConsistencyModelPipeline" if told else "StableDiffusionPipeline"
        _finish(folder, name, index | unsafe, scheduler)


def write_sana(folder: Path, denoiser: Denoiser, tensors: Tensors, scheduler: Any, dtype: str) -> None:
    """All parts of SanaSprintPipeline."""
    codec, net = denoiser.codec, denoiser.net
    assert isinstance(codec, SanaCodec)
    config: Any = net
    stem = "diffusion_pytorch_model"
    write_network(folder / "transformer", tensors, json.loads(config.to_json_string()), stem=stem, dtype=dtype)
    for name, module in codec.modules().items():
        config = files.read_json(codec.folder / name / "config.json")
        if name == "text_encoder":
            config = _plain_text_config(config, dtype)
        write_network(
            folder / name, dict(module.state_dict()), config, stem=stem if name == "vae" else "model", dtype=dtype
        )
    _copy_words(codec.folder / "tokenizer", folder / "tokenizer")
    index = {"transformer": ["diffusers", "SanaTransformer2DModel"], "vae": ["diffusers", "AutoencoderDC"]}
    index |= {"text_encoder": ["transformers", "Gemma2Model"], "tokenizer": ["transformers", "GemmaTokenizerFast"]}
    _finish(folder, "SanaSprintPipeline", index, scheduler)


def _plain_text_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A text encoder's config with the precision of its export, under the name that every transformers reads."""
    kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    return kept | {"torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}


def write_network(folder: Path, tensors: Tensors, config: Mapping[str, Any], *, stem: str, dtype: str) -> None:
    """config.json and one weight file, in half precision under its variant's name (`variant="fp16"`)."""
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", dict(config))
    name = f"{stem}.safetensors" if dtype == "fp32" else f"{stem}.{dtype}.safetensors"
    write_tensors(folder / name, tensors, dtype)


def write_tensors(file: Path, tensors: Tensors, dtype: str, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file; floating-point tensors in the given precision."""
    from safetensors.torch import save_file

    kind = DTYPES[dtype]
    cast = {name: t.detach().to("cpu", kind if t.is_floating_point() else t.dtype) for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in cast.items()}, file, metadata={"format": "pt", **(metadata or {})})


def says_size(denoiser: Denoiser) -> bool:
    """Whether a folder can say what size its images have: XL's pipeline knows squares alone."""
    return denoiser.shape[1] == denoiser.shape[2] or not getattr(denoiser, "xl", False)


def _write_unet(
    folder: Path,
    denoiser: Denoiser,
    tensors: Tensors,
    dtype: str,
    *,
    takes_guidance: bool = False,
    told: bool = False,
) -> None:
    net: Any = denoiser.net
    config = json.loads(net.to_json_string())
    if says_size(denoiser):
        sides = denoiser.shape[1:]
        config["sample_size"] = sides[0] if sides[0] == sides[1] else list(sides)
    if takes_guidance and not told:
        config["time_cond_proj_dim"] = width = config.get("time_cond_proj_dim") or GUIDANCE_DIM
        zeros = torch.zeros(net.time_embedding.linear_1.in_features, width)
        tensors = tensors | {"time_embedding.cond_proj.weight": zeros}
    write_network(folder, tensors, config, stem="diffusion_pytorch_model", dtype=dtype)


def _copy_words(source: Path, folder: Path) -> None:
    """A tokenizer's files."""
    folder.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".txt", ".model"):
            shutil.copyfile(file, folder / file.name)


def _finish(folder: Path, pipeline: str, parts: Mapping[str, Any], scheduler: Any) -> None:
    import diffusers

    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **parts}
    files.write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", type(scheduler).__name__]})
