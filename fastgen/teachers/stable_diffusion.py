"""Stable Diffusion 1.x, 2.x and XL: diffusers' `UNet2DConditionModel` on latents, conditioned on text.

Read are pipeline folders. A single file and a hub id become such folders first (`fastgen.sources`).
"""

from __future__ import annotations

import logging
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import files
from fastgen.codecs.stable_diffusion import StableDiffusionCodec
from fastgen.cond import Cond, repeat
from fastgen.denoiser import GUIDANCE, Denoiser, conventions
from fastgen.errors import UserError
from fastgen.nets.scalar import added
from fastgen.nets.weights import fill, modern, weight_files
from fastgen.schedulers import read_scheduler, write_scheduler
from fastgen.teachers.unet import unet_features

logger = logging.getLogger("fastgen")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline")
GUIDANCE_DIM = 256  # of the embedding of the guidance weight, as LCM's own students have it (2310.04378)


class StableDiffusionDenoiser(Denoiser):
    """cond: "text" [B, 77, D]; XL also "pooled" [B, P] and "time_ids" [B, 6]. Latents [B, 4, h, w].

    codec: None for a bare U-Net, whose conditions come from a cache.

    Guidance is LCM's input: the embedding of w = (usual weight) - 1 through `time_embedding.cond_proj`. Zeros there are
    an export's switch against guidance in stock pipelines (`samplers.export.folder`), not a network that takes it.
    """

    family = "stable_diffusion"
    net: Any
    codec: StableDiffusionCodec | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        proj = self.net.time_embedding.cond_proj
        self._guidance_input = proj is not None and (proj.weight.is_meta or bool(proj.weight.any()))

    @property
    def xl(self) -> bool:
        return self.net.config.addition_embed_type == "text_time"

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        told = dict(cond or {})
        weight = told.pop(GUIDANCE, None)
        texts = told or repeat(self.null, len(x))
        assert texts is not None
        dtype = self.net.dtype
        texts = {name: value.to(x.device, dtype) for name, value in texts.items()}
        beside = {"text_embeds": texts["pooled"], "time_ids": texts["time_ids"]} if self.xl else None
        options = {"encoder_hidden_states": texts["text"], "added_cond_kwargs": beside, "return_dict": False}
        if weight is not None and self._guidance_input:
            width = self.net.config.time_cond_proj_dim
            options["timestep_cond"] = guidance_embedding(weight.to(x.device) - 1, width).to(dtype)
        with added([self.net.time_embedding], extra):
            return self.net(x.to(dtype), time, **options)[0]

    @property
    def takes_guidance(self) -> bool:
        return self._guidance_input

    def add_guidance(self) -> None:
        """Widen the embedding of the time by LCM's input, whose weights are 0 at first: see `Denoiser.add_guidance`."""
        embedding = self.net.time_embedding
        if embedding.cond_proj is None:
            proj = nn.Linear(GUIDANCE_DIM, embedding.linear_1.in_features, bias=False)
            nn.init.zeros_(proj.weight)
            embedding.cond_proj = proj.to(embedding.linear_1.weight)
            self.net.register_to_config(time_cond_proj_dim=GUIDANCE_DIM)
        self._guidance_input = True

    @property
    def embedding_width(self) -> int:
        return self.net.time_embedding.linear_2.out_features

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return unet_features(self.net)

    @property
    def distilled(self) -> bool:
        return self.net.config.time_cond_proj_dim is not None  # guidance as an input: LCM and its kin

    @property
    def usual_guidance(self) -> float | None:
        if self.distilled:
            return None  # nor does the stock pipeline guide it
        return 5.0 if self.xl else 7.5

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
        """The empty prompt beside each row; XL's sizes and crops stay those of the row, as in the stock pipeline."""
        assert cond is not None
        rows = repeat(self.null, len(cond["text"])) or {}
        return {name: cond[name] if name == "time_ids" else value.to(cond[name]) for name, value in rows.items()}

    def resized(self, height: int, width: int) -> StableDiffusionDenoiser:
        """The same network for images of another size in pixels."""
        if self.codec is None:
            raise UserError("size: this network came without its VAE, so its size in pixels is not known")
        self.codec = self.codec.resized(height, width)
        self.shape = (self.shape[0], height // self.codec.factor, width // self.codec.factor)
        return self

    def write(self, folder: FilePath) -> None:
        """unet/, scheduler/ and the codec's parts. No model_index.json: a stock pipeline would run a student at its own
        defaults; `fastgen export --to diffusers` writes one that is safe."""
        self.net.save_pretrained(folder / "unet")
        write_scheduler(self, folder / "scheduler")
        if self.codec is not None:
            self.codec.write(folder)


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """[sin, cos] of 1000 w f_i for i < width / 2: [B] to [B, width], in w's dtype. LCM's w: the usual weight less 1."""
    return waves(w, guidance_frequencies(width // 2, w), width)


def guidance_frequencies(n: int, like: Tensor) -> Tensor:
    """f_i = 1e4^(-i / (n - 1)), [n], operation by operation as the stock pipelines have it: an angle of 10,000 carries
    the rounding of each of them."""
    step = torch.log(torch.tensor(10000.0)) / (n - 1)  # in float32 whatever w is, as there
    return torch.exp(torch.arange(n, dtype=like.dtype, device=like.device) * -step.to(like.device, like.dtype))


def waves(w: Tensor, frequencies: Tensor, width: int) -> Tensor:
    """[B, width]: sines, cosines, and a zero where the width is odd."""
    angles = (1000.0 * w)[:, None] * frequencies[None]
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def recognises(folder: FilePath) -> bool:
    """A pipeline whose unet is a `UNet2DConditionModel`."""
    return files.peek_json(folder / "model_index.json").get("unet") == ["diffusers", "UNet2DConditionModel"]


def read(folder: FilePath, data: dict[str, Any] | None) -> StableDiffusionDenoiser:
    """Read a folder written here (`data` from its fastgen.json) or a published pipeline's."""
    if data is None:
        _check_pipeline(folder)
    net = read_net(folder / "unet")
    _check_text(folder, net.config)
    codec_of = lambda shape: StableDiffusionCodec(folder, shape) if (folder / "vae").is_dir() else None  # noqa: E731
    if data is not None:
        told = conventions(data)
        return StableDiffusionDenoiser(net, codec=codec_of(told["shape"]), **told)
    config = net.config
    side = config.sample_size
    if side is None:
        raise UserError(f"{folder / 'unet/config.json'}: no sample_size; write the latent size it was trained on there")
    shape = (config.in_channels, *((side, side) if isinstance(side, int) else tuple(side)))
    convention = read_scheduler(folder / "scheduler" / "scheduler_config.json")
    codec = codec_of(shape)
    if codec is None or not codec.reads_text:
        logger.warning("%s: no text encoder or no VAE here: prompts must be cached, latents stay latents", folder)
    return StableDiffusionDenoiser(net, codec=codec, shape=shape, **vars(convention))


def _check_text(folder: FilePath, config: Any) -> None:
    """Text encoders of another family than the network's are a UserError; none at all are not looked at here."""
    parts = [name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()]
    widths: list[Any] = [files.peek_json(folder / name / "config.json").get("hidden_size") for name in parts]
    if not parts or not all(isinstance(width, int) for width in widths):
        return  # the codec says what is wrong with them
    wanted, two = config.cross_attention_dim, config.addition_embed_type == "text_time"
    if two != (len(parts) == 2) or (isinstance(wanted, int) and wanted != sum(widths)):
        raise UserError(
            f"{folder}: the unet takes texts of width {wanted} from {1 + two} encoder(s), here {len(parts)} of width "
            f"{sum(widths)}: parts of different families; put the unet's own text encoders there"
        )


def read_net(where: FilePath) -> Any:
    """A `UNet2DConditionModel` with its weights in float32; what does not fit is a UserError."""
    net = empty_net(where)
    found = weight_files(where)
    tensors = {name: tensor for file in found for name, tensor in files.load_tensors(file).items()}
    fill(net, {modern(name): tensor for name, tensor in tensors.items()}, found[0])
    return net.eval()


def empty_net(where: FilePath) -> Any:
    """The network of a folder on the meta device: its architecture, no memory."""
    from diffusers import UNet2DConditionModel

    file = where / "config.json"
    config = files.read_json(file)
    if not isinstance(config, dict) or config.get("_class_name") != "UNet2DConditionModel":
        raise UserError(f"{file}: not the config of a UNet2DConditionModel")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise UserError(f"{file}: addition_embed_type {config['addition_embed_type']} is not supported")
    if config.get("in_channels", 4) != config.get("out_channels", 4):
        told = f"{config.get('in_channels', 4)} channels in, {config.get('out_channels', 4)} out"
        raise UserError(f"{file}: {told}: an inpainting or editing network, which is no text-to-image teacher")
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{file}: no UNet2DConditionModel can be made of it ({error})") from error


def _check_pipeline(folder: FilePath) -> None:
    index = files.peek_json(folder / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        known = ", ".join(PIPELINES)
        raise UserError(f"{folder / 'model_index.json'}: pipeline {name} is not read by this family; known: {known}")
    refiner = index.get("text_encoder", [None])[0] is None and "text_encoder_2" in index
    if refiner:
        raise UserError(f"{folder}: an SDXL refiner, which continues another model's images; give the base model")
