"""FlexiCubes: the generated table, closed surfaces, and sparse extraction against a dense one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastgen.errors import UserError
from fastgen.geometry import flexicubes
from fastgen.geometry.flexicubes_table import CORNERS, EDGES, edge_axes, table
from fastgen.geometry.mesh import Mesh, check
from tests.geometry import shapes
from tests.goldens.surfaces import triangles


def test_the_table_has_the_published_counts():
    tables = table()
    assert tables.count.bincount().tolist() == [2, 162, 82, 8, 2]
    assert int(tables.problematic.sum()) == 36
    for case in range(256):
        active = [(case >> a & 1) != (case >> b & 1) for a, b in EDGES]
        assert (tables.group[case] >= 0).tolist() == active
        sizes = torch.bincount(tables.group[case][tables.group[case] >= 0], minlength=int(tables.count[case]))
        assert len(sizes) == tables.count[case] and all(3 <= n <= 7 for n in sizes)


def test_a_problematic_case_points_through_its_ambiguous_face():
    tables = table()
    for case in range(256):
        normal = tables.direction[case]
        assert bool(normal.any()) == bool(tables.problematic[case])
        if normal.any():
            face = [k for k in range(8) if (torch.tensor(CORNERS[k]) * 2 - 1) @ normal > 0]
            inside = [k for k in face if case >> k & 1]
            assert len(inside) == 2 and sum(CORNERS[inside[0]][a] != CORNERS[inside[1]][a] for a in range(3)) == 2


def test_edges_know_their_axis_and_lower_end():
    for (a, b), axis, low in zip(EDGES, *edge_axes(), strict=True):
        assert CORNERS[a][axis] != CORNERS[b][axis]
        assert low in (a, b) and CORNERS[low][axis] == 0


def test_a_sphere_is_closed_and_wound_outwards():
    mesh = shapes.surface(shapes.sphere(shapes.corners(10)), weights=3)
    assert shapes.watertight(mesh) and shapes.euler(mesh) == 2
    assert (len(mesh.vertices), len(mesh.faces)) == (224, 444)
    assert mesh.volume > 0
    plain = shapes.surface(shapes.sphere(shapes.corners(10)))
    assert ((plain.face_normals * plain.triangles.mean(1)).sum(1) > 0).all()
    assert abs(plain.volume / (4 / 3 * torch.pi * 0.33**3) - 1) < 0.12  # dual vertices lie within


def test_a_torus_has_a_hole():
    mesh = shapes.surface(shapes.torus(shapes.corners(20)), weights=5)
    assert shapes.watertight(mesh) and shapes.euler(mesh) == 0 and mesh.volume > 0


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_closed(seed):
    """With every ambiguous neighbourhood in it: without the correction of problematic cases edges have four faces."""
    sdf = shapes.noise(9, seed)
    assert shapes.watertight(shapes.surface(sdf, weights=seed + 1))
    assert shapes.watertight(Mesh(*_centred(sdf)))


def _centred(sdf):
    found = flexicubes.extract(shapes.grid(sdf, weights=2), centres=True)
    return found.vertices, found.faces


def test_zeros_on_the_grid_are_outside():
    """An sdf of exactly 0 at corners: the surface goes through them and stays closed and wound outwards."""
    mesh = shapes.surface((shapes.corners(8).abs().amax(-1) * 8).round() - 2.0)
    assert shapes.watertight(mesh)
    assert torch.allclose(mesh.vertices.abs().amax(0), torch.full((3,), 0.25)) and mesh.volume > 0


def test_the_order_and_the_number_of_cubes_do_not_matter():
    """Only the cubes that the surface meets, shuffled: the same surface as from all of them."""
    sdf = shapes.noise(8, 7)
    whole = shapes.grid(sdf, weights=4, attributes=torch.rand(9**3, 6, generator=torch.Generator().manual_seed(0)))
    inside = (whole.sdf < 0)[whole.corners]
    met = (inside.any(1) & ~inside.all(1)).nonzero()[:, 0]
    part = whole.select(met[torch.randperm(len(met), generator=torch.Generator().manual_seed(1))])
    one, other = flexicubes.extract(whole), flexicubes.extract(part)
    assert len(met) < len(whole.cubes)
    for field in dataclasses.fields(one):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name))


def test_an_edge_is_cut_where_the_weighted_distances_say():
    """One corner inside: three edges, their crossings and mean worked out by hand."""
    sdf = torch.ones(2, 2, 2)
    sdf[0, 0, 0] = -1.0
    grid = shapes.grid(sdf)
    alpha, beta = grid.alpha.clone(), grid.beta.clone()
    alpha[0, 0] = 3.0  # crossings move to 3/4 of each edge, away from the heavy corner
    beta[0, 0] = 2.0  # edge 0 runs along x from corner 0
    found = flexicubes.extract(dataclasses.replace(grid, alpha=alpha, beta=beta, attributes=sdf.reshape(-1, 1)))
    assert torch.allclose(found.vertices, torch.tensor([[2 * 0.75, 0.75, 0.75]]) / 4 - 0.5)
    assert torch.allclose(found.attributes, torch.tensor([[0.5]]))
    assert len(found.faces) == 0  # no edge has four cubes


def test_a_quad_is_cut_along_the_heavier_diagonal():
    """Two by two by two cubes, the middle corner inside: six quads. A heavy cube draws the cuts of its quads to it."""
    sdf = torch.ones(3, 3, 3)
    sdf[1, 1, 1] = -1.0
    grid = shapes.grid(sdf)
    gamma = grid.gamma.clone()
    gamma[0] = 0.9  # the cube at the origin, whose vertex is part of three quads
    found = flexicubes.extract(dataclasses.replace(grid, gamma=gamma))
    uses = torch.bincount(found.faces.flatten())
    assert len(found.faces) == 12 and uses[0] == 6  # two triangles of each
    gamma[0] = 0.1
    light = flexicubes.extract(dataclasses.replace(grid, gamma=gamma))
    assert torch.bincount(light.faces.flatten())[0] == 3
    assert shapes.watertight(Mesh(found.vertices, found.faces)) and shapes.watertight(Mesh(light.vertices, light.faces))


def test_centres_lie_between_the_diagonals_as_gamma_says():
    sdf = torch.ones(3, 3, 3)
    sdf[1, 1, 1] = -1.0
    grid = shapes.grid(sdf)
    gamma = grid.gamma.clone()
    gamma[0] = 1.0
    positions = grid.positions + 0.1 * grid.positions[:, [1, 2, 0]] ** 2
    found = flexicubes.extract(dataclasses.replace(grid, gamma=gamma, positions=positions), centres=True)
    assert found.vertices.shape == (14, 3) and found.faces.shape == (24, 3)
    mesh = Mesh(found.vertices, found.faces)
    assert shapes.watertight(mesh) and mesh.volume > 0
    centre = next(c for c in range(8, 14) if 0 in found.faces[(found.faces == c).any(1)])
    ring = found.faces[(found.faces == centre).any(1)]
    corners = sorted(set(ring.flatten().tolist()) - {centre})
    # The other end of vertex 0's diagonal shares no triangle with it.
    beside = set(ring[(ring == 0).any(1)].flatten().tolist())
    (across,) = set(corners) - beside
    sides = [c for c in corners if c not in (0, across)]
    own, other = (found.vertices[pair].mean(0) for pair in ([0, across], sides))
    assert torch.allclose(found.vertices[centre], (own * 0.5 + other * 0.25) / 0.75, atol=1e-6)


def test_vertices_have_the_derivatives_of_finite_differences():
    sdf = (shapes.sphere(shapes.corners(3), 0.3)).double().flatten().requires_grad_()
    base = shapes.grid(shapes.sphere(shapes.corners(3), 0.3), weights=2)
    parts = {name: getattr(base, name).double() for name in ("positions", "beta", "alpha", "gamma")}
    inputs = (sdf, *(v.requires_grad_() for v in parts.values()))

    def run(sdf, *values):
        grid = dataclasses.replace(base, sdf=sdf, **dict(zip(parts, values, strict=True)))
        found = flexicubes.extract(grid, centres=True)
        return found.vertices, found.deviation

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


# --- features of the mesh decoder


def features(resolution, seed, share=0.3):
    """Random voxels with random features: disagreeing corners, open rims, voxels at the faces of the grid."""
    generator = torch.Generator().manual_seed(seed)
    coords = (torch.rand(*(resolution,) * 3, generator=generator) < share).nonzero()
    return torch.randn(len(coords), 101, generator=generator) * 1.5, coords


def dense(feats, coords, resolution):
    """Section by section on whole arrays, one voxel and one corner at a time."""
    size = resolution + 1
    total, count = torch.zeros(size, size, size, 10, dtype=torch.float64), torch.zeros(size, size, size)
    weights = torch.zeros(resolution, resolution, resolution, 21)
    for row, place in zip(feats, coords.tolist(), strict=True):
        weights[tuple(place)] = row[32:53]
        for k, offset in enumerate(CORNERS):
            at = tuple(p + o for p, o in zip(place, offset, strict=True))
            own = [row[k : k + 1] - 1 / resolution, row[8 + 3 * k : 11 + 3 * k], row[53 + 6 * k : 59 + 6 * k]]
            total[at] += torch.cat(own)
            count[at] += 1
    mean = (total / count.clamp(min=1)[..., None]).float()
    sdf = torch.where(count > 0, mean[..., 0], 1.0)
    rows = weights.reshape(-1, 21)
    index = torch.cartesian_prod(*(torch.arange(size),) * 3)
    return dataclasses.replace(
        shapes.grid(sdf),
        positions=flexicubes.deformed(index, mean[..., 1:4].reshape(-1, 3), resolution),
        attributes=mean[..., 4:].reshape(-1, 6).sigmoid(),
        **dict(
            zip(("beta", "alpha", "gamma"), flexicubes.activate(rows[:, :12], rows[:, 12:20], rows[:, 20]), strict=True)
        ),
    )


@pytest.mark.parametrize(("seed", "share"), [(0, 0.3), (1, 0.05), (2, 0.8), (3, 1.0)])
def test_sparse_extraction_is_the_dense_one(seed, share):
    feats, coords = features(7, seed, share)
    mesh, whole = flexicubes.from_features(feats, coords, 7), flexicubes.extract(dense(feats, coords, 7))
    assert mesh.colours is not None and mesh.normals is not None and len(mesh.vertices) == len(whole.vertices)
    found = torch.cat([mesh.vertices, mesh.colours, mesh.normals], 1).double()
    expected = torch.cat([whole.vertices, whole.attributes], 1).double()
    distance, match = torch.cdist(found, expected).min(1)
    assert len(match.unique()) == len(match) and distance.max() < 1e-6
    assert triangles(match[mesh.faces]) == triangles(whole.faces)


def test_half_precision_and_the_order_of_voxels_change_nothing_but_rounding():
    feats, coords = features(6, 5)
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(0))
    half = feats.half()
    one = flexicubes.from_features(half.float(), coords, 6)
    other = flexicubes.from_features(half[order], coords[order].int(), 6)
    assert torch.allclose(one.vertices, other.vertices, atol=1e-6) and torch.equal(one.faces, other.faces)
    assert other.vertices.dtype == torch.float32


def test_no_surface_is_a_mesh_without_faces():
    feats, coords = features(4, 0)
    feats[:, :8] = 1.0
    for empty in (
        flexicubes.from_features(feats, coords, 4),
        flexicubes.from_features(torch.zeros(0, 101), torch.zeros(0, 3, dtype=torch.int32), 4),
    ):
        assert empty.faces.shape == empty.vertices.shape == (0, 3) and empty.colours is not None
        with pytest.raises(UserError, match="a mesh with no faces"):
            check(empty)
    with pytest.raises(ValueError, match="101"):
        flexicubes.from_features(torch.zeros(2, 100), torch.zeros(2, 3), 4)
