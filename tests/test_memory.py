"""Peak memory on the meta device against counts by hand."""

from __future__ import annotations

import inspect

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional

from fastgen.memory import peak_bytes
from fastgen.sparse import Voxels, attention
from fastgen.sparse.shapes_only import ShapesOnly

N = 100  # rows and columns: one activation is 4 N^2 bytes
UNIT = 4 * N * N


def x():
    return torch.empty(N, N, device="meta")


def layers(n):
    net = nn.Sequential(*[nn.Linear(N, N, bias=False, device="meta") for _ in range(n)])
    for parameter in net.parameters():
        parameter.grad = torch.empty_like(parameter)
    return net


def test_what_is_dropped_is_counted_no_longer():
    def compute():
        y = x()
        for _ in range(5):
            y = y + 1  # two at once: the old one and the new one

    assert peak_bytes(compute) == 2 * UNIT


def test_views_and_in_place_results_take_nothing():
    def compute():
        y = x()
        y.view(-1)[3:].mul_(2)
        y.T.add_(1)

    assert peak_bytes(compute) == UNIT


def test_autograd_keeps_the_input_of_every_layer():
    net = layers(6)
    with_graph, without = [], []
    kept = peak_bytes(lambda: with_graph.append(net(x())))
    assert kept == 7 * UNIT  # six inputs and the output
    with torch.no_grad():
        assert peak_bytes(lambda: without.append(net(x()))) == 3 * UNIT  # the caller's, and two in turn


def test_the_backward_pass_is_counted_and_gradients_that_lie_there_already_are_not():
    net = layers(6)
    # In the last layer: six inputs and the output, and the gradients of output, weight and input.
    assert peak_bytes(lambda: net(x()).backward(x())) == 10 * UNIT
    for parameter in net.parameters():
        parameter.grad = None
    # In the layer before it: five inputs, the output and its gradient, two weights' gradients, and two on the way.
    assert peak_bytes(lambda: net(x()).backward(x())) == 11 * UNIT


def test_checkpoints_keep_their_inputs_and_compute_the_rest_again():
    net = layers(9)

    def compute():
        y = x().requires_grad_()
        for part in (net[:3], net[3:6], net[6:]):
            y = torch.utils.checkpoint.checkpoint(part, y, use_reentrant=False)
        y.sum().backward()

    plain = peak_bytes(lambda: net(x()).sum().backward())
    assert peak_bytes(compute) < 0.8 * plain
    assert inspect.isfunction(torch.utils.checkpoint.checkpoint)  # what was put in its place is gone


def test_attention_keeps_its_inputs_and_output_not_the_square():
    tokens, heads, width = 512, 2, 8
    qkv = [torch.empty(1, heads, tokens, width, device="meta", requires_grad=True) for _ in range(3)]
    one = 4 * heads * tokens * width
    kept = []
    assert peak_bytes(lambda: kept.append(functional.scaled_dot_product_attention(*qkv))) == one
    assert kept[0].shape == qkv[0].shape
    assert peak_bytes(lambda: functional.scaled_dot_product_attention(*qkv).sum().backward()) <= 6 * one


def test_half_precision_halves_activations_and_adds_a_copy_of_the_weights():
    net, kept = layers(4), []
    # The float32 input, its cast, three inputs, the output, four weights.
    assert peak_bytes(lambda: kept.append(net(x())), torch.bfloat16) == UNIT + (1 + 3 + 1 + 4) * UNIT // 2
    assert kept[0].dtype == torch.bfloat16


def test_what_is_computed_again_is_computed_in_half_precision_too():
    net = layers(4)

    def compute():
        torch.utils.checkpoint.checkpoint(net, x().requires_grad_(), use_reentrant=False).sum().backward()

    peak_bytes(compute, torch.bfloat16)  # torch compares the types of both passes


def test_norms_are_computed_in_float32_under_autocast():
    norm, found = nn.LayerNorm(N, device="meta"), []
    peak_bytes(lambda: found.append(norm(x().bfloat16())), torch.bfloat16)
    assert found[0].dtype == torch.float32


def test_attention_of_voxels_is_fused_in_both_passes():
    n = 512
    coords = torch.stack([torch.zeros(n), *torch.arange(n).expand(3, n)], 1).int()
    line = Voxels(torch.empty(n, 1, device="meta"), ShapesOnly(coords, 1))
    qkv = [torch.empty(n, 1, 4, device="meta", requires_grad=True) for _ in range(3)]
    assert peak_bytes(lambda: attention.full(*qkv, line).sum().backward()) < 4 * n * n / 4
