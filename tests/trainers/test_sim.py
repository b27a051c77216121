"""SIM against formulas: gradients through both networks' inputs, identities, fixed points, turns, noise levels."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import EDM, VP, Prediction, RectifiedFlow
from fastgen.samplers import few_step
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.teachers.mixture import Mixture
from fastgen.trainers.engine.fake_score import FakeConfig, one_step
from fastgen.trainers.engine.levels import LevelsConfig
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.optim import OptimConfig
from fastgen.trainers.sim import LossConfig, Sim, init_time, losses
from tests.trainers.truth import batch, gaussian, mixture, small

N = 16
MU, S = torch.tensor([1.0, -0.5]).double(), torch.tensor([[0.5, 0.2], [0.2, 0.3]]).double()
A, B = torch.tensor([[0.9, 0.3], [-0.2, 0.7]]).double(), torch.tensor([0.2, 0.4]).double()
EXACT = {"rtol": 1e-9, "atol": 1e-12}

LOSSES = {
    "l2": LossConfig(kind="l2", space="score"),
    "pseudo_huber": LossConfig(huber_c=0.3),
    "pseudo_huber eps": LossConfig(huber_c=0.3, space="eps", weight="sigma^k", k=1.5),
    "sid": LossConfig(kind="sid", alpha=1.2, weight="inv_mean_abs"),
    "diff_instruct": LossConfig(kind="diff_instruct", space="score"),
}


class Affine(Denoiser):
    """A student whose one step from unit noise z is A z + b."""

    family = "affine"

    def __init__(self, a: Tensor = A, b: Tensor = B, sigma_init: float = 2.5) -> None:
        super().__init__(None, EDM(), Prediction(kind="x0"), shape=(2,))
        self.a, self.b, self.sigma_init = nn.Parameter(a.clone()), nn.Parameter(b.clone()), sigma_init

    def raw(self, x, time, cond, extra):
        return x / self.sigma_init @ self.a.T + self.b


def law(mean: Tensor, cov: Tensor) -> Mixture:
    return Mixture(torch.ones(1), mean[None], cov[None])


def sim(
    loss: LossConfig | None = None, student: Denoiser | None = None, fake: Denoiser | None = None, **options
) -> Sim:
    """A Gaussian teacher, an affine student, its exact fake: where nothing else is asked for."""
    config = Sim.Config(
        loss=loss or LossConfig(), **{"sigma": LevelsConfig(kind="log_uniform", low=0.1, high=5), **options}
    )
    return Sim(config, student or Affine(), Teacher(law(MU, S)), fake=fake or law(B, A @ A.T))


def by_hand(config: LossConfig, rows, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss by A and b, written with the Jacobians of two affine denoisers."""
    z, noise = rows.normal("z", (2,)), rows.normal("noise", (2,))
    x = z @ A.T + B
    eye, s = torch.eye(2).double(), sigma[:, None, None]
    k_r, k_f = (c @ torch.linalg.inv(c + s**2 * eye) for c in (S, A @ A.T))
    noisy = x + sigma[:, None] * noise
    apply = lambda m, v: torch.einsum("bij,bj->bi", m, v)  # noqa: E731
    back = lambda m, v: torch.einsum("bij,bi->bj", m, v)  # noqa: E731
    real, fake = MU + apply(k_r, noisy - MU), B + apply(k_f, noisy - B)
    u = sigma[:, None] ** {"x0": 0, "eps": -1, "score": -2}[config.space]
    y, e = u * (fake - real), u * (fake - x)
    by_y, by_e = (lambda v: u * back(k_f - k_r, v)), (lambda v: u * back(k_f - eye, v))
    ye = (y * e).sum(1, keepdim=True)
    if config.kind == "l2":
        by_x = -2 * (by_y(e) + by_e(y))
    elif config.kind == "sid":
        by_x = 2 * (1 - config.alpha) * by_y(y) - by_y(e) - by_e(y)
    elif config.kind == "diff_instruct":
        by_x = y
    else:
        r = (y.square().sum(1, keepdim=True) + 2 * config.huber_c**2).sqrt()
        by_x = -(by_y(e) + by_e(y)) / r + ye * by_y(y) / r**3
    if config.weight == "inv_mean_abs":
        by_x = by_x / (x - real).abs().mean(1, keepdim=True)
    elif config.weight == "sigma^k":
        by_x = by_x * sigma[:, None] ** config.k
    return by_x.T @ z / len(z), by_x.mean(0)


def found(method: Sim, rows) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(method.loss(rows)[0], [method.student.a, method.student.b])


def levels(method: Sim, rows) -> Tensor:
    return method.config.sigma.quantile(rows.uniform("sigma"), RectifiedFlow())


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_goes_through_the_sample_and_through_both_networks_inputs(name):
    method, rows = sim(LOSSES[name]), batch({}, N)
    for gradient, expected in zip(found(method, rows), by_hand(LOSSES[name], rows, levels(method, rows)), strict=True):
        torch.testing.assert_close(gradient, expected, **EXACT)


PLANTED = {
    "detached teacher": lambda real, fake: (real.detach(), fake),
    "detached fake": lambda real, fake: (real, fake.detach()),
    "both detached": lambda real, fake: (real.detach(), fake.detach()),
    "flipped sign": lambda real, fake: (2 * fake - real, fake),
}


@pytest.mark.parametrize("error", PLANTED)
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "diff_instruct"])
def test_planted_errors_give_another_gradient(name, error, monkeypatch):
    """Several of them still train, so a falling loss does not tell."""
    method, rows, scores = sim(LOSSES[name]), batch({}, N), Sim.scores
    monkeypatch.setattr(Sim, "scores", lambda self, *args: PLANTED[error](*scores(self, *args)))
    wrong, right = found(method, rows)[0], by_hand(LOSSES[name], rows, levels(method, rows))[0]
    assert (wrong - right).norm() > 0.1 * right.norm()


def test_detached_scores_are_what_diff_instruct_is_and_it_needs_the_right_sign(monkeypatch):
    rows = batch({}, N)
    exact = found(sim(LOSSES["diff_instruct"]), rows)[0]
    monkeypatch.setattr(Sim, "scores", lambda self, *args, scores=Sim.scores: [v.detach() for v in scores(self, *args)])
    torch.testing.assert_close(found(sim(LOSSES["diff_instruct"]), rows)[0], exact, **EXACT)
    l2 = sim(LossConfig(kind="l2", space="score", weight="sigma^k", k=2.0))  # left with w 2 y^T dx: twice the direction
    flat = sim(LossConfig(kind="diff_instruct", space="score", weight="sigma^k", k=0.0))
    x, noise, sigma = rows.normal("z", (2,)).requires_grad_(), rows.normal("noise", (2,)), levels(l2, rows)
    (twice,) = torch.autograd.grad(losses(l2.config.loss, x, *l2.scores(x, sigma, noise, None), sigma).sum(), x)
    (once,) = torch.autograd.grad(losses(flat.config.loss, x, *flat.scores(x, sigma, noise, None), sigma).sum(), x)
    torch.testing.assert_close(twice, 2 * once, **EXACT)


# Identities between the losses


def some_denoised(n: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, real, fake = (gaussian(n, (1, 3, 3), seed) for seed in (1, 2, 3))
    return x, real, fake, gaussian(n, (), 4).exp()


def test_sid_of_alpha_one_is_l2_with_another_weight():
    x, real, fake, sigma = some_denoised()
    omega = (x - real).abs().mean((1, 2, 3))
    sid = losses(LossConfig(kind="sid", alpha=1.0, weight="inv_mean_abs"), x, real, fake, sigma)
    l2 = losses(LossConfig(kind="l2", space="score"), x, real, fake, sigma)
    torch.testing.assert_close(l2, 2 * omega / sigma**4 * sid, **EXACT)


def test_sid_of_alpha_one_half_is_half_of_the_moving_fisher_divergence():
    x, real, fake, sigma = some_denoised()
    moving, fixed = (losses(LossConfig(kind=kind, alpha=0.5), x, real, fake, sigma) for kind in ("sid", "l2"))
    torch.testing.assert_close(2 * moving, (real - fake).square().sum((1, 2, 3)) + fixed, **EXACT)


def test_a_wide_huber_is_half_of_l2_over_c_and_a_narrow_one_knows_only_directions():
    x, real, fake, sigma = some_denoised()
    l2 = losses(LossConfig(kind="l2"), x, real, fake, sigma)
    c = 1e6
    wide = losses(LossConfig(huber_c=c / 3), x, real, fake, sigma)  # times sqrt(9) coordinates
    torch.testing.assert_close(c * wide, l2 / 2, rtol=1e-6, atol=1e-6)
    narrow = losses(LossConfig(huber_c=1e-9), x, real, fake, sigma)
    farther = losses(LossConfig(huber_c=1e-9), x, fake + 7 * (real - fake), fake, sigma)
    torch.testing.assert_close(narrow, farther, **EXACT)


@pytest.mark.parametrize(("space", "power"), [("eps", 1), ("score", 2)])
def test_spaces_are_powers_of_sigma(space, power):
    x, real, fake, sigma = some_denoised()
    for kind, factors in (("l2", 2), ("diff_instruct", 1)):
        plain, scaled = (losses(LossConfig(kind=kind, space=s), x, real, fake, sigma) for s in ("x0", space))
        torch.testing.assert_close(scaled, plain / sigma ** (factors * power), **EXACT)


# Fixed points


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_moves_where_fake_and_teacher_agree(name):
    """At the optimum, and also as long as the fake is still the teacher, whatever the student does."""
    rows, root = batch({}, N), torch.linalg.cholesky(S)
    for student in (Affine(root, MU), Affine()):
        gradients = found(sim(LOSSES[name], student, fake=law(MU, S)), rows)
        assert all(float(gradient.abs().max()) == 0 for gradient in gradients)
    assert found(sim(LOSSES[name]), rows)[0].norm() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_a_shifted_student_is_led_to_the_teachers_mean(name):
    rows, root = batch({}, 256), torch.linalg.cholesky(S)
    _, gradient = found(sim(LOSSES[name], Affine(root, B), fake=law(B, S)), rows)
    assert (B - 0.1 * gradient / gradient.norm() - MU).norm() < (B - MU).norm()


# Networks, turns, rows


def trained(tmp_path, steps=4, loop=None, **fake) -> tuple[Loop, Sim]:
    """A short run of small networks on the mixture."""
    torch.manual_seed(0)
    student = mlp.build(mlp.MLPConfig(width=8, depth=1), (2,), None)
    method = Sim(Sim.Config(fake=FakeConfig(init="student", **fake)), student, Teacher(mixture()))
    config = LoopConfig(steps=steps, batch=8, save_every=2, log_every=1, clip=None, **(loop or {}))
    return Loop(method, None, config, tmp_path, seed=1), method


def test_each_turn_trains_its_own_network_and_no_other(tmp_path):
    loop, method = trained(tmp_path)
    fake_turn, student_turn = method.turns
    for turn, own in ((fake_turn, "fake"), (student_turn, "student")):
        loop._give_turn(turn.trains)
        turn.loss(loop._draw()[0])[0].backward()
        for name, network in method.networks.items():
            given = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters()]
            assert any(given) if name == own else not any(p.grad is not None for p in network.parameters()), (own, name)
            network.zero_grad()
    assert all(p.grad is None for p in method.frozen["teacher"].parameters())


def test_networks_of_the_students_turn_are_in_eval_mode(tmp_path):
    loop, method = trained(tmp_path)
    modes = {}
    scores = method.scores
    method.scores = lambda *args: modes.update({n: m.training for n, m in method.networks.items()}) or scores(*args)
    loop.run(until=1)
    assert modes == {"student": True, "fake": False}


def test_fake_learns_from_samples_made_as_in_the_students_turn(tmp_path):
    loop, method = trained(tmp_path)
    modes, generate = [], method.generate
    method.generate = lambda student, *args: modes.append(student.training) or generate(student, *args)
    loop.run(until=1)
    assert modes == [True, True]


def test_warm_up_and_repeats(tmp_path):
    loop, method = trained(tmp_path, steps=5, loop={"optim": OptimConfig(lr=1e-2)}, repeat=3, warmup=2)
    moved = {}
    for step in range(1, 5):
        before = {name: [p.detach().clone() for p in net.parameters()] for name, net in method.networks.items()}
        drawn = loop.drawn
        loop.run(until=step)
        assert loop.drawn - drawn == 8 * (3 + (step > 2))  # every update on rows of its own
        for name, net in method.networks.items():
            pairs = zip(before[name], net.parameters(), strict=True)
            moved[step, name] = any(not torch.equal(old, new) for old, new in pairs)
    assert [moved[step, "student"] for step in range(1, 5)] == [False, False, True, True]
    assert all(moved[step, "fake"] for step in range(1, 5))


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(UserError, match="set teacher=PATH"):
        Sim(Sim.Config(), small())
    with pytest.raises(UserError, match="student None, teacher 3"):
        Sim(Sim.Config(), small(), Teacher(small(3)))
    with pytest.raises(UserError, match=r"method.guidance=3.0: the teacher has no null condition"):
        Sim(Sim.Config(guidance=3.0), small(), Teacher(small()))
    with pytest.raises(UserError, match="precision=fp16"):
        trained(tmp_path, loop={"precision": "fp16"})


@pytest.mark.parametrize("guidance", [None, 1.0, 2.5])
def test_labels_are_drawn_and_the_teacher_alone_is_guided(guidance):
    teacher, student = mixture([0, 1, 1]), small(2)
    config = Sim.Config(fake=FakeConfig(init="student"), guidance=guidance, null_share=0.3)
    method, rows = Sim(config, student, Teacher(teacher)), batch({}, 4000)
    label = method.condition(rows)["label"]
    shares = torch.bincount(label, minlength=3) / len(label)
    torch.testing.assert_close(shares, torch.tensor([0.35, 0.35, 0.3]), atol=0.03, rtol=0)
    x, sigma, noise = gaussian(4000, (2,), 7), levels(method, rows), rows.normal("noise", (2,))
    x.requires_grad_()
    real, fake = method.scores(x, sigma, noise, {"label": label})
    noisy, view = x + sigma[:, None] * noise, EDM()
    null = teacher(noisy, sigma, {"label": torch.full_like(label, 2)}, on=view).x0
    expected = null + (1.0 if guidance is None else guidance) * (
        teacher(noisy, sigma, {"label": label}, on=view).x0 - null
    )
    torch.testing.assert_close(real, expected, **EXACT)
    torch.testing.assert_close(fake, method.fake.denoiser(noisy, sigma, {"label": label}, on=view).x0, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(real.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0], rtol=1e-8, atol=1e-10
    )


def test_prompts_are_asked_for_and_both_turns_use_the_batchs_own():
    class Text(Affine):
        has_null = True

    teacher, seen = Text(), []
    method = Sim(Sim.Config(), Affine(), Teacher(teacher))
    assert method.needs == {"cond.text"} and sim().needs == frozenset()
    forward = teacher.forward
    teacher.forward = lambda x, t, cond=None, *, on=None: seen.append(cond) or forward(x, t, cond, on=on)
    rows = batch({"cond.text": gaussian(N, (3, 4))}, N)
    method.loss(rows)
    method.fake_loss(rows)
    assert len(seen) == 1 and torch.equal(seen[0]["text"], rows["cond.text"])


class Broken(Affine):
    """NaN for samples of a positive first coordinate, without gradient of its own."""

    def forward(self, x, t, cond=None, *, on=None, r=None):
        pair = super().forward(x, t, cond, on=on)
        return type(pair)(pair.x0 * torch.where(x[:, :1] > 0, math.nan, 1.0), pair.eps)


def test_samples_where_a_network_answers_nan_are_left_out_and_counted():
    rows, config = batch({}, N), LossConfig(kind="l2")
    whole = Sim(Sim.Config(loss=config), Affine(), Teacher(Affine(S, MU)), fake=law(B, A @ A.T))
    broken = Sim(Sim.Config(loss=config), Affine(), Teacher(Broken(S, MU)), fake=law(B, A @ A.T))
    z, noise = rows.normal("z", (2,)), rows.normal("noise", (2,))
    x, sigma = z @ A.T + B, broken.config.sigma.quantile(rows.uniform("sigma"), RectifiedFlow())
    kept = (x + sigma[:, None] * noise)[:, 0] <= 0
    assert 0 < kept.sum() < N
    loss, logs = broken.loss(rows)
    each = losses(config, x, *whole.scores(x, sigma, noise, None), sigma)
    torch.testing.assert_close(loss, each[kept].mean(), **EXACT)
    assert int(logs["dropped"]) == N - int(kept.sum())
    gradient = torch.autograd.grad(loss, broken.student.a)[0]
    x = one_step(whole.student, whole.spec, z, None)
    own = losses(config, x, *whole.scores(x, sigma, noise, None), sigma)[kept].mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(own, whole.student.a)[0], **EXACT)


def test_a_step_leaves_nothing_in_memory():
    method, made = sim(), []
    generate = method.generate
    method.generate = lambda *args: (x := generate(*args), made.append(weakref.ref(x)))[0]
    method.loss(batch({}, N))[0].backward()
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_a_batch_with_nothing_left_has_no_loss_so_that_the_loop_skips_it():
    method = sim(student=Affine(A * math.nan))
    assert method.loss(batch({}, N))[0].isnan()
    fake = small()
    method = sim(student=Affine(A * math.nan), fake=fake)
    assert method.fake_loss(batch({}, N))[0].isnan()


# One step


def test_first_level_is_a_tables_nearest_index():
    assert init_time(VP(), 2.5) == 625
    assert init_time(VP(beta_start=1e-4, beta_end=0.02, schedule="linear"), 2.5) == 440
    assert init_time(EDM(), 2.5) == pytest.approx(2.5)
    assert init_time(RectifiedFlow(), 2.5) == pytest.approx(2.5 / 3.5)
    with pytest.raises(UserError, match=r"method.sigma_init=20: the student's levels are 0.0292 .. 14.6"):
        init_time(VP(), 20)


@pytest.mark.parametrize("path", ["VP", "EDM", "RectifiedFlow", "TrigFlow"])
def test_a_step_in_training_is_the_samplers_step(path):
    torch.manual_seed(2)
    student = mlp.build(mlp.MLPConfig(width=8, depth=1, path=path), (2,), None).double()
    nn.init.normal_(student.net.outer.weight)
    method, z = sim(student=student), gaussian(N, (2,))
    x = one_step(student, method.spec, z, None)
    assert x.requires_grad and torch.equal(x, few_step.sample(student, method.sampler(), z, 1))
    scale = {"VP": 1.0, "EDM": 2.5, "RectifiedFlow": 2.5 / 3.5, "TrigFlow": 2.5 / math.sqrt(1 + 2.5**2)}[path]
    time = torch.full((N,), method.spec.at(1)[0]).double()
    torch.testing.assert_close(x, student(scale * z, time).x0, rtol=1e-6, atol=1e-8)


# What is told


def test_diagnosis_shows_broken_routing_and_where_the_gap_is(monkeypatch):
    method, rows = sim(LossConfig(huber_c=0.3)), batch({}, 640)
    told = method.diagnose(method.student, rows)
    assert 0.05 < abs(told["cos_to_kl"]) < 0.95
    assert all(f"{key}/d{i}" in told for key in ("gap", "error", "saturated") for i in range(10))
    sigma = method.config.sigma.quantile(torch.tensor([0.55]).double(), RectifiedFlow())
    z, noise = (rows.normal(f"diagnose/{tag}", (2,))[320:384] for tag in ("z", "noise"))
    x = z @ A.T + B
    real, fake = method.scores(x, sigma.expand(64), noise, None)
    gap = (fake - real).norm(dim=1)
    assert told["gap/d5"] == pytest.approx(float(gap.mean()) / math.sqrt(2))
    assert told["error/d5"] == pytest.approx(float((fake - x).norm(dim=1).mean()) / math.sqrt(2))
    assert told["saturated/d5"] == pytest.approx(float((gap > 0.3 * math.sqrt(2)).double().mean()))
    scores = Sim.scores
    monkeypatch.setattr(Sim, "scores", lambda self, *args: [v.detach() for v in scores(self, *args)])
    assert method.diagnose(method.student, rows)["cos_to_kl"] == pytest.approx(1)
    few = method.diagnose(method.student, batch({}, 3))
    assert {key for key in few if key.startswith("gap")} == {"gap/d0", "gap/d5"}
