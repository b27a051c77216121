"""What the autoencoders are shown, held against the solids: a mesh extracted from the true distances is the solid."""

from __future__ import annotations

import pytest
import torch

from fastgen.data.solids import KINDS, Solid, surface
from fastgen.geometry import flexicubes
from fastgen.geometry.mesh import is_closed
from fastgen.sparse import Voxels
from fastgen.sparse.spatial import subdivide
from fastgen.trainers.shapes.bodies import CHANNELS, LATTICE, Bodies, body, fine_corners, lattice
from fastgen.trainers.shapes.measures import chamfer

CENTRE = (0.03, -0.02, 0.01)


def ideal(solid, resolution):
    """The mesh decoder's output if it gave back the distances exactly: [64 N, 101] at fine coordinates [64 N, 3]."""
    coords, distances = body(solid, resolution)
    fine = subdivide(subdivide(Voxels(distances, torch.nn.functional.pad(coords, (1, 0)), 1)))
    sdf = 4 * distances[:, fine_corners()].reshape(-1, 8) + 1 / (4 * resolution)
    return torch.cat([sdf, torch.zeros(len(sdf), 93)], dim=1), fine.coords[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
def test_true_distances_in_the_decoders_order_are_the_solid(kind):
    solid = Solid(kind, "medium", 1, CENTRE)
    mesh = flexicubes.from_features(*ideal(solid, 16), 64)
    assert is_closed(mesh)
    assert mesh.volume > 0
    # In fine voxels; FlexiCubes cuts edges and corners of boxes by a part of one.
    assert float(solid.distance(mesh.vertices).abs().max()) * 64 < 0.5
    assert float(solid.distance(mesh.vertices).abs().mean()) * 64 < 0.1
    assert chamfer(solid, mesh) * 16 < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_is_the_surface_and_all_that_it_encloses(kind):
    solid = Solid(kind, "large", 0, CENTRE)
    coords, distances = body(solid, 16)
    assert torch.equal(distances, lattice(solid, coords, 16)) and distances.shape == (len(coords), LATTICE)
    full = torch.zeros(16, 16, 16, dtype=torch.bool)
    full[tuple(coords.long().T)] = True
    assert full[tuple(surface(solid, 16).long().T)].all()
    everywhere = torch.cartesian_prod(*[torch.arange(16)] * 3).int()
    assert torch.equal(full.flatten(), (lattice(solid, everywhere, 16) < 0).any(1))
    inner = full.clone()
    inner[tuple(surface(solid, 16).long().T)] = False
    assert inner.any() and (lattice(solid, inner.nonzero(), 16) < 0).all()


def test_a_lattice_is_measured_in_voxels_from_its_voxels_corner():
    solid = Solid("sphere", "large")
    found = lattice(solid, torch.tensor([[3, 8, 8]]), 16).reshape(5, 5, 5)
    line = torch.arange(5) / 64 + 3 / 16 - 0.5
    assert torch.allclose(found[:, 0, 0], (line.abs() - 0.33) * 16, atol=1e-4)
    assert found[0, 1, 2] != found[0, 2, 2] and found[0, 1, 2] == found[0, 2, 1]


def test_solids_are_counted_on_from_the_first():
    few, more = Bodies(2, 8, "latent", seed=3, first=5), Bodies(7, 8, "latent", seed=3)
    assert few.solids == more.solids[5:]
    shown, again = few.get(torch.tensor([1, 0]))["x0"], more.get(torch.tensor([6, 5]))["x0"]
    assert torch.equal(shown.feats, again.feats) and torch.equal(shown.coords, again.coords)
    assert shown.shape == (2, CHANNELS) and shown.lengths.tolist() == [len(c) for c in reversed(few.coords)]
    assert torch.allclose(shown.feats[0, LATTICE:] / 4 + 0.5, torch.tensor(few.solids[1].colour))  # 0..1 as -2..2


def test_a_grid_is_full_where_its_solid_has_voxels():
    bodies = Bodies(3, 8, "structure", seed=3)
    grids = bodies.get(torch.tensor([2, 0]))["x0"]
    assert grids.shape == (2, 1, 8, 8, 8) and set(grids.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(grids[0, 0].nonzero().int(), bodies.coords[2])
