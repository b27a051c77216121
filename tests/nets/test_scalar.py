"""The embedding of a number beside the time: silent at first, learnable, addable to a stock network, foldable."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastgen.nets.scalar import Scalar, added, fold


def test_it_is_zero_at_first_and_can_come_to_depend_on_its_value():
    embedding, value = Scalar(6), torch.tensor([0.0, 0.3, 1.0])
    assert not embedding(value).any()
    target = torch.stack([value, -value, value**2, 0 * value, value, value], 1)
    optimizer = torch.optim.Adam(embedding.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (embedding(value) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_two_of_them_begin_alike():
    torch.manual_seed(3)
    one, other = Scalar(5), Scalar(5)
    assert torch.equal(one.inner.weight, other.inner.weight) and one.inner.weight.any()


def test_added_for_the_call_and_folded_for_good_are_the_same():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 4))
    x, extra = torch.randn(5, 3), torch.randn(4)
    plain = net(x)
    with added([net], extra.expand(5, 4)):
        inside = net(x)
    assert torch.allclose(inside, plain + extra) and torch.equal(net(x), plain)
    with added([net], None):
        assert torch.equal(net(x), plain)
    folded = copy.deepcopy(net)
    fold(folded[2], extra)
    assert torch.allclose(folded(x), inside, atol=1e-6)


def test_the_addition_ends_with_an_error_too():
    net = nn.Linear(2, 2)
    try:
        with added([net], torch.ones(1, 2)):
            raise KeyError
    except KeyError:
        pass
    assert not net._forward_hooks
