"""Back ends by name: what is refused, what is reported, and that those which are here agree with torch's."""

from __future__ import annotations

import sys
from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastgen.errors import UserError
from fastgen.sparse import attention, backends
from fastgen.sparse.attention import cross, full, windowed
from fastgen.sparse.backends import Choice, chosen, use
from tests.sparse.grids import apart, layer_of, normal, occupancy, voxels

HERE = {name: told for name, told in backends.available().items() if not told.startswith("absent")}


def needs(name: str, *, cuda: bool = False) -> None:
    if name not in HERE:
        pytest.skip(f"{name} cannot be imported: {backends.available()[name]}")
    if cuda and not torch.cuda.is_available():
        pytest.skip(f"{name} has no kernel for a CPU")


def test_unknown_names_and_absent_libraries_are_one_line() -> None:
    with pytest.raises(UserError, match=r"conv=spconf: unknown; did you mean 'spconv'\?"):
        use(conv="spconf")
    with pytest.raises(UserError, match="attention=cudnn: unknown; known: flash_attn, torch, xformers"):
        use(attention="cudnn")
    for name, kind in (("spconv", "conv"), ("xformers", "attention"), ("flash_attn", "attention")):
        if name not in HERE:
            with pytest.raises(UserError, match=f"{kind}={name} is not here: pip install .*; or use {kind}=torch"):
                use(**{kind: name})
    assert chosen() == Choice("torch", "torch")


def test_a_choice_lasts_as_long_as_it_is_asked_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: name)
    monkeypatch.setattr(backends, "version", lambda name: "1.2.3")
    with caplog.at_level("INFO", logger="fastgen"), use(attention="xformers") as choice:
        assert choice == chosen() == Choice("torch", "xformers")
        with use(conv="spconv"):
            assert chosen() == Choice("spconv", "xformers")
        assert chosen() == choice
        with pytest.raises(RuntimeError), use(attention="flash_attn"):
            raise RuntimeError
        assert chosen() == choice
    assert chosen() == Choice()
    assert "convolution by torch 1.2.3, attention by xformers 1.2.3" in caplog.text
    before = use(attention="flash_attn")  # from now on
    assert chosen().attention == "flash_attn"
    before.__exit__()
    assert chosen() == Choice()


def test_a_derivative_along_a_path_is_refused_by_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: name)
    x = voxels(occupancy(0.5, 1, 3, 3, 3), 1)
    q = normal(len(x.sites), 2, 8)
    with use(attention="xformers"), pytest.raises(UserError, match="no derivative along a path; use attention=torch"):
        torch.func.jvp(lambda q: full(q, q, q, x), (q,), (q,))


@pytest.mark.parametrize("name", ["xformers", "flash_attn"])
def test_a_device_without_their_kernels_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers imports on a CPU, and has nothing to compute with there."""
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: name)
    x = voxels(occupancy(0.5, 1, 3, 3, 3), 1)
    q = normal(len(x.sites), 2, 8)
    with use(attention=name), pytest.raises(UserError, match=f"{name} has no kernel for a cpu; use attention=torch"):
        full(q, q, q, x)


def by_sets(q: Tensor, k: Tensor, v: Tensor, ends: list[int], key_ends: list[int]) -> Tensor:
    """Attention of rows [N, H, d] set by set, as both libraries' documentation says."""
    outs = []
    for (a, b), (c, d) in zip(pairwise(ends), pairwise(key_ends), strict=True):
        weights = torch.einsum("nhd,mhd->hnm", q[a:b], k[c:d]).div(q.shape[-1] ** 0.5).softmax(-1)
        outs.append(torch.einsum("hnm,mhd->nhd", weights, v[c:d]))
    return torch.cat(outs)


class Mask(NamedTuple):
    """xformers' block-diagonal mask: lengths of queries and keys."""

    queries: list[int]
    keys: list[int]


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Mask) -> Tensor:
    assert len(q) == len(k) == len(v) == 1  # all sets in one row
    ends, key_ends = ([0, *accumulate(lengths)] for lengths in attn_bias)
    return by_sets(q[0], k[0], v[0], ends, key_ends)[None]


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, longest: int, longest_key: int
) -> Tensor:
    assert ends.dtype == key_ends.dtype == torch.int32
    assert longest == ends.diff().max() and longest_key == key_ends.diff().max()
    return by_sets(q, k, v, ends.tolist(), key_ends.tolist())


@pytest.mark.parametrize("name", ["xformers", "flash_attn"])
def test_the_libraries_are_called_as_documented(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins in place of their kernels, which a CPU does not have; empty samples among the voxels."""
    fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=SimpleNamespace(from_seqlens=Mask)))
    ops = SimpleNamespace(fmha=fmha, memory_efficient_attention=xformers_attention)
    for module, made in (
        ("xformers", SimpleNamespace(ops=ops)),
        ("xformers.ops", ops),
        ("flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attention)),
    ):
        monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.setattr(attention, "_refuse", lambda *_: None)
    mask = occupancy(0.4, 4, 6, 6, 6)
    mask[1] = mask[3] = False
    for x in (voxels(mask, 1), voxels(mask[1:2], 1)):
        q, k, v = (normal(len(x.sites), 2, 8, seed=i) for i in range(3))
        context = [normal(x.batch, 9, 2, 8, seed=i) for i in (3, 4)]
        calls = [(full, q, k, v), (partial(windowed, window=4, shift=2), q, k, v), (cross, q, *context)]
        for call, *inputs in calls:
            expected = call(*inputs, like=x)
            with use(attention=name):
                assert apart(call(*inputs, like=x), expected) <= 1e-12


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_spconv_agrees(kernel: int, device: str) -> None:
    needs("spconv", cuda=device == "cuda")
    layer = layer_of(8, 16, kernel, dtype=torch.float32).to(device)
    x = voxels(occupancy(0.3, 3, 6, 6, 6), 8, dtype=torch.float32).to(device).requires_grad_()
    inputs = (x.feats, *layer.parameters())
    along = normal(len(x.sites), 16, dtype=torch.float32).to(device)
    out = layer(x).feats
    expected = torch.autograd.grad(out, inputs, along)
    with use(conv="spconv"):
        found = layer.eval()(x).feats
        assert apart(found, out) <= 1e-5
        assert torch.equal(layer(x).feats, found)  # by the pairs that are kept
        if device == "cuda":  # the CPU build asks for a CUDA stream in its backward pass
            for a, b in zip(torch.autograd.grad(found, inputs, along), expected, strict=True):
                assert apart(a, b) <= 1e-4


@pytest.mark.parametrize("name", ["xformers", "flash_attn"])
def test_attention_libraries_agree(name: str) -> None:
    needs(name, cuda=True)
    mask = occupancy(0.4, 4, 8, 8, 8)
    mask[1] = False
    x = voxels(mask, 1).to("cuda")

    def rows(*shape: int, seed: int) -> Tensor:
        return normal(*shape, seed=seed).to("cuda", torch.float16).requires_grad_()

    q, k, v = (rows(len(x.sites), 4, 32, seed=i) for i in range(3))
    contexts = [rows(4, 9, 4, 32, seed=i) for i in (3, 4)]
    for fn, inputs in (
        (lambda *t: full(*t, x), (q, k, v)),
        (lambda *t: windowed(*t, x, 4, 2), (q, k, v)),
        (lambda *t: cross(*t, x), (q, *contexts)),
    ):
        expected = fn(*inputs)
        slopes = torch.autograd.grad(expected.float().square().sum(), inputs)
        with use(attention=name):
            found = fn(*inputs)
        assert apart(found.float(), expected.float()) <= 2e-3
        for a, b in zip(torch.autograd.grad(found.float().square().sum(), inputs), slopes, strict=True):
            assert apart(a.float(), b.float()) <= 1e-2
