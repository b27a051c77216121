"""Stable Diffusion 1.5, 2.1 and XL: the facts of their published configs (diffusers and transformers names).

Parameters: denoiser 859,520,964 / 865,910,724 / 2,567,463,684; autoencoder 83,653,863; text encoders 123,060,480 /
340,387,840 / 123,060,480 and 694,659,840. tests/test_zoo.py counts them.
"""

from __future__ import annotations

from typing import Any

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "norm_num_groups": 32,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
CLIP_L = TEXT | {  # OpenAI's ViT-L/14
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
CLIP_H = TEXT | {  # OpenCLIP's ViT-H/14 without its last layer
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
CLIP_G = TEXT | {  # OpenCLIP's ViT-bigG/14
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
# name -> the configs of the parts, and what the scheduler predicts.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {
        "unet": UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": VAE | {"sample_size": 512},
        "text_encoder": CLIP_L,
        "scheduler": BETAS | {"prediction_type": "epsilon"},
    },
    "sd21": {
        "unet": UNET
        | {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        "vae": VAE | {"sample_size": 768},
        "text_encoder": CLIP_H,
        "scheduler": BETAS | {"prediction_type": "v_prediction"},
    },
    "sdxl": {
        "unet": UNET
        | {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": CLIP_L,
        "text_encoder_2": CLIP_G,
        "scheduler": BETAS | {"prediction_type": "epsilon"},
    },
}
