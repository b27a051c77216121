"""Operations and bytes: counted by hand, and beside each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgen.eval.roofline import Ceiling, Cost, bytes_read, ceiling, cost_of, flops
from fastgen.eval.workload import Workload
from fastgen.student import Student
from fastgen.teacher import Teacher
from tests.eval.models import pixel_denoiser, spec, text_denoiser, text_student


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_multiply_add_is_two_operations(device):
    layer, x = nn.Linear(64, 128, device=device), torch.zeros(10, 64, device=device)
    assert flops(lambda: layer(x)) == 2 * 10 * 64 * 128 == 163_840


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_two_products(device):
    q = torch.zeros(1, 2, 64, 32, device=device)
    with torch.inference_mode():
        assert flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 64 * 64 * 32)


def test_a_run_costs_its_calls_and_the_rest_once():
    cost = Cost(net=100, rest=7)
    assert cost.flop("net", nfe=4, batch=3) == 1200
    assert cost.flop("e2e", nfe=4, batch=3) == cost.flop("bare", nfe=4, batch=3) == 1221


@pytest.mark.parametrize("steps", [1, 2])
def test_the_extrapolated_cost_is_that_of_the_run(steps):
    model = text_student(1, 2)
    for scope in ("net", "e2e"):
        work = Workload(model, steps=steps, batch=3)
        assert cost_of(model).flop(scope, work.nfe, 3) == flops(lambda work=work, scope=scope: work.run(scope)) > 0


def test_guidance_doubles_the_networks_share_only():
    teacher = Teacher(text_denoiser())
    plain, guided = cost_of(teacher), cost_of(teacher, guidance=5.0)
    assert (guided.net, guided.rest) == (2 * plain.net, plain.rest) and plain.rest > 0


def test_a_model_of_pixels_is_its_network_alone():
    assert cost_of(Student(pixel_denoiser(), spec(2), {})).rest == 0


def test_weights_are_read_at_every_call():
    net, text, decoder = nn.Linear(4, 4, bias=False), nn.Linear(2, 2, bias=False).bfloat16(), nn.Linear(3, 3)
    parts = [text, net, decoder]
    assert bytes_read(net, parts, "net", nfe=3) == 3 * 64
    assert bytes_read(net, parts, "e2e", nfe=3) == 3 * 64 + 8 + 48


def test_the_shares_of_a_ceiling():
    top = Ceiling(flop_per_s=1e12, bytes_per_s=2e9)
    assert top.mfu(flop=10**9, ms=4.0) == pytest.approx(0.25)
    assert top.bytes_ms(10**6) == pytest.approx(0.5)


def test_a_ceiling_can_be_measured():
    top = ceiling(torch.device("cpu"), torch.float32, sides=(8, 16), copied=1024)
    assert 0 < top.flop_per_s < 1e15 and 0 < top.bytes_per_s < 1e15
