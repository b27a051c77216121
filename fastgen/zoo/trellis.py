"""TRELLIS (2412.01506): the facts of the four official folders' json files, and folders of the same layout at any size.

Parameters by role are counted in tests/teachers/trellis. Tiny folders have the same classes, keys and files with few
channels; their encoders are tiny folders of transformers' classes inside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastgen import files
from fastgen.teachers.trellis.folder import PIPELINE
from fastgen.teachers.trellis.models import make

Stem = tuple[str, dict[str, Any]]  # class, args
_FLOW = {"in_channels": 8, "out_channels": 8, "mlp_ratio": 4, "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": True}
_TRUNK = {
    "resolution": 64,
    "model_channels": 768,
    "latent_channels": 8,
    "num_blocks": 12,
    "num_heads": 12,
    "mlp_ratio": 4,
    "attn_mode": "swin",
    "window_size": 8,
    "use_fp16": True,
}
_VAE = {"latent_channels": 8, "num_res_blocks": 2, "num_res_blocks_middle": 2, "use_fp16": True}
GAUSSIANS = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True,
    "voxel_size": 1.5,
    "num_gaussians": 32,
    "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4,
    "scaling_bias": 4e-3,
    "opacity_bias": 0.1,
    "scaling_activation": "softplus",
}
SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1280, 28, 16)}  # channels, blocks, heads


def _size(size: str) -> dict[str, int]:
    return dict(zip(("model_channels", "num_blocks", "num_heads"), SIZES[size], strict=True))


def _structure_flow(size: str, cond: int, **more: Any) -> Stem:
    args = {"resolution": 16, "cond_channels": cond, "patch_size": 1}
    return "SparseStructureFlowModel", _FLOW | args | _size(size) | more


def _latent_flow(size: str, cond: int, width: int = 128, blocks: int = 2) -> Stem:
    args = {"resolution": 64, "cond_channels": cond, "patch_size": 2}
    return "SLatFlowModel", _FLOW | args | _size(size) | {"num_io_res_blocks": blocks, "io_block_channels": [width]}


VAES: dict[str, Stem] = {
    "ckpts/ss_dec_conv3d_16l8_fp16": ("SparseStructureDecoder", _VAE | {"out_channels": 1, "channels": [512, 128, 32]}),
    "ckpts/ss_enc_conv3d_16l8_fp16": ("SparseStructureEncoder", _VAE | {"in_channels": 1, "channels": [32, 128, 512]}),
    "ckpts/slat_enc_swin8_B_64l8_fp16": ("SLatEncoder", _TRUNK | {"in_channels": 1024}),
    "ckpts/slat_dec_gs_swin8_B_64l8gs32_fp16": ("SLatGaussianDecoder", _TRUNK | {"representation_config": GAUSSIANS}),
    "ckpts/slat_dec_rf_swin8_B_64l8r16_fp16": (
        "SLatRadianceFieldDecoder",
        _TRUNK | {"representation_config": {"rank": 16, "dim": 8}},
    ),
    "ckpts/slat_dec_mesh_swin8_B_64l8m256c_fp16": (
        "SLatMeshDecoder",
        _TRUNK | {"representation_config": {"use_color": True}},
    ),
}
_DECODERS = {
    "sparse_structure_decoder": "ckpts/ss_dec_conv3d_16l8_fp16",
    "slat_decoder_gs": "ckpts/slat_dec_gs_swin8_B_64l8gs32_fp16",
    "slat_decoder_rf": "ckpts/slat_dec_rf_swin8_B_64l8r16_fp16",
    "slat_decoder_mesh": "ckpts/slat_dec_mesh_swin8_B_64l8m256c_fp16",
}
FLOWS: dict[str, dict[str, Stem]] = {
    "trellis-image-large": {
        "ckpts/ss_flow_img_dit_L_16l8_fp16": _structure_flow("L", 1024),
        "ckpts/slat_flow_img_dit_L_64l8p2_fp16": _latent_flow("L", 1024),
    },
    "trellis-text-base": {
        "ckpts/ss_flow_txt_dit_B_16l8_fp16": _structure_flow("B", 768),
        "ckpts/slat_flow_txt_dit_B_64l8p2_fp16": _latent_flow("B", 768),
    },
    "trellis-text-large": {
        "ckpts/ss_flow_txt_dit_L_16l8_fp16": _structure_flow("L", 768),
        "ckpts/slat_flow_txt_dit_L_64l8p2_fp16": _latent_flow("L", 768),
    },
    "trellis-text-xlarge": {
        "ckpts/ss_flow_txt_dit_XL_16l8_fp16": _structure_flow("XL", 768, qk_rms_norm_cross=True),
        "ckpts/slat_flow_txt_dit_XL_64l8p2_fp16": _latent_flow("XL", 768, 256, 3),
    },
}
MEAN: tuple[float, ...] = (-2.1687545776367188, -0.004347046371549368, -0.13352349400520325, -0.08418072760105133)
MEAN += (-0.5271206498146057, 0.7238689064979553, -1.1414450407028198, 1.2039363384246826)
STD: tuple[float, ...] = (2.377650737762451, 2.386378288269043, 2.124418020248413, 2.1748552322387695)
STD += (2.663944721221924, 2.371192216873169, 2.6217446327209473, 2.684523105621338)


def pipeline(name: str) -> dict[str, Any]:
    """The pipeline.json of an official folder, the three decoders' stems as in image-large."""
    image = "image" in name
    structure, latent = FLOWS[name]
    params = {"steps": 25, "cfg_strength": 5.0 if image else 7.5, "cfg_interval": [0.5, 1.0 if image else 0.95]}
    sampler = {
        "name": "FlowEulerGuidanceIntervalSampler",
        "args": {"sigma_min": 1e-5},
        "params": {**params, "rescale_t": 3.0},
    }
    encoder = (
        {"image_cond_model": "dinov2_vitl14_reg"} if image else {"text_cond_model": "openai/clip-vit-large-patch14"}
    )
    return {
        "name": f"Trellis{'Image' if image else 'Text'}To3DPipeline",
        "args": {
            "models": {**_DECODERS, "sparse_structure_flow_model": structure, "slat_flow_model": latent},
            "sparse_structure_sampler": sampler,
            "slat_sampler": sampler,
            "slat_normalization": {"mean": list(MEAN), "std": list(STD)},
            **encoder,
        },
    }


def tiny(stem: Stem) -> Stem:
    """The same network with few channels: a structure of 4^3 latents and 16^3 cells, decoders at resolution 16."""
    name, args = stem
    few = {"model_channels": 48, "num_blocks": 2, "num_heads": 2, "cond_channels": 32, "use_fp16": False}
    small: dict[str, Any] = {key: value for key, value in few.items() if key in args}
    if "Structure" in name and "Flow" not in name:
        small |= {"channels": sorted([8, 16, 32], reverse="Decoder" in name), "num_res_blocks": 1}
    elif "Structure" in name:
        small["resolution"] = 4
    else:
        small["resolution"] = 16
    if name == "SLatMeshDecoder":
        small |= {"model_channels": 256, "num_blocks": 1}  # group norms of 32 groups at an eighth of the width
    if "io_block_channels" in args:
        small["io_block_channels"] = [16]
    if name == "SLatEncoder":
        small["in_channels"] = 32
    return name, args | small


def write(folder: Path, name: str, *, seed: int = 0, full: bool = False) -> None:
    """A folder of the official layout with random weights (tiny unless `full`), whole or not at all.

    The structure decoder's last bias is set so that about a twentieth of the cells are filled.
    """
    told = pipeline(name)
    stems = VAES | FLOWS[name]
    files.make_folder(folder.parent)
    with files.atomic_folder(folder) as temporary, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        (temporary / "ckpts").mkdir()
        for stem, described in stems.items():
            kind, args = described if full else tiny(described)
            files.write_json(temporary / f"{stem}.json", {"name": kind, "args": args})
            net = make(kind, args, stem)
            _awaken(net)
            if kind == "SparseStructureDecoder":
                _fill_a_twentieth(net, args)
            tensors = {key: value.contiguous() for key, value in net.state_dict().items()}
            save_file(tensors, temporary / f"{stem}.safetensors")
        if not full:
            told["args"] |= _tiny_encoder(temporary, told)
        files.write_json(temporary / PIPELINE, told)


def _awaken(net: torch.nn.Module) -> None:
    """Fresh networks end in zeros, and would answer 0 to everything."""
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def _fill_a_twentieth(net: Any, args: dict[str, Any]) -> None:
    last, dtype = net.out_layer[2], net.torso_dtype
    samples, side = (1, 16) if args["channels"][0] > 64 else (4, 4)
    net.to_torso(torch.float32)  # a CPU takes minutes for half-precision convolutions
    with torch.no_grad():
        last.bias.zero_()
        logits = net(torch.randn(samples, args["latent_channels"], side, side, side))
        last.bias.fill_(-float(logits.flatten().quantile(0.95)))
    net.to_torso(dtype)


def _tiny_encoder(folder: Path, told: dict[str, Any]) -> dict[str, str]:
    """The entry of pipeline.json for an encoder of 32 channels, which lies in the folder itself."""
    from transformers.utils import logging as quiet

    quiet.disable_progress_bar()
    if told["name"] == "TrellisImageTo3DPipeline":
        from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        config = Dinov2WithRegistersConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
        )
        Dinov2WithRegistersModel(config).save_pretrained(folder / "encoder")
        return {"image_cond_model": "encoder"}
    from transformers import CLIPTextConfig, CLIPTextModel

    from fastgen.zoo.fresh import write_clip_tokenizer

    clip = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    CLIPTextModel(clip).save_pretrained(folder / "encoder")
    write_clip_tokenizer(folder / "encoder")
    return {"text_cond_model": "encoder"}
