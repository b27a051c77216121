"""MeanFlow against formulas: a student that is exactly right, gradients by hand, spans, ends of the path, guidance."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fastgen import jvp
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.jvp import JvpConfig
from fastgen.nets.lora import LoraConfig, add_lora
from fastgen.paths import EDM, VP, Pair, Prediction, RectifiedFlow
from fastgen.samplers import few_step
from fastgen.teacher import Teacher
from fastgen.teachers import mlp, unet
from fastgen.teachers.mixture import Mixture
from fastgen.trainers import meanflow
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.spans import SpansConfig
from fastgen.trainers.meanflow import GuidedConfig, LossConfig, MeanFlow, one_sided
from tests.trainers.truth import batch, gaussian, gradients, mixture, small

RF = RectifiedFlow()
EXACT = {"rtol": 1e-9, "atol": 1e-11}
MU, SD = torch.tensor([0.6, -0.3]).double(), 0.4
UNIFORM = SpansConfig(kind="uniform", equal=0.25)
PLAIN = LossConfig(power=0)


class Gauss(Denoiser):
    """The exact average velocity of N(mu, sd^2): (x - x_r) / (t - r), x_r = m_r + s_r / s_t (x - m_t)."""

    family = "gauss"

    def __init__(self) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=(2,))
        self.mu = nn.Parameter(MU.clone())

    def add_gap(self) -> None:
        """It is told two times as it is."""

    def forward(self, x, t, cond=None, *, on=None, r=None):
        assert on in (None, RF)
        r = t if r is None else r
        t, r = t[:, None], r[:, None]
        s_t, s_r = ((((1 - s) * SD) ** 2 + s**2).sqrt() for s in (t, r))
        # (s_t - s_r) / (t - r) / s_t, where s_t^2 - s_r^2 = (t - r) ((t + r) (1 + sd^2) - 2 sd^2): exact at r = t too.
        rate = ((t + r) * (1 + SD**2) - 2 * SD**2) / (s_t + s_r) / s_t
        velocity = -self.mu + rate * (x - (1 - t) * self.mu)
        return Pair(x - t * velocity, x + (1 - t) * velocity)


def truth() -> Teacher:
    return Teacher(Mixture(torch.ones(1), MU[None], SD**2 * torch.eye(2).double()[None]))


def made(student: Denoiser | None = None, teacher: Teacher | None = None, **options) -> MeanFlow:
    """By default the exact student of a Gaussian teacher, without weights on the loss."""
    options = {"spans": UNIFORM, "loss": PLAIN, "drop_label": 0.0, **options}
    config = MeanFlow.Config(velocity="data" if teacher is None else "teacher", **options)
    return MeanFlow(config, student or Gauss(), teacher)


def data(n: int) -> dict[str, Tensor]:
    return {"x0": MU + SD * gaussian(n, (2,), 9)}


# A student that is exactly right


@pytest.mark.parametrize("route", ["two_pass", "single_pass"])
def test_the_exact_average_velocity_has_no_loss(route):
    method = made(teacher=truth(), jvp=JvpConfig(route=route))
    rows = batch(data(64), 64)
    loss, logs = method.loss(rows)
    t, r, z, one_point = method.noisy(rows)
    u = method.student(z, t, on=RF, r=r).velocity
    assert float(logs["v_loss"]) == pytest.approx(float((u - one_point).square().mean().detach()))
    assert loss < 1e-20 and logs["g_rms"] < 1e-10 and logs["moving/D_rms"] > 0.1
    assert loss.requires_grad


def test_its_loss_by_differences_is_their_own_error():
    losses = [
        float(made(teacher=truth(), jvp=JvpConfig(route="finite", step=h)).loss(batch(data(512), 512))[0].detach())
        for h in (2e-3, 1e-3)
    ]
    # Rows near an end have first-order differences: their error falls 2-fold with the step, the others' 4-fold.
    assert losses[0] < 1e-9 and 3.5 < losses[0] / losses[1] < 20


def test_the_other_sign_of_the_tangent_has_one(monkeypatch):
    right = meanflow.target
    monkeypatch.setattr(meanflow, "target", lambda v, slope, gap, share: right(v, slope, gap, -share))
    assert made(teacher=truth()).loss(batch(data(64), 64))[0] > 0.05


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_its_samples_are_the_ends_of_the_flow_in_any_number_of_steps(steps):
    """So each step is told its own second time."""
    z = gaussian(16, (2,))
    found = few_step.sample(Gauss(), made().sampler(), z, steps)
    torch.testing.assert_close(found, MU + SD * z, **EXACT)
    wrong = few_step.sample(Gauss(), made().sampler().__class__(path=RF, times={steps: RF.grid(steps)}), z, steps)
    assert (wrong - found).abs().max() > 0.1


def test_diagnosis_of_it_is_zero_and_of_another_is_not():
    rows, method = batch({}, 64), made(teacher=truth())
    told = method.diagnose(Gauss(), rows)
    assert told["step_gap"] < 1e-9 and told["teacher_gap"] < 0.03
    with torch.no_grad():
        method.student.mu += 0.3
    worse = method.diagnose(method.student, rows)
    assert worse["teacher_gap"] == pytest.approx(0.3, abs=0.03)
    assert set(made(steps=(1,)).diagnose(Gauss(), rows)) == set()


# The start


@pytest.mark.parametrize("family", ["mlp", "unet"])
def test_the_student_starts_as_its_teacher_for_every_second_time(family):
    torch.manual_seed(0)
    if family == "mlp":
        teacher: Denoiser = mlp.build(mlp.MLPConfig(width=8, depth=1), (2,), None)
        for layer in (teacher.net.outer, teacher.net.modulation):
            nn.init.normal_(layer.weight)
    else:
        teacher = unet.build(unet.UNetConfig(block_out_channels=(8, 16), layers_per_block=1), (1, 8, 8), None)
        nn.init.normal_(teacher.net.conv_out.weight)
    teacher.eval()
    student = copy.deepcopy(teacher)
    MeanFlow(MeanFlow.Config(velocity="data"), student)
    assert student.two_time and not teacher.two_time
    x, t = gaussian(6, teacher.shape).float(), torch.rand(6)
    with torch.no_grad():
        expected = teacher(x, t).velocity
        for r in (t, t / 2, torch.zeros(6)):
            assert torch.equal(student(x, t, on=RF, r=r).velocity, expected)
        student.extra["gap"].outer.bias += 1
        assert not torch.equal(student(x, t, on=RF, r=t).velocity, expected)


# The loss by hand


class Affine(Denoiser):
    """u = a x + b t + c (t - r)."""

    def __init__(self, path=RF) -> None:
        super().__init__(None, path, Prediction(kind="flow"), shape=(2,))
        self.weights = nn.Parameter(torch.tensor([0.3, -0.7, 0.45]).double())

    def add_gap(self) -> None:
        """It is told two times as it is."""

    def forward(self, x, t, cond=None, *, on=None, r=None):
        (a, b, c), t = self.weights, t[:, None]
        u = a * x + b * t + c * (t - (t if r is None else r[:, None]))
        return Pair(x - t * u, x + (1 - t) * u)


LOSSES = {
    "l2": LossConfig(power=0.75, c=0.2),
    "l2, no weight": PLAIN,
    "l2, exponential": LossConfig(exponential=(1.5, -0.5), c=0.3),
    "opt_grad": LossConfig(kind="opt_grad", c=0.1),
    "opt_grad, per root": LossConfig(kind="opt_grad", c=0.1, power=0.5, per_root=True),
    "warming up": LossConfig(c=0.2, warmup=4),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_by_hand(name):
    config, rows = LOSSES[name], batch(data(32), 32)
    rows.step = 1
    method = made(Affine(), loss=config)
    t, r, z, v = method.noisy(rows)
    a, b, c = method.student.weights.detach()
    u = a * z + b * t[:, None] + c * (t - r)[:, None]
    slope = a * v + b + c
    k = 0.25 if config.warmup else 1.0
    error = u - (v - k * (t - r)[:, None] * slope)
    by_weights = torch.stack([z, t[:, None].expand_as(z), (t - r)[:, None].expand_as(z)], -1)
    scale = math.sqrt(2) if config.per_root else 1.0
    x = (error / scale).square().sum(1)
    if config.kind == "opt_grad":
        x = x.sqrt()
    weight = 1.5 * torch.exp(-0.5 * x + 0.3) if config.exponential else (x + config.c) ** -config.power
    if config.kind == "l2":
        expected, pull = (weight * x).mean(), 2 * weight[:, None] * error
    else:
        expected, pull = (weight * x).square().mean(), 2 * weight[:, None] * error / scale
    loss, found = gradients(method, rows)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(found["weights"], torch.einsum("bi,bij->j", pull, by_weights) / 32, **EXACT)


def test_what_is_logged_says_more_than_the_loss():
    """With power 1 and a small c the loss is 1, whatever the student does."""
    method, rows = made(Affine(), loss=LossConfig(c=1e-9)), batch(data(256), 256)
    loss, logs = method.loss(rows)
    assert float(loss.detach()) == pytest.approx(1, abs=1e-6)
    t, r, z, v = method.noisy(rows)
    u, slope = (value.detach() for value in method.derivative(z, t, r, v, None))
    assert float(logs["v_loss"]) == pytest.approx(float((u - v).square().mean()))
    g, moving = v - (t - r)[:, None] * slope - u, t > r
    assert float(logs["g_rms"]) == pytest.approx(float(g.square().mean().sqrt()))
    for name, value in (("g", g), ("D", slope)):
        assert float(logs[f"moving/{name}_rms"]) == pytest.approx(float(value[moving].square().mean().sqrt()))
    with torch.no_grad():
        method.student.weights += 3
    worse, logs_worse = method.loss(rows)
    assert float(worse.detach()) == pytest.approx(1, abs=1e-6) and logs_worse["g_rms"] > 2 * logs["g_rms"]


def test_differences_and_the_derivative_agree():
    torch.manual_seed(1)
    student = small()
    for layer in (student.net.outer, student.net.skip, student.net.modulation):
        nn.init.normal_(layer.weight, std=0.3)
    exact = made(student)
    nn.init.normal_(student.extra["gap"].outer.weight)
    student.double()
    z, v = gaussian(64, (2,)), gaussian(64, (2,), 2)
    t, r = torch.full((64,), 0.6).double(), torch.full((64,), 0.2).double()
    slope = exact.derivative(z, t, r, v, None)[1]
    off = []
    for h in (2e-3, 1e-3, 1e-4):
        method = made(student, jvp=JvpConfig(route="finite", step=h))
        off.append(float((method.derivative(z, t, r, v, None)[1] - slope).norm() / slope.norm()))
    assert off[2] < 1e-6 and off[0] / off[1] == pytest.approx(4, abs=0.2)


# Ends of the path


def test_differences_stay_between_the_second_time_and_the_end():
    h, last = 0.01, 0.94
    # The last but one reaches r exactly, which is too far.
    t = torch.tensor([0.5, 0.94, 0.935, 0.5, 0.495, 0.005, 0.0, 0.5, 0.937]).double()
    r = torch.tensor([0.1, 0.1, 0.1, 0.5, 0.49, 0.0, 0.0, 0.0, 0.936]).double()
    r[7] = t[7] - h
    seen = []

    def square(z, t, r):
        seen.append(t)
        return t[:, None] ** 2 + z

    z, v = torch.zeros(9, 1).double(), torch.zeros(9, 1).double()
    fn, factor = one_sided(square, z, t, r, h, last)
    tangents = (v, torch.ones(9).double(), torch.zeros(9).double())
    value, slope = jvp.value_and_tangent(fn, (z, t, r), tangents, JvpConfig(route="finite", step=h))
    assert all(((at <= last) & (at >= 0) & ((at > r) | (at == t))).all() for at in seen)
    assert len({tuple(at.tolist()) for at in seen}) == 3 and torch.equal(value[:, 0], t**2)
    # 2 t by the middle, 2 t + h ahead, 2 t - h behind, and nothing where both are out of reach.
    expected = 2 * t + h * torch.tensor([0, -1, -1, 1, 1, 1, 1, 1, 0]).double()
    expected[8] = 0
    torch.testing.assert_close((factor[:, None] * slope)[:, 0], expected, **EXACT)


def test_rows_of_one_time_have_a_finite_derivative_that_does_not_count():
    for route in ("two_pass", "finite"):
        method = made(Affine(), spans=SpansConfig(kind="uniform", equal=0.999999), jvp=JvpConfig(route=route))
        rows = batch(data(8), 8)
        t, r, z, v = method.noisy(rows)
        assert torch.equal(t, r)
        u, slope = method.derivative(z, t, r, v, None)
        assert slope.isfinite().all()
        torch.testing.assert_close(method.loss(rows)[0], (u - v).square().sum(1).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("path", "last"), [(RF, 1.0), (VP(), 0.93595), (VP(zero_snr=True), 1.0), (EDM(), 80 / 81)])
def test_nothing_beyond_the_last_level_is_asked(path, last):
    method, rows = made(Affine(path)), batch(data(256), 256)
    t, r, z, v = method.noisy(rows)
    assert method.last_time == pytest.approx(last, abs=1e-5)
    assert (r <= t).all() and (t <= method.last_time).all() and t.max() > 0.95 * last
    # The line leads to the data at t = 0 and to the sampler's first state at T.
    torch.testing.assert_close(z - t[:, None] * v, rows.x0, **EXACT)
    eps, spec = rows.normal("eps", (2,)), method.sampler()
    first = few_step.initial(spec, eps, 1)
    torch.testing.assert_close(z + (method.last_time - t)[:, None] * v, first, rtol=1e-6, atol=1e-6)
    own_first = eps * (float(path.levels(torch.tensor(path.start).double())[1]) if path.init == "sigma" else 1.0)
    alpha, sigma = path.levels(torch.tensor(path.start).double())
    torch.testing.assert_close(first * float(alpha + sigma), own_first, rtol=1e-6, atol=1e-6)


def test_a_teacher_is_asked_on_its_own_path():
    method, rows = made(Affine(VP()), Teacher(mixture())), batch(data(64), 64)
    t, _, z, v = method.noisy(rows)
    eps = rows.normal("eps", (2,))
    torch.testing.assert_close(z, RF.mix(rows.x0, eps, t), **EXACT)
    torch.testing.assert_close(v, eps - rows.x0, **EXACT)
    torch.testing.assert_close(method.velocity(rows, z, t, v)[0], mixture()(z, t).velocity, **EXACT)


def test_the_samplers_steps_are_equal_and_end_on_data():
    for path in (RF, VP(), EDM()):
        spec = made(Affine(path), steps=(1, 2, 4)).sampler()
        assert spec.two_time and not spec.renoise and spec.keeps_noise
        last = spec.times[1][0]
        assert spec.times[4] == pytest.approx([last, 3 / 4 * last, last / 2, last / 4])


# Spans


def spans(n: int = 20_000, **options) -> tuple[Tensor, Tensor]:
    t, r = SpansConfig(**options).draw(batch({}, n))
    assert ((r >= 0) & (r <= t) & (t <= 1)).all()
    return t, r


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75])
def test_the_share_of_rows_with_one_time(share):
    t, r = spans(equal=share)
    assert float((t == r).double().mean()) == pytest.approx(share, abs=0.015)


def test_sorted_uniform_times():
    t, r = spans(kind="uniform", equal=0.0)
    assert float(t.mean()) == pytest.approx(2 / 3, abs=0.01) and float(r.mean()) == pytest.approx(1 / 3, abs=0.01)


def test_logit_normal_times_keep_their_law_when_r_is_clipped_to_them():
    options = {"mean": -0.6, "std": 1.6, "r_mean": -4.0, "r_std": 1.6, "equal": 0.0}
    t, r = spans(order="clip", **options)
    assert float(t.logit().mean()) == pytest.approx(-0.6, abs=0.05)
    assert float(t.logit().std()) == pytest.approx(1.6, abs=0.05)
    late = t == r  # rows where r came out later than t
    assert 0.03 < float(late.double().mean()) < 0.1
    high, low = spans(order="sort", **options)
    assert torch.equal(high[~late], t[~late]) and torch.equal(low[~late], r[~late])
    assert torch.equal(low[late], t[late]) and (high[late] > t[late]).all()
    other = torch.where(late, high, r).logit()
    assert float(other.mean()) == pytest.approx(-4.0, abs=0.05) and float(other.std()) == pytest.approx(1.6, abs=0.05)


def test_spans_to_the_end_and_shifted_ones():
    t, r = spans(equal=0.3, to_end=0.2)
    assert float((r == 0).double().mean()) == pytest.approx(0.2, abs=0.015)
    assert float((t == r).double().mean()) == pytest.approx(0.3, abs=0.015)
    plain, shifted = spans(kind="uniform", equal=0.0), spans(kind="uniform", equal=0.0, shift=3.0)
    for one, other in zip(plain, shifted, strict=True):
        torch.testing.assert_close(other / (1 - other), 3 * one / (1 - one))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_mean": 0.0}, "give both"),
        ({"kind": "uniform", "r_mean": 0.0, "r_std": 1.0}, "no law of r alone"),
        ({"equal": 0.8, "to_end": 0.3}, "more than all rows"),
    ],
)
def test_spans_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        SpansConfig(**options)


# Conditions and guidance


class Labelled(Affine):
    """u = 0.1 (label + 1) + t - r; whether it was in train mode, and whether gradients were on, is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.asked = 3, []

    def forward(self, x, t, cond=None, *, on=None, r=None):
        self.asked.append((self.training, torch.is_grad_enabled()))
        gap = torch.zeros_like(t) if r is None else t - r
        u = ((0.1 * (cond["label"] + 1).double() + gap)[:, None] + 0 * x) * self.weights[0] / self.weights[0].detach()
        return Pair(x - t[:, None] * u, x + (1 - t[:, None]) * u)


def labelled(n: int) -> dict[str, Tensor]:
    return {**data(n), "label": torch.arange(n) % 3}


def test_guided_targets_by_hand():
    guided = GuidedConfig(omega=0.2, kappa=0.7, interval=(0.25, 0.75))
    method, rows = made(Labelled(), guided=guided, drop_label=0.3), batch(labelled(600), 600)
    method.student.train()
    t, r, z, own = method.noisy(rows)
    v, cond = method.velocity(rows, z, t, own)
    assert method.student.asked == [(False, False)] * 2 and method.student.training
    dropped = cond["label"] == 3
    assert 0.25 < dropped.double().mean() < 0.35 and torch.equal(cond["label"][~dropped], rows["label"][~dropped])
    inside = (t >= 0.25) & (t <= 0.75) & ~dropped
    assert torch.equal(v[~inside], own[~inside])
    expected = 0.2 * own + 0.1 * 0.4 + 0.7 * 0.1 * (rows["label"] + 1).double()[:, None]
    torch.testing.assert_close(v[inside], expected[inside], **EXACT)
    # The tangent goes along the guided velocity; with u independent of x only t counts.
    torch.testing.assert_close(method.derivative(z, t, r, v, cond)[1], torch.ones_like(z), **EXACT)


def test_without_guidance_the_student_is_not_asked_for_targets():
    method = made(Labelled(), drop_label=0.3)
    rows = batch(labelled(8), 8)
    t, _, z, own = method.noisy(rows)
    assert torch.equal(method.velocity(rows, z, t, own)[0], own) and not method.student.asked


@pytest.mark.parametrize("guidance", [None, 1.0, 2.5])
def test_a_teacher_is_guided_by_its_own_weight_or_by_the_methods(guidance):
    teacher = Teacher(mixture([0, 1, 1]), guidance=1.5)
    method = made(small(2), teacher, guidance=guidance, drop_label=0.3)
    rows = batch({**data(300), "label": torch.arange(300) % 2}, 300)
    t, _, z, own = method.noisy(rows)
    v, cond = method.velocity(rows, z, t, own)
    truth, label = mixture([0, 1, 1]), cond["label"]
    null, kept = (truth(z, t, {"label": one}).velocity for one in (torch.full_like(label, 2), label))
    w = 1.5 if guidance is None else guidance
    torch.testing.assert_close(v, null + w * (kept - null), **EXACT)
    assert torch.equal(v[label == 2], null[label == 2]) and (label == 2).any()


def test_networks_without_labels_are_given_none():
    assert made(Affine(), drop_label=0.3).condition(batch(labelled(4), 4))[0] is None


def test_text_networks_ask_for_texts_and_their_null_is_dropped_in():
    class Text(Affine):
        has_null = True
        null = {"text": torch.full((1, 2, 3), 7.0)}  # noqa: RUF012

    method = made(Text(), drop_label=0.5)
    assert method.needs == {"x0", "cond.text"} and made().needs == {"x0"}
    cond, dropped = method.condition(batch({**data(64), "cond.text": torch.zeros(64, 2, 3)}, 64))
    assert 0 < dropped.sum() < 64
    assert ((cond["text"] == 7).all((1, 2)) == dropped).all() and ((cond["text"] == 0).all((1, 2)) == ~dropped).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"velocity": "teacher"}, "set teacher=PATH, or velocity=data"),
        ({"velocity": "data", "teacher": True}, "never asks a teacher"),
        ({"velocity": "data", "guidance": 2.0}, r"method.guidance is the teacher's"),
        ({"teacher": True, "guided": GuidedConfig()}, "belongs to velocity=data"),
        ({"velocity": "data", "guided": GuidedConfig()}, "no null condition to guide against"),
        ({"teacher": True, "guidance": 2.0}, "the teacher has no null condition"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(options, message):
    teacher = truth() if options.pop("teacher", False) else None
    with pytest.raises(UserError, match=message):
        MeanFlow(MeanFlow.Config(**options), Affine(), teacher)


def test_adapters_and_half_precision_are_refused(tmp_path):
    student = unet.build(unet.UNetConfig(block_out_channels=(8, 16), layers_per_block=1), (1, 8, 8), None)
    with pytest.raises(UserError, match=r"leave out student.lora"):
        MeanFlow(MeanFlow.Config(velocity="data"), add_lora(student, LoraConfig(rank=2), seed=0))
    with pytest.raises(UserError, match="precision=fp16"):
        Loop(made(Affine()), None, LoopConfig(precision="fp16"), tmp_path)
    with pytest.raises(ValueError, match="per_root belongs to"):
        LossConfig(per_root=True)


def test_labels_without_a_null_label_cannot_be_dropped():
    student = Labelled()
    student.null_label = False
    with pytest.raises(UserError, match="drop_label=0"):
        made(student, drop_label=0.1)


def test_the_derivative_is_tried_inside_the_path_before_the_first_step(monkeypatch):
    seen = []
    monkeypatch.setattr(
        jvp, "check", lambda fn, primals, tangents, config, student: seen.append((fn, primals, tangents))
    )
    method = made(Affine(VP()))
    method.begin(batch(data(2), 2))
    ((fn, (z, t, r), tangents),) = seen
    assert ((r > 0) & (r < t) & (t < method.last_time)).all() and fn(z, t, r).shape == (2, 2)
    assert [float(one[0]) for one in tangents[1:]] == [1, 0]
