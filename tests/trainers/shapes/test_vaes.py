"""Both autoencoders: their losses against closed forms, what they learn in a few steps, their folder."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastgen import files
from fastgen.data.solids import Solid
from fastgen.data.source import Source
from fastgen.errors import UserError
from fastgen.geometry import flexicubes
from fastgen.geometry.mesh import Mesh
from fastgen.sparse import Voxels
from fastgen.stages.shape_vae import LatentNet, StructureNet
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.method import Batch
from fastgen.trainers.shapes import measures
from fastgen.trainers.shapes.autoencoder import Autoencoder
from fastgen.trainers.shapes.bodies import LATTICE, Bodies, fine_corners
from fastgen.trainers.shapes.latent_vae import LatentVAE
from fastgen.trainers.shapes.structure_vae import StructureVAE, dice, divergence

SIDE = 4


def structure():
    torch.manual_seed(0)
    return StructureNet(channels=(8, 16), middle=1).build(SIDE)


def latent():
    torch.manual_seed(0)
    return LatentNet(encoder=32, blocks=1).build(SIDE)


def first_loss(method, bodies):
    batch = Batch(bodies.get(torch.arange(2)), torch.arange(2), seed=0, step=0, steps=1)
    return method.loss(batch)


def test_dice_counts_what_both_share():
    grid = torch.tensor([[1.0, 1, 0, 0]])
    assert float(dice(grid, grid)) == 0 and float(dice(1 - grid, grid)) == 1
    assert math.isclose(float(dice(torch.tensor([[1.0, 0, 1, 1]]), grid)), 1 - 2 / 5, rel_tol=1e-6)


def test_divergence_is_torchs():
    mean, logvar = torch.randn(2, 3), torch.randn(2, 3)
    truth = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).mean()
    assert torch.allclose(divergence(mean, logvar), truth, atol=1e-6)
    assert float(divergence(torch.zeros(2), torch.zeros(2))) == 0


def test_losses_are_their_weighted_parts():
    method = StructureVAE(StructureVAE.Config(kl=0.5), structure())
    total, parts = first_loss(method, Bodies(2, SIDE, "structure", seed=0))
    assert torch.allclose(total, parts["bce"] + parts["dice"] + 0.5 * parts["kl"])
    method = LatentVAE(LatentVAE.Config(kl=0.5, colour=2, flat=3), latent())
    total, parts = first_loss(method, Bodies(2, SIDE, "latent", seed=0))
    assert torch.allclose(total, parts["sdf"] + 2 * parts["colour"] + 3 * parts["flat"] + 0.5 * parts["kl"])
    total.backward()
    assert all(p.grad is not None for p in method.student.parameters())


def test_errors_vanish_for_the_true_distances_and_colours():
    shown = Bodies(2, SIDE, "latent", seed=0).get(torch.arange(2))["x0"]
    method = LatentVAE(LatentVAE.Config(near=1.5), latent())
    truth = 4 * shown.feats[:, :LATTICE][:, fine_corners()].reshape(-1, 8)
    told = shown.feats[:, None, LATTICE:] / 4 + 0.5
    colour = told.expand(-1, 64, -1).reshape(-1, 1, 3).logit().expand(-1, 8, -1)
    rest = torch.zeros(len(truth), 8, 3)  # normals, which nothing is asked of
    flat = torch.zeros(len(truth), 45)
    feats = torch.cat([truth + 1 / (4 * SIDE), flat, torch.cat([colour, rest], 2).flatten(1)], 1)
    assert feats.shape[1] == sum(flexicubes.CHANNELS.values())
    coords = torch.zeros(len(feats), 4, dtype=torch.int32)
    found = method.errors(Voxels(feats, coords, 1), shown)
    assert all(float(value) < 1e-9 for value in found.values())
    feats[:, 0] += 1
    weight = (-truth.abs() / 1.5).exp()
    off = float(method.errors(Voxels(feats, coords, 1), shown)["sdf"])
    assert math.isclose(off, float(weight[:, 0].sum() / weight.sum()), rel_tol=1e-4)


@pytest.mark.parametrize(("part", "steps", "share"), [("structure", 40, 0.6), ("latent", 25, 0.7)])
def test_a_few_steps_lower_the_loss(part, steps, share, tmp_path):
    bodies = Bodies(4, SIDE, part, seed=0)
    method = StructureVAE(StructureVAE.Config(), structure()) if part == "structure" else None
    method = method or LatentVAE(LatentVAE.Config(), latent())
    before = float(first_loss(method, bodies)[0].detach())
    config = LoopConfig(steps=steps, batch=2, optim={"lr": 3e-3}, save_every=steps, preview_every=steps)
    Loop(method, Source(bodies, 0), config, tmp_path).run()
    assert float(first_loss(method, bodies)[0].detach()) < share * before


def test_what_is_measured_of_a_perfect_and_of_an_empty_answer():
    bodies = Bodies(2, SIDE, "structure", seed=0)
    net = structure()
    net.encoder, net.decoder = torch.nn.Identity(), torch.nn.Identity()
    net.weight = torch.nn.Parameter(torch.zeros(1))  # so that it has a device
    net.encoder.forward = lambda x: (2 * x - 1, None)
    assert measures.structures(net, bodies)["iou"] == 1
    net.encoder.forward = lambda x: (1 - 2 * x, None)
    assert measures.structures(net, bodies)["iou"] == 0


def test_a_mesh_without_faces_is_far_from_everything():
    empty = flexicubes.from_features(torch.ones(1, 101), torch.zeros(1, 3, dtype=torch.int32), 16)
    solid = Bodies(1, SIDE, "latent", seed=0).solids[0]
    assert measures.chamfer(solid, empty) == measures.colour_error(solid, empty) == 1


def test_a_colour_is_off_by_the_mean_over_its_channels():
    solid = Solid("box", "small")
    vertices, faces = torch.rand(3, 3), torch.tensor([[0, 1, 2]])
    mesh = Mesh(vertices, faces, torch.tensor(solid.colour) + torch.tensor([0.1, -0.2, 0.0]).expand(3, 3))
    assert math.isclose(measures.colour_error(solid, mesh), 0.1, rel_tol=1e-4)


@pytest.mark.parametrize(("part", "make"), [("structure", structure), ("latent", latent)])
def test_a_folder_holds_both_halves(part, make, tmp_path):
    net = make()
    with files.atomic_folder(tmp_path / "model") as folder:
        net.write(folder, part, {"rows": 3})
    again = Autoencoder.read(tmp_path / "model", part)
    assert again.resolution == SIDE and not any(p.requires_grad for p in again.parameters())
    there = again.state_dict()
    assert all(torch.equal(value, there[key]) for key, value in net.state_dict().items()) and len(there)
    other = {"structure": "latent", "latent": "structure"}[part]
    with pytest.raises(UserError, match=f"the autoencoder of the part '{part}', needed is that of '{other}'"):
        Autoencoder.read(tmp_path / "model", other)


def test_a_damaged_folder_is_told(tmp_path):
    with files.atomic_folder(tmp_path / "model") as folder:
        structure().write(folder, "structure", {})
    with pytest.raises(UserError, match="no such file"):
        Autoencoder.read(tmp_path, "structure")
    description = tmp_path / "model" / "decoder.json"
    files.write_json(description, {**files.read_json(description), "name": "SLatMeshDecoder"})
    with pytest.raises(UserError, match="describes no SparseStructureDecoder"):
        Autoencoder.read(tmp_path / "model", "structure")
