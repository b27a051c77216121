"""The residual MLP: zero at first, told of time and label in every block, smooth enough for a JVP."""

from __future__ import annotations

import pytest
import torch

from fastgen.nets.mlp import ResidualMLP


def awake(shape=(1, 4, 4), width=32, depth=2, num_classes=3, dropout=0.0) -> ResidualMLP:
    """A network whose zero-initialised layers have been given weights."""
    torch.manual_seed(0)
    net = ResidualMLP(shape, width, depth, num_classes, dropout)
    for layer in (net.modulation, net.outer):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return net


def test_a_fresh_network_is_zero_and_learns_in_every_layer():
    torch.manual_seed(0)
    net = ResidualMLP((1, 4, 4), 32, 2, 3)
    x, t, label = torch.randn(5, 1, 4, 4), torch.rand(5), torch.tensor([0, 1, 2, 3, 0])
    assert net(x, t, label).abs().max() == 0 and net(x, t, label).shape == x.shape
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = {name: p.clone() for name, p in net.named_parameters()}
    for _ in range(3):  # the output moves first, the modulation second, what feeds the modulation third
        optimizer.zero_grad()
        (net(x, t, label) - x).square().sum().backward()
        optimizer.step()
    assert [name for name, p in net.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4), (3, 2, 5)])
def test_samples_do_not_mix(shape):
    net = awake(shape)
    x, t, label = torch.randn(4, *shape), torch.rand(4), torch.tensor([0, 1, 2, 3])
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(net(x, t, label), alone, atol=1e-5, rtol=1e-5)


def test_time_and_label_matter_in_every_block():
    net = awake()
    x, t, label = torch.randn(1, 1, 4, 4), torch.tensor([0.3]), torch.tensor([0])
    seen = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    net(x, t, label), net(x, t + 0.1, label), net(x, t, label + 1)
    first, later, other = seen[0:2], seen[2:4], seen[4:6]
    for i in range(2):
        assert (first[i] - later[i]).abs().max() > 1e-3 and (first[i] - other[i]).abs().max() > 1e-3
    assert not torch.equal(first[0], first[1])


def test_the_null_label_has_a_row_and_the_next_has_none():
    net = awake(num_classes=3)
    x, t = torch.randn(1, 1, 4, 4), torch.rand(1)
    assert torch.isfinite(net(x, t, torch.tensor([3]))).all()
    with pytest.raises(IndexError):
        net(x, t, torch.tensor([4]))


def test_the_time_derivative_agrees_with_finite_differences():
    net = awake().double()
    x, t, label = torch.randn(4, 1, 4, 4).double(), torch.rand(4).double(), torch.tensor([0, 1, 2, 3])
    _, tangent = torch.func.jvp(lambda t: net(x, t, label), (t,), (torch.ones_like(t),))
    h = 1e-5
    difference = (net(x, t + h, label) - net(x, t - h, label)) / (2 * h)
    torch.testing.assert_close(tangent, difference, atol=1e-7, rtol=1e-6)
    assert tangent.abs().max() > 1e-2


def test_times_inside_the_unit_interval_are_told_apart():
    """sin and cos of whole multiples of pi alone would give t = 0 and t = 2 the same features; t itself does not."""
    net = awake()
    x, label = torch.randn(1, 1, 4, 4).expand(41, -1, -1, -1), torch.zeros(41, dtype=torch.long)
    y = net(x, torch.linspace(0, 2, 41), label).flatten(1)
    gaps = torch.cdist(y, y) + 1e9 * torch.eye(41)
    assert gaps.min() > 1e-3


def test_dropout_acts_in_training_only():
    net = awake(dropout=0.5)
    x, t, label = torch.randn(4, 1, 4, 4), torch.rand(4), torch.tensor([0, 1, 2, 3])
    assert not torch.equal(net(x, t, label), net(x, t, label))
    net.eval()
    assert torch.equal(net(x, t, label), net(x, t, label))
