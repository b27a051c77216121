"""Half and double resolution and group norm against what they mean on a grid."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from fastgen.jvp import JvpConfig, value_and_tangent
from fastgen.sparse import Voxels
from fastgen.sparse.conv import SparseConv3d, neighbours
from fastgen.sparse.spatial import SparseGroupNorm32, downsample, subdivide, upsample
from tests.sparse.grids import apart, normal, occupancies, occupancy, steady, voxels


@given(mask=occupancies())
@steady
def test_half_resolution_is_the_sum_over_the_number_and_one(mask: Tensor) -> None:
    x = voxels(mask, 3)
    children: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row, (sample, *place) in enumerate(x.coords.tolist()):
        parent = (sample, *(c // 2 for c in place))
        children[parent].append(row)
    down = downsample(x)
    assert [tuple(c) for c in down.coords.tolist()] == sorted(children) and down.batch == x.batch
    for row, place in enumerate(sorted(children)):
        rows = children[place]
        assert torch.allclose(down.feats[row], x.feats[rows].sum(0) / (len(rows) + 1), rtol=1e-12, atol=1e-14)
    up = upsample(down * 2)
    assert up.sites == x.sites
    for row, place in enumerate(sorted(children)):
        assert (up.feats[children[place]] == 2 * down.feats[row]).all()


def test_rows_need_not_be_sorted_and_coordinates_may_be_negative() -> None:
    coords = torch.tensor([[0, 3, 0, 0], [0, -1, 0, 0], [0, 2, 1, 1], [0, -2, 1, 0], [0, 0, 0, 0]], dtype=torch.int32)
    x = Voxels(torch.arange(5.0)[:, None], coords, 1)
    down = downsample(x)
    assert down.coords.tolist() == [[0, -1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert down.feats.flatten().tolist() == pytest.approx([4 / 3, 4 / 2, 2 / 3])
    assert upsample(down).feats.flatten().tolist() == pytest.approx([2 / 3, 4 / 3, 2 / 3, 4 / 3, 2])


def test_what_is_known_of_the_sites_is_kept_without_a_circle() -> None:
    x = voxels(occupancy(0.5, 1, 4, 4, 4), 2)
    first, second = downsample(x), downsample(x + 1)
    assert first.sites == second.sites and neighbours(first.sites) is neighbours(second.sites)
    assert upsample(first).sites is x.sites and subdivide(x).sites is subdivide(x * 2).sites
    assert (first + second).sites is first.sites

    def held(value: Any) -> bool:
        return getattr(value, "finer", None) is not None

    assert not any(held(v) or held(getattr(v, "coarse", None)) for v in x.sites._known.values())


def test_upsample_wants_what_downsample_made() -> None:
    with pytest.raises(ValueError, match="come from no downsample"):
        upsample(voxels(occupancy(0.5, 1, 4, 4, 4), 2))


@given(mask=occupancies(side=3))
@steady
def test_subdivision_puts_eight_children_beside_one_another(mask: Tensor) -> None:
    x = voxels(mask, 2)
    out = subdivide(x)
    offsets = torch.cartesian_prod(*[torch.arange(2)] * 3)
    expected = [
        [sample, *(2 * torch.tensor(place) + o).tolist()] for sample, *place in x.coords.tolist() for o in offsets
    ]
    assert out.coords.tolist() == expected and out.coords.dtype == torch.int32
    assert torch.equal(out.feats, x.feats.repeat_interleave(8, 0))
    assert torch.equal(out.lengths, 8 * x.lengths)


def test_group_norm_is_that_of_each_sample_by_itself() -> None:
    mask = occupancy(0.4, 4, 3, 3, 3)
    mask[1] = mask[3] = False
    mask[2] = False
    mask[2, 0, 0, 0] = True
    x = voxels(mask, 6)
    norm = SparseGroupNorm32(3, 6).double()
    norm.weight.data, norm.bias.data = normal(6, seed=1), normal(6, seed=2)
    parts = [functional.group_norm(p.T[None], 3, norm.weight, norm.bias, 1e-5)[0].T for p in x.parts() if len(p)]
    assert apart(norm(x).feats, torch.cat(parts)) <= 1e-13
    whole = voxels(torch.ones(2, 2, 3, 2, dtype=torch.bool), 6)
    grid = whole.feats.view(2, 2, 3, 2, 6).movedim(-1, 1)
    expected = functional.group_norm(grid, 3, norm.weight, norm.bias, 1e-5).movedim(1, -1).reshape(-1, 6)
    assert apart(norm(whole).feats, expected) <= 1e-13
    empty = voxels(torch.zeros(2, 2, 2, 2, dtype=torch.bool), 6)
    assert norm(empty).feats.shape == (0, 6)


def test_group_norm_computes_half_precision_in_float32() -> None:
    x = voxels(occupancy(0.5, 1, 4, 4, 4), 4)
    norm = SparseGroupNorm32(2, 4)
    far = (300 + x).to(torch.float16)  # squares beyond float16
    out = norm(far)
    assert out.dtype == torch.float16
    assert apart(out.feats.float(), norm(far.float()).feats) <= 1e-3


OPERATIONS = {
    "downsample": downsample,
    "there and back": lambda v: upsample(downsample(v).square()),
    "subdivide": lambda v: subdivide(v).square(),
    "group norm": SparseGroupNorm32(2, 4).double(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_derivatives_of_both_orders_in_both_modes(name: str) -> None:
    x, fn = voxels(occupancy(0.5, 2, 3, 3, 3), 4), OPERATIONS[name]

    def bare(feats: Tensor) -> Tensor:
        return fn(x.with_feats(feats)).feats

    feats = x.feats.requires_grad_()
    assert gradcheck(bare, (feats,), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(bare, (feats,), check_fwd_over_rev=True, fast_mode=True)
    x = x.detach()
    v = x.with_feats(normal(*x.feats.shape, seed=5))
    value, tangent = torch.func.jvp(fn, (x,), (v,))
    found = value_and_tangent(fn, (x,), (v,), JvpConfig())
    assert apart(found[0].feats, value.feats) <= 1e-12 and apart(found[1].feats, tangent.feats) <= 1e-10


def test_a_stack_of_all_is_equal_alone_and_together() -> None:
    conv, norm = SparseConv3d(4, 4).double(), SparseGroupNorm32(2, 4).double()

    def net(x: Voxels) -> Voxels:
        h = upsample(conv(downsample(norm(conv(x)))))
        return conv(subdivide(norm(h + x)))

    x = voxels(occupancy(0.4, 3, 5, 5, 5), 4)
    assert apart(net(x).feats, torch.cat([net(part).feats for part in x.split()])) <= 1e-12
