"""Voxels as samples: arithmetic, pytrees, and paths, pairs and denoisers that agree with dense ones on full grids."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastgen import layout
from fastgen.denoiser import Denoiser
from fastgen.jvp import JvpConfig, check, value_and_tangent
from fastgen.paths import EDM, VP, Pair, Path, Prediction, RectifiedFlow, TrigFlow, carry
from fastgen.sparse import Voxels
from tests.sparse.grids import PRECISION, apart, normal, occupancies, occupancy, steady, voxels

B, SIDE, C = 3, (2, 3, 2), 4
FULL = torch.ones(B, *SIDE, dtype=torch.bool)


def grid(v: Voxels) -> Tensor:
    """Voxels of a full grid as the dense batch [B, C, X, Y, Z]."""
    return v.feats.view(v.batch, *SIDE, -1).movedim(-1, 1)


def same(found: Voxels, expected: Tensor, bound: float = 1e-12) -> None:
    assert apart(grid(found), expected) <= bound and found.dtype == expected.dtype


def two(dtype: torch.dtype = torch.float64) -> tuple[Voxels, Voxels]:
    x = voxels(FULL, C, dtype=dtype)
    return x, x.with_feats(normal(*x.feats.shape, seed=1, dtype=dtype))


def test_what_it_says_of_itself() -> None:
    mask = occupancy(0.3, 4, 3, 3, 3)
    mask[1] = mask[3] = False
    x = voxels(mask, C)
    counts = mask.flatten(1).sum(1)
    assert x.shape == (4, C) and len(x) == x.batch == 4 and x.ndim == 2
    assert torch.equal(x.lengths, counts) and torch.equal(x.row_batch, torch.arange(4).repeat_interleave(counts))
    assert [s.stop - s.start for s in x.slices] == counts.tolist()
    assert torch.equal(torch.cat([x.coords[s] for s in x.slices]), x.coords)
    assert [len(p) for p in x.parts()] == counts.tolist()


@pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_arithmetic_is_that_of_the_features(operation: Callable[..., Any]) -> None:
    x, y = two()
    n = len(x.sites)
    for other in (y, 3.0, 2, torch.tensor(1.5), normal(n, 1), normal(n, C), normal(1, C)):
        bare = other.feats if isinstance(other, Voxels) else other
        for found, expected in (
            (operation(x, other), operation(x.feats, bare)),
            (operation(other, x), operation(bare, x.feats)),
        ):
            assert isinstance(found, Voxels) and found.sites is x.sites and torch.equal(found.feats, expected)
    assert torch.equal((-x).feats, -x.feats) and torch.equal((x**2).feats, x.feats**2)


def test_elementwise_functions_of_torch() -> None:
    x, y = two()
    rows = normal(len(x.sites), 1) > 0
    assert torch.equal(torch.where(rows, x, y).feats, torch.where(rows, x.feats, y.feats))
    assert torch.equal(torch.where(rows, x, 0).feats, torch.where(rows, x.feats, 0))
    assert torch.equal(torch.lerp(x, y, 0.3).feats, torch.lerp(x.feats, y.feats, 0.3))
    assert torch.equal(torch.zeros_like(x).feats, torch.zeros_like(x.feats))
    assert torch.equal(x.square().sqrt().feats, x.feats.square().sqrt())
    assert x.isfinite().all() and x.float().dtype == x.type(torch.float32).dtype == torch.float32
    with pytest.raises(TypeError, match="flatten has no meaning for Voxels"):
        torch.flatten(x, 1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="sum has no meaning for Voxels"):
        torch.sum(x)  # type: ignore[call-overload]


def test_voxels_on_different_sites_do_not_combine() -> None:
    x, other = voxels(FULL, C), voxels(occupancy(0.5, B, *SIDE), C)
    moved = Voxels(x.feats, x.coords + torch.tensor([0, 0, 0, 1], dtype=torch.int32), B)
    more = Voxels(x.feats, x.coords, B + 1)
    for wrong in (other, moved, more):
        with pytest.raises(ValueError, match="voxels on different sites do not combine"):
            x + wrong
    equal = Voxels(x.feats, x.coords.clone(), B)
    assert torch.equal((x + equal).feats, 2 * x.feats)


@pytest.mark.parametrize("shape", [(B,), (C,), (B, 1), (B, C, 1, 1, 1)])
def test_tensors_that_are_no_rows_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"combines with tensors \[\], \[1, C\], \[N, 1\] and \[N, C\], not"):
        normal(*shape) * voxels(FULL, C)


def test_coordinates_that_are_no_batch_are_refused() -> None:
    feats = normal(2, C)
    for coords, batch, words in (
        ([[1, 0, 0, 0], [0, 0, 0, 0]], 2, "must ascend"),
        ([[0, 0, 0, 0], [2, 0, 0, 0]], 2, "at most 1"),
        ([[-1, 0, 0, 0], [0, 0, 0, 0]], 2, "from 0"),
        ([[0, 0, 0], [1, 0, 0]], 2, r"int32 \[N, 4\]"),
        ([[0, 0, 0, 0]], 1, r"N = 1, not \[2, 4\]"),
        ([[0, 0, 0, 0], [0, 0, 0, 1]], None, "give batch"),
    ):
        with pytest.raises(ValueError, match=words):
            Voxels(feats, torch.tensor(coords, dtype=torch.int32), batch)
    with pytest.raises(ValueError, match="int32"):
        Voxels(feats, torch.zeros(2, 4, dtype=torch.long), 1)


@given(mask=occupancies(samples=4, side=3))
@steady
def test_joining_splitting_and_choosing(mask: Tensor) -> None:
    x = voxels(mask, 2)
    parts = x.split()
    assert [len(p.sites) for p in parts] == x.lengths.tolist() and all(p.batch == 1 for p in parts)
    again = Voxels.cat(parts)
    assert torch.equal(again.feats, x.feats) and again.sites == x.sites
    assert [p.sites for p in x] == [p.sites for p in parts]
    turned = x[list(range(x.batch))[::-1]]
    assert turned.sites == Voxels.cat(parts[::-1]).sites
    assert torch.equal(turned.feats, Voxels.cat(parts[::-1]).feats)
    assert x[1:].batch == x.batch - 1 and x[-1].sites == parts[-1].sites
    assert x[torch.tensor([0, 0])].batch == 2 and x[:0].batch == 0


def test_gradients_pass_through_joining_and_choosing() -> None:
    x = voxels(occupancy(0.5, 3, 2, 2, 2), 2).requires_grad_()
    Voxels.cat([x[2], x[0], x[2]]).square().feats.sum().backward()
    times = torch.tensor([1.0, 0.0, 2.0])[x.row_batch][:, None]
    assert torch.equal(x.grad, 2 * x.feats.detach() * times)


def test_a_pytree_whose_only_leaf_is_the_features() -> None:
    x, y = two()
    leaves, spec = tree_flatten({"x": x, "n": 1})
    assert leaves[0] is x.feats and len(leaves) == 2
    back = tree_unflatten(leaves, spec)["x"]
    assert back.sites is x.sites and back.feats is x.feats
    assert tree_flatten(x)[1] == tree_flatten(Voxels(y.feats, x.coords.clone(), B))[1]
    assert tree_flatten(x)[1] != tree_flatten(voxels(occupancy(0.5, B, *SIDE), C))[1]
    assert torch.equal(tree_map(torch.add, x, y).feats, (x + y).feats)
    assert isinstance(tree_map(lambda _: None, x), Voxels)
    copied = copy.deepcopy(x)
    assert copied.sites == x.sites and copied.feats is not x.feats


def test_to_another_dtype_and_device() -> None:
    x = voxels(FULL, C)
    assert x.to(torch.float16).sites is x.sites and x.to(dtype=torch.float32).dtype == torch.float32
    away = x.to("meta")
    assert away.device.type == away.coords.device.type == "meta" and away.batch == B


PATHS = [RectifiedFlow(), RectifiedFlow(sigma_min=1e-5), TrigFlow(sd=0.5), EDM(), VP()]


def times(path: Path, dtype: torch.dtype = torch.float64) -> Tensor:
    return path.end + (path.start - path.end) * torch.tensor([0.2, 0.55, 0.9], dtype=dtype)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_paths_and_pairs_are_those_of_the_dense_batch(path: Path) -> None:
    x, y = two()
    t = times(path)
    same(path.mix(x, y, t), path.mix(grid(x), grid(y), t))
    ours, theirs = Pair(x, y), Pair(grid(x), grid(y))  # type: ignore[arg-type]
    same(ours.velocity, theirs.velocity)
    for w in (0.3, torch.tensor([0.1, 2.0, 5.0], dtype=torch.float64)):
        other, dense = ours.lerp(Pair(y, x), w), theirs.lerp(Pair(grid(y), grid(x)), w)  # type: ignore[arg-type]
        same(other.x0, dense.x0)
        same(other.eps, dense.eps)
    for there in PATHS:
        moved, expected = carry(x, t, path, there), carry(grid(x), t, path, there)  # type: ignore[arg-type]
        same(moved[0], expected[0])
        assert torch.equal(moved[1], expected[1])


def test_layout_is_that_of_the_dense_batch() -> None:
    x, y = two()
    t = normal(B)
    same(layout.expand(t, x) * x, layout.expand(t, grid(x)) * grid(x))
    same(layout.expand(t[:1], x) * x, layout.expand(t[:1], grid(x)) * grid(x))
    assert layout.expand(t[0], x).ndim == 0
    assert torch.equal(layout.expand(t > 0, x), (t > 0)[x.row_batch][:, None])
    half = x.to(torch.float16)
    assert layout.expand(t, half).dtype == torch.float32 and layout.wide(half).dtype == torch.float32
    assert layout.wide(x).dtype == torch.float64
    for ours, theirs in (
        (layout.sumsq(x), layout.sumsq(grid(x))),
        (layout.mean(x), layout.mean(grid(x))),
        (layout.dot(x, y), layout.dot(grid(x), grid(y))),
    ):
        assert ours.shape == (B,) and apart(ours, theirs) <= 1e-12
    y.feats[y.slices[1].start, 0], y.feats[y.slices[2].start, 1] = torch.nan, torch.inf
    assert layout.finite(y).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="2 per-sample values for 3 samples"):
        layout.expand(t[:2], x)


def test_layout_of_empty_samples() -> None:
    mask = occupancy(0.5, 3, 2, 2, 2)
    mask[1] = False
    x = voxels(mask, C).requires_grad_()
    assert layout.sumsq(x)[1] == layout.mean(x)[1] == layout.dot(x, x)[1] == 0 and layout.finite(x)[1]
    assert torch.equal(layout.expand(torch.tensor([1.0, 2.0, 3.0]), x)[:, 0], x.row_batch + 1.0)
    layout.mean(x.square()).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    none = x[:0]
    assert layout.sumsq(none).shape == layout.finite(none).shape == (0,)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_a_loss_and_its_gradient_are_those_of_the_dense_batch(dtype: torch.dtype) -> None:
    """Weighted flow matching of a channelwise net: mean over each sample, weights [B]."""
    x, y = two(dtype)
    net = nn.Sequential(nn.Linear(C, 8), nn.Tanh(), nn.Linear(8, C)).to(dtype)
    path, t, weight = RectifiedFlow(), times(RectifiedFlow(), dtype), normal(B, dtype=dtype)

    def loss(x0: Any, eps: Any, call: Callable[[Any], Any]) -> Tensor:
        return (weight * layout.mean((call(path.mix(x0, eps, t)) - Pair(x0, eps).velocity).square())).sum()

    ours = loss(x, y, lambda v: v.with_feats(net(v.feats)))
    theirs = loss(grid(x), grid(y), lambda g: net(g.movedim(1, -1)).movedim(-1, 1))
    assert apart(ours, theirs) <= PRECISION[dtype]
    for a, b in zip(*(torch.autograd.grad(value, list(net.parameters())) for value in (ours, theirs)), strict=True):
        assert apart(a, b) <= PRECISION[dtype]


class Channelwise(Denoiser):
    """The same network for both layouts: a nonlinear map of channels, times the network's time."""

    def raw(self, x: Any, time: Tensor, cond: Any, extra: Tensor | None) -> Any:
        assert self.net is not None
        rows = x.feats if isinstance(x, Voxels) else x.movedim(1, -1)
        made = self.net(rows)
        made = x.with_feats(made) if isinstance(x, Voxels) else made.movedim(-1, 1)
        return layout.expand(time, x) * made + x.square()


def channelwise(path: Path, kind: Any) -> Channelwise:
    net = nn.Linear(C, C).double()
    net.weight.data, net.bias.data = normal(C, C, seed=3), normal(C, seed=4)
    return Channelwise(net, path, Prediction(kind=kind), shape=(C,), time_scale=2.0)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_denoiser_is_that_of_the_dense_batch_on_its_own_path_and_on_others(path: Path) -> None:
    x, _ = two()
    for own, kind in ((RectifiedFlow(sigma_min=1e-5), "flow"), (EDM(start=3.0, end=0.1), "edm"), (VP(), "v")):
        denoiser = channelwise(own, kind)
        ours, theirs = (denoiser(batch, times(path), on=path) for batch in (x, grid(x)))
        same(ours.x0, theirs.x0, 1e-10)
        same(ours.eps, theirs.eps, 1e-10)


def test_a_derivative_along_the_path_is_that_of_the_dense_batch(caplog: pytest.LogCaptureFixture) -> None:
    x, v = two()
    denoiser = channelwise(RectifiedFlow(), "flow")
    t = times(RectifiedFlow())

    def along(x: Any, t: Tensor) -> Any:
        return denoiser(x, t).velocity

    ours = torch.func.jvp(along, (x, t), (v, torch.ones_like(t)))
    theirs = torch.func.jvp(along, (grid(x), t), (grid(v), torch.ones_like(t)))
    for a, b in zip(ours, theirs, strict=True):
        same(a, b)
    for route in ("two_pass", "single_pass"):
        config = JvpConfig(route=route)  # type: ignore[arg-type]
        value, tangent = value_and_tangent(along, (x, t), (v, torch.ones_like(t)), config)  # type: ignore[arg-type]
        same(value, theirs[0])
        same(tangent, theirs[1])
    with caplog.at_level("INFO", logger="fastgen"):
        check(along, (x, t), (v, torch.ones_like(t)), JvpConfig(), denoiser)  # type: ignore[arg-type]
    assert "from a central difference" in caplog.text


def test_per_sample_values_on_rows() -> None:
    mask = occupancy(0.5, 4, 2, 2, 2)
    mask[2] = False
    x = voxels(mask, C)
    values = normal(4, 5, 2).requires_grad_()
    out = x.rows(values)
    assert torch.equal(out, values[x.row_batch])
    weight = normal(*out.shape, seed=2)
    (found,) = torch.autograd.grad((out * weight).sum(), values)
    assert apart(found, torch.zeros_like(values).index_add(0, x.row_batch, weight)) <= 1e-12
    assert len(tree_leaves(x)) == 1
