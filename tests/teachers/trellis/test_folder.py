"""Official folders: what they say, where stems lie, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.errors import UserError
from fastgen.teachers.trellis import PIPELINE, recognises
from fastgen.teachers.trellis.folder import (
    DECODERS,
    LATENT_FLOW,
    ROLES,
    STRUCTURE_DECODER,
    STRUCTURE_FLOW,
    TrellisFolder,
)
from fastgen.zoo import trellis

FLOW = "ckpts/ss_flow_img_dit_L_16l8_fp16"
LATENT = "ckpts/slat_flow_img_dit_L_64l8p2_fp16"


def edit(folder, change):
    told = json.loads((folder / PIPELINE).read_text())
    change(told["args"])
    (folder / PIPELINE).write_text(json.dumps(told))


def mistake(act):
    with pytest.raises(UserError) as told:
        act()
    assert "\n" not in str(told.value)
    return str(told.value)


def test_what_a_folder_says(image_folder, text_folder):
    image, text = TrellisFolder.read(image_folder), TrellisFolder.read(text_folder)
    assert (image.condition, text.condition) == ("image", "text")
    assert recognises(image_folder) and not recognises(image_folder / "ckpts")
    assert image.structure.params == {"steps": 25, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0}
    assert text.latent.params["cfg_interval"] == [0.5, 0.95] and text.latent.args.sigma_min == 1e-5
    assert image.mean == trellis.MEAN and image.std == trellis.STD and len(image.mean) == 8
    assert image.encoder == str(image_folder / "encoder")  # a folder inside goes by its name alone


def test_every_role_is_read_with_all_its_weights_and_no_gradient(image_folder):
    folder = TrellisFolder.read(image_folder)
    for role in ROLES:
        net = folder.network(role)
        assert type(net).__name__ == ROLES[role] and not net.training
        assert not any(p.requires_grad or p.is_meta for p in net.parameters())
        stored = load_file(folder.files(role)[1])
        assert stored.keys() == net.state_dict().keys()
        assert all(torch.equal(stored[key], value) for key, value in net.state_dict().items())
        assert {key: tuple(value.shape) for key, value in folder.checked(role).state_dict().items()} == {
            key: tuple(value.shape) for key, value in stored.items()
        }


def test_half_precision_files_are_widened_unless_the_torso_is_half(copy):
    file = copy / f"{FLOW}.safetensors"
    stored = load_file(file)
    halved = {
        key: value.half() if key.startswith("blocks.") and "norm" not in key else value for key, value in stored.items()
    }
    save_file(halved, file)
    folder = TrellisFolder.read(copy)
    wide, half = (folder.network(STRUCTURE_FLOW, torso=dtype) for dtype in (torch.float32, torch.float16))
    key = "blocks.0.mlp.mlp.0.weight"
    assert wide.state_dict()[key].dtype == torch.float32 and torch.equal(wide.state_dict()[key], halved[key].float())
    assert half.state_dict()[key].dtype == torch.float16 and torch.equal(half.state_dict()[key], halved[key])
    assert half.state_dict()["out_layer.weight"].dtype == torch.float32


def test_a_stem_may_lie_elsewhere(copy, tmp_path):
    """As the decoders of the text folders do."""
    away = tmp_path / "other" / "ckpts"
    away.mkdir(parents=True)
    for ending in ("json", "safetensors"):
        shutil.move(copy / f"{FLOW}.{ending}", away / f"flow.{ending}")
    for stem in (str(away / "flow"), "../other/ckpts/flow"):
        edit(copy, lambda args, stem=stem: args["models"].update({STRUCTURE_FLOW: stem}))
        assert TrellisFolder.read(copy).structure_flow().shape == (8, 4, 4, 4)


def test_an_elastic_class_is_the_plain_one(copy):
    file = copy / f"{LATENT}.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "name": f"Elastic{told['name']}"}))
    assert type(TrellisFolder.read(copy).network(LATENT_FLOW)).__name__ == "SLatFlowModel"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda args: args["models"].pop(STRUCTURE_DECODER), "no stem for sparse_structure_decoder"),
        (lambda args: args["slat_normalization"].update(std=[1.0]), "mean and std need the same number"),
        (lambda args: args["slat_normalization"].update(std=[0.0] * 8), "std positive"),
        (lambda args: args.pop("slat_sampler"), "'args.slat_sampler' is missing"),
        (lambda args: args.update(modells={}), "unknown key 'args.modells'"),
        (lambda args: args["slat_sampler"]["args"].update(sigma_min=2), "args.slat_sampler.args.sigma_min"),
    ],
)
def test_what_is_wrong_with_a_description(copy, change, expected):
    edit(copy, change)
    message = mistake(lambda: TrellisFolder.read(copy))
    assert expected in message and PIPELINE in message


def test_foreign_descriptions(copy):
    (copy / PIPELINE).write_text('{"name": "StableDiffusionPipeline", "args": {}}')
    assert not recognises(copy) and "args.models" in mistake(lambda: TrellisFolder.read(copy))
    (copy / PIPELINE).write_text("[]")
    assert not recognises(copy) and "not the description of a pipeline" in mistake(lambda: TrellisFolder.read(copy))
    (copy / PIPELINE).write_text("{")
    assert not recognises(copy) and str(copy / PIPELINE) in mistake(lambda: TrellisFolder.read(copy))


def test_missing_stems_and_files(copy, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (copy / f"{FLOW}.safetensors").unlink()
    folder = TrellisFolder.read(copy)
    assert f"{FLOW}.safetensors: missing, and its .json is there" in mistake(folder.structure_flow)
    (copy / f"{FLOW}.json").unlink()
    assert f"{FLOW}.json: no such file, for the role {STRUCTURE_FLOW}" in mistake(folder.structure_flow)
    edit(copy, lambda args: args["models"].update({STRUCTURE_FLOW: "someone/trellis/ckpts/flow"}))
    message = mistake(TrellisFolder.read(copy).structure_flow)
    assert "someone/trellis/ckpts/flow.json: neither a path here nor to be had from the hub" in message
    assert "names no slat_encoder" in mistake(lambda: folder.network("slat_encoder"))


def test_a_class_in_the_wrong_place(copy):
    edit(copy, lambda args: args["models"].update({LATENT_FLOW: FLOW}))
    message = mistake(TrellisFolder.read(copy).latent_flow)
    assert "a SparseStructureFlowModel stands for the role slat_flow_model, which needs a SLatFlowModel" in message


def test_weights_of_another_network(copy):
    file = copy / f"{LATENT}.safetensors"
    stored = load_file(file)
    save_file({key: value for key, value in stored.items() if key != "out_layer.bias"}, file)
    folder = TrellisFolder.read(copy)
    for act in (folder.latent_flow, lambda: folder.checked(LATENT_FLOW)):
        assert "no tensor 'out_layer.bias'" in mistake(act)
    save_file(stored | {"head.weight": torch.zeros(1)}, file)
    assert "tensor 'head.weight' has no place" in mistake(folder.latent_flow)
    save_file(stored | {"out_layer.bias": torch.zeros(9)}, file)
    assert "tensor 'out_layer.bias' is (9,), the network's (8,)" in mistake(folder.latent_flow)
    file.write_bytes(file.read_bytes()[:1000])
    assert str(file) in mistake(folder.latent_flow)


def test_a_decoder_that_is_not_named(copy):
    edit(copy, lambda args: args["models"].pop(DECODERS["mesh"]))
    assert "names no slat_decoder_mesh" in mistake(lambda: TrellisFolder.read(copy).network(DECODERS["mesh"]))
