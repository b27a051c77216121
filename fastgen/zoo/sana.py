"""SANA 0.6B and 1.6B at 1024 pixels: the facts of their published configs (diffusers and transformers names).

Parameters: transformer 591,747,872 / 1,604,462,752; autoencoder (DC-AE f32c32) 312,250,275; text encoder (Gemma 2 2B)
2,614,341,888. tests/test_zoo.py counts them. "sana" is the 0.6B with a dense time and QK-norm: what `prepare` makes,
and what SANA-Sprint's students (2503.09641) begin from.
"""

from __future__ import annotations

from typing import Any

TRANSFORMER: dict[str, Any] = {
    "_class_name": "SanaTransformer2DModel",
    "in_channels": 32,
    "out_channels": 32,
    "attention_head_dim": 32,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "patch_size": 1,
}
SMALL = TRANSFORMER | {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
LARGE = TRANSFORMER | {
    "num_layers": 20,
    "num_attention_heads": 70,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
}
_BLOCKS, _SCALES = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3, [[], [], [], [5], [5], [5]]
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderDC",
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": _BLOCKS,
    "decoder_block_types": _BLOCKS,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": _SCALES,
    "decoder_qkv_multiscales": _SCALES,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
GEMMA: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
}
PREPARED = {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001}
_PARTS: dict[str, Any] = {"vae": VAE, "text_encoder": GEMMA, "scheduler": SCHEDULER}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sana": {"transformer": SMALL | PREPARED, **_PARTS},
    "sana-0.6b": {"transformer": SMALL, **_PARTS},
    "sana-1.6b": {"transformer": LARGE, **_PARTS},
}


def shrunk(configs: dict[str, Any]) -> dict[str, Any]:
    """The same configs with few channels, layers and pixels: 64 x 64."""
    few = {
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 32,
        "sample_size": 2,
    }
    layers = {f"{half}_layers_per_block": [1] * 6 for half in ("encoder", "decoder")}
    channels = {f"{half}_block_out_channels": [8] * 3 + [16, 32, 32] for half in ("encoder", "decoder")}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16, "vocab_size": 512}
    return configs | {
        "transformer": configs["transformer"] | few,
        "vae": configs["vae"] | layers | channels | {"attention_head_dim": 8},
        "text_encoder": configs["text_encoder"] | text,
    }
