"""LCM against a second statement of it in float64: loss and gradient, fixed points, tables, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.layout import expand
from fastgen.paths import EDM, VP, Prediction
from fastgen.teacher import Teacher
from fastgen.trainers.lcm import Lcm, boundary
from tests.trainers.truth import PointMass, batch, gaussian

N = 24
EXACT = {"rtol": 1e-9, "atol": 1e-11}
KINDS = ("eps", "v", "x0")


class Small(Denoiser):
    """A network of a few weights on points in the plane that reads "text" [B, 2], in float64."""

    family = "small"
    has_null = True
    null = {"text": torch.zeros(1, 2).double()}  # noqa: RUF012

    def __init__(self, kind: Any = "eps", seed: int = 0, path: VP | EDM | None = None) -> None:
        super().__init__(None, path or VP(), Prediction(kind=kind), shape=(2,))
        generator = torch.Generator().manual_seed(seed)
        self.inner, self.outer = (
            nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64)) for shape in ((5, 6), (6, 2))
        )
        self.told: nn.Parameter | None = None
        self.seen: list[Any] = []

    def add_guidance(self) -> None:
        self.told = nn.Parameter(torch.full((6,), 0.05).double())

    @property
    def takes_guidance(self) -> bool:
        return self.told is not None

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        self.seen.append(cond)
        return formula(x, time, cond["text"], cond.get("guidance"), self.inner, self.outer, self.told)


def formula(x: Tensor, t: Tensor, text: Tensor, w: Tensor | None, inner: Tensor, outer: Tensor, told: Any) -> Tensor:
    hidden = torch.cat([x, t[:, None] / 1000, text], 1) @ inner
    if w is not None:
        hidden = hidden + w[:, None] * told
    return hidden.tanh() @ outer


def made(kind: str = "eps", *, lora: bool = False, zero_snr: bool = False, **config: Any) -> Lcm:
    """A student, another teacher and, for a student trained whole, a third network as its slow copy."""
    path = VP(zero_snr=zero_snr)
    student = Small(kind, 0, path)
    if lora:
        student.inner.requires_grad_(False)
    method = Lcm(Lcm.Config(**config), student, Teacher(Small(kind, 1, path)))
    if not lora:
        method.slow["target"] = Small(kind, 2, path)
        method.slow["target"].add_guidance()
    return method


def rows(n: int = N):
    return batch({"x0": gaussian(n, (2,), 3), "cond.text": 2 * gaussian(n, (2,), 4)}, n)


# The same again, with nothing of the path, the pair or the teacher in it


def table(path: VP) -> np.ndarray:
    """The products of 1 - beta, [1000]."""
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if path.zero_snr:
        root = np.sqrt(abar)
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar


def both(kind: str, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x0 and eps by what the network says."""
    if kind == "eps":
        return (x - b * y) / a, y
    if kind == "v":
        return a * x - b * y, b * x + a * y
    return y, (x - a * y) / b


def again(method: Lcm, given: Any, change: str = "") -> Tensor:
    """The loss by hand; `change` is an error planted into it."""
    kind, config, student = method.student.prediction.kind, method.config, method.student
    abar = torch.from_numpy(table(method.table))
    j = given.integers("index", 50)
    t = 20 * (j + 1) - 1
    before = torch.clamp(t + 20 if change == "step reversed" else t - 20, 0, 999)
    w = config.w_min + (config.w_max - config.w_min) * given.uniform("w")
    a, b, a_, b_ = (v[:, None] for v in (abar[t] ** 0.5, (1 - abar[t]) ** 0.5, *(f(abar[before]) for f in ROOTS)))
    text, eps = given["cond.text"], given.normal("noise", (2,))
    t, before = t.double(), before.double()
    z = a * given.x0 + b * eps
    truth = method.teacher.denoiser
    ys = [formula(z, t, words, None, truth.inner, truth.outer, None) for words in (text, 0 * text)]
    (x_c, e_c), (x_u, e_u) = (both(kind, y, z, a, b) for y in ys)
    extra = w[:, None] - 1 if change == "usual weight" else w[:, None]
    x0, e = x_c + extra * (x_c - x_u), e_c + extra * (e_c - e_u)
    e = e_c if change == "x0 alone guided" else e
    z_ = a_ * x0 + b_ * e
    slow = method.slow.get("target", student)

    def f(net: Any, x: Tensor, at: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = formula(x, at, text, 1 + w if net.told is not None else None, net.inner, net.outer, net.told)
        s = 10.0 * at[:, None]
        return 0.25 / (s**2 + 0.25) * x + s / (s**2 + 0.25) ** 0.5 * both(kind, y, x, a, b)[0]

    target = f(slow, z_, before, a_, b_)
    error = f(student, z, t, a, b) - (target if change == "gradient through the target" else target.detach())
    return error.square().mean() if config.loss == "l2" else ((error**2 + 1e-6) ** 0.5 - 1e-3).mean()


ROOTS = (lambda abar: abar**0.5, lambda abar: (1 - abar) ** 0.5)


def by_hand(method: Lcm, given: Any, change: str = "") -> tuple[Tensor, dict[str, Tensor]]:
    named = {name: p for name, p in method.student.named_parameters() if p.requires_grad}
    loss = again(method, given, change)
    return loss.detach(), dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


def found(method: Lcm, given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    named = {name: p for name, p in method.student.named_parameters() if p.requires_grad}
    loss = method.loss(given)[0]
    return loss.detach(), dict(zip(named, torch.autograd.grad(loss, named.values()), strict=True))


@pytest.mark.parametrize("loss", ["huber", "l2"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_a_second_statement(kind, lora, loss):
    method, given = made(kind, lora=lora, loss=loss), rows()
    (value, own), (expected, theirs) = found(method, given), by_hand(method, given)
    torch.testing.assert_close(value, expected, **EXACT)
    assert own.keys() == theirs.keys() == ({"outer"} if lora else {"inner", "outer", "told"})
    for name, gradient in theirs.items():
        torch.testing.assert_close(own[name], gradient, **EXACT)


@pytest.mark.parametrize("change", ["step reversed", "usual weight", "x0 alone guided"])
def test_planted_errors_give_another_gradient(change):
    method, given = made("v", loss="l2"), rows()
    right, wrong = found(method, given)[1]["outer"], by_hand(method, given, change)[1]["outer"]
    assert (right - wrong).norm() > 0.005 * right.norm()


def test_a_gradient_through_the_lora_students_own_target_would_be_another():
    method, given = made("v", lora=True), rows()
    right, wrong = found(method, given)[1]["outer"], by_hand(method, given, "gradient through the target")[1]["outer"]
    assert (right - wrong).norm() > 0.1 * right.norm()


def test_the_teachers_step_runs_towards_the_data(monkeypatch):
    """The same error planted into the trainer itself is seen by the comparison above."""
    method, given = made("v", loss="l2"), rows()
    skip = Lcm.skip
    monkeypatch.setattr(Lcm, "skip", lambda self, z, t, earlier, *rest: skip(self, z, t, 2 * t - earlier, *rest))
    monkeypatch.setattr(VP, "start", 2000.0)
    right = by_hand(method, given)[1]["outer"]
    assert (found(method, given)[1]["outer"] - right).norm() > 0.02 * right.norm()


def test_zero_terminal_snr_is_trained_and_sampled_at_its_last_level():
    method, given = made("v", zero_snr=True), rows(400)
    (value, own), (expected, theirs) = found(method, given), by_hand(method, given)
    assert (method.times(given)[0] == 999).any()
    torch.testing.assert_close(value, expected, **EXACT)
    torch.testing.assert_close(own["outer"], theirs["outer"], **EXACT)


# Fixed points


class Points(PointMass):
    has_null = True
    null = {"text": torch.zeros(1, 1).double()}  # noqa: RUF012

    def add_guidance(self) -> None:
        """Guidance changes nothing here: the null condition knows the same point."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_is_its_own_consistency_function(kind):
    """Zero loss but for c_skip, 7e-6 of z at most; and but for the first level, on which f- is z' and not x0."""
    point = torch.tensor([0.7, -1.1]).double()
    method = Lcm(Lcm.Config(loss="l2"), Points(VP(), kind, point), Teacher(Points(VP(), kind, point)))
    method.slow["target"] = Points(VP(), kind, point)
    given = batch({"x0": point.expand(400, 2), "cond.text": torch.zeros(400, 1).double()}, 400)
    t, earlier = method.times(given)
    z = method.table.mix(given.x0, given.normal("noise", (2,)), t)
    w = method.weights(given)
    error = method.consistent(method.student, z, t, None) - method.target(z, t, earlier, given.cond, w)
    later = earlier > 0
    assert error[later].abs().max() < 5e-5 and 0 < later.sum() < len(later)
    expected = point - VP().mix(given.x0, given.normal("noise", (2,)), earlier)
    torch.testing.assert_close(error[~later], expected[~later], atol=1e-4, rtol=0)


class Gauss(Denoiser):
    """The posterior mean, or the consistency function (the end of its ODE at the table's first level), of N(1, s^2)."""

    has_null = True
    null = {"text": torch.zeros(1, 1).double()}  # noqa: RUF012
    s = 0.6

    def __init__(self, flow: bool) -> None:
        super().__init__(None, VP(), Prediction(kind="x0"), shape=(1,))
        self.flow, self.weight = flow, nn.Parameter(torch.ones(1))

    def add_guidance(self) -> None:
        """As for `Points`."""

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        alpha, sigma = (expand(level, x) for level in self.path.levels(time))
        first = self.path.levels(torch.zeros_like(time[:1]))
        deviation = (alpha**2 * self.s**2 + sigma**2).sqrt()
        if not self.flow:
            return 1 + alpha * self.s**2 / deviation**2 * (x - alpha)
        return first[0] + (x - alpha) * (first[0] ** 2 * self.s**2 + first[1] ** 2).sqrt() / deviation


def test_an_exact_consistency_function_is_left_with_the_error_of_one_ddim_step():
    """Second order in the step: a quarter for half of it."""
    found = []
    for n in (50, 100, 200):
        method = Lcm(Lcm.Config(num_ddim_timesteps=n), Gauss(True), Teacher(Gauss(False)))
        method.slow["target"] = Gauss(True)
        t = torch.full((200,), 599.0).double()
        z = method.table.mix(1 + 0.6 * gaussian(200, (1,), 1), gaussian(200, (1,), 2), t)
        text = {"text": torch.zeros(200, 1).double()}
        target = method.target(z, t, t - 1000 // n, text, torch.full((200,), 7.0).double())
        found.append(float((method.consistent(method.student, z, t, text) - target).abs().mean()))
    assert found[0] < 0.01
    assert 3.5 < found[0] / found[1] < 4.5 and 3.5 < found[1] / found[2] < 4.5


def test_at_the_first_level_the_network_is_not_heard():
    skip, out = boundary(torch.tensor([0.0, 19.0]), 10.0, 0.5)
    assert skip[0] == 1 and out[0] == 0 and float(skip[1]) == pytest.approx(6.925e-6, rel=1e-3)
    method, z = made(), gaussian(3, (2,))
    zero = torch.zeros(3).double()
    cond = {"text": gaussian(3, (2,)), "guidance": zero + 8}
    assert torch.equal(method.consistent(method.student, z, zero, cond), z)


# What the networks are told


def test_teacher_and_lora_student_are_never_told_the_weight():
    for lora in (False, True):
        method = made(lora=lora)
        method.loss(rows())
        assert all("guidance" not in cond for cond in method.teacher.denoiser.seen)
        assert all(("guidance" in cond) != lora for cond in method.student.seen)
        assert (method.sampler().guidance == 8.5) != lora
    assert made(w=5.0).sampler().guidance == 6.0


def test_weights_are_drawn_evenly_for_each_sample():
    w = made(w_min=3.0, w_max=15.0).weights(rows(4000))
    assert 3 <= w.min() < 3.1 and 14.9 < w.max() <= 15 and abs(float(w.mean()) - 9) < 0.2


# What is refused


class Labelled(Small):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 3


class Unread(Small):
    has_null = False


class Told(Small):
    takes_guidance = True


@pytest.mark.parametrize(
    ("student", "teacher", "config", "message"),
    [
        (Small, None, {}, "set teacher=PATH"),
        (lambda: Small("x0", path=EDM()), Small, {}, "indices of a VP table; this student is on EDM"),
        (Labelled, Labelled, {}, "must read text"),
        (Small, Unread, {}, "and the teacher the empty prompt too"),
        (Small, Told, {}, "takes guidance as an input: somebody's student already"),
        (Small, Small, {"num_ddim_timesteps": 48}, "num_ddim_timesteps=48 does not divide the table's 1000 levels"),
    ],
)
def test_what_it_cannot_do_is_refused(student, teacher, config, message):
    with pytest.raises(UserError, match=message):
        Lcm(Lcm.Config(**config), student(), None if teacher is None else Teacher(teacher()))


def test_guidance_that_would_be_ignored_is_refused():
    with pytest.raises(UserError, match=r"guidance=7.5: .* from method.w_min .. w_max; leave it off"):
        Lcm(Lcm.Config(), Small(), Teacher(Small(), guidance=7.5))


@pytest.mark.parametrize(
    ("config", "message"),
    [({"w_min": 9, "w_max": 3}, "w_max=3 lies below"), ({"steps": (1, 64)}, "steps=64 of num_ddim_timesteps=50")],
)
def test_settings_that_contradict_each_other(config, message):
    with pytest.raises(ValueError, match=message):
        Lcm.Config(**config)
