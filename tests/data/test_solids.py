from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial import cKDTree

from fastgen.data import solids as made
from fastgen.data.solids import SHIFT, SIZES, STEP, Solid, conditions, solids, surface
from fastgen.eval.meshes import soundness
from fastgen.geometry.voxelise import surface_voxels
from fastgen.noise import uniform

AWRY = (0.05, -0.03, 0.06)


def somewhere(n: int, seed: int = 0) -> torch.Tensor:
    return uniform(seed, "test", torch.arange(n), (3,)) - 0.5


def one_of_each(axis: int = 1) -> list[Solid]:
    return [Solid(kind, size, axis, AWRY) for kind, size in conditions()]


def test_known_distances():
    for axis in range(3):
        along, aside, other = (torch.eye(3)[(axis + i) % 3] for i in range(3))
        centre = torch.tensor(AWRY)

        def at(kind: str, offset: torch.Tensor, size: str = "large", where: int = axis) -> float:
            return Solid(kind, size, where, AWRY).distance(torch.tensor(AWRY) + offset).item()

        assert at("sphere", 0.5 * aside) == pytest.approx(0.5 - 0.33, abs=1e-6)
        assert at("torus", 0 * along) == pytest.approx(0.26 - 0.105, abs=1e-6)
        assert at("torus", 0.26 * aside) == pytest.approx(-0.105, abs=1e-6)
        assert at("torus", 0.3 * along + 0.26 * other) == pytest.approx(0.3 - 0.105, abs=1e-6)
        assert at("capsule", 0.4 * along) == pytest.approx(0.04, abs=1e-6)
        assert at("capsule", 0.22 * along + 0.2 * aside) == pytest.approx(0.06, abs=1e-6)
        assert at("box", 0.37 * along) == pytest.approx(0.01, abs=1e-6)
        assert at("box", 0.18 * aside) == pytest.approx(0, abs=1e-6)
        assert at("box", 0.26 * other) == pytest.approx(0, abs=1e-6)
        corner = 0.36 * along + 0.18 * aside + 0.26 * other
        assert at("box", corner + 0.1 * (along + aside + other)) == pytest.approx(0.1 * math.sqrt(3), abs=1e-6)
        assert at("union", 0.4 * along) == pytest.approx(0.06, abs=1e-6)
        assert at("union", -0.4 * along) == pytest.approx(0.06, abs=1e-6)
        assert at("union", -0.2 * along + 0.26 * aside) == pytest.approx(0, abs=1e-6)
        assert at("sphere", 0 * centre, "small") == pytest.approx(-0.33 / STEP**2, abs=1e-6)


@pytest.mark.parametrize("kind", made.KINDS)
def test_distances_against_the_nearest_of_many_points(kind):
    solid = Solid(kind, "medium", 2, AWRY)
    points, cloud = somewhere(2000), solid.points(40_000)
    nearest = torch.from_numpy(cKDTree(cloud.numpy()).query(points.numpy())[0]).float()
    distance = solid.distance(points)
    exact = distance > 0 if kind == "union" else torch.ones(len(points), dtype=torch.bool)
    # The nearest of n points lies within about sqrt(area / n) of the foot, which matters near the surface alone.
    assert ((nearest - distance.abs())[exact] >= -1e-5).all()
    assert (nearest - distance.abs())[exact].max() < 0.015
    assert (nearest >= distance.abs() - 1e-5).all()  # within a union too: a bound


@pytest.mark.parametrize("kind", made.KINDS)
def test_the_gradient_has_length_one(kind):
    solid = Solid(kind, "large", 0, AWRY)
    points = somewhere(2000).double().requires_grad_()
    (slope,) = torch.autograd.grad(solid.distance(points).sum(), points)
    assert (slope.norm(dim=1) - 1).abs().max() < 1e-5


def test_points_lie_on_the_surface_uniformly_by_area():
    for solid in one_of_each(axis=0):
        points = solid.points(3000)
        assert points.shape == (3000, 3) and points.dtype == torch.float32
        assert solid.distance(points).abs().max() < 1e-6
        assert not torch.equal(points, solid.points(3000, draw=1))
        assert torch.equal(points, solid.points(3000))
    # Second moments against those of the triangles: a density that is off shows there.
    for solid in one_of_each(axis=1)[2::3]:
        mesh, points = made.mesh(solid, 96), solid.points(40_000)
        centres, areas = mesh.triangles.mean(1), mesh.areas[:, None]
        assert torch.allclose(points.mean(0), (centres * areas).sum(0) / areas.sum(), atol=0.005)
        spread = (((centres - points.mean(0)) ** 2) * areas).sum(0) / areas.sum()
        assert torch.allclose(points.var(0), spread, rtol=0.03), solid


@pytest.mark.parametrize("resolution", (16, 32))
def test_surface_voxels_are_those_of_the_mesh_and_clear_of_the_walls(resolution):
    for solid in one_of_each()[:: resolution // 8 - 1]:
        found = surface(solid, resolution)
        assert found.dtype == torch.int32 and len(found) > 50
        assert found.min() >= 1 and found.max() <= resolution - 2
        if resolution == 16:
            assert torch.equal(found, surface_voxels(made.mesh(solid, 4 * resolution), resolution))


def test_every_pose_keeps_a_voxel_clear():
    far = [(x, y, z) for x in (-SHIFT, SHIFT) for y in (-SHIFT, SHIFT) for z in (-SHIFT, SHIFT)]
    for kind in made.KINDS:
        for axis in range(3):
            for centre in far:
                assert Solid(kind, "large", axis, centre).points(2000).abs().max() < 0.5 - 1 / 16


def test_meshes_are_closed_with_the_right_holes_and_volumes():
    volumes = {
        "sphere": 4 / 3 * math.pi * 0.33**3,
        "box": 8 * 0.18 * 0.26 * 0.36,
        "torus": 2 * math.pi**2 * 0.26 * 0.105**2,
        "capsule": math.pi * 0.14**2 * (2 * 0.22 + 4 / 3 * 0.14),
    }
    for solid in one_of_each()[::2]:
        mesh = made.mesh(solid, 64)
        sound = soundness(mesh)
        assert sound.watertight and sound.wound and sound.parts == 1, solid
        assert sound.euler == (0 if solid.kind == "torus" else 2), solid
        assert mesh.colours is not None and mesh.colours[0].tolist() == pytest.approx(solid.colour)
        if solid.kind in volumes:
            wanted = volumes[solid.kind] * STEP ** (3 * (SIZES.index(solid.size) - 2))
            assert sound.volume == pytest.approx(wanted, rel=0.03), solid


def test_a_solid_is_a_function_of_row_and_seed():
    rows = torch.arange(400)
    whole = solids(rows, seed=3)
    assert solids(torch.tensor([17, 2]), seed=3) == [whole[17], whole[2]]
    assert sum(a == b for a, b in zip(whole, solids(rows, seed=4), strict=True)) == 0
    assert len(set(whole)) == 400
    assert {(solid.kind, solid.size) for solid in whole} == set(conditions()) and len(conditions()) == 15
    assert {solid.axis for solid in whole} == {0, 1, 2}
    assert max(abs(x) for solid in whole for x in solid.centre) <= SHIFT
    assert Solid("torus", "large").text == "a large torus"
