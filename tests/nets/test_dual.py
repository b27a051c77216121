"""The forward-mode rules against differences in float64, and against torch's own where it has one."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.nets import dual
from fastgen.nets.dual import RULES, Rules


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, BIAS, IMAGE = draw(8, seed=2), draw(8, seed=3), draw(3, 8, 4, 4)
CASES = {
    "linear": (lambda x: functional.linear(x, draw(5, 4, seed=1), draw(5, seed=2)), draw(3, 4)),
    "linear without a bias": (lambda x: functional.linear(x, draw(5, 4, seed=1)), draw(2, 3, 4)),
    "conv1d": (lambda x: functional.conv1d(x, draw(6, 4, 3, seed=1), draw(6, seed=2), padding=1), draw(2, 8, 4).mT),
    "conv2d": (lambda x: functional.conv2d(x, draw(6, 4, 3, 3, seed=1), draw(6), 2, groups=2), IMAGE),
    "conv3d": (lambda x: functional.conv3d(x, draw(2, 3, 1, 2, 2, seed=1)), draw(1, 3, 2, 3, 3)),
    "group_norm": (lambda x: functional.group_norm(x, 4, WEIGHT, BIAS, 1e-3), IMAGE),
    "group_norm, channels last": (
        lambda x: functional.group_norm(x, 2, WEIGHT, BIAS),
        IMAGE.contiguous(memory_format=torch.channels_last),
    ),
    "group_norm of a transposed tensor": (lambda x: functional.group_norm(x.mT, 4, None, BIAS), draw(3, 5, 8)),
    "layer_norm": (lambda x: functional.layer_norm(x, (8,), WEIGHT, BIAS), draw(3, 5, 8)),
    "layer_norm, bare, transposed": (lambda x: functional.layer_norm(x.mT, (3, 5), eps=1e-2), draw(2, 5, 3)),
    "silu": (functional.silu, IMAGE),
    "silu in place": (lambda x: (y := x * 2, functional.silu(y, inplace=True), y)[2], IMAGE),
    "division": (lambda x: x / 3.0 + torch.div(x, 7) + x.div(2), IMAGE),
    "division by a tensor": (lambda x: IMAGE / (2 + x * x), draw(3, 8, 4, 4, seed=5)),
    "division of a number": (lambda x: 2.0 / (2 + x * x), IMAGE),
    "rounding division": (lambda x: x + torch.div(x, 7, rounding_mode="floor"), IMAGE),
    "weights that move": (
        lambda x: torch.stack(
            [
                functional.linear(draw(3, 4), x[0, :, 0], x[0, :, 0, 0]).sin().sum(),
                functional.conv2d(IMAGE, x, x[0, :3, 0, 0]).sin().sum(),
                functional.group_norm(IMAGE, 2, x[0, :, 0, 0], BIAS).sin().sum(),
                functional.layer_norm(draw(3, 8), (8,), WEIGHT, x[0, :, 0, 0]).sin().sum(),
                functional.linear(x[0, :, 0], x[1, :, 0], x[0, :, 1, 0]).sin().sum(),
            ]
        ),
        IMAGE,
    ),
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x.sin(), x.cos()), draw(2, 3, 5, 4)),
    "attention, named": (
        lambda x: functional.scaled_dot_product_attention(query=x, key=x.sin(), value=x.cos(), attn_mask=None),
        draw(2, 3, 5, 4),
    ),
    "all by name": (
        lambda x: (
            functional.linear(input=x, weight=draw(5, 4, seed=1), bias=None).sum()
            + functional.conv2d(input=x, weight=draw(5, 8, 3, 3), bias=None, padding=1).sum()
            + functional.group_norm(input=x, num_groups=2, weight=WEIGHT).sin().sum()
            + functional.layer_norm(input=x, normalized_shape=(4,), eps=0.1).sin().sum()
            + functional.silu(input=x)
        ),
        IMAGE,
    ),
    "attention, grouped queries": (
        lambda x: functional.scaled_dot_product_attention(x, x[:, :1], x[:, 1:2].sin(), enable_gqa=True),
        draw(2, 4, 5, 4),
    ),
    "attention, scaled": (
        lambda x: functional.scaled_dot_product_attention(x, x.sin(), x.cos()[..., :2], scale=0.3),
        draw(2, 5, 4),
    ),
    "attention to what stands still": (
        lambda x: functional.scaled_dot_product_attention(x, draw(2, 7, 4), draw(2, 7, 4, seed=1)),
        draw(2, 5, 4),
    ),
    "attention from what stands still": (
        lambda x: functional.scaled_dot_product_attention(draw(2, 6, 4, seed=1), x, draw(2, 5, 3)),
        draw(2, 5, 4),
    ),
    "attention to moving values": (
        lambda x: functional.scaled_dot_product_attention(draw(2, 6, 4, seed=1), draw(2, 5, 4, seed=2), x),
        draw(2, 5, 4),
    ),
    "attention, causal": (
        lambda x: functional.scaled_dot_product_attention(x, x.sin(), x.cos(), is_causal=True),
        draw(2, 5, 4),
    ),
    "attention, masked": (
        lambda x: functional.scaled_dot_product_attention(x, x.sin(), x, torch.eye(5, dtype=torch.bool)[None]),
        draw(2, 5, 4),
    ),
}


def derivative(fn, x: Tensor, v: Tensor, rules: Rules | None = None) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), rules or Rules():
        return forward_ad.unpack_dual(fn(forward_ad.make_dual(x, v)))


def difference(fn, x: Tensor, v: Tensor, h: float = 1e-4) -> Tensor:
    """Richardson-extrapolated."""

    def central(h: float) -> Tensor:
        return (fn(x + h * v) - fn(x - h * v)) / (2 * h)

    with sdpa_kernel(SDPBackend.MATH):
        return (4 * central(h) - central(2 * h)) / 3


@pytest.mark.parametrize("name", CASES)
def test_a_rule_gives_the_value_and_the_derivative(name):
    fn, x = CASES[name]
    v = draw(*x.shape, seed=9)
    value, moved = derivative(fn, x, v)
    assert torch.allclose(value, fn(x), rtol=1e-12, atol=1e-12)
    assert torch.allclose(moved, difference(fn, x, v), rtol=1e-7, atol=1e-7)


def test_every_rule_is_tried_here_and_reached():
    reached = set()

    class Watch(Rules):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            reached.add(func)
            return super().__torch_function__(func, types, args, kwargs)

    for fn, x in CASES.values():
        derivative(fn, x, x, Watch())
    # x / 2 arrives under one of two names, by torch's version
    assert set(RULES) - reached <= {torch.Tensor.__truediv__, torch.Tensor.div}
    assert functional.scaled_dot_product_attention in reached


@pytest.mark.parametrize("name", ["conv2d", "group_norm", "layer_norm", "attention", "linear", "silu", "division"])
def test_the_value_keeps_its_gradient_and_the_derivative_none(name):
    fn, x = CASES[name]
    x = x.clone().requires_grad_()
    value, moved = derivative(fn, x, draw(*x.shape, seed=9))
    assert not moved.requires_grad
    (gradient,) = torch.autograd.grad((value * value.detach().cos()).sum(), x)
    plain = fn(x)
    (expected,) = torch.autograd.grad((plain * plain.detach().cos()).sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [nn.Linear(4, 5), nn.Conv2d(8, 2, 3), nn.GroupNorm(4, 8), nn.LayerNorm(4)])
def test_the_derivative_keeps_no_graph_of_the_weights(layer):
    value, moved = derivative(layer.double(), IMAGE, draw(*IMAGE.shape, seed=9))
    assert value.requires_grad and not moved.requires_grad


def test_rows_of_attention_are_taken_in_chunks(monkeypatch):
    fn, x = CASES["attention"]
    v, whole, sizes = draw(*x.shape, seed=9), derivative(*CASES["attention"], draw(*x.shape, seed=9)), []
    rows = dual._rows
    monkeypatch.setattr(dual, "CHUNK", 2 * 3 * 5 * 2)  # two of the five rows of 2 x 3 heads
    monkeypatch.setattr(dual, "_rows", lambda q, *rest: sizes.append(q[0].shape[-2]) or rows(q, *rest))
    for kept in (False, True):
        with torch.set_grad_enabled(kept):
            parts = derivative(fn, x, v)
        assert sizes == [2, 2, 1]
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(parts, whole, strict=True))
        sizes.clear()


def test_a_value_that_keeps_its_gradient_keeps_no_matrix_of_all_tokens():
    x, kept = torch.randn(2, 1, 300, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        derivative(lambda x: functional.scaled_dot_product_attention(x, x, x), x, torch.randn(2, 1, 300, 8))
    assert kept and max(kept) < 300 * 300


def test_a_group_norm_behind_attention_is_differentiated():
    """Torch's own rule fails there: its view does not fit a tensor that is not contiguous."""
    norm = nn.GroupNorm(2, 8).double()

    def fn(x: Tensor) -> Tensor:
        return norm(x.transpose(1, 2).reshape(2, 8, 3, 3))

    x, v = draw(2, 9, 8), draw(2, 9, 8, seed=1)
    with torch.no_grad():
        assert torch.allclose(derivative(fn, x, v)[1], difference(fn, x, v), atol=1e-7)


@torch.library.custom_op("fastgen_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("fastgen_tests::places", mutates_args=())
def places(x: Tensor) -> Tensor:
    return x.argsort()


def test_an_operation_that_drops_the_derivative_is_no_silent_matter():
    with pytest.raises(NotImplementedError, match=r"doubled.*no forward-mode rule"):
        derivative(lambda x: x + torch.ops.fastgen_tests.doubled(x), draw(3), draw(3))
    with pytest.raises(NotImplementedError, match="doubled"):
        derivative(lambda x: x + doubled(x), draw(3), draw(3))
    still = derivative(lambda x: x + doubled(torch.ones(3)) + places(x), draw(3), draw(3, seed=1))
    assert torch.equal(still[1], draw(3, seed=1)), "nothing is dropped where nothing moves, or where integers come out"


def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, sm_scale: float | None = None) -> Tensor:
    """A stand-in for jvp_flash_attention's: dual tensors in, a dual tensor out."""
    assert not causal
    return dual.attention(q, k, v, scale=sm_scale) + 1000


@pytest.mark.parametrize(
    ("q", "k", "options", "fitting"),
    [
        ((2, 3, 64, 16), (2, 3, 64, 16), {}, True),
        ((2, 3, 64, 16), (2, 3, 64, 16), {"scale": 0.1}, True),
        ((2, 3, 64, 16), (2, 3, 32, 16), {}, False),
        ((2, 3, 64, 24), (2, 3, 64, 24), {}, False),
        ((2, 3, 65, 16), (2, 3, 65, 16), {}, False),
        ((3, 64, 16), (3, 64, 16), {}, False),
        ((2, 3, 64, 16), (2, 3, 64, 16), {"attn_mask": torch.ones(64, 64, dtype=torch.bool)}, False),
    ],
)
def test_a_kernel_takes_the_calls_that_fit_it(q, k, options, fitting):
    rules = Rules(kernel)
    x, y = draw(*q), draw(*k, seed=1)

    def fn(h: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x * h, y * h, y * (1 + h), **options)

    value, moved = derivative(fn, torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64), rules)
    assert (rules.fused, rules.written) == (int(fitting), int(not fitting))
    with sdpa_kernel(SDPBackend.MATH):
        expected = fn(torch.ones((), dtype=torch.float64))
    assert torch.allclose(value - 1000 * fitting, expected, atol=1e-9)
    one = torch.ones((), dtype=torch.float64)
    assert torch.allclose(moved, difference(fn, one, one), atol=1e-7)


def test_attention_of_constants_is_torchs_own():
    rules = Rules(kernel)
    x = draw(1, 2, 32, 16)
    derivative(lambda h: h * functional.scaled_dot_product_attention(x, x, x).sum(), draw(2), draw(2), rules)
    assert (rules.fused, rules.written) == (0, 0)
