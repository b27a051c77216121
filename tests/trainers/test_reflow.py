"""Reflow against formulas: losses and gradients, times, first states, fixed points, networks of another kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import nn
from torch.nn import functional

from fastgen.errors import UserError
from fastgen.paths import EDM, VP, TrigFlow, carry
from fastgen.samplers import few_step, ode
from fastgen.teachers import mlp, unet
from fastgen.teachers.mixture import Mixture
from fastgen.trainers.engine.method import Batch
from fastgen.trainers.reflow import Reflow, u_shape
from tests.trainers.truth import (
    PLANTED,
    RF,
    Linear,
    PointMass,
    Straight,
    batch,
    gaussian,
    gradient_norm,
    gradients,
    plant,
    root,
)

SHAPE = (1, 4, 4)
KINDS = ("l2", "huber", "lpips", "lpips_huber")
# Every path with the prediction kinds that are exact for a point mass all the way.
PATHS = [
    (RF, "flow"),
    (RF, "x0"),
    (VP(), "eps"),
    (VP(), "v"),
    (EDM(), "x0"),
    (TrigFlow(), "trig"),
    (VP(zero_snr=True), "v"),
]


class Features(nn.Module):
    """Stands for LPIPS: the mean squared difference of a frozen random convolution, [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1, bias=False, dtype=torch.float64)
        self.conv.weight.data = gaussian(3, (1, 3, 3), seed=9)
        self.requires_grad_(False)

    def forward(self, a, b):
        return (self.conv(a) - self.conv(b)).square().mean((1, 2, 3))

    def gradient(self, a, b):
        """d forward / d a, each sample by itself."""
        off = self.conv(a) - self.conv(b)
        return 2 / off[0].numel() * functional.conv_transpose2d(off, self.conv.weight, padding=1)


def reflow(student, distance=None, **options):
    return Reflow(Reflow.Config(**options), student, distance=distance)


def image_batch(n=12):
    return batch({"x0": gaussian(n, SHAPE, 1), "eps": gaussian(n, SHAPE, 2)}, n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [0.00054, 0.3])
def test_loss_and_gradient_equal_the_hand_derived_ones(kind, c):
    student, features, rows = Linear(SHAPE), Features(), image_batch()
    loss, gradient = gradients(reflow(student, features, loss=kind, huber_c=c), rows)

    n, size = len(rows), math.prod(SHAPE)
    t, x0, eps = rows.uniform("t"), rows.x0.flatten(1), rows["eps"].flatten(1)
    x = (1 - t[:, None]) * x0 + t[:, None] * eps
    v = x @ student.a.detach().T + student.b.detach() + t[:, None] * student.c.detach()
    error = v - (eps - x0)
    wide = torch.sqrt(error.square().sum(1) + (c * size) ** 2)
    huber, by_huber = (wide - c * size) / size, error / (size * wide[:, None])
    clean, data = (x - t[:, None] * v).view(n, *SHAPE), rows.x0
    seen, by_seen = features(clean, data), -t[:, None] * features.gradient(clean, data).flatten(1)
    expected, by_v = {
        "l2": (error.square().mean(1), 2 * error / size),
        "huber": (huber, by_huber),
        "lpips": (seen, by_seen),
        "lpips_huber": ((1 - t) * huber + seen, (1 - t[:, None]) * by_huber + by_seen),
    }[kind]
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(loss, expected.mean(), **close)
    torch.testing.assert_close(gradient["a"], by_v.T @ x / n, **close)
    torch.testing.assert_close(gradient["b"], by_v.mean(0), **close)
    torch.testing.assert_close(gradient["c"], (t[:, None] * by_v).mean(0), **close)


def test_distance_stays_frozen_and_the_mean_squared_error_is_logged():
    student, features, rows = Linear(SHAPE), Features(), image_batch()
    before = features.conv.weight.clone()
    value, logs = reflow(student, features, loss="lpips").loss(rows)
    value.backward()
    assert features.conv.weight.grad is None and torch.equal(features.conv.weight, before)
    plain, _ = reflow(student).loss(rows)
    torch.testing.assert_close(logs["velocity_mse"], plain)


@pytest.mark.parametrize("kind", ["lpips", "lpips_huber"])
def test_perceptual_losses_without_weights_are_refused(kind):
    with pytest.raises(UserError, match=f"method.loss={kind} needs LPIPS weights: set lpips.trunk"):
        reflow(Linear(SHAPE), loss=kind)


@pytest.mark.parametrize("bad", [{"steps": ()}, {"steps": (1, 0)}, {"huber_c": 0.0}, {"u_shape_a": 0.0}])
def test_settings_without_meaning_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Reflow.Config(**bad)


# Times


def u_cdf(s, a=4.0):
    """The integral of the U-shaped density a / 2 (e^(a s) + e^(a (1 - s))) / (e^a - 1)."""
    return 0.5 + (np.exp(a * s) - np.exp(a * (1 - s))) / (2 * (np.exp(a) - 1))


def test_u_shape_has_the_density_of_the_paper():
    n, h = 4_000_000, 1e-3
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = u_shape(u, 4.0)
    assert drawn.min() >= 1e-5 and drawn.max() <= 1 - 1e-5
    s = ((drawn - 1e-5) / (1 - 2e-5)).sort().values

    def below(q: float) -> float:
        return float(torch.searchsorted(s, torch.tensor(q, dtype=torch.float64))) / n

    for q in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        assert below(q) == pytest.approx(u_cdf(q), abs=2e-6)
    # One-sided second-order differences at the ends, a central one in the middle.
    assert 2 * below(h) / h - below(2 * h) / (2 * h) == pytest.approx(2.0746, abs=1e-3)
    assert 2 * (1 - below(1 - h)) / h - (1 - below(1 - 2 * h)) / (2 * h) == pytest.approx(2.0746, abs=1e-3)
    assert (below(0.5 + h) - below(0.5 - h)) / (2 * h) == pytest.approx(0.55144, abs=1e-3)


@pytest.mark.parametrize(("path", "kind"), [(RF, "flow"), (VP(), "eps")])
def test_drawn_times_have_their_law(path, kind):
    point = PointMass(path, kind, gaussian(2, ()))
    rows, n = batch({"x0": gaussian(1, (2,)).expand(20_000, 2), "eps": gaussian(20_000, (2,))}, 20_000), 20_000
    scale = reflow(point).last_time
    drawn = {times: reflow(point, times=times).line(rows)[0] / scale for times in ("uniform", "u_shape")}
    limit = 1.95 / math.sqrt(n)  # Kolmogorov's statistic at the level 0.001
    assert kstest(drawn["uniform"].numpy(), "uniform").statistic < limit
    assert kstest(drawn["u_shape"].numpy(), u_cdf).statistic < limit
    assert kstest(drawn["u_shape"].numpy(), "uniform").statistic > 5 * limit


@pytest.mark.parametrize(("path", "kind"), PATHS)
def test_distillation_visits_the_students_own_times_each_step_count_as_often_as_any_other(path, kind):
    counts, n = (1, 2, 4), 7000
    method = reflow(PointMass(path, kind, gaussian(2, ())), times="steps", steps=counts)
    t = method.line(batch({"x0": gaussian(n, (2,)), "eps": gaussian(n, (2,), 2)}, n))[0]
    share: dict[float, float] = {}
    for steps in counts:
        for time in path.grid(steps):
            here = float(RF.time(*path.levels(torch.tensor(time, dtype=torch.float64))))
            share[here] = share.get(here, 0.0) + 1 / steps / len(counts)
    visited, found = t.unique(return_counts=True)
    np.testing.assert_allclose(visited.numpy(), sorted(share), atol=1e-12)
    assert chisquare(found.numpy(), [n * share[time] for time in sorted(share)]).pvalue > 0.001


@pytest.mark.parametrize(("path", "kind"), PATHS)
def test_training_states_are_the_states_that_the_sampler_visits(path, kind):
    """All data are one point, whose exact network takes every run along the lines that training draws from."""
    m, n = gaussian(2, ()), 64
    point, eps = PointMass(path, kind, m), gaussian(n, (2,), 2)
    method = reflow(point, times="steps", steps=(1, 2, 4))
    t, x, _ = method.line(batch({"x0": m.expand(n, 2), "eps": eps}, n))
    visited = []

    class Spy(nn.Module):
        def forward(self, x, t, cond=None, *, on=None):
            visited.append(carry(x, t, on, RF))
            return point(x, t, cond, on=on)

    seen = 0
    for steps in (1, 2, 4):
        end = few_step.sample(Spy(), method.sampler(), eps, steps)
        torch.testing.assert_close(end, m.expand(n, 2), atol=1e-6, rtol=0)
    for state, time in visited:
        here = (t - time).abs() < 1e-9
        # A path that never reaches pure noise starts a hair off its own level; carry() would rescale it.
        torch.testing.assert_close(x[here], state[here], atol=2e-6, rtol=2e-6)
        seen += int(here.sum())
    assert seen > n


@pytest.mark.parametrize(
    ("path", "kind", "last", "scale"),
    [
        (RF, "flow", 1.0, 1.0),
        (TrigFlow(), "trig", 1.0, 1.0),
        (EDM(), "x0", 80 / 81, 80 / 81),
        (VP(zero_snr=True), "v", 1.0, 1.0),
        # SD's betas: sqrt(0.0046601) and sqrt(1 - 0.0046601); a run starts on noise of unit variance.
        (VP(), "eps", 0.935958, 1 / (0.0682651 + 0.9976672)),
    ],
)
def test_runs_begin_at_the_last_level_on_what_the_sampler_feeds(path, kind, last, scale):
    method = reflow(PointMass(path, kind, gaussian(2, ())), times="steps", steps=(1,))
    assert method.last_time == pytest.approx(last, abs=5e-7)
    assert method.first_scale == pytest.approx(scale, abs=5e-7)
    rows = batch({"x0": gaussian(5, (2,)), "eps": gaussian(5, (2,), 2)}, 5)
    t, x, _ = method.line(rows)
    assert t.tolist() == pytest.approx([last] * 5, abs=5e-7)
    torch.testing.assert_close(x, scale * rows["eps"], atol=1e-6, rtol=0)


# Fixed points


@pytest.mark.parametrize(("path", "kind"), PATHS)
@pytest.mark.parametrize("times", ["uniform", "u_shape", "steps"])
def test_point_mass_is_a_fixed_point_on_every_path(path, kind, times):
    """A teacher of one point is straight already: nothing must move. (v = z - x0 on VP moves it 6 % towards 0.)"""
    m = gaussian(math.prod(SHAPE), ()).view(SHAPE)
    rows = batch({"x0": m.expand(12, *SHAPE), "eps": gaussian(12, SHAPE, 2)}, 12)
    for loss in KINDS:
        method = reflow(PointMass(path, kind, m), Features(), times=times, loss=loss)
        assert gradient_norm(method, rows) < 1e-8, loss
        method.student.m.data *= 1.06
        assert gradient_norm(method, rows) > 1e-3, loss


MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
COV = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)


def gaussian_pairs(n=256):
    """Exact pairs of a Gaussian: the ODE's map is x0 = m + S^(1/2) z (2209.03003; monotone and linear)."""
    z = gaussian(n, (2,), 2)
    return {"x0": MEAN + z @ root(COV), "eps": z}


@pytest.mark.parametrize("loss", ["l2", "huber"])
@pytest.mark.parametrize("times", ["uniform", "u_shape", "steps"])
def test_straight_pairs_of_a_gaussian_are_a_fixed_point(loss, times, monkeypatch):
    config, student = Reflow.Config(loss=loss, times=times), Straight(MEAN, root(COV))
    rows = batch(gaussian_pairs(), 256)
    assert Reflow(config, student).loss(rows)[0] < 1e-10
    assert gradient_norm(Reflow(config, student), rows) < 1e-10
    # The straight network's run has no bend, and ends where the pairs do.
    assert ode.straightness(student, rows["eps"], steps=10) < 1e-12
    assert Reflow(config, student).diagnose(student, rows)["teacher_gap"] < 1e-10
    for error in PLANTED:
        with monkeypatch.context() as patch:
            plant(error, patch)
            assert gradient_norm(Reflow(config, student), rows) > 0.05, error


def test_a_curved_teacher_is_no_fixed_point_though_it_ends_where_the_pairs_do():
    """The Gaussian's own flow has the same map, and S = (2 - pi / 2) trace S^(1/2): each axis of deviation s has
    a(t) = hypot(t, (1 - t) s) and int a'^2 = 1 + s^2 - s pi / 2."""
    teacher, rows = Mixture(torch.ones(1), MEAN[None], COV[None]), batch(gaussian_pairs(4000), 4000)
    torch.testing.assert_close(ode.solve(teacher, rows["eps"], steps=400), rows.x0, atol=1e-4, rtol=0)
    expected = (2 - math.pi / 2) * float(root(COV).trace())
    assert ode.straightness(teacher, rows["eps"], steps=200) == pytest.approx(expected, rel=0.05)
    method = Reflow(Reflow.Config(), teacher)
    assert method.loss(rows)[0] > 0.05
    told = method.diagnose(teacher, rows)
    assert told["straightness"] == pytest.approx(ode.straightness(teacher, rows["eps"], steps=20))
    one = ode.solve(teacher, rows["eps"], steps=1, solver="euler")
    assert told["teacher_gap"] == pytest.approx(float((one - rows.x0).square().mean().sqrt()))


# Networks of another kind


def eps_on_vp(family):
    """An untrained eps network on SD's betas, its zeroed last layer filled so that it says something."""
    torch.manual_seed(4)
    if family == "mlp":
        student = mlp.build(mlp.MLPConfig(path="VP", prediction="eps", width=16, depth=1), (2,), None)
        last = student.net.outer
    else:
        config = unet.UNetConfig(path="VP", prediction="eps", block_out_channels=(8, 8), layers_per_block=1)
        student = unet.build(config, (3, 8, 8), None)
        last = student.net.conv_out
    nn.init.normal_(last.weight, std=0.3)
    return student


def from_eps(student, x, t):
    """eps - x0 by hand: index, levels and state of SD's table at rectified-flow time t, and the bare network there."""
    bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    index = np.interp(np.log(t / (1 - t)), np.log(np.sqrt((1 - bar) / bar)), np.arange(1000))
    alpha, sigma = ((1 - t) / np.hypot(t, 1 - t), t / np.hypot(t, 1 - t))
    alpha, sigma, index = (torch.from_numpy(v).float().view(-1, *[1] * (x.ndim - 1)) for v in (alpha, sigma, index))
    own = x * (alpha + sigma)
    eps = student.raw(own, student.time_scale * index.flatten(), None, None)
    return eps - (own - sigma * eps) / alpha


@pytest.mark.parametrize("family", ["mlp", "unet"])
@pytest.mark.parametrize("times", ["uniform", "u_shape", "steps"])
def test_eps_network_on_vp_starts_as_its_teacher_and_is_never_asked_beyond_its_last_level(family, times, monkeypatch):
    student = eps_on_vp(family)
    rows = Batch(
        {name: gaussian(32, student.shape, seed).float() for seed, name in enumerate(("x0", "eps"))},
        torch.arange(32),
        seed=1,
        step=0,
        steps=1,
    )
    method, asked = reflow(student, times=times), []
    t, x, target = method.line(rows)
    known = t > 0.03  # above the table's first level
    expected = from_eps(student, x, t.double().numpy())[known]
    torch.testing.assert_close(student(x, t, on=RF).velocity[known], expected, rtol=2e-3, atol=2e-3)

    raw = student.raw
    monkeypatch.setattr(student, "raw", lambda x, time, *rest: (asked.append(time), raw(x, time, *rest))[1])
    loss, _ = method.loss(rows)
    loss.backward()
    torch.testing.assert_close(loss[None], (student(x, t, on=RF).velocity - target).square().mean()[None])
    index = torch.cat(asked) / student.time_scale
    assert index.min() >= 0 and index.max() <= 999.0005
    assert t.max() <= method.last_time + 1e-6 and method.last_time == pytest.approx(0.935958, abs=5e-7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert sum(float(p.grad.abs().sum()) for p in student.parameters()) > 0


def test_labels_of_the_pairs_reach_the_student():
    student = mlp.build(mlp.MLPConfig(width=16, depth=1), (2,), 3)
    seen = []
    student.net.register_forward_hook(lambda net, inputs, output: seen.append(inputs[2]))
    data = {"x0": torch.randn(6, 2), "eps": torch.randn(6, 2), "label": torch.tensor([0, 1, 2, 3, 0, 1])}
    reflow(student).loss(batch(data, 6))
    assert seen[0].tolist() == [0, 1, 2, 3, 0, 1]
