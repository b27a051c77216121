"""Consistency training against formulas: exact consistency functions, teacher steps, boundaries, masks, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import EDM, VP, Pair, Prediction, RectifiedFlow, TrigFlow
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.teachers.mixture import Mixture
from fastgen.trainers import consistency
from fastgen.trainers.consistency import Consistency, pseudo_huber
from fastgen.trainers.engine.method import Batch
from tests.trainers.truth import batch, gaussian, gradients, mixture, root, small

N = 64
VIEW = EDM()
MU, S = torch.tensor([0.4, -0.3]).double(), torch.tensor([[0.5, 0.2], [0.2, 0.3]]).double()
EXACT = {"rtol": 1e-9, "atol": 1e-11}


class Exact(Denoiser):
    """The consistency function of one Gaussian with end point at the level `end`, on any view.

    f(x, s) = mu + (S + end^2)^(1/2) (S + s^2)^(-1/2) (x - mu)
    """

    family = "exact"

    def __init__(self, end: float = 0.002) -> None:
        super().__init__(None, EDM(), Prediction(kind="cm", sigma_min=end), shape=(2,))
        self.end, self.mu = end, nn.Parameter(MU.clone())

    def forward(self, x, t, cond=None, *, on=None, r=None):
        values, vectors = torch.linalg.eigh(S)
        scale = ((values + self.end**2) / (values + t[:, None] ** 2)).sqrt()
        x0 = self.mu + ((x - self.mu) @ vectors * scale) @ vectors.T
        return Pair(x0, (x - x0) / t[:, None])


def law() -> Mixture:
    return Mixture(torch.ones(1), MU[None], S[None])


def moved(x: Tensor, hi: Tensor, lo: Tensor) -> Tensor:
    """The exact solution of the ODE from one level to another."""
    values, vectors = torch.linalg.eigh(S)
    scale = ((values + lo[:, None] ** 2) / (values + hi[:, None] ** 2)).sqrt()
    return MU + ((x - MU) @ vectors * scale) @ vectors.T


def made(kind: str, student: Denoiser | None = None, teacher: Denoiser | None = None, **options) -> Consistency:
    return Consistency(
        Consistency.Config(kind=kind, **options), student or small(), None if teacher is None else Teacher(teacher)
    )


def points(n: int = N, **data: Tensor):
    x0 = MU + gaussian(n, (2,), 7) @ root(S)
    return batch({"x0": x0, **data}, n)


# The exact consistency function


def test_exact_steps_leave_the_exact_function_without_a_loss(monkeypatch):
    method, rows = made("cd", Exact(), law(), distance="l2"), points()
    assert method.loss(rows)[0].item() > 1e-8
    monkeypatch.setattr(Consistency, "teacher_step", lambda self, x, hi, lo, cond: moved(x, hi, lo))
    loss, grads = gradients(method, rows)
    assert float(loss) < 1e-28 and float(grads["mu"].abs().max()) < 1e-12


@pytest.mark.parametrize(("solver", "factor"), [("euler", 4), ("heun", 8)])
def test_order_of_the_teachers_step(solver, factor):
    """The local error is h^2 of Euler and h^3 of Heun: the loss of the exact function falls so for half the step."""
    method, rows = made("cd", Exact(), law(), solver=solver, huber_c=0.0), points()
    hi = torch.full((N,), 1.0, dtype=torch.float64)
    losses = [method.distances(method.student, rows, hi - h, hi)[0].mean().item() for h in (0.02, 0.01, 0.005)]
    assert losses[0] / losses[1] == pytest.approx(factor, rel=0.05)
    assert losses[1] / losses[2] == pytest.approx(factor, rel=0.03)


def test_a_reversed_step_of_the_teacher_is_seen(monkeypatch):
    method, rows = made("cd", Exact(), law(), distance="l2"), points()
    right, step = method.loss(rows)[0].item(), Consistency.teacher_step
    monkeypatch.setattr(Consistency, "teacher_step", lambda self, x, hi, lo, cond: 2 * x - step(self, x, hi, lo, cond))
    assert method.loss(rows)[0].item() > 100 * right


def test_heuns_step_by_hand():
    method, rows = made("cd", small(), law()), points(3)
    x, hi, lo = gaussian(3, (2,), 2) * 3, torch.tensor([5.0, 1.0, 0.3]).double(), torch.tensor([4.0, 0.7, 0.0]).double()
    denoise = lambda x, s: law()(x, s, on=VIEW).x0  # noqa: E731
    first = (x - denoise(x, hi)) / hi[:, None]
    there = x + (lo - hi)[:, None] * first
    second = (there - denoise(there, lo)) / lo[:, None]
    expected = x + (lo - hi)[:, None] * (first + second) / 2
    expected[2] = there[2]  # at level 0 there is no slope: Euler
    torch.testing.assert_close(method.teacher_step(x, hi, lo, rows.cond), expected, **EXACT)


@pytest.mark.parametrize("path", [VP(), RectifiedFlow(), TrigFlow(), EDM()])
def test_a_teacher_of_any_path_is_asked_at_the_levels_of_the_run(path):
    """Its pair is the mixture's, whatever the path: the steps agree where the path reaches."""
    torch.manual_seed(3)
    kind = {VP: "VP", RectifiedFlow: "RectifiedFlow", TrigFlow: "TrigFlow", EDM: "EDM"}[type(path)]
    teacher = mlp.build(mlp.MLPConfig(width=8, depth=1, path=kind), (2,), None).double()
    nn.init.normal_(teacher.net.outer.weight)
    method = made("cd", small(), teacher, solver="euler")
    x, hi, lo = (
        gaussian(4, (2,)) * 2,
        torch.full((4,), 2.0, dtype=torch.float64),
        torch.full((4,), 0.5, dtype=torch.float64),
    )
    time, there = (path.time(torch.ones_like(s), s) for s in (hi, lo))
    own = x * (torch.hypot(*path.levels(time)) / torch.hypot(torch.ones_like(hi), hi))[:, None]
    step = teacher(own, time).at(*path.levels(there))
    back = torch.hypot(torch.ones_like(lo), lo) / torch.hypot(*path.levels(there))
    torch.testing.assert_close(method.teacher_step(x, hi, lo, None), step * back[:, None], rtol=1e-6, atol=1e-9)


# Targets


@pytest.mark.parametrize("path", ["EDM", "RectifiedFlow", "VP", "TrigFlow"])
def test_the_target_at_the_lowest_level_is_the_sample_itself(path):
    torch.manual_seed(1)
    student = mlp.build(mlp.MLPConfig(width=8, depth=1, path=path), (2,), None).double()
    nn.init.normal_(student.net.outer.weight)
    method, x = made("ict", student), gaussian(4, (2,))
    levels = method.config.grid.levels(11, method.low, method.high)
    assert torch.equal(method.target(student, x, levels[:1].expand(4), None), x)
    assert not torch.equal(method.target(student, x, levels[1:2].expand(4), None), x)


def test_a_cm_network_is_exact_at_its_lowest_level():
    torch.manual_seed(1)
    student = mlp.build(mlp.MLPConfig(width=8, depth=1, path="EDM", prediction="cm"), (2,), None).double()
    nn.init.normal_(student.net.outer.weight)
    x = gaussian(4, (2,))
    assert torch.equal(student(x, torch.full((4,), 0.002, dtype=torch.float64)).x0, x)
    with pytest.raises(UserError, match=r"s_min=0.01: this cm network answers with its input at 0.002"):
        made("ict", student, s_min=0.01)


def test_ect_where_r_is_zero_takes_the_clean_image():
    """There an EDM network is asked at ln 0, and its NaN must not reach the loss."""
    torch.manual_seed(1)
    student = mlp.build(mlp.MLPConfig(width=8, depth=1, path="EDM"), (2,), None).double()
    nn.init.normal_(student.net.outer.weight)
    method, rows = made("ect", student), points()
    lo, hi = method.levels(rows, rows.uniform("level"))
    assert 0 < int((lo == 0).sum()) < N
    assert student(rows.x0, lo).x0.isnan().any()
    distance, whole = method.distances(student, rows, lo, hi)
    assert whole.all() and distance.isfinite().all()
    zero = lo == 0
    noisy = rows.x0 + hi[:, None] * rows.normal("z", (2,))
    expected = (student(noisy, hi).x0 - rows.x0).norm(dim=1)
    torch.testing.assert_close(distance[zero], expected[zero], **EXACT)
    loss, grads = gradients(method, rows)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads.values())


def test_the_target_has_no_gradient():
    method, rows = made("ict", network(0.0)), points()
    _, grads = gradients(method, rows)
    lo, hi = method.levels(rows, rows.uniform("level"))
    z = rows.normal("z", (2,))
    target = method.student(rows.x0 + lo[:, None] * z, lo, on=VIEW).x0.detach()
    target = torch.where((lo <= 0.002 * (1 + 1e-9))[:, None], rows.x0 + lo[:, None] * z, target)
    found = method.student(rows.x0 + hi[:, None] * z, hi, on=VIEW).x0
    loss = (((found - target).square().sum(1) + method.c**2).sqrt() - method.c) / (hi - lo)
    names, parameters = zip(*method.student.named_parameters(), strict=True)
    for name, expected in zip(names, torch.autograd.grad(loss.mean(), parameters), strict=True):
        torch.testing.assert_close(grads[name], expected, rtol=1e-7, atol=1e-10)


def network(dropout: float) -> mlp.MLPDenoiser:
    torch.manual_seed(4)
    student = mlp.build(mlp.MLPConfig(width=32, depth=2, path="EDM", dropout=dropout), (2,), None).double()
    nn.init.normal_(student.net.outer.weight)
    return student


@pytest.mark.parametrize("target", ["online", "slow"])
def test_dropout_masks_are_shared(target, monkeypatch):
    """With equal levels both answers are the same to the last bit, which other masks would not leave so."""
    student = network(0.3).train()
    method = made("cd", student, law(), mu=0.9) if target == "slow" else made("ict", student)
    if target == "slow":
        method.slow = {"target": network(0.3).eval()}
        monkeypatch.setattr(Consistency, "teacher_step", lambda self, x, hi, lo, cond: x)
    rows, level = points(), torch.full((N,), 1.3, dtype=torch.float64)
    distance, _ = method.distances(student, rows, level, level)
    assert float(distance.abs().max()) == 0
    monkeypatch.setattr(consistency, "same_dropout", lambda device: torch.no_grad())
    distance, _ = method.distances(student, rows, level, level)
    assert float(distance.min()) > 0


def test_the_target_is_computed_in_train_mode_and_leaves_the_generator_alone():
    student, rows = network(0.3).train(), points()
    method, level = made("ict", student), torch.full((N,), 1.3, dtype=torch.float64)
    before = torch.random.get_rng_state()
    one = method.target(student, rows.x0, level, None)
    assert torch.equal(before, torch.random.get_rng_state())
    student.eval()
    assert not torch.equal(one, method.target(student, rows.x0, level, None))


class Broken(Exact):
    """NaN at low levels for samples with a positive first coordinate."""

    def forward(self, x, t, cond=None, *, on=None, r=None):
        pair = super().forward(x, t, cond, on=on)
        bad = (x[:, :1] > 0) & (t[:, None] < 0.5)
        return Pair(torch.where(bad, math.nan, pair.x0), pair.eps)


def test_rows_without_a_finite_target_are_left_out_and_counted():
    rows = points()
    hi, lo = torch.full((N,), 1.0, dtype=torch.float64), torch.full((N,), 0.4, dtype=torch.float64)
    results = []
    for student in (Exact(), Broken()):
        method = made("ict", student)
        method.levels = lambda rows, u: (lo, hi)
        loss, logs = method.loss(rows)
        distance, _ = method.distances(student, rows, lo, hi)
        results.append((loss, logs, distance, torch.autograd.grad(loss, student.mu)[0]))
    kept = (rows.x0 + lo[:, None] * rows.normal("z", (2,)))[:, 0] <= 0
    assert 0 < kept.sum() < N
    torch.testing.assert_close(results[1][0], (results[0][2][kept] / (hi - lo)[kept]).mean(), **EXACT)
    assert float(results[1][1]["not_finite"]) == pytest.approx(1 - float(kept.double().mean()))
    assert results[1][3].isfinite().all()


@pytest.mark.parametrize("kind", ["ict", "tcm"])
def test_a_batch_with_nothing_left_has_no_loss_so_that_the_loop_skips_it(kind):
    student = network(0.0)
    method, rows = made(kind, student), points()
    assert method.loss(rows)[0].isfinite()
    method.target = lambda *args: torch.full((N, 2), math.nan, dtype=torch.float64)
    assert method.loss(rows)[0].isnan()


# TCM


def test_tcm_asks_the_frozen_copy_below_t_prime_and_weighs_the_boundary():
    student = network(0.0)
    method, rows = made("tcm", student), points()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)  # the copy was taken before
    lo, hi = method.levels(rows, rows.uniform("level"))
    edge = method.boundary(rows)
    assert int(edge.sum()) == N // 4 and bool((hi >= 1).all()) and torch.equal(hi == 1 + 1e-8, edge)
    assert bool((lo[edge] < 1).all()) and bool((lo >= 1).any())
    z = rows.normal("z", (2,))
    low = rows.x0 + lo[:, None] * z
    first, second = (net(low, lo, on=VIEW).x0 for net in (method.frozen["first"], student))
    assert not torch.allclose(first, second)
    target = torch.where((lo < 1)[:, None], first, second)
    torch.testing.assert_close(method.target(student, low, lo, None), target, **EXACT)
    each = (student(rows.x0 + hi[:, None] * z, hi, on=VIEW).x0 - target).norm(dim=1) / (hi - lo)
    torch.testing.assert_close(method.loss(rows)[0], each[~edge].mean() + 0.1 * each[edge].mean(), **EXACT)
    assert not method.frozen["first"].training
    assert not any(p.requires_grad for p in method.frozen["first"].parameters())


@pytest.mark.parametrize("row", [0, 3])
def test_tcm_with_one_row_has_a_loss(row):
    """An empty set of boundary rows, or of others, has no mean and no part in the loss."""
    method = made("tcm", network(0.0))
    rows = batch({"x0": gaussian(1, (2,))}, torch.tensor([row]))
    assert bool(method.boundary(rows)) == (row == 3)
    assert method.loss(rows)[0].isfinite()


def test_tcm_never_samples_below_t_prime():
    spec = made("tcm", network(0.0), mid=1.0).sampler()
    assert spec.times == {1: (80.0,), 2: (80.0, 1.0)}
    with pytest.raises(UserError, match=r"method.mid=0.8 lies outside 1 .. 80"):
        made("tcm", network(0.0), mid=0.8)
    with pytest.raises(UserError, match=r"truncation.t_prime=90 lies outside 0.002 .. 80"):
        made("tcm", network(0.0), truncation={"t_prime": 90.0})
    method, rows = made("tcm", network(0.0), truncation={"share": 0.0}), points()
    object.__setattr__(method.config.times, "quantile", lambda u, low, high: 0.5 * torch.ones_like(u))
    with pytest.raises(ValueError, match="every level lies below t'=1"):
        method.levels(rows, rows.uniform("level"))


# Distances and conditions


def test_distances_sum_over_coordinates():
    error = gaussian(5, (3, 4, 4))
    square = error.square().sum((1, 2, 3))
    c = 0.3
    torch.testing.assert_close(pseudo_huber(error, c), (square + c * c).sqrt() - c, **EXACT)
    torch.testing.assert_close(pseudo_huber(error, 0.0), square.sqrt(), **EXACT)
    zero = torch.zeros(2, 3, requires_grad=True)
    assert torch.autograd.grad(pseudo_huber(zero, 0.0).sum(), zero)[0].tolist() == [[0.0] * 3] * 2
    tiny = torch.full((1, 3), 1e-7)  # in float32 the difference of roots would be 0
    assert float(pseudo_huber(tiny, 0.03)) == pytest.approx(3e-14 / 0.06, rel=1e-4, abs=0)
    assert made("ict").c == pytest.approx(0.00054 * math.sqrt(2)) and made("ect").c == 0
    assert made("ict", huber_c=0.06).c == 0.06


def test_lpips_is_given_large_images():
    seen = []
    student = mlp.build(mlp.MLPConfig(width=8, depth=1), (3, 8, 8), None)
    config = Consistency.Config(kind="cd", distance="lpips")
    distance = lambda a, b: seen.append((a.shape, b.shape)) or (a - b).square().mean((1, 2, 3))  # noqa: E731
    method = Consistency(
        config, student, Teacher(mlp.build(mlp.MLPConfig(width=8), (3, 8, 8), None)), distance=distance
    )
    rows = Batch({"x0": gaussian(4, (3, 8, 8)).float()}, torch.arange(4), seed=0, step=0, steps=1)
    loss, _ = method.loss(rows)
    assert loss.isfinite() and seen == [((4, 3, 224, 224),) * 2]
    with pytest.raises(UserError, match=r"set lpips.trunk and lpips.heads"):
        made("cd", student, law(), distance="lpips")


@pytest.mark.parametrize("guidance", [None, 2.5])
def test_labels_are_dropped_and_the_teacher_alone_is_guided(guidance):
    teacher, student = mixture([0, 1, 1]), small(2)
    method = made("cd", student, teacher, guidance=guidance, null_share=0.3, solver="euler")
    n = 4000
    label = torch.arange(n) % 2
    rows = batch({"x0": gaussian(n, (2,)), "label": label}, n)
    given = method.condition(rows)["label"]
    assert float((given == 2).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(given[given != 2], label[given != 2])
    x, hi, lo = (
        gaussian(n, (2,), 3) * 2,
        torch.full((n,), 2.0, dtype=torch.float64),
        torch.full((n,), 1.5, dtype=torch.float64),
    )
    null, told = (teacher(x, hi, c, on=VIEW).eps for c in ({"label": torch.full_like(given, 2)}, {"label": given}))
    slope = null + (1.0 if guidance is None else guidance) * (told - null)
    torch.testing.assert_close(method.teacher_step(x, hi, lo, {"label": given}), x - 0.5 * slope, **EXACT)
    assert made("ict").condition(rows) is None


def test_a_teacher_that_is_not_asked_is_not_placed():
    assert "teacher" not in made("ect", small(), law()).frozen
    assert "teacher" in made("ect", small(), law(), solver="euler").frozen
