"""Names of the exported tensors: the single-file layout and the two of LoRA files, against what stock loaders make."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as stock
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

from fastgen.errors import UserError
from fastgen.nets.lora import LoraConfig, add_lora, lora_settings, lora_tensors
from fastgen.paths import VP, Prediction
from fastgen.samplers.export import ldm
from fastgen.samplers.export.lora_keys import kohya, lora_file, peft
from fastgen.teachers.stable_diffusion import StableDiffusionDenoiser
from fastgen.zoo.fresh import network
from fastgen.zoo.stable_diffusion import ARCHITECTURES
from tests import tiny

META = torch.device("meta")
# SD 1.5's published file holds 1,145 tensors: besides weights CLIP's position ids, twelve tables of the noise schedule
# and two numbers of the moving average. Of the others parts are counted: U-Net, VAE, layers of text encoders.
COUNTS = {"sd15": 1145 - (1 + 12 + 2), "sd21": 686 + 248 + 12 * 23 + 4, "sdxl": 2513}


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def full(request) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A published architecture on the meta device: its name, tensors by part, configs, and its single file."""
    configs = {part: config for part, config in ARCHITECTURES[request.param].items() if part != "scheduler"}
    nets = {part: network(part, config, META) for part, config in configs.items()}
    known = {part: dict(net.config) if part in ("unet", "vae") else configs[part] for part, net in nets.items()}
    tensors = {part: net.state_dict() for part, net in nets.items()}
    return request.param, tensors, known, ldm.single_file(tensors, known)


def test_every_tensor_of_a_full_size_checkpoint_has_a_name(full):
    """One to one, but for query, key and value of OpenCLIP's layers, which are one tensor there."""
    name, tensors, configs, found = full
    count = sum(len(part) for part in tensors.values())
    fused = {"sd15": None, "sd21": "text_encoder", "sdxl": "text_encoder_2"}[name]
    layers = configs[fused]["num_hidden_layers"] if fused else 0
    assert len(found) == count - 4 * layers
    elements = sum(tensor.numel() for part in tensors.values() for tensor in part.values())
    assert sum(tensor.numel() for tensor in found.values()) == elements


def test_as_many_tensors_as_the_published_architectures(full):
    """SD 2.1's published file also holds the text encoder's last layer, which no pipeline uses and no folder keeps."""
    name, _, _, found = full
    assert len(found) == COUNTS[name]


def test_stock_diffusers_knows_the_family_by_the_names(full):
    name, _, _, found = full
    assert stock.infer_diffusers_model_type(found) == {"sd15": "v1", "sd21": "v2", "sdxl": "xl_base"}[name]


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_stock_diffusers_reads_the_same_tensors_back(full, part):
    _, tensors, configs, found = full
    convert = {"unet": stock.convert_ldm_unet_checkpoint, "vae": stock.convert_ldm_vae_checkpoint}[part]
    back = convert(dict(found), configs[part])
    assert back.keys() == tensors[part].keys()
    assert all(back[name].shape == tensors[part][name].shape for name in back)
    if part == "unet":  # the very tensors, so no two of one shape are exchanged
        assert all(back[name] is tensors[part][name] for name in back)


def test_some_names_as_they_are_in_the_published_files(full):
    """Read off published key lists, since the way back could hide a name that both sides get wrong."""
    name, _, _, found = full
    unet = {
        "time_embed.0.weight": (1280, 320),
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": None,
        "out.2.bias": (4,),
    }
    more = {
        "sd15": {
            "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.11.1.proj_out.weight": (320, 320, 1, 1),
            "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        },
        "sd21": {
            "model.diffusion_model.output_blocks.8.2.conv.weight": (640, 640, 3, 3),
            "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
            "cond_stage_model.model.positional_embedding": (77, 1024),
        },
        "sdxl": {
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
            "conditioner.embedders.1.model.text_projection": (1280, 1280),
            "conditioner.embedders.1.model.ln_final.bias": (1280,),
        },
    }[name]
    vae = {
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "quant_conv.weight": (8, 8, 1, 1),
    }
    shapes = {f"model.diffusion_model.{key}": shape for key, shape in unet.items()} | more
    shapes |= {f"first_stage_model.{key}": shape for key, shape in vae.items()}
    for key, shape in shapes.items():
        assert key in found and (shape is None or tuple(found[key].shape) == shape), key


def test_open_clip_holds_query_key_and_value_in_order():
    text = tiny.text_encoder(projection=True)
    tensors = text.state_dict()
    found = ldm.open_clip(tensors, "x.")
    layer = {ldm.bare(name): tensor for name, tensor in tensors.items()}
    for kind in ("weight", "bias"):
        parts = [layer[f"encoder.layers.1.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        torch.testing.assert_close(found[f"x.model.transformer.resblocks.1.attn.in_proj_{kind}"], torch.cat(parts))
    torch.testing.assert_close(found["x.model.text_projection"], tensors["text_projection.weight"].T)


def test_the_names_of_text_encoders_do_not_depend_on_transformers_version():
    tensors = {"embeddings.token_embedding.weight": torch.zeros(1)}
    older = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    assert ldm.clip(tensors, "c.").keys() == ldm.clip(older, "c.").keys()
    assert set(ldm.clip(older, "c.")) == {"c.transformer.text_model.embeddings.token_embedding.weight"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_cond_proj_dim": 8}, "no place for time_embedding.cond_proj"),
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "no place for AttnDownBlock2D"),
    ],
)
def test_networks_that_the_layout_cannot_hold(changes, message):
    config = {**tiny.unet().config, **changes}
    with pytest.raises(ValueError, match=message):
        ldm.single_file({"unet": {"conv_in.bias": torch.zeros(1)}, "vae": {}}, {"unet": config, "vae": {}})


def test_a_tensor_without_a_name_is_an_error():
    with pytest.raises(KeyError, match=r"mid_block\.new"):
        ldm.unet({"mid_block.new.weight": torch.zeros(1)}, tiny.unet().config)


@pytest.fixture(scope="module")
def adapted() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every layer that LCM-LoRA adapts, rank 4, alpha 2."""
    torch.manual_seed(0)
    bare = StableDiffusionDenoiser(tiny.unet(), VP(), Prediction(kind="eps"), shape=(4, tiny.LATENT, tiny.LATENT))
    denoiser = add_lora(bare, LoraConfig(rank=4, alpha=2), seed=0)
    for tensor in lora_tensors(denoiser).values():
        tensor.normal_()
    return lora_tensors(denoiser), lora_settings(denoiser)


def test_kohya_names_every_layer_once_and_stock_reads_them_back(adapted):
    tensors, settings = adapted
    found, metadata = kohya(tensors, settings)
    assert len(found) == len(tensors) * 3 // 2 and metadata["ss_network_alpha"] == "2"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert found[f"{name}.lora_down.weight"] is tensors[f"{layer}.lora_A.weight"]
    assert found[f"{name}.lora_up.weight"] is tensors[f"{layer}.lora_B.weight"]
    assert {key.split(".", 1)[1] for key in found} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(float(tensor) == 2 and tensor.ndim == 0 for key, tensor in found.items() if key.endswith(".alpha"))
    back, alphas = _convert_non_diffusers_lora_to_diffusers(dict(found))
    assert len(back) == len(tensors) and set(alphas.values()) == {2.0}
    by_data = {tensor.data_ptr() for tensor in tensors.values()}
    assert {tensor.data_ptr() for tensor in back.values()} == by_data


def test_peft_carries_alpha_in_the_weights(adapted):
    """A reader that takes alpha for the rank adds what one that knows alpha adds: (2 / 4) B A."""
    tensors, settings = adapted
    found, metadata = peft(tensors, settings)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor if "lora_A" in name else 0.5 * tensor)
    told = json.loads(metadata["lora_adapter_metadata"])
    assert told["unet.r"] == told["unet.lora_alpha"] == 4
    assert len(told["unet.target_modules"]) == len(tensors) // 2


@pytest.mark.parametrize(
    "name", ["unet.base_model.model.conv_in.lora_A.weight", "conv_in.lora_A.weight", "unet.conv_in.lora_down.weight"]
)
@pytest.mark.parametrize("convention", [kohya, peft])
def test_prefixes_that_no_reader_knows_are_errors(name, convention):
    with pytest.raises(ValueError, match="no tensor of a U-Net's adapter"):
        convention({name: torch.zeros(1)}, {"rank": 1, "alpha": 1.0})


def test_half_an_adapter_and_names_that_collide_are_errors(adapted):
    tensors, settings = adapted
    half = dict(list(tensors.items())[1:])
    with pytest.raises(ValueError, match="one half"):
        kohya(half, settings)
    two = {f"unet.{path}.lora_{half}.weight": torch.zeros(1) for path in ("a.b", "a_b") for half in "AB"}
    with pytest.raises(ValueError, match="two layers"):
        kohya(two, settings)
    with pytest.raises(UserError, match="--keys koya: no such convention \\(did you mean 'kohya'"):
        lora_file(tensors, settings, "koya")  # type: ignore[arg-type]
