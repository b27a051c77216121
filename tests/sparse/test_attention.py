"""Attention over samples and windows against dense attention with a mask, and its derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastgen.jvp import JvpConfig, value_and_tangent
from fastgen.sparse import Voxels, attention
from fastgen.sparse.attention import cross, full, windowed, windows
from tests.sparse.grids import PRECISION, apart, normal, occupancies, occupancy, steady, voxels

HEADS, SIZE = 2, 3


def softmaxed(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention of all rows q [N, H, d] to all k, v [M, H, d], where allowed [N, M]."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v)


def together(x: Voxels, window: int | None = None, shift: int = 0) -> Tensor:
    """Which rows share a sample, and a window: bool [N, N]."""
    places = x.coords.long()
    if window is not None:
        places[:, 1:] = (places[:, 1:] + shift).div(window, rounding_mode="floor")
    else:
        places = places[:, :1]
    return (places[:, None] == places[None]).all(-1)


def qkv(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (normal(n, HEADS, SIZE, seed=seed + i, dtype=dtype).requires_grad_() for i in range(3))
    return q, k, v


def compare(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], seed: int = 0) -> None:
    """Values and gradients."""
    bound = PRECISION[found.dtype]
    assert apart(found, expected) <= bound
    along = normal(*found.shape, seed=seed + 7, dtype=found.dtype)
    options = {"allow_unused": True, "materialize_grads": True}
    for a, b in zip(*(torch.autograd.grad(o, inputs, along, **options) for o in (found, expected)), strict=True):
        assert float((a - b).abs().max() if a.numel() else 0) <= bound * (1 + float(b.abs().max() if b.numel() else 0))


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@given(mask=occupancies(), window=st.integers(1, 4), shift=st.integers(0, 3), seed=st.integers(0, 99))
@steady
def test_windows_are_dense_attention_with_a_mask(
    dtype: torch.dtype, mask: Tensor, window: int, shift: int, seed: int
) -> None:
    x = voxels(mask, 1)
    inputs = qkv(len(x.sites), seed, dtype)
    compare(windowed(*inputs, x, window, shift), softmaxed(*inputs, together(x, window, shift)), inputs, seed)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@given(mask=occupancies(samples=5, side=3), seed=st.integers(0, 99))
@steady
def test_samples_are_dense_attention_with_a_mask(dtype: torch.dtype, mask: Tensor, seed: int) -> None:
    x = voxels(mask, 1)
    inputs = qkv(len(x.sites), seed, dtype)
    compare(full(*inputs, x), softmaxed(*inputs, together(x)), inputs, seed)


@pytest.mark.parametrize("dtype", PRECISION, ids=str)
@given(mask=occupancies(samples=5, side=3), tokens=st.integers(1, 6), seed=st.integers(0, 99))
@steady
def test_cross_attention_is_dense_attention_with_a_mask(
    dtype: torch.dtype, mask: Tensor, tokens: int, seed: int
) -> None:
    x = voxels(mask, 1)
    q = normal(len(x.sites), HEADS, SIZE, seed=seed, dtype=dtype).requires_grad_()
    k, v = (normal(x.batch, tokens, HEADS, SIZE, seed=seed + i, dtype=dtype).requires_grad_() for i in (1, 2))
    allowed = x.row_batch[:, None] == torch.arange(x.batch).repeat_interleave(tokens)
    expected = softmaxed(q, k.flatten(0, 1), v.flatten(0, 1), allowed)
    compare(cross(q, k, v, x), expected, (q, k, v), seed)


def every(x: Voxels, tokens: int = 3) -> dict[str, Any]:
    """The three kinds as functions of their tensors, and those tensors."""
    rows = tuple(t.detach() for t in qkv(len(x.sites)))
    k, v = (normal(x.batch, tokens, HEADS, SIZE, seed=i) for i in (5, 6))
    return {
        "full": (lambda q, k, v: full(q, k, v, x), rows),
        "windowed": (lambda q, k, v: windowed(q, k, v, x, 2, 1), rows),
        "cross": (lambda q, k, v: cross(q, k, v, x), (rows[0], k, v)),
    }


KINDS = ["full", "windowed", "cross"]


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_both_orders_in_both_modes(kind: str) -> None:
    fn, inputs = every(voxels(occupancy(0.4, 2, 3, 3, 2), 1))[kind]
    inputs = tuple(t.requires_grad_() for t in inputs)
    assert gradcheck(fn, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(fn, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_and_the_derivative_along_a_path(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With matrices that are written out in pieces, and in one."""
    fn, inputs = every(voxels(occupancy(0.6, 2, 3, 3, 3), 1))[kind]
    tangents = tuple(normal(*t.shape, seed=20 + i) for i, t in enumerate(inputs))
    h = 1e-5
    up, down = (fn(*(t + side * h * v for t, v in zip(inputs, tangents, strict=True))) for side in (1, -1))
    difference = (up - down) / (2 * h)
    for chunk in (attention.CHUNK, 64):
        monkeypatch.setattr(attention, "CHUNK", chunk)
        value, tangent = torch.func.jvp(fn, inputs, tangents)
        assert apart(value, fn(*inputs)) <= 1e-10 and apart(tangent, difference) <= 1e-7
        for route in ("two_pass", "single_pass"):
            config = JvpConfig(route=route)  # type: ignore[arg-type]
            assert apart(value_and_tangent(fn, inputs, tangents, config)[1], tangent) <= 1e-10
    slopes = torch.func.grad(lambda *t: fn(*t).square().sum(), argnums=(0, 1, 2))(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    for found, truth in zip(slopes, torch.autograd.grad(fn(*leaves).square().sum(), leaves), strict=True):
        assert apart(found, truth) <= 1e-10


def test_only_some_inputs_may_ask_for_gradients() -> None:
    x = voxels(occupancy(0.5, 2, 3, 3, 3), 1)
    q, k, v = (t.detach() for t in qkv(len(x.sites)))
    for asked in (q, k, v):
        asked.requires_grad_()
        (found,) = torch.autograd.grad(windowed(q, k, v, x, 2, 0).square().sum(), asked)
        (truth,) = torch.autograd.grad(softmaxed(q, k, v, together(x, 2)).square().sum(), asked)
        assert apart(found, truth) <= 1e-10
        asked.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_padding_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = occupancy(0.5, 6, 4, 4, 4)
    mask[2], mask[4] = mask[1], mask[1]
    truth = every(voxels(mask, 1))[kind]
    whole = truth[0](*truth[1])
    monkeypatch.setattr(attention, "CHUNK", 40)
    fn, inputs = every(voxels(mask, 1))[kind]
    assert apart(fn(*inputs), whole) <= 1e-12
    monkeypatch.setattr(attention, "ALONE", 1)  # no set is padded
    fn, inputs = every(voxels(mask, 1))[kind]
    assert apart(fn(*inputs), whole) <= 1e-12


def test_padding_is_bounded_and_calls_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.functional, "scaled_dot_product_attention", lambda *a: calls.append(a[0].shape) or sdpa(*a)
    )
    x = voxels(occupancy(0.3, 2, 24, 24, 24), 1)
    plan = windows(x.sites, 8, 4)
    windowed(*(t.detach() for t in qkv(len(x.sites))), x, 8, 4)
    assert len(plan.sizes) > 100 and len(set(plan.sizes)) > 30
    assert len(calls) <= 17
    assert len(x.sites) <= sum(shape[0] * shape[2] for shape in calls) <= 1.5 * len(x.sites)
    assert sum(b.rows.numel() for b in plan.buckets) == sum(shape[0] * shape[2] for shape in calls)


def test_a_bucket_holds_its_lengths_and_little_more() -> None:
    for n in range(1, attention.ALONE):
        assert n <= attention._ceiling(n) < max(1.5 * n, n + 1)
        assert attention._ceiling(attention.ALONE + n) == attention.ALONE + n


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_sample_may_come_in_any_order(kind: str) -> None:
    x = voxels(occupancy(0.5, 2, 4, 4, 4), 1)
    order = torch.cat([torch.randperm(s.stop - s.start) + s.start for s in x.slices])
    moved = Voxels(x.feats[order], x.coords[order], 2)
    (fn, (q, k, v)), (again, _) = every(x)[kind], every(moved)[kind]
    rest = (k, v) if kind == "cross" else (k[order], v[order])
    assert apart(again(q[order], *rest), fn(q, k, v)[order]) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_samples_know_nothing_of_one_another(kind: str) -> None:
    mask = occupancy(0.5, 4, 3, 3, 3)
    mask[1] = mask[3] = False
    x = voxels(mask, 1)
    fn, inputs = every(x)[kind]
    parts = []
    for i, alone in enumerate(x.split()):
        rows = x.slices[i]
        q, k, v = (t[rows] if len(t) == len(x.sites) else t[i : i + 1] for t in inputs)
        parts.append(
            {
                "full": lambda q, k, v, a=alone: full(q, k, v, a),
                "windowed": lambda q, k, v, a=alone: windowed(q, k, v, a, 2, 1),
                "cross": lambda q, k, v, a=alone: cross(q, k, v, a),
            }[kind](q, k, v)
        )
    assert [len(part) for part in parts] == x.lengths.tolist()
    assert apart(fn(*inputs), torch.cat(parts)) <= 1e-12


def test_a_voxel_alone_gives_its_own_value() -> None:
    x = Voxels(normal(1, 1), torch.tensor([[2, 5, 5, 5]], dtype=torch.int32), 4)
    q, k, v = qkv(1)
    assert torch.equal(full(q, k, v, x), v) and torch.equal(windowed(q, k, v, x, 8, 4), v)


def test_windows_reach_across_zero_without_a_fold() -> None:
    """Floor, not truncation: -1 and 0 lie in different windows of 8."""
    coords = torch.tensor([[0, -1, 0, 0], [0, 0, 0, 0], [0, 7, 0, 0], [0, 8, 0, 0]], dtype=torch.int32)
    x = Voxels(normal(4, 1), coords, 1)
    assert sorted(windows(x.sites, 8, 0).sizes) == [1, 1, 2]
    assert sorted(windows(x.sites, 8, 4).sizes) == [2, 2]


def test_a_backward_pass_keeps_rows_and_not_their_padding() -> None:
    x = voxels(occupancy(0.3, 1, 8, 8, 8), 1)
    q, k, v = qkv(len(x.sites))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        windowed(q, k, v, x, 4, 2)
    assert sum(kept) == 3 * q.numel()


def test_autocast_computes_in_its_own_precision() -> None:
    x = voxels(occupancy(0.5, 1, 4, 4, 4), 1)
    q, k, v = qkv(len(x.sites), dtype=torch.float32)
    exact = full(q, k, v, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = full(q, k, v, x)
    assert out.dtype == torch.bfloat16 and 0 < apart(out.float(), exact) < 0.03
    assert torch.autograd.grad(out.float().sum(), q)[0].dtype == torch.float32


def test_what_is_kept_serves_every_later_caller() -> None:
    x = voxels(occupancy(0.5, 2, 4, 4, 4), 1)
    inputs = qkv(len(x.sites))
    with torch.inference_mode():
        windowed(*inputs, x, 2, 1)
    torch.func.jvp(lambda q: full(q, *inputs[1:], x), (inputs[0],), (inputs[0],))
    compare(windowed(*inputs, x, 2, 1), softmaxed(*inputs, together(x, 2, 1)), inputs)
    compare(full(*inputs, x), softmaxed(*inputs, together(x)), inputs)


def test_keys_of_another_number_of_samples_are_refused() -> None:
    x = voxels(occupancy(0.5, 2, 3, 3, 3), 1)
    q, keys = normal(len(x.sites), HEADS, SIZE), normal(3, 4, HEADS, SIZE)
    with pytest.raises(ValueError, match="keys of 3 samples for voxels of 2"):
        cross(q, keys, keys, x)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_cuda_device_gives_the_same(dtype: torch.dtype) -> None:
    x = voxels(occupancy(0.3, 3, 9, 9, 9), 1)
    q, k, v = (normal(len(x.sites), 2, 32, seed=i) for i in range(3))
    there = x.to("cuda")
    bound = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    for fn in (lambda *t, x: full(*t, x), lambda *t, x: windowed(*t, x, 4, 2)):
        inputs = [t.to("cuda", dtype).requires_grad_() for t in (q, k, v)]
        out = fn(*inputs, x=there)
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        expected = fn(*leaves, x=x)
        assert apart(out.cpu().double(), expected) <= bound
        slopes = torch.autograd.grad(out.double().square().sum(), inputs)
        for a, b in zip(slopes, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            assert apart(a.cpu().double(), b) <= 10 * bound
