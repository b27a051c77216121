"""TRELLIS's flows as denoisers: their pair, their conditions, guidance in one call, derivatives along the path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgen.errors import UserError
from fastgen.jvp import JvpConfig, value_and_tangent
from fastgen.layout import expand, halves, twice
from fastgen.paths import RectifiedFlow, TrigFlow
from fastgen.sparse import Voxels
from fastgen.teacher import Teacher
from fastgen.teachers.trellis.flows import FlowDenoiser, LatentDenoiser, StructureDenoiser
from tests.teachers.trellis.nets import normal, small, told, voxels

S = 1e-5
TIMES = torch.tensor([0.9, 0.13], dtype=torch.float64)


def structure(**options: Any) -> StructureDenoiser:
    return StructureDenoiser(small("SparseStructureFlowModel"), **options)


def latent(**options: Any) -> LatentDenoiser:
    return LatentDenoiser(small("SLatFlowModel"), **options)


CASES = [(structure, normal(2, 3, 4, 4, 4)), (latent, voxels(3))]


def feats(x: Any) -> torch.Tensor:
    return x.feats if isinstance(x, Voxels) else x


@pytest.mark.parametrize(("make", "x"), CASES)
def test_the_pair_is_that_of_the_published_formulas(make, x):
    """x0 = (1 - s) x - sigma(t) v, eps = (1 - t) v + x, sigma(t) = s + (1 - s) t; the network is told 1000 t."""
    denoiser, cond = make(), {"image": told()[1]}
    pair = denoiser(x, TIMES, cond)
    v = denoiser.net(x, 1000 * TIMES, cond["image"])
    sigma = S + (1 - S) * TIMES
    for found, expected in (
        (pair.x0, (1 - S) * x - expand(sigma, x) * v),
        (pair.eps, expand(1 - TIMES, x) * v + x),
    ):
        torch.testing.assert_close(feats(found), feats(expected), rtol=1e-12, atol=1e-12)
    assert denoiser.path == RectifiedFlow(sigma_min=S)


def test_shapes_are_of_one_sample():
    assert structure().shape == (3, 4, 4, 4) and latent().shape == (3,)
    assert structure().embedding_width == 24 and len(latent().blocks) == 2


@pytest.mark.parametrize(("make", "x"), CASES)
def test_a_second_time_starts_as_nothing_and_can_be_told(make, x):
    denoiser, cond = make(), {"image": told()[1]}
    before = feats(denoiser(x, TIMES, cond).x0)
    denoiser.add_gap()
    denoiser.double()
    torch.testing.assert_close(feats(denoiser(x, TIMES, cond, r=0 * TIMES).x0), before, rtol=0, atol=0)
    torch.nn.init.ones_(denoiser.extra["gap"].outer.weight)
    assert not torch.equal(feats(denoiser(x, TIMES, cond, r=0 * TIMES).x0), before)


@pytest.mark.parametrize(("make", "x"), CASES)
def test_guidance_is_one_call_of_both_conditions(make, x):
    """u + (1 + w) (c - u) = (1 + w) c - w u with zeros as the null condition."""
    denoiser, cond, rows = make(), {"image": told()[1]}, []
    teacher = Teacher(denoiser)
    denoiser.net.register_forward_pre_hook(lambda _net, args: rows.append(len(args[1])))
    found = teacher(x, TIMES, cond, guidance=1 + 5.0)
    assert rows == [4]
    with torch.no_grad():
        conditional, null = denoiser(x, TIMES, cond), denoiser(x, TIMES, {"image": torch.zeros_like(cond["image"])})
    expected = 6 * conditional.x0 - 5 * null.x0
    torch.testing.assert_close(feats(found.x0), feats(expected), rtol=1e-9, atol=1e-9)
    assert teacher(x, TIMES, cond, guidance=1.0) and rows[-1] == 2  # conditional alone: one evaluation


def test_a_batch_twice_keeps_its_sites():
    x = voxels(3)
    both = twice(x)
    assert twice(x).sites is both.sites and both.batch == 4
    again, other = halves(both.with_feats(torch.cat([x.feats, 2 * x.feats])), x)
    assert again.sites is other.sites is x.sites
    assert torch.equal(again.feats, x.feats) and torch.equal(other.feats, 2 * x.feats)
    for i in range(2):
        assert torch.equal(both[2 + i].coords, x[i].coords) and torch.equal(both[2 + i].feats, x[i].feats)
    dense = normal(2, 3)
    assert all(torch.equal(half, dense) for half in halves(twice(dense), dense))


def test_zeros_of_any_length_are_the_same_null_condition():
    denoiser, x = structure(), normal(2, 3, 4, 4, 4)
    zeros = denoiser.unconditional({"image": told()[1]})
    assert zeros["image"].shape == (2, 5, 8) and not zeros["image"].any()
    one = denoiser.double()(x, TIMES, None)  # cond=None is the null condition
    torch.testing.assert_close(one.x0, denoiser(x, TIMES, zeros).x0, rtol=1e-12, atol=1e-12)


def test_a_text_flow_needs_the_empty_texts_encoding():
    cond, bare = {"text": told()[1]}, structure(condition="text")
    assert not bare.has_null and bare.null is None and bare.usual_guidance is None
    with pytest.raises(UserError, match="no encoding of the empty text"):
        Teacher(bare, guidance=8.5)
    with pytest.raises(UserError, match="the empty text's encoding is not known"):
        bare.unconditional(cond)
    empty = normal(1, 5, 8, seed=9)
    known = structure(condition="text", empty=empty)
    assert torch.equal(known.unconditional(cond)["text"], empty.expand(2, 5, 8))
    assert known.usual_guidance == 8.5 and structure().usual_guidance == 6.0


def test_conditions_that_do_not_fit_are_told_in_one_line():
    x, cases = normal(2, 3, 4, 4, 4), []
    cases.append((structure(), {"text": told()[1]}, "needs the condition 'image', and was given text"))
    cases.append((structure(condition="text"), None, "needs the condition 'text', and was given none"))
    cases.append((structure(), {"image": normal(2, 5, 7)}, r"as \[B, L, 8\], and was given \[2, 5, 7\]"))
    for denoiser, cond, message in cases:
        with pytest.raises(UserError, match=message) as refusal:
            denoiser(x, TIMES, cond)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("route", ["two_pass", "single_pass"])
@pytest.mark.parametrize(("make", "x"), CASES)
def test_the_derivative_along_the_path(make: Any, x: Any, route: str):
    """Against a central difference, in float64; low frequencies only, or 1000 t would turn too fast for it."""
    denoiser, cond = make(), {"image": told()[1]}
    denoiser.time_scale = 1.0
    v = x * 0.5 + 0.1

    def velocity(x: Any, t: torch.Tensor) -> Any:
        return denoiser(x, t, cond).velocity

    _, found = value_and_tangent(velocity, (x, TIMES), (v, torch.ones_like(TIMES)), JvpConfig(route=route))
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (velocity(x + h * sign * v, TIMES + h * sign) for sign in (1, -1))
    expected = (feats(ahead) - feats(behind)) / (2 * h)
    torch.testing.assert_close(feats(found), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(("make", "x"), CASES)
def test_another_path_sees_the_same_flow(make: FlowDenoiser, x: Any):
    denoiser, cond, trig = make(), {"image": told()[1]}, TrigFlow(sd=1.0)
    ours = RectifiedFlow(sigma_min=S)
    there = trig.time(*ours.levels(TIMES))
    ratio = torch.hypot(*trig.levels(there)) / torch.hypot(*ours.levels(TIMES))
    moved, own = denoiser(x * expand(ratio, x), there, cond, on=trig), denoiser(x, TIMES, cond)
    torch.testing.assert_close(feats(moved.x0), feats(own.x0), rtol=1e-8, atol=1e-8)
