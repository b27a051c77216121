from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from scipy.spatial import cKDTree

from fastgen.data import solids as made
from fastgen.data.solids import Solid, conditions, solids
from fastgen.eval.meshes import compare
from fastgen.eval.solids import NOTHING, Judge, Verdict, by_kind, gap_closed, iou, summary
from fastgen.geometry.mesh import Mesh

AWRY = (0.05, -0.03, 0.06)


@cache
def judge() -> Judge:
    return Judge()


def test_true_solids_in_any_pose_are_near_and_look_like_themselves():
    for solid in solids(torch.arange(20), seed=1):
        verdict = judge().verdict(made.mesh(solid, 64), (solid.kind, solid.size))
        assert verdict.chamfer < 0.007 and verdict.right and verdict.right_kind, solid


def test_a_wrong_kind_or_size_is_caught_and_told_apart():
    mesh = made.mesh(Solid("torus", "large", 1, AWRY), 64)
    right, small, other = (
        judge().verdict(mesh, asked) for asked in (("torus", "large"), ("torus", "medium"), ("box", "large"))
    )
    assert right.right and not small.right and small.right_kind and not other.right_kind
    assert {right.looks, small.looks, other.looks} == {("torus", "large")}
    assert right.chamfer < 0.006 < 0.04 < small.chamfer and other.chamfer > 0.04


def test_every_two_conditions_are_further_apart_than_the_floor():
    for kind, size in conditions():
        mesh = made.mesh(Solid(kind, size, 0, AWRY), 48)
        assert judge().verdict(mesh, (kind, size)).right
        at_kind, at_size = conditions()[0], (kind, "small" if size != "small" else "large")
        for asked in {at_kind, at_size} - {(kind, size)}:
            assert judge().verdict(mesh, asked).chamfer > 0.02


def test_the_distance_is_that_of_two_drawings_but_for_their_floor():
    ball, box = Solid("sphere", "large"), Solid("box", "large", 2)
    verdict = judge().verdict(made.mesh(box, 64), ("sphere", "large"))
    drawn = compare(made.mesh(box, 64), made.mesh(ball, 64), points=20_000)["CD-L1"]
    assert drawn.floor is not None
    assert drawn.value - drawn.floor < verdict.chamfer < drawn.value + 0.004


def test_a_shift_costs_nothing_and_a_swelling_what_it_swells():
    mesh = made.mesh(Solid("sphere", "medium"), 64)
    moved = replace(mesh, vertices=mesh.vertices + torch.tensor([0.1, -0.2, 0.05]))
    plain, shifted = (judge().verdict(one, ("sphere", "medium")).chamfer for one in (mesh, moved))
    assert shifted == pytest.approx(plain, abs=1e-5)
    swollen = replace(mesh, vertices=mesh.vertices * (1 + 0.03 / (0.33 / made.STEP)))
    assert judge().verdict(swollen, ("sphere", "medium")).chamfer == pytest.approx(0.03, abs=0.003)


def test_half_of_a_solid_is_further_away():
    mesh = made.mesh(Solid("capsule", "large", 0), 64)
    half = mesh.subset(mesh.triangles[:, :, 0].amax(1) < 0.02)
    assert judge().verdict(half, ("capsule", "large")).chamfer > 5 * judge().verdict(mesh, ("capsule", "large")).chamfer


@pytest.mark.parametrize("kind", ("none", "no faces", "no area", "nan"))
def test_no_surface_counts_one(kind):
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    mesh = {
        "none": None,
        "no faces": Mesh(corners, torch.zeros(0, 3, dtype=torch.long)),
        "no area": Mesh(corners, torch.tensor([[0, 1, 2]])),
        "nan": Mesh(corners * torch.tensor([1, math.nan, 1]), torch.tensor([[0, 1, 2]])),
    }[kind]
    verdict = judge().verdict(mesh, ("box", "small"))
    assert verdict == Verdict(("box", "small"), NOTHING, None)
    assert not verdict.right and not verdict.right_kind


def test_ruling_out_by_bounds_finds_the_nearest_of_all():
    mesh = made.mesh(Solid("union", "small", 1, AWRY), 48)
    verdict = judge().verdict(mesh, ("sphere", "large"))
    points = torch.stack([mesh.vertices[:, i] - mesh.vertices[:, i].mean() for i in range(3)], 1).double()
    tree = cKDTree(points.numpy())
    rough = {
        one.solid: float(one.solid.distance(points).abs().mean() + tree.query(one.marks.numpy())[0].mean()) / 2
        for one in judge().templates
    }
    nearest = min(rough, key=lambda solid: rough[solid])
    assert verdict.looks == (nearest.kind, nearest.size)
    assert verdict.chamfer == pytest.approx(rough[Solid("sphere", "large", 2)], rel=0.05)


def test_summaries():
    verdicts = [
        Verdict(("box", "small"), 0.1, ("box", "small")),
        Verdict(("box", "large"), 0.3, ("box", "small")),
        Verdict(("torus", "large"), 0.2, ("box", "small")),
        Verdict(("torus", "large"), 1.0, None),
    ]
    assert summary(verdicts) == {"chamfer": pytest.approx(0.4), "kind_and_size": 0.25, "kind": 0.5, "empty": 1}
    assert by_kind(verdicts)["torus"] == {"chamfer": pytest.approx(0.6), "kind_and_size": 0, "kind": 0, "empty": 1}
    assert by_kind(verdicts)["box"]["chamfer"] == pytest.approx(0.2)


def test_iou_and_gaps():
    one = torch.zeros(3, 4, 4, 4, dtype=torch.bool)
    one[0, :2] = True
    other = one.clone()
    other[0, 1] = False
    other[1, 0, 0, 0] = True
    assert iou(one, other).tolist() == [0.5, 0.0, 1.0]
    assert gap_closed(0.4, 0.1) == pytest.approx(0.75)
    assert gap_closed(0.4, 0.1, 0.2) == pytest.approx(1.5)
    assert gap_closed(0.2, 0.1, 0.2) is None
