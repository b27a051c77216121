"""The released networks, on the meta device: names, counts and dtypes are those of the official files."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from fastgen.errors import UserError
from fastgen.teachers.trellis.folder import LATENT_FLOW, STRUCTURE_FLOW, TrellisFolder
from fastgen.teachers.trellis.models import NETWORKS, make
from fastgen.zoo import trellis
from tests.commands import call
from tests.teachers.trellis.nets import STRUCTURE, TRUNK, half_elements

STEMS = trellis.VAES | {stem: net for flows in trellis.FLOWS.values() for stem, net in flows.items()}
# stem without "ckpts/": parameters, keys of the state dict
COUNTS = {
    "ss_flow_img_dit_L_16l8_fp16": (555_543_560, 489),
    "ss_flow_txt_dit_B_16l8_fp16": (156_726_536, None),
    "ss_flow_txt_dit_L_16l8_fp16": (542_960_648, 489),
    "ss_flow_txt_dit_XL_16l8_fp16": (975_440_648, None),
    "slat_flow_img_dit_L_64l8p2_fp16": (600_432_520, 526),
    "slat_flow_txt_dit_B_64l8p2_fp16": (185_364_616, None),
    "slat_flow_txt_dit_L_64l8p2_fp16": (587_849_608, 526),
    "slat_flow_txt_dit_XL_64l8p2_fp16": (1_073_414_408, None),
    "ss_dec_conv3d_16l8_fp16": (73_671_201, 74),
    "ss_enc_conv3d_16l8_fp16": (59_298_192, None),
    "slat_enc_swin8_B_64l8_fp16": (85_817_104, 100),
    "slat_dec_gs_swin8_B_64l8gs32_fp16": (85_369_024, 101),
    "slat_dec_rf_swin8_B_64l8r16_fp16": (85_369_024, 100),
    "slat_dec_mesh_swin8_B_64l8m256c_fp16": (90_926_693, 120),
}
# Inside these parts all but norms may be half precision.
TORSO = r"(blocks|input_blocks|out_blocks|middle_block|upsample)\."
NORM = r"(.*\.)?(norm\d|[qk]_rms_norm|act_layers\.0|out_layers\.1)\.(weight|bias|gamma)"


def official(name):
    """A released network on the meta device."""
    kind, args = STEMS[f"ckpts/{name}"]
    with torch.device("meta"):
        return make(kind, args, name)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_dtypes(name):
    net, (parameters, keys) = official(name), COUNTS[name]
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert keys is None or len(state) == keys
    assert not any(tensor.device.type != "meta" for tensor in state.values())
    for key, tensor in state.items():
        torso = re.match(TORSO, key) and not re.fullmatch(NORM, key)
        assert tensor.dtype == (torch.float16 if torso else torch.float32), key
    if name == "ss_flow_img_dit_L_16l8_fp16":
        assert half_elements(net) == 554_115_072  # of the released file
    if type(net).__name__ == "SLatFlowModel":
        assert "pos_emb" not in state and tuple(state["input_blocks.0.conv1.conv.weight"].shape[1:4]) == (3, 3, 3)


def write_headers(folder, names):
    """Networks' files of full length, released names, shapes and dtypes, that take no room on the disk."""
    (folder / "ckpts").mkdir(parents=True)
    for name in names:
        kind, args = STEMS[f"ckpts/{name}"]
        (folder / f"ckpts/{name}.json").write_text(json.dumps({"name": kind, "args": args}))
        described, end = {}, 0
        for key, tensor in official(name).state_dict().items():
            size = tensor.numel() * tensor.element_size()
            dtype = {torch.float16: "F16", torch.float32: "F32"}[tensor.dtype]
            described[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
        head = json.dumps(described).encode()
        with (folder / f"ckpts/{name}.safetensors").open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(file.tell() + end)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """As they come: the three decoders of a text folder are stems of image-large."""
    made = tmp_path_factory.mktemp("official")
    for name, flows in trellis.FLOWS.items():
        told = trellis.pipeline(name)
        stems = [*flows, *(trellis.VAES if "image" in name else ())]
        write_headers(made / name, [stem.removeprefix("ckpts/") for stem in stems])
        if "text" in name:
            models = told["args"]["models"]
            models |= {role: f"../trellis-image-large/{stem}" for role, stem in models.items() if stem in trellis.VAES}
            assert sum(stem.startswith("..") for stem in models.values()) == 4
        (made / name / "pipeline.json").write_text(json.dumps(told))
    return made


@pytest.mark.parametrize("name", trellis.FLOWS)
def test_the_four_folders_are_held_against_their_files_headers(folders, name):
    ended = call("inspect", folders / name, "--json")
    assert ended.code == 0, ended.message
    found = json.loads(ended.out)["networks"]
    assert len(found) == 6
    for role, stem in json.loads((folders / name / "pipeline.json").read_text())["args"]["models"].items():
        kind = STEMS[f"ckpts/{stem.split('/')[-1]}"][0]
        assert (found[role]["class"], found[role]["parameters"]) == (kind, COUNTS[stem.split("/")[-1]][0])


def test_the_headers_of_another_size_are_refused(folders, tmp_path):
    base, large = (trellis.FLOWS[f"trellis-text-{size}"] for size in ("base", "large"))
    (structure, latent), (_, other) = base, large
    (tmp_path / "ckpts").mkdir()
    for stem, described, size in ((structure, structure, "base"), (latent, other, "large")):
        shutil.copy(folders / f"trellis-text-{size}" / f"{described}.json", tmp_path / f"{stem}.json")
        (tmp_path / f"{stem}.safetensors").symlink_to(folders / "trellis-text-base" / f"{stem}.safetensors")
    shutil.copy(folders / "trellis-text-base" / "pipeline.json", tmp_path)
    folder = TrellisFolder.read(tmp_path)
    assert folder.checked(STRUCTURE_FLOW).torso_dtype == torch.float16
    with pytest.raises(UserError, match=rf"{latent}\.safetensors: ") as refusal:
        folder.checked(LATENT_FLOW)
    assert "\n" not in str(refusal.value)


def test_every_published_network_is_counted():
    assert {stem.removeprefix("ckpts/") for stem in STEMS} == COUNTS.keys()


def test_keys_of_a_flow_of_each_stage():
    dense = official("ss_flow_img_dit_L_16l8_fp16").state_dict()
    sparse = official("slat_flow_img_dit_L_64l8p2_fp16").state_dict()
    assert dense["pos_emb"].shape == (4096, 1024)
    block = {key.removeprefix("blocks.23.") for key in dense if key.startswith("blocks.23.")}
    both = [f"{layer}.{part}" for layer in ("to_qkv", "to_q", "to_kv", "to_out") for part in ("weight", "bias")]
    assert block == {
        *(f"self_attn.{key}" for key in both if "to_q." not in key and "to_kv" not in key),
        *(f"cross_attn.{key}" for key in both if "to_qkv" not in key),
        *(f"self_attn.{which}_rms_norm.gamma" for which in "qk"),
        *(
            f"{layer}.{part}"
            for layer in ("norm2", "mlp.mlp.0", "mlp.mlp.2", "adaLN_modulation.1")
            for part in ("weight", "bias")
        ),
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in sparse.items()}
    assert shapes["input_blocks.1.conv1.conv.weight"] == (1024, 3, 3, 3, 128)
    assert shapes["input_blocks.1.skip_connection.weight"] == (1024, 128)
    assert shapes["out_blocks.1.conv1.conv.weight"] == (128, 3, 3, 3, 256)
    assert shapes["out_blocks.1.emb_layers.1.weight"] == (256, 1024)


def test_a_shared_modulation_stands_outside_the_blocks():
    net = make("SparseStructureFlowModel", STRUCTURE | {"share_mod": True, "use_fp16": True}, "here")
    keys = [key for key in net.state_dict() if "adaLN" in key]
    assert keys == ["adaLN_modulation.1.weight", "adaLN_modulation.1.bias"]
    assert net.adaLN_modulation[1].weight.dtype == torch.float32 and net.torso_dtype == torch.float16


def test_the_mesh_decoders_skips_are_convolutions():
    state = official("slat_dec_mesh_swin8_B_64l8m256c_fp16").state_dict()
    for i, (channels, out) in enumerate([(768, 192), (192, 96)]):
        assert state[f"upsample.{i}.skip_connection.conv.weight"].shape == (out, 1, 1, 1, channels)
        assert state[f"upsample.{i}.act_layers.0.weight"].shape == (channels,)
        assert state[f"upsample.{i}.out_layers.3.conv.weight"].shape == (out, 3, 3, 3, out)


def test_elastic_names_are_aliases():
    for name in ("SparseStructureFlowModel", "SLatFlowModel"):
        made = make(f"Elastic{name}", STRUCTURE | {"io_block_channels": None} if "SLat" in name else STRUCTURE, "here")
        assert type(made) is NETWORKS[name]


FLOWS = ("SparseStructureFlowModel", "SLatFlowModel")
SLAT = STRUCTURE | {"patch_size": 2, "io_block_channels": [8]}
REFUSED = [
    ("SLatFlow", SLAT, "no TRELLIS network is called 'SLatFlow' (did you mean 'SLatFlowModel'?)"),
    (FLOWS[0], STRUCTURE | {"num_block": 3}, "unknown key 'num_block' (did you mean 'num_blocks'?)"),
    (FLOWS[1], SLAT | {"share_mod": True}, "share_mod=true with io_block_channels"),
    (FLOWS[0], STRUCTURE | {"pe_mode": "rope"}, "'pe_mode': rotary positions are used by no released checkpoint"),
    (FLOWS[1], SLAT | {"pe_mode": "rope"}, "'pe_mode': rotary positions are used by no released checkpoint"),
    (FLOWS[1], SLAT | {"io_block_channels": [8, 16]}, "io_block_channels has 2 stages"),
    (FLOWS[1], SLAT | {"patch_size": 1}, "patch_size=1: one stage of io_block_channels means patch_size=2"),
    (FLOWS[0], STRUCTURE | {"patch_size": 3}, "resolution=4 is no multiple of patch_size=3"),
    (FLOWS[0], STRUCTURE | {"num_heads": 5}, "model_channels=24 is no multiple of 5 heads"),
    (FLOWS[0], {k: v for k, v in STRUCTURE.items() if k != "resolution"}, "'resolution' is missing"),
    *(
        ("SLatEncoder", TRUNK | {"in_channels": 4, "attn_mode": mode}, "'attn_mode': needs the CUDA extension vox2seq")
        for mode in ("shift_window", "shift_sequence", "shift_order")
    ),
    ("SLatEncoder", TRUNK | {"in_channels": 4, "attn_mode": "swim"}, "'attn_mode': not one of full, swin"),
    (
        "SLatMeshDecoder",
        TRUNK | {"representation_config": {"use_color": True, "use_colour": True}},
        "unknown key 'representation_config.use_colour' (did you mean 'use_color'?)",
    ),
    ("SLatMeshDecoder", TRUNK | {"representation_config": {"use_color": False}}, "'representation_config.use_color'"),
    (
        "SparseStructureDecoder",
        dict(latent_channels=8, num_res_blocks=2, out_channels=1, channels=[8], norm_type="group"),
        "'norm_type'",
    ),
]


@pytest.mark.parametrize(("kind", "args", "told"), REFUSED)
def test_what_cannot_be_is_refused_in_one_line(kind, args, told):
    with pytest.raises(UserError) as refusal:
        make(kind, args, "flow.json")
    message = str(refusal.value)
    assert told in message and message.startswith("flow.json: ") and "\n" not in message
