"""Tiny checkpoints of the real classes, with seeded random weights: what a user's folder looks like, in megabytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastgen.zoo import fresh

LATENT = 8  # 16 x 16 pixels: the VAE halves once
TEXT, WIDER = 32, 48  # stock code tells XL's two encoders apart by their widths


def stable_diffusion(folder: Path, prediction_type: str = "epsilon", zero_snr: bool = False) -> Path:
    """SD 1.x (or 2.x with v_prediction): one text encoder, PNDM's scheduler config as the published folders have it."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if zero_snr:
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler(**betas, prediction_type=prediction_type, rescale_betas_zero_snr=True)
    else:
        scheduler = PNDMScheduler(
            **betas, prediction_type=prediction_type, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
        )
    pipeline = StableDiffusionPipeline(
        vae=vae(0.18215),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder.with_name(f"{folder.name}-tokenizer")),
        unet=unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def sdxl(folder: Path) -> Path:
    """SDXL: two text encoders, pooled embedding and time ids, a VAE that asks for float32."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    words = tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    pipeline = StableDiffusionXLPipeline(
        vae=vae(0.13025, force_upcast=True),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(WIDER, projection=True),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet(
            cross_attention_dim=TEXT + WIDER,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=TEXT + 6 * 8,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    pipeline.save_pretrained(folder)
    return folder


def sana(folder: Path) -> Path:
    """SANA: Gemma 2 and DC-AE, which halves five times; 2 x 2 places of latents, so 64 x 64 pixels."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
    )
    return _sana(folder, SanaPipeline, scheduler)


def sana_sprint(folder: Path) -> Path:
    """SANA-Sprint as it is published: dense time, QK-norm, the guidance weight as an input."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    options = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}
    return _sana(folder, SanaSprintPipeline, SCMScheduler(), **options)


def _sana(folder: Path, pipeline: Any, scheduler: Any, **options: Any) -> Path:
    torch.manual_seed(0)
    parts = {"text_encoder": gemma(), "tokenizer": fresh.gemma_tokenizer(), "vae": dc_ae()}
    pipeline(transformer=sana_transformer(**options), scheduler=scheduler, **parts).save_pretrained(folder)
    return folder


def sana_transformer(**changes: Any) -> Any:
    from diffusers import SanaTransformer2DModel

    options: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 16,
        "sample_size": 2,
    }
    return SanaTransformer2DModel(**{**options, **changes}).eval()


def dc_ae(**changes: Any) -> Any:
    from diffusers import AutoencoderDC

    options: dict[str, Any] = {
        "latent_channels": 4,
        "attention_head_dim": 8,
        "encoder_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
        "decoder_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
        "encoder_block_out_channels": (8,) * 5 + (16,),
        "decoder_block_out_channels": (8,) * 5 + (16,),
        "encoder_layers_per_block": (1,) * 6,
        "decoder_layers_per_block": (1,) * 6,
        "encoder_qkv_multiscales": ((),) * 5 + ((5,),),
        "decoder_qkv_multiscales": ((),) * 5 + ((5,),),
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    }
    return AutoencoderDC(**{**options, **changes}).eval()


def gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=64,
    )
    return Gemma2Model(config).eval()


def unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    options: dict[str, Any] = {
        "sample_size": LATENT,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**options, **changes}).eval()


def vae(scaling: float, **options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=2 * LATENT,
        scaling_factor=scaling,
        **options,
    ).eval()


def text_encoder(width: int = TEXT, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=TEXT,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer of single bytes: no merges, so a letter is a token."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def _byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes in a byte-level vocabulary (GPT-2's)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))]


def dit(folder: Path, **changes: Any) -> Any:
    """A stranger's DiT pipeline without its VAE: ten classes, learned variances. Returns the stock network."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    options: dict[str, Any] = {
        "sample_size": LATENT,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": 10,
    }
    return _bare(folder, DiTTransformer2DModel, DDIMScheduler(clip_sample=False), options | changes)


def sd3(folder: Path, **changes: Any) -> Any:
    """A stranger's SD3 transformer and scheduler. Returns the stock network."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    options: dict[str, Any] = {
        "sample_size": LATENT,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 12,
        "pos_embed_max_size": 12,
    }
    return _bare(folder, SD3Transformer2DModel, FlowMatchEulerDiscreteScheduler(shift=3.0), options | changes)


def flux(folder: Path, **changes: Any) -> Any:
    """A stranger's FLUX.1-dev transformer (guidance is an input) and scheduler. Returns the stock network."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    options: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": 12,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return _bare(folder, FluxTransformer2DModel, scheduler, options | changes)


def _bare(folder: Path, kind: Any, scheduler: Any, options: dict[str, Any]) -> Any:
    """transformer/ and scheduler/ of a pipeline. Layers that begin as zeros are given weights."""
    torch.manual_seed(0)
    net = kind(**options).eval()
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    return net
