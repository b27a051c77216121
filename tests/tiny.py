"""Tiny checkpoints of the real classes, with seeded random weights: what a user's folder looks like, in megabytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

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
