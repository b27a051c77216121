"""The one way to a derivative: every route against differences in float64, what is shared, and what is refused."""

from __future__ import annotations

import copy
import logging
import sys
import types

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastgen import jvp
from fastgen.errors import RunFailed, UserError
from fastgen.jvp import JvpConfig, check, value_and_tangent
from fastgen.nets import dual
from fastgen.paths import TrigFlow
from fastgen.teachers import mlp

ROUTES = ("two_pass", "single_pass", "finite")
FORWARD = ROUTES[:2]


class Attention(nn.Module):
    """[B, 6, 4] and [B] -> [B, 6, 4]: attention, norms, dropout; its inner half may be computed again."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.dropout = nn.Linear(5, 24), nn.Linear(8, 4), nn.Dropout(dropout)
        self.norm, self.gradient_checkpointing = nn.LayerNorm(8), False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.cat([x, t[:, None, None].expand(*x.shape[:2], 1)], -1)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            h = checkpoint(self.inner, h, use_reentrant=False)
        else:
            h = self.inner(h)
        return self.out(functional.silu(self.norm(h)))

    def inner(self, h: Tensor) -> Tensor:
        return self.dropout(functional.scaled_dot_product_attention(*self.qkv(h).chunk(3, -1)))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    g = torch.Generator().manual_seed(1)
    x, v = (torch.randn(3, 6, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t, u = torch.rand(3, generator=g, dtype=torch.float64), torch.randn(3, generator=g, dtype=torch.float64)
    return (x.to(dtype), t.to(dtype)), (v.to(dtype), u.to(dtype))


def reference(net: nn.Module, seed: int = 0) -> Tensor:
    """Richardson-extrapolated central differences in float64, one seed of dropout for all."""
    (x, t), (v, u) = inputs(torch.float64)
    net = copy.deepcopy(net).double()

    def at(h: float) -> Tensor:
        torch.manual_seed(seed)
        return net(x + h * v, t + h * u)

    def difference(h: float) -> Tensor:
        return (at(h) - at(-h)) / (2 * h)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return (4 * difference(1e-4) - difference(2e-4)) / 3


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("route", "bound"), [("two_pass", 2e-6), ("single_pass", 2e-6), ("finite", 1e-3)])
def test_a_route_agrees_with_float64(route, bound):
    net = Attention()
    primals, tangents = inputs()
    value, tangent = value_and_tangent(net, primals, tangents, JvpConfig(route=route))
    assert torch.allclose(value, net(*primals), atol=1e-6)
    assert apart(tangent, reference(net)) < bound
    assert value.requires_grad and not tangent.requires_grad
    with torch.no_grad():
        assert not value_and_tangent(net, primals, tangents, JvpConfig(route=route))[0].requires_grad


@pytest.mark.parametrize("route", ROUTES)
def test_float64_stays_and_tangents_take_the_primals_dtype(route):
    net = Attention().double()
    primals, tangents = inputs(torch.float64)
    _, tangent = value_and_tangent(net, primals, tuple(v.float() for v in tangents), JvpConfig(route=route, step=1e-5))
    assert tangent.dtype == torch.float64 and apart(tangent, reference(net)) < 1e-6


def test_a_function_that_ignores_its_arguments_has_a_derivative_of_zero():
    parameter = nn.Parameter(torch.ones(3))
    _, tangent = value_and_tangent(lambda x: 2 * parameter, (torch.ones(3),), (torch.ones(3),), JvpConfig())
    assert torch.equal(tangent, torch.zeros(3))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_the_gradient_of_the_value_is_that_of_a_plain_pass(route, again, dropout):
    if again and route == "single_pass":
        pytest.skip("refused: see below")
    net = Attention(dropout)
    plain = copy.deepcopy(net)
    net.gradient_checkpointing = again
    primals, tangents = inputs()
    torch.manual_seed(4)
    value, _ = value_and_tangent(net, primals, tangents, JvpConfig(route=route))
    after = torch.rand(1)
    value.sin().sum().backward()
    torch.manual_seed(4)
    expected = plain(*primals)
    assert torch.equal(after, torch.rand(1)), "the generator stands where one plain pass leaves it"
    expected.sin().sum().backward()
    assert torch.allclose(value, expected, atol=1e-6)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=2e-6)


@pytest.mark.parametrize(("route", "bound"), [("two_pass", 2e-6), ("single_pass", 2e-6), ("finite", 2e-3)])
def test_the_derivative_sees_the_masks_of_the_value(route, bound):
    net = Attention(dropout=0.5)
    torch.manual_seed(4)
    _, tangent = value_and_tangent(net, *inputs(), JvpConfig(route=route))
    assert apart(tangent, reference(net, seed=4)) < bound
    assert apart(tangent, reference(net, seed=5)) > 0.1


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_touches_the_value_only(route):
    net, config = Attention(), JvpConfig(route=route)
    primals, tangents = inputs()
    _, expected = value_and_tangent(net, primals, tangents, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, tangent = value_and_tangent(net, primals, tangents, config)
        with torch.no_grad():
            half = net(*primals)
    assert torch.equal(tangent, expected)
    assert value.dtype == (torch.float32 if route == "single_pass" else torch.bfloat16)
    assert torch.equal(value, half) or route == "single_pass"


@pytest.mark.parametrize("route", ["two_pass", "finite"])
def test_under_autocast_the_gradient_is_that_of_a_plain_pass(route):
    """The weights that autocast keeps in half precision are not handed from the derivative's pass to the value's."""
    net, primals = Attention(), inputs()[0]
    plain = copy.deepcopy(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = value_and_tangent(net, *inputs(), JvpConfig(route=route))
        expected = plain(*primals)
    value.float().sum().backward()
    expected.float().sum().backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad) and ours.grad.any()


def test_half_inputs_are_widened_for_the_derivative():
    net, (primals, tangents) = Attention(), inputs()
    seen = []

    def fn(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return net(x.float(), t)

    halves = (primals[0].bfloat16(), primals[1])
    _, tangent = value_and_tangent(fn, halves, (tangents[0].bfloat16(), tangents[1]), JvpConfig())
    assert tangent.dtype == torch.float32 and seen == [torch.float32, torch.bfloat16]


def test_a_view_is_differentiated_through_its_time_map():
    torch.manual_seed(0)
    net = mlp.build(mlp.MLPConfig(width=16, depth=1, path="VP"), (3,), None).double()
    nn.init.normal_(net.net.outer.weight, std=0.3)
    view = net.on(TrigFlow())
    x, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t, u = torch.tensor([0.1, 0.5, 1.0, 1.4], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    _, tangent = value_and_tangent(lambda x, t: view(x, t).velocity, (x, t), (v, u), JvpConfig())
    h = 1e-6
    with torch.no_grad():
        expected = (view(x + h * v, t + h * u).velocity - view(x - h * v, t - h * u).velocity) / (2 * h)
    assert torch.allclose(tangent, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_no_gradient_comes_through_the_derivative(route):
    factor = nn.Parameter(torch.ones(3))
    value, tangent = value_and_tangent(lambda x: factor * x, (torch.ones(3),), (torch.ones(3),), JvpConfig(route=route))
    assert value.requires_grad and not tangent.requires_grad


class Root(nn.Module):
    """sqrt: at 0 its value is finite and its derivative is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def rooted() -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(), Root()), nn.Identity())


@pytest.mark.parametrize("route", FORWARD)
def test_a_derivative_that_is_not_finite_names_the_module(route):
    with pytest.raises(RunFailed, match=r"not finite: first so in 1\.1 \(Root\); lower"):
        value_and_tangent(rooted(), (torch.zeros(2),), (torch.ones(2),), JvpConfig(route=route))
    with pytest.raises(RunFailed, match=r"not finite: first so in 0 \(Identity\), as is its value"):
        value_and_tangent(rooted(), (torch.full((2,), torch.nan),), (torch.ones(2),), JvpConfig(route=route))


def test_a_difference_that_is_not_finite_names_the_module():
    net = nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity(), Root()))
    with pytest.raises(RunFailed, match=r"first so in 1\.1 \(Root\), as is its value"):
        value_and_tangent(net, (torch.zeros(2),), (torch.ones(2),), JvpConfig(route="finite"))
    with pytest.raises(RunFailed, match="every module's output is"):
        value_and_tangent(lambda x: nn.ReLU()(x).sqrt(), (torch.zeros(2),), (torch.ones(2),), JvpConfig())
    assert not torch.nn.modules.module._global_forward_hooks


class Sometimes(nn.Module):
    """Not a number by the first draw of a generator that stands at seed 1, a number by the second."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 if torch.rand(()) < 0.5 else torch.nan)


def test_the_module_is_looked_for_with_the_same_masks():
    torch.manual_seed(1)
    assert [bool(torch.rand(()) < 0.5) for _ in range(2)] == [False, True]
    torch.manual_seed(1)
    with pytest.raises(RunFailed, match=r"first so in the network \(Sometimes\)"):
        value_and_tangent(Sometimes(), (torch.ones(2),), (torch.ones(2),), JvpConfig())


@pytest.mark.parametrize(
    ("route", "graphs"), [("two_pass", [False, True]), ("single_pass", [True]), ("finite", [False, False, True])]
)
def test_a_graph_is_kept_for_the_value_alone(route, graphs):
    seen = []

    def fn(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return x.sin()

    value_and_tangent(fn, (torch.ones(2),), (torch.ones(2),), JvpConfig(route=route))
    assert seen == graphs


class Old(torch.autograd.Function):
    """As flash-attn's and xformers': a backward pass, no forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@torch.library.custom_op("fastgen_tests::tripled", mutates_args=())
def tripled(x: Tensor) -> Tensor:
    return x * 3


def fused(x: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]


@pytest.mark.parametrize("operation", [fused, Old.apply, tripled])
@pytest.mark.parametrize("route", FORWARD)
def test_an_operation_without_a_rule_is_told_in_one_line(route, operation):
    x = torch.ones(1, 1, 4, 8)
    with pytest.raises(UserError, match=r"no forward-mode rule \(.*xformers.*method\.jvp\.route=finite") as caught:
        value_and_tangent(operation, (x,), (x,), JvpConfig(route=route))
    assert "\n" not in str(caught.value)
    _, difference = value_and_tangent(operation, (x,), (x,), JvpConfig(route="finite"))
    assert difference.isfinite().all()


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        value_and_tangent(nn.Linear(3, 2), (torch.ones(1, 4),), (torch.ones(1, 4),), JvpConfig())


@pytest.mark.parametrize("route", ROUTES)
def test_the_look_before_the_first_step_says_what_is_used_and_leaves_no_trace(route, caplog):
    net = Attention(dropout=0.5)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with caplog.at_level(logging.INFO, logger="fastgen"):
        check(net, *inputs(), JvpConfig(route=route), net)
    assert torch.equal(torch.rand(2), expected) and net.training
    assert all(p.grad is None for p in net.parameters())
    (line,) = caplog.messages
    assert f"{route}, attention math, float32" in line
    figure = float(line.split("; ")[1].split()[0])
    assert figure < 2e-3


def lossy(x: Tensor) -> Tensor:
    """Half of it goes where no derivative follows."""
    return x.sin() + torch.from_numpy(x.detach().numpy()).sin()


def test_a_derivative_that_gets_lost_is_found_at_the_start():
    x, net = torch.linspace(0, 1, 8), nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"50% of its size.*drops or mistakes it; set method\.jvp\.route=finite"):
        check(lossy, (x,), (torch.ones(8),), JvpConfig(), net)
    check(lossy, (x,), (torch.ones(8),), JvpConfig(route="finite"), net)


@pytest.mark.parametrize("route", ROUTES)
def test_a_derivative_of_zero_is_no_disagreement(route):
    x, net = torch.linspace(1, 2, 8), nn.Linear(1, 1)
    for fn in (lambda x: 0 * x, lambda x: (x + 3) - x, lambda x: 3 + 1e-9 * x):
        check(fn, (x,), (torch.ones(8),), JvpConfig(route=route), net)


def test_a_step_that_is_too_long_or_too_short_is_found_at_the_start():
    def fn(x: Tensor) -> Tensor:
        return 100 + (20 * x).sin()

    x, net = torch.linspace(0, 0.1, 8), nn.Linear(1, 1)
    check(fn, (x,), (torch.ones(8),), JvpConfig(route="finite", step=1e-3), net)
    for step in (0.1, 1e-6):
        with pytest.raises(UserError, match=r"set method\.jvp\.step near [13]e-0[34]"):
            check(fn, (x,), (torch.ones(8),), JvpConfig(route="finite", step=step), net)


def test_one_pass_and_gradient_checkpointing_do_not_go_together():
    net = Attention()
    net.gradient_checkpointing = True
    with pytest.raises(UserError, match=r"single_pass keeps the graph.*use route=two_pass"):
        check(net, *inputs(), JvpConfig(route="single_pass"), nn.Sequential(net))
    check(net, *inputs(), JvpConfig(), nn.Sequential(net))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("route", ROUTES)
def test_weights_in_half_precision_are_refused(route, dtype):
    net = Attention()
    net.qkv.to(dtype).requires_grad_(False)  # as the frozen weights under adapters
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=f"weights in {name}.*teacher_precision=fp32"):
        check(net, *inputs(), JvpConfig(route=route), net)


def test_a_kernel_is_named_for_what_uses_it():
    with pytest.raises(ValidationError, match="attention=jvp_flash is for forward-mode routes"):
        JvpConfig(route="finite", attention="jvp_flash")


def test_the_kernel_is_refused_without_cuda_or_its_package():
    config = JvpConfig(attention="jvp_flash")
    with pytest.raises(UserError, match="its kernels run on CUDA, not on cpu; use attention=math"):
        value_and_tangent(Attention(), *inputs(), config)
    with pytest.raises(UserError, match=r"pip install 'fastgen-distill\[jvp\]'"):
        jvp._rules(config, torch.device("cuda"))


def test_the_kernel_is_taken_from_its_package_and_counted(monkeypatch, caplog):
    package, module = types.ModuleType("jvp_flash_attention"), types.ModuleType(jvp.FLASH)
    package.jvp_attention = module

    def fwd_dual(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, sm_scale: float | None = None) -> Tensor:
        return dual.attention(q, k, v, scale=sm_scale)

    module.JVPAttn = types.SimpleNamespace(fwd_dual=fwd_dual)
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", package)
    monkeypatch.setitem(sys.modules, jvp.FLASH, module)
    rules, config = jvp._rules(JvpConfig(attention="jvp_flash"), torch.device("cuda")), JvpConfig(attention="jvp_flash")
    monkeypatch.setattr(jvp, "_rules", lambda config, device: rules)
    net, x = nn.Linear(1, 1), torch.randn(1, 2, 32, 16)

    def fn(x: Tensor) -> Tensor:
        h = functional.scaled_dot_product_attention(x, x, x)
        return functional.scaled_dot_product_attention(h, x[..., :8, :], x[..., :8, :])

    with pytest.raises(UserError, match="no attention of this network fits it"):
        check(lambda x: x.sin(), (x,), (x,), config, net)
    with caplog.at_level(logging.INFO, logger="fastgen"):
        check(fn, (x,), (x,), config, net)
    assert "attention jvp_flash in 1 of 2 calls" in caplog.messages[-1]


@pytest.mark.cuda
@pytest.mark.parametrize("route", ROUTES)
def test_masks_are_shared_on_a_gpu(route):
    net = Attention(dropout=0.5).cuda()
    primals, tangents = (tuple(t.cuda() for t in part) for part in inputs())
    torch.manual_seed(4)
    value, tangent = value_and_tangent(net, primals, tangents, JvpConfig(route=route))
    after = torch.rand(1, device="cuda")
    torch.manual_seed(4)
    assert torch.allclose(value, net(*primals), atol=1e-5)
    assert torch.equal(after, torch.rand(1, device="cuda"))
    torch.manual_seed(4)
    _, difference = value_and_tangent(net, primals, tangents, JvpConfig(route="finite"))
    assert apart(tangent, difference) < 5e-3


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [32, 256, 1024])
def test_the_kernel_agrees_with_attention_written_out(tokens):
    pytest.importorskip("jvp_flash_attention")
    torch.manual_seed(0)
    x, v = torch.randn(2, 4, tokens, 64, device="cuda"), torch.randn(2, 4, tokens, 64, device="cuda")

    def fn(x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x.sin(), x.cos())

    _, written = value_and_tangent(fn, (x,), (v,), JvpConfig())
    _, fused = value_and_tangent(fn, (x,), (v,), JvpConfig(attention="jvp_flash"))
    assert apart(fused, written) < 2e-2  # its products are taken in TF32
