"""The derivative seam against float64 differences, through attention, dropout and a view."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgen.errors import RunFailed
from fastgen.jvp import jvp
from fastgen.paths import TrigFlow
from fastgen.teachers import mlp


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.dropout = nn.Linear(5, 24), nn.Linear(8, 4), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = torch.cat([x, t[:, None, None].expand(*x.shape[:2], 1)], -1)
        q, k, v = self.qkv(h).chunk(3, -1)
        return self.out(self.dropout(nn.functional.scaled_dot_product_attention(q, k, v)))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    g = torch.Generator().manual_seed(1)
    x, v = (
        torch.randn(3, 6, 4, generator=g, dtype=torch.float64),
        torch.randn(3, 6, 4, generator=g, dtype=torch.float64),
    )
    t, u = torch.rand(3, generator=g, dtype=torch.float64), torch.randn(3, generator=g, dtype=torch.float64)
    return (x.to(dtype), t.to(dtype)), (v.to(dtype), u.to(dtype))


def reference(net: nn.Module) -> torch.Tensor:
    """Richardson-extrapolated central differences in float64."""
    (x, t), (v, u) = inputs(torch.float64)
    net = net.double()

    def difference(h: float) -> torch.Tensor:
        with torch.no_grad():
            return (net(x + h * v, t + h * u) - net(x - h * v, t - h * u)) / (2 * h)

    return (4 * difference(1e-4) - difference(2e-4)) / 3


@pytest.mark.parametrize(("route", "bound"), [("forward", 2e-6), ("finite", 2e-3)])
def test_both_routes_agree_with_float64_through_attention(route, bound):
    net = Attention().eval()
    primals, tangents = inputs()
    value, tangent = jvp(net, primals, tangents, route=route)
    assert torch.allclose(value, net(*primals), atol=1e-6)
    expected = reference(net)
    assert float((tangent - expected).abs().max() / expected.abs().max()) < bound
    assert not tangent.requires_grad


def test_autocast_is_left_and_half_inputs_are_widened():
    net = Attention().eval()
    primals, tangents = inputs()
    _, expected = jvp(net, primals, tangents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, tangent = jvp(net, primals, tangents)
    assert value.dtype == torch.float32
    assert torch.equal(tangent, expected)


@pytest.mark.parametrize("route", ["forward", "finite"])
def test_dropout_masks_are_shared_within_one_call(route):
    net = Attention(dropout=0.5).train()
    primals, tangents = inputs()
    torch.manual_seed(4)
    value, tangent = jvp(net, primals, tangents, route=route)
    torch.manual_seed(4)
    assert torch.allclose(value, net(*primals), atol=1e-6)
    assert float(tangent.abs().max()) < 50, "two masks would put their difference over the step"


def test_a_view_is_differentiated_through_its_time_map():
    torch.manual_seed(0)
    net = mlp.build(mlp.MLPConfig(width=16, depth=1, path="VP"), (3,), None).double()
    nn.init.normal_(net.net.outer.weight, std=0.3)
    view = net.on(TrigFlow())
    x, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t, u = torch.tensor([0.1, 0.5, 1.0, 1.4], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    _, tangent = jvp(lambda x, t: view(x, t).velocity, (x, t), (v, u))
    h = 1e-6
    with torch.no_grad():
        expected = (view(x + h * v, t + h * u).velocity - view(x - h * v, t - h * u).velocity) / (2 * h)
    assert torch.allclose(tangent, expected, rtol=1e-5, atol=1e-6)


def test_tangent_that_is_not_finite_stops():
    with pytest.raises(RunFailed, match="not finite"):
        jvp(lambda x: x.sqrt(), (torch.zeros(2),), (torch.ones(2),))
