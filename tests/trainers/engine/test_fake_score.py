"""The fake score by itself: what it starts from, its loss on every kind of network, the loss that DMD2 makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastgen.errors import UserError
from fastgen.paths import EDM, VP, RectifiedFlow
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.trainers.engine.fake_score import FakeConfig, distribution_matching, draw_condition
from fastgen.trainers.sim import Sim
from tests.trainers.test_sim import EXACT, A, B, N, law, sim, some_denoised
from tests.trainers.truth import batch, mixture, small


def test_fake_starts_as_the_teachers_copy_or_the_students_and_is_what_it_is_given():
    torch.manual_seed(1)
    teacher, student = small(), small()
    for source, model in (("teacher", teacher), ("student", student)):
        method = Sim(Sim.Config(fake=FakeConfig(init=source)), student, Teacher(teacher))
        fake = method.networks["fake"]
        assert fake is not model and all(p.requires_grad for p in fake.parameters())
        for own, other in zip(fake.parameters(), model.parameters(), strict=True):
            assert torch.equal(own, other) and own.data_ptr() != other.data_ptr()
    assert not any(p.requires_grad for p in teacher.parameters())
    given = small()
    (name,) = Sim.copies
    assert Sim(Sim.Config(), student, Teacher(teacher), **{name: given}).networks[name] is given
    with pytest.raises(UserError, match=r"a closed-form teacher has no weights; set method.fake.init=student"):
        Sim(Sim.Config(), student, Teacher(mixture()))


@pytest.mark.parametrize("path", [RectifiedFlow(), VP(), EDM()])
def test_fakes_loss_is_the_weighted_denoising_error(path):
    kind = {"VP": "eps", "EDM": "edm"}.get(type(path).__name__, "flow")
    torch.manual_seed(3)
    fake = mlp.build(mlp.MLPConfig(width=8, depth=1, path=type(path).__name__, prediction=kind), (2,), None).double()
    nn.init.normal_(fake.net.outer.weight, std=0.5)
    method, rows = sim(fake=fake), batch({}, N)
    loss, _ = method.fake_loss(rows)
    x, noise, u = rows.normal("z", (2,)) @ A.T + B, rows.normal("fake/noise", (2,)), rows.uniform("fake/sigma")
    if kind == "eps":  # mean |eps - n|^2 at whole indices of the table
        index = (u * 1000).floor()
        alpha, sigma = path.levels(index)
        state = alpha[:, None] * x + sigma[:, None] * noise
        eps = fake.net(state, index / 999)
        torch.testing.assert_close(loss, (eps - noise).square().mean(), rtol=1e-6, atol=0)
        return
    sigma = (-1.2 + 1.2 * torch.special.ndtri(u)).exp()
    if kind == "edm":  # only the levels that this network knows
        low, high = (0.5 * (1 + math.erf((math.log(v) + 1.2) / (1.2 * math.sqrt(2)))) for v in (0.002, 80))
        sigma = (-1.2 + 1.2 * torch.special.ndtri(low + (high - low) * u)).exp()
    clean = fake(x + sigma[:, None] * noise, sigma, on=EDM()).x0
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    torch.testing.assert_close(loss, (weight * (clean - x).square().mean(1)).mean(), **EXACT)


def test_samples_that_are_no_numbers_teach_the_fake_nothing():
    fake, rows = small(), batch({}, N)
    nn.init.normal_(fake.net.outer.weight)
    method, x = sim(fake=fake), rows.normal("z", (2,))
    bad = torch.arange(N) % 3 == 0
    loss, logs = method.fake.loss(rows, torch.where(bad[:, None], math.nan, x), None)
    assert int(logs["fake/dropped"]) == int(bad.sum())
    (gradient,) = torch.autograd.grad(loss, fake.net.outer.weight)
    whole = batch({}, torch.arange(N)[~bad])
    (expected,) = torch.autograd.grad(method.fake.loss(whole, x[~bad], None)[0], fake.net.outer.weight)
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_labels_of_a_batch_come_before_drawn_ones():
    label = torch.tensor([2, 0, 1])
    assert torch.equal(draw_condition(batch({"label": label}, 3), small(3), 0.5)["label"], label)
    assert draw_condition(batch({}, 3), small(), 0.5) is None


def test_fakes_loss_is_least_at_the_exact_score_of_the_student():
    rows = batch({}, 4096)
    least = [float(sim(fake=law(B + shift, A @ A.T)).fake_loss(rows)[0]) for shift in (0.0, 0.05, -0.05)]
    assert least[0] < min(least[1:])


def test_distribution_matching_has_the_gradient_of_its_paper():
    x, real, fake, _ = some_denoised()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(distribution_matching(x, real, fake).sum(), x)
    scale = (x.detach() - real).abs().mean((1, 2, 3), keepdim=True) + 1e-6
    torch.testing.assert_close(gradient, (fake - real) / scale, **EXACT)
