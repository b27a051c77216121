"""Submanifold convolution against dense convolution, its derivatives, and what it must not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.jvp import JvpConfig, value_and_tangent
from fastgen.sparse import Voxels, conv
from fastgen.sparse.conv import SparseConv3d
from tests.sparse.grids import PRECISION, apart, at, dense, layer_of, normal, occupancies, occupancy, steady, voxels


def by_dense(layer: SparseConv3d, feats: Tensor, mask: Tensor) -> Tensor:
    """conv3d on the filled-up grid, at the active voxels: kernel axes D, H, W are x, y, z."""
    weight = layer.conv.weight.permute(0, 4, 1, 2, 3)
    return at(functional.conv3d(dense(feats, mask), weight, layer.conv.bias, padding=1), mask)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@given(mask=occupancies(), channels=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 99))
@steady
def test_values_and_gradients_are_those_of_a_dense_convolution(
    dtype: torch.dtype, mask: Tensor, channels: tuple[int, int], seed: int
) -> None:
    layer, x = layer_of(*channels, dtype=dtype, seed=seed), voxels(mask, channels[0], seed=seed, dtype=dtype)
    inputs = (x.requires_grad_().feats, *layer.parameters())
    out, expected = layer(x).feats, by_dense(layer, x.feats, mask)
    assert apart(out, expected) <= PRECISION[dtype]
    along = normal(*out.shape, seed=seed + 9, dtype=dtype)
    for found, truth in zip(*(torch.autograd.grad(o, inputs, along) for o in (out, expected)), strict=True):
        assert apart(found, truth) <= PRECISION[dtype]


def test_each_tap_of_the_kernel_looks_at_its_own_neighbour() -> None:
    """One voxel at a time, so that no sum hides a tap: W[i, j, k] weighs the voxel at (i - 1, j - 1, k - 1)."""
    layer, coords = layer_of(1, 1), torch.cartesian_prod(*[torch.arange(3)] * 3)
    layer.conv.bias.data.zero_()
    x = Voxels(torch.zeros(27, 1, dtype=torch.float64), functional.pad(coords, (1, 0)).int(), 1)
    for row, place in enumerate(coords.tolist()):
        x.feats.zero_()[row] = 1
        assert layer(x).feats[13] == layer.conv.weight[0, place[0], place[1], place[2], 0]


@pytest.mark.parametrize("channels", [(8, 2), (4, 12), (6, 6)])
def test_kernel_1_reads_the_weights_memory_as_in_by_out(channels: tuple[int, int]) -> None:
    layer, x = layer_of(*channels, kernel=1), voxels(occupancy(0.4, 2, 3, 3, 3), channels[0])
    weight, bias = layer.conv.weight, layer.conv.bias
    expected = torch.stack(
        [
            sum((row[i] * weight.flatten()[i * channels[1] :][: channels[1]] for i in range(channels[0])), bias)
            for row in x.feats
        ]
    )
    out = layer(x).feats
    assert apart(out, expected) <= 1e-12
    assert apart(out, functional.linear(x.feats, weight.flatten(1), bias)) > 0.1


def test_a_moved_grid_gives_the_same_bits() -> None:
    layer, x = layer_of(3, 5), voxels(occupancy(0.3, 2, 6, 5, 4), 3)
    out = layer(x).feats
    for move in ((7, 3, 100), (-4, -1, -60), (2**19, -(2**20), 5)):
        moved = x.coords + torch.tensor([0, *move], dtype=torch.int32)
        assert torch.equal(layer(Voxels(x.feats, moved, 2)).feats, out)


def test_rows_of_a_sample_may_come_in_any_order() -> None:
    layer, x = layer_of(3, 5), voxels(occupancy(0.4, 2, 5, 5, 5), 3)
    order = torch.cat([torch.randperm(s.stop - s.start) + s.start for s in x.slices])
    assert not torch.equal(order, torch.arange(len(order)))
    found = layer(Voxels(x.feats[order], x.coords[order], 2)).feats
    assert apart(found, layer(x).feats[order]) <= 1e-13


def test_samples_know_nothing_of_one_another() -> None:
    """Same coordinates in both; an empty sample between them and one at the end."""
    layer, mask = layer_of(3, 5), occupancy(0.5, 4, 4, 4, 4)
    mask[1] = mask[3] = False
    x = voxels(mask, 3)
    alone = [layer(part).feats for part in x.split()]
    assert [len(part) for part in alone] == x.lengths.tolist() and len(alone[1]) == len(alone[3]) == 0
    assert apart(layer(x).feats, torch.cat(alone)) <= 1e-13


def test_empty_sets_and_single_voxels() -> None:
    layer = layer_of(3, 5)
    empty = voxels(torch.zeros(2, 3, 3, 3, dtype=torch.bool), 3).requires_grad_()
    out = layer(empty)
    assert out.feats.shape == (0, 5) and out.batch == 2
    out.feats.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 3) and not layer.conv.weight.grad.any()
    x = Voxels(normal(1, 3), torch.tensor([[1, 40, 2, 3]], dtype=torch.int32), 2)
    centre = functional.linear(x.feats, layer.conv.weight[:, 1, 1, 1], layer.conv.bias)
    assert apart(layer(x).feats, centre) <= 1e-14


def derivatives(x: Voxels, layer: SparseConv3d) -> Any:
    """The layer as a function of features, weight and bias."""

    def fn(feats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = {"conv.weight": weight, "conv.bias": bias}
        return torch.func.functional_call(layer, given, (x.with_feats(feats),)).feats

    return fn


@pytest.mark.parametrize("kernel", [1, 3])
def test_derivatives_of_both_orders_in_both_modes(kernel: int) -> None:
    x, layer = voxels(occupancy(0.6, 2, 2, 2, 2), 2), layer_of(2, 3, kernel)
    inputs = tuple(t.detach().requires_grad_() for t in (x.feats, *layer.parameters()))
    fn = derivatives(x, layer)
    assert gradcheck(fn, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(fn, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def test_torch_func_and_the_derivative_along_a_path() -> None:
    mask = occupancy(0.5, 2, 3, 3, 3)
    x, v, layer = voxels(mask, 2), voxels(mask, 2, seed=1), layer_of(2, 2)
    v = x.with_feats(v.feats)

    def twice(x: Voxels) -> Voxels:
        return layer(layer(x).square())

    def truth(feats: Tensor) -> Tensor:
        return by_dense(layer, by_dense(layer, feats, mask).square(), mask)

    expected = torch.func.jvp(truth, (x.feats,), (v.feats,))
    for found, value in zip(torch.func.jvp(twice, (x,), (v,)), expected, strict=True):
        assert apart(found.feats, value) <= 1e-10
    slope = torch.func.grad(lambda x: twice(x).square().feats.sum())(x)
    assert apart(slope.feats, torch.func.grad(lambda f: truth(f).square().sum())(x.feats)) <= 1e-10
    for route in ("two_pass", "single_pass"):
        layer.zero_grad()
        value, tangent = value_and_tangent(twice, (x,), (v,), JvpConfig(route=route))  # type: ignore[arg-type]
        assert apart(tangent.feats, expected[1]) <= 1e-10 and not tangent.requires_grad
        value.feats.sum().backward()
        given = layer.conv.weight.grad
        (wanted,) = torch.autograd.grad(truth(x.feats).sum(), layer.conv.weight)
        assert given is not None and apart(given, wanted) <= 1e-10


@pytest.mark.parametrize("first", ["inference", "jvp", "grad", "no_grad"])
def test_what_is_kept_serves_every_later_caller(first: str) -> None:
    mask = occupancy(0.5, 2, 3, 3, 3)
    x, layer = voxels(mask, 2), layer_of(2, 2)
    if first == "inference":
        with torch.inference_mode():
            layer(x)
    elif first == "no_grad":
        with torch.no_grad():
            layer(x)
    elif first == "jvp":
        torch.func.jvp(layer, (x,), (x,))
    else:
        torch.func.grad(lambda x: layer(x).feats.sum())(x)
    near = conv.neighbours(x.sites)
    out = torch.func.jvp(layer, (x,), (x,))[0]
    assert apart(out.feats, by_dense(layer, x.feats, mask)) <= 1e-10
    layer(x.requires_grad_()).feats.sum().backward()
    assert conv.neighbours(x.sites) is near
    assert apart(x.feats.grad, torch.autograd.grad(by_dense(layer, x.feats, mask).sum(), x.feats)[0]) <= 1e-10


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.entries = max(self.entries, out.numel())
        return out


@pytest.mark.parametrize(("channels", "chunk", "most"), [(40, 640, 640 // 40), (4, 640, 27 * (640 // (27 * 4)))])
def test_gathered_rows_are_bounded(channels: int, chunk: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide rows one offset at a time, narrow ones all 27 at once."""
    x, layer = voxels(occupancy(1.0, 1, 8, 8, 8), channels), layer_of(channels, channels)
    whole = layer(x.requires_grad_()).feats
    (slope,) = torch.autograd.grad(whole.square().sum(), x.feats)
    monkeypatch.setattr(conv, "CHUNK", chunk)
    gathered: list[int] = []
    select = Tensor.index_select
    monkeypatch.setattr(Tensor, "index_select", lambda *a: gathered.append(len(a[2])) or select(*a))
    with Largest() as largest:
        out = layer(x).feats
        (again,) = torch.autograd.grad(out.square().sum(), x.feats)
    assert max(gathered) == most
    if channels > conv.NARROW:
        # No operation makes more than the features themselves, or the weight.
        assert largest.entries == max(whole.numel(), layer.conv.weight.numel())
    assert apart(out, whole) <= 1e-13 and apart(again, slope) <= 1e-13


def test_neighbours_are_looked_up_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    search = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda *a, **k: looked.append(1) or search(*a, **k))
    x = voxels(occupancy(0.5, 1, 4, 4, 4), 3)
    for _ in range(3):
        x = layer_of(3, 3)(x * 2 + 1)
    x.with_feats(x.feats)
    assert len(looked) == 13


def test_half_precision_is_summed_in_float32() -> None:
    """2048 + 1 is 2048 in float16: 26 neighbours added one by one would vanish."""
    layer = SparseConv3d(1, 1, bias=False).half()
    layer.conv.weight.data.fill_(1.0)
    layer.conv.weight.data[:, 1, 1, 1] = 2048.0
    x = Voxels(torch.ones(27, 1).half(), voxels(occupancy(1.0, 1, 3, 3, 3), 1).coords, 1)
    out = layer(x).feats
    assert out.dtype == torch.float16 and out[13] == 2048 + 26


def test_autocast_computes_in_its_own_precision() -> None:
    layer, x = layer_of(4, 4, dtype=torch.float32), voxels(occupancy(0.5, 1, 4, 4, 4), 4, dtype=torch.float32)
    exact = layer(x).feats
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x).feats
    assert out.dtype == torch.bfloat16 and 0 < apart(out.float(), exact) < 0.02
    out.float().sum().backward()
    assert x.feats.grad.dtype == torch.float32 and layer.conv.weight.grad.dtype == torch.float32


def test_bad_coordinates_are_refused_by_name() -> None:
    double = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 2], [0, 1, 1, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="occurs twice"):
        layer_of(2, 2)(Voxels(normal(3, 2), double, 1))
    far = torch.tensor([[0, 0, 0, 0], [0, 2**21, 2**21, 2**21]], dtype=torch.int32)
    with pytest.raises(ValueError, match="too large for 64-bit keys"):
        layer_of(2, 2)(Voxels(normal(2, 2), far, 1))
    with pytest.raises(ValueError, match="kernel_size=5"):
        SparseConv3d(2, 2, 5)


def test_distant_voxels_do_not_meet() -> None:
    """Keys beyond 32 bits: two crowds a million voxels apart are each as if alone."""
    layer, near = layer_of(2, 2), voxels(occupancy(0.7, 1, 3, 3, 3), 2)
    shift = torch.tensor([0, 2**20, 2**20, 2**20], dtype=torch.int32)
    both = Voxels(near.feats.repeat(2, 1), torch.cat([near.coords, near.coords + shift]), 1)
    assert torch.equal(layer(both).feats, layer(near).feats.repeat(2, 1))


def test_a_row_at_the_border_does_not_see_the_next_line() -> None:
    """Without a margin the key after (x, y, last) would be that of (x, y + 1, first)."""
    layer = layer_of(1, 1)
    line = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.int32)
    grid = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    grid[tuple(line.long().T)] = True
    x = Voxels(normal(3, 1), line, 2)
    assert apart(layer(x).feats, by_dense(layer, x.feats, grid)) <= 1e-12


def test_keys_of_the_state_are_spconvs() -> None:
    state = SparseConv3d(4, 6).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {"conv.weight": (6, 3, 3, 3, 4), "conv.bias": (6,)}
    assert SparseConv3d(4, 6, 1).conv.weight.shape == (6, 1, 1, 1, 4)


@pytest.mark.cuda
def test_a_cuda_device_gives_the_same_and_the_same_bits_again() -> None:
    layer, x = layer_of(4, 6, dtype=torch.float32), voxels(occupancy(0.3, 2, 9, 9, 9), 4, dtype=torch.float32)
    expected = layer(x.requires_grad_()).feats
    slopes = torch.autograd.grad(expected.square().sum(), (x.feats, *layer.parameters()))
    layer, x = layer.cuda(), x.detach().to("cuda").requires_grad_()
    runs = []
    for _ in range(2):
        out = layer(x).feats
        runs.append([out, *torch.autograd.grad(out.square().sum(), (x.feats, *layer.parameters()))])
    for found, again, truth in zip(*runs, (expected, *slopes), strict=True):
        assert torch.equal(found, again) and apart(found.cpu(), truth) <= 1e-4
