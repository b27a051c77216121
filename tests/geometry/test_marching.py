"""Marching cubes as a check on FlexiCubes: the same surface by another algorithm of another library."""

from __future__ import annotations

import pytest
import torch

from fastgen.errors import UserError
from fastgen.eval.meshes import compare
from fastgen.geometry import flexicubes, marching
from fastgen.geometry.flexicubes_table import CORNERS
from tests.geometry import shapes

pytest.importorskip("skimage", reason="scikit-image is not installed")


@pytest.mark.parametrize("solid", ["sphere", "torus"])
def test_both_find_the_same_surface(solid):
    sdf = getattr(shapes, solid)(shapes.corners(20))
    one, other = flexicubes.from_sdf(sdf), marching.marching_cubes(sdf)
    assert shapes.watertight(other) and shapes.euler(other) == shapes.euler(one) == (0 if solid == "torus" else 2)
    assert other.volume > 0
    rows = compare(one, other, points=6000, taus=())
    assert (rows["CD-L1"].value - rows["CD-L1"].floor) * 20 < 0.15 and rows["normal consistency"].value > 0.97


def decoder_features(resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the mesh decoder would say of a sphere: voxels around its surface, colours by place, a deformation."""
    at = shapes.corners(resolution)
    sdf = shapes.sphere(at) + 1 / resolution
    axis = torch.arange(resolution)
    cubes = torch.cartesian_prod(axis, axis, axis)
    places = tuple((cubes[:, None] + torch.tensor(CORNERS)).unbind(-1))
    near = (sdf[places].abs() < 2 / resolution).any(1)
    places = tuple(p[near] for p in places)
    deform = 0.3 * torch.sin(9 * at)[places].flatten(1)
    colour = torch.cat([4 * at, -2 * at], -1)[places].flatten(1)
    weights = torch.zeros(int(near.sum()), 21)
    return torch.cat([sdf[places], deform, weights, colour], 1), cubes[near]


def test_features_give_the_same_surface_and_colours():
    feats, coords = decoder_features(16)
    # The band is hollow: beyond its inner rim all counts as outside, so each has a second surface within.
    one, other = flexicubes.from_features(feats, coords, 16), marching.from_features(feats, coords, 16)
    assert shapes.watertight(other) and other.volume > 0
    rows = compare(one, other, points=6000, taus=())
    assert (rows["CD-L1"].value - rows["CD-L1"].floor) * 16 < 0.25
    assert one.colours is not None and other.colours is not None and other.normals is not None
    match = torch.cdist(one.vertices, other.vertices).argmin(1)
    assert (one.colours - other.colours[match]).abs().mean() < 0.04
    outer = other.vertices.norm(dim=1) > 0.3
    expected = torch.sigmoid(4 * other.vertices[outer])
    assert (other.colours[outer] - expected).abs().max() < 0.05


def test_no_surface_is_one_line():
    with pytest.raises(UserError, match="no surface in the distances: a mesh with no faces"):
        marching.marching_cubes(torch.ones(4, 4, 4))
    with pytest.raises(UserError, match=r"no surface in the distances on 4\^3 points"):
        flexicubes.from_sdf(torch.ones(4, 4, 4))
