"""Flow matching against formulas: gradient, minimiser, times, dropped labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import kstest
from torch import nn

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import EDM, VP, Prediction
from fastgen.trainers.flow_matching import FlowMatching, last_time
from tests.trainers.truth import RF, Linear, batch, gaussian, gradients, mixture, small

LABELS = [0, 1, 1]


def method(student, **options):
    return FlowMatching(FlowMatching.Config(**options), student)


UNIFORM = {"kind": "uniform"}
TIMES = [UNIFORM, {"kind": "logit_normal", "mean": 1.0, "std": 0.5}]


def spied(student):
    """What the bare network of a denoiser is asked: lists of states, times and conditions."""
    asked, raw = [], student.raw
    student.raw = lambda x, time, cond, r: (asked.append((x, time, cond)), raw(x, time, cond, r))[1]
    return asked


@pytest.mark.parametrize("times", TIMES)
def test_loss_and_gradient_equal_the_hand_derived_ones(times):
    shape, n = (1, 3, 3), 16
    student, rows = Linear(shape), batch({"x0": gaussian(n, shape)}, n)
    loss, gradient = gradients(method(student, times=times), rows)
    t = rows.uniform("t") if times == UNIFORM else 1 / (1 + (-1 - 0.5 * rows.normal("t", ())).exp())
    x0, eps = rows.x0.flatten(1), rows.normal("eps", shape).flatten(1)
    x = (1 - t[:, None]) * x0 + t[:, None] * eps
    v = x @ student.a.detach().T + student.b.detach() + t[:, None] * student.c.detach()
    error, close = v - (eps - x0), {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(loss, error.square().mean(), **close)
    torch.testing.assert_close(gradient["a"], 2 * error.T @ x / error.numel(), **close)
    torch.testing.assert_close(gradient["b"], 2 * error.sum(0) / error.numel(), **close)
    torch.testing.assert_close(gradient["c"], 2 * (t[:, None] * error).sum(0) / error.numel(), **close)


class Leaning(Denoiser):
    """The exact posterior mean of x0, plus w_k times the k-th of some functions of (x, t): a gradient in w = 0 says
    whether the exact one is where the loss is stationary. On a path of its own, with labels."""

    family = "leaning"

    def __init__(self, truth, path) -> None:
        super().__init__(None, path, Prediction(kind="x0"), shape=(2,), num_classes=truth.num_classes)
        self.truth, self.w = truth, nn.Parameter(torch.zeros(8, dtype=torch.float64))

    def raw(self, x, time, cond, extra):
        alpha, sigma = (level[:, None] for level in self.path.levels(time))
        norm = torch.hypot(alpha, sigma)
        seen, level, one = x / norm, torch.atan2(sigma, alpha), torch.ones_like(x)
        label = 0 * level if cond is None else cond["label"][:, None].double()
        features = [one, seen, level * one, seen.flip(1), seen.sin(), level * seen, label * one, label * seen.cos()]
        # Times sigma: near clean data the velocity magnifies any change of x0 by 1 / t.
        return self.truth(x, time, cond, on=self.path).x0 + sigma / norm * (torch.stack(features, -1) @ self.w)


def stationarity(student, batches=40, size=4000, **options):
    """The gradient's mean over its standard error, by component, from many batches of the mixture's own draws."""
    found = []
    for i in range(batches):
        rows = torch.arange(i * size, (i + 1) * size)
        data = {"label": (rows % 10 >= 3).long()} if student.num_classes else {}  # as often as the weights say
        data["x0"] = mixture(LABELS).sample(5, "data", rows, data or None).double()
        found.append(gradients(method(student, **options), batch(data, rows))[1]["w"])
    found = torch.stack(found)
    return float((found.mean(0) / (found.std(0) / batches**0.5)).nan_to_num().abs().max())


@pytest.mark.parametrize("path", [RF, VP(), EDM()])
@pytest.mark.parametrize("times", TIMES)
def test_loss_is_stationary_at_the_posterior_mean(path, times):
    truth = mixture()
    assert stationarity(Leaning(truth, path), times=times) < 4
    truth.means += 0.05
    assert stationarity(Leaning(truth, path), batches=10, times=times) > 8


@pytest.mark.parametrize("drop_label", [0.0, 0.3])
def test_each_label_has_its_own_posterior_mean_and_dropped_ones_have_the_whole(drop_label):
    truth = mixture(LABELS)
    assert stationarity(Leaning(truth, RF), drop_label=drop_label) < 4
    row = 2 if drop_label else 0  # a network that takes the null label, or a class, for another one
    truth.shares[row] = truth.shares[1]
    assert stationarity(Leaning(truth, RF), batches=10, drop_label=drop_label) > 8


@pytest.mark.parametrize(
    ("path", "scale"), [("RectifiedFlow", 1.0), ("VP", 0.935958), ("EDM", 80 / 81), ("TrigFlow", 1.0)]
)
def test_times_have_their_law_inside_the_networks_own_path(path, scale):
    student, n = small(path=path), 20_000
    assert last_time(student.path) == pytest.approx(scale, abs=5e-7)
    laws = ["uniform", lambda u: ndtr((np.log(u / (1 - u)) - 1) / 0.5)]
    for times, law in zip(TIMES, laws, strict=True):
        asked = on_rectified_flow(student, {"x0": gaussian(n, (2,))}, n, times=times)
        assert kstest(asked / scale, law).statistic < 1.95 / math.sqrt(n), times


def on_rectified_flow(student, data, n, **options):
    """The rectified-flow times that a loss asks of a network."""
    seen, forward = [], student.forward
    student.forward = lambda x, t, cond=None, *, on: (seen.append((t, on)), forward(x, t, cond, on=on))[1]
    method(student, **options).loss(batch(data, n))
    ((t, on),) = seen
    assert on == RF
    student.forward = forward
    return np.clip(t.numpy(), 0, last_time(student.path))


def labels_seen(student, drop_label, n=20_000):
    asked, label = spied(student), torch.arange(n) % 3
    method(student, drop_label=drop_label).loss(batch({"x0": gaussian(n, (2,)), "label": label}, n))
    ((_, time, cond),) = asked
    return label, time, None if cond is None else cond["label"]


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_labels_are_dropped_as_often_as_asked_and_become_the_null_label(share):
    label, time, seen = labels_seen(small(3), share)
    dropped, n = seen == 3, len(label)
    assert abs(int(dropped.sum()) - share * n) <= 4 * (share * (1 - share) * n) ** 0.5
    assert torch.equal(seen[~dropped], label[~dropped])
    if 0 < share < 1:
        columns = torch.stack([dropped.double(), time, label.double()])
        assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < 4 / n**0.5, "drops follow time or label"


def test_unconditional_network_is_not_shown_the_labels_of_the_data():
    assert labels_seen(small(), 0.1, n=4)[2] is None


def test_dropping_labels_needs_a_label_that_means_none():
    student = small(3)
    student.null_label = False
    with pytest.raises(UserError, match=r"set method\.drop_label=0"):
        method(student)
    assert labels_seen(student, 0.0, n=9)[2].tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_outside_0_and_1_are_refused(share):
    with pytest.raises(ValueError, match="drop_label"):
        FlowMatching.Config(drop_label=share)
