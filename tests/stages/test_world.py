"""Both autoencoders of a world of solids, and the folder that is made of them, at sizes that train in a second."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fastgen import files
from fastgen.data.shapes import LatentShapes
from fastgen.data.solids import KINDS, SIZES, conditions, solids
from fastgen.errors import RunFailed, Stopped, UserError
from fastgen.samplers import flow_euler
from fastgen.sparse import Voxels
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from fastgen.stages.world import TextNet, told_apart, write_text_encoder
from fastgen.teachers.trellis.conditions import TextEncoder
from fastgen.teachers.trellis.folder import DECODERS, STRUCTURE_DECODER, TrellisFolder
from fastgen.trainers.shapes.autoencoder import Autoencoder
from fastgen.trainers.shapes.bodies import Bodies
from tests.commands import refused, tree_bytes, write_config
from tests.crash import dies_at

LOOP = {"steps": 4, "batch": 2, "save_every": 2, "preview_every": 4, "log_every": 2, "optim": {"lr": 2.0e-3}}
VAE = {"stage": "shape_vae", "resolution": 4, "rows": 6, "held_out": 2, "loop": LOOP}
STRUCTURE = {"name": "s", **VAE, "part": "structure", "net": {"channels": [8, 16], "middle": 1}}
LATENT = {"name": "l", **VAE, "part": "latent", "net": {"encoder": 32, "blocks": 0}}
FLOW = {"channels": 24, "blocks": 1, "heads": 2}
FLOWS = {"structure_flow": {**FLOW, "patch": 2}, "latent_flow": {**FLOW, "io": 8}}
WORLD = {"name": "w", "stage": "world", "structure": "s", "latent": "l", "rows": 10, **FLOWS}
SEED = 7


def go(out, *stages, resume=False, interrupt=None):
    tree = {"out": str(out), "device": "cpu", "seed": SEED, "stages": list(stages)}
    out.with_suffix(".yaml").write_text(json.dumps(tree))
    run, made = load_run(out.with_suffix(".yaml"), [])
    execute(run, made, Context(run, out, "cpu", interrupt=interrupt or (lambda: False)), resume=resume)
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return go(tmp_path_factory.mktemp("worlds") / "run", STRUCTURE, LATENT, WORLD)


def record(out, name):
    return json.loads((out / name / "stage.json").read_text())


def test_the_records_tell_what_the_autoencoders_give_back(world):
    structure, latent = record(world, "s")["facts"], record(world, "l")["facts"]
    assert 0 <= structure["iou_worst"] <= structure["iou"] < 1 and len(structure["std"]) == 8
    assert 0 < latent["chamfer"] <= latent["chamfer_worst"] and 0 <= latent["closed"] <= 1
    assert structure["held_out"] == 2 and structure["rows"] == 6 and structure["seed"] == SEED


def test_the_world_is_a_text_folder_that_makes_meshes(world):
    folder = TrellisFolder.read(world / "w" / "model")
    assert folder.condition == "text" and folder.structure.params["steps"] == 25
    cond = {"text": TextEncoder(folder.encoder).encode(["a large torus"])}
    flow = folder.flow("structure")
    settings = flow_euler.FlowEuler(steps=2)
    structure = flow_euler.sample(flow, torch.randn(1, *flow.shape), settings, cond)
    assert torch.isfinite(folder.network(STRUCTURE_DECODER)(structure)).all()
    coords = torch.cartesian_prod(torch.zeros(1), *[torch.arange(4.0)] * 3).int()
    flow = folder.flow("latent")
    latent = flow_euler.sample(flow, Voxels(torch.randn(64, 8), coords, 1), settings, cond)
    decoder = folder.network(DECODERS["mesh"])
    assert decoder(latent).feats.shape == (64 * 64, 101)


def test_the_latents_are_what_the_encoders_make_of_the_first_solids(world):
    folder = TrellisFolder.read(world / "w" / "model")
    shapes = LatentShapes(folder.path / "latents", mean=folder.mean, std=folder.std)
    assert len(shapes) == 10 and shapes.manifest.resolution == 4 and shapes.manifest.conditions == 1
    found = shapes.get([3, 8])
    nets = {
        part: Autoencoder.read(world / name / "model", part) for part, name in (("structure", "s"), ("latent", "l"))
    }
    for part, net in nets.items():
        shown = Bodies(10, 4, part, seed=SEED).get(torch.tensor([3, 8]))["x0"]
        mean = net.encoder(shown)[0]
        if part == "structure":
            assert torch.allclose(found[part], mean, atol=1e-5)
        else:
            assert torch.equal(found[part].coords, mean.coords)
            assert torch.allclose(shapes.decodable(found[part]).feats, mean.feats, atol=1e-4)
    everything = shapes.get(range(10))["latent"].feats
    assert torch.allclose(everything.mean(0), torch.zeros(8), atol=1e-4)
    assert torch.allclose(everything.std(0), torch.ones(8), atol=1e-4)


def test_each_solid_comes_with_its_text(world):
    folder = TrellisFolder.read(world / "w" / "model")
    shapes = LatentShapes(folder.path / "latents", mean=folder.mean, std=folder.std)
    texts = [solid.text for solid in solids(torch.arange(10), seed=SEED)]
    assert len(set(texts)) > 3
    encoder = TextEncoder(folder.encoder)
    told = shapes.condition(torch.arange(10), torch.zeros(10, dtype=torch.long))
    assert torch.allclose(told, encoder.encode(texts), atol=2e-3)
    assert torch.allclose(shapes.empty, encoder.empty, atol=2e-3)


def test_a_word_is_a_token_that_tells_the_solid(world):
    encoder = TextEncoder(TrellisFolder.read(world / "w" / "model").encoder)
    for kind, size in conditions():
        assert encoder.parts[0].tokenize(f"a {size} {kind}") == ["a</w>", f"{size}</w>", f"{kind}</w>"]
    sizes = encoder.encode([f"a {size} torus" for size in SIZES])[:, 2]
    kinds = encoder.encode([f"a large {kind}" for kind in KINDS])[:, 3]
    for words in (sizes, kinds):
        assert torch.cdist(words, words).add(torch.eye(len(words)) * 99).min() > 0.5 * words.norm(dim=1).mean()


def test_a_patch_that_does_not_fit_the_structures_grid_is_refused(world, tmp_path):
    vaes = {name: str(world / name[0] / "model") for name in ("structure", "latent")}
    with pytest.raises(UserError, match=r"structure_flow.*resolution=2 is no multiple of patch_size=3"):
        go(tmp_path / "run", {**WORLD, **vaes, "structure_flow": {**FLOW, "patch": 3}})
    assert not (tmp_path / "run" / "w" / "model").exists()


def test_a_run_that_was_stopped_ends_with_the_same_weights(world, tmp_path):
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        go(tmp_path / "run", STRUCTURE, interrupt=lambda: next(asked, False))
    assert not (tmp_path / "run" / "s" / "model").exists()
    go(tmp_path / "run", STRUCTURE, resume=True)
    for half in ("encoder", "decoder"):
        there, here = (files.sha256(out / "s" / "model" / f"{half}.safetensors") for out in (world, tmp_path / "run"))
        assert there == here


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_no_half_a_folder_and_the_same_end(world, tmp_path):
    vaes = {part: str(world / part[0] / "model") for part in ("structure", "latent")}
    stage = {**WORLD, **vaes, "rows": 2}
    whole = tree_bytes(go(tmp_path / "whole", stage) / "w/model")
    for instant in range(200):
        out = tmp_path / str(instant)
        died = dies_at(instant, lambda out=out: go(out, stage))
        if (out / "w/model").exists():
            assert tree_bytes(out / "w/model") == whole
        go(out, stage, resume=(out / "config.yaml").exists())
        assert tree_bytes(out / "w/model") == whole
        assert {path.name for path in (out / "w").glob("[!.]*")} == {"begun.json", "stage.json", "model"}
        shutil.rmtree(out)
        if not died:
            break
    assert instant > 10 and not died


def test_an_autoencoder_that_diverges_is_not_written(tmp_path):
    wild = {**LOOP, "optim": {"lr": 1.0e30}, "clip": None, "bad_limit": 2}
    with pytest.raises(RunFailed, match="not finite"):
        go(tmp_path / "run", {**STRUCTURE, "loop": wild})
    assert not (tmp_path / "run" / "s" / "model").exists()


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({**STRUCTURE, "net": {"channels": [8, 16], "decoder": 256}}, "unknown key 'decoder'"),
        ({**LATENT, "net": {"decoder": 128}}, "'net': 'decoder': input should be a multiple of 256"),
        ({**STRUCTURE, "method": {"near": 1.0}}, "unknown key 'near'"),
        ({**STRUCTURE, "resolution": 6, "net": {"channels": [8, 16, 16]}}, "resolution=6 cannot be halved 2 times"),
        ({**STRUCTURE, "part": "mesh"}, "'part': input should be 'structure' or 'latent'"),
        ({**WORLD, "latent_flow": {"channels": 25, "heads": 2}}, "channels=25 is no multiple of 2 heads"),
        ({**WORLD, "text": {"width": 9}}, "width=9 is no multiple of 2 heads"),
        ({**WORLD, "rows": 1}, "'rows': input should be greater than or equal to 2"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_runs(stage, expected, tmp_path):
    message = refused(tmp_path / "run", "distill", write_config(tmp_path / "c.yaml", {"stages": [stage]}))
    assert expected in message


def test_autoencoders_that_do_not_fit_are_told(world, tmp_path):
    s, latent = (str(world / name / "model") for name in ("s", "l"))
    swapped = write_config(tmp_path / "a.yaml", {"stages": [{**WORLD, "structure": latent, "latent": s}]})
    message = refused(tmp_path / "run", "distill", swapped)
    assert "the autoencoder of the part 'latent', needed is that of 'structure'" in message
    other = shutil.copytree(s, tmp_path / "other")
    files.write_json(other / "autoencoder.json", {"format": 1, "part": "structure", "resolution": 8})
    with pytest.raises(UserError, match=r"other is for 8\^3 voxels, latent=.* on 4\^3"):
        go(tmp_path / "run", {**WORLD, "structure": str(other), "latent": latent})


def test_texts_that_cannot_be_told_apart_are_refused(tmp_path):
    write_text_encoder(tmp_path / "text", TextNet())
    encoder = TextEncoder(str(tmp_path / "text"))
    assert len(told_apart(encoder)) == 16
    with torch.no_grad():
        encoder.parts[1].get_input_embeddings().weight.mul_(1e-4)
    with pytest.raises(UserError, match="two texts' encodings differ by"):
        told_apart(encoder)
