"""sCM against formulas: exact students, units, guidance, what is drawn and sampled, turns and resumption."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.layout import expand
from fastgen.paths import EDM, VP, Prediction, RectifiedFlow, TrigFlow
from fastgen.samplers import few_step
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.teachers.mixture import Mixture
from fastgen.trainers.engine.adaptive import LogVariance
from fastgen.trainers.engine.adversary import AdversaryConfig
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.optim import OptimConfig
from fastgen.trainers.engine.trig import angles, draw_angle, ends, few_step_spec, first_states
from fastgen.trainers.scm import Regulariser, Scm, Start, TangentConfig, normed, ramp, step_back
from tests.trainers.truth import PointMass, batch, gaussian, mixture, small

EXACT = {"rtol": 1e-9, "atol": 1e-11}
SD = 0.5

# Put into `Scm`: the sign of time in the tangent, and that of the term c s y of g.
PLANTED = {
    "time runs backwards": ("direction", lambda f: lambda self, *a: (f(self, *a)[0], -f(self, *a)[1])),
    "x-term with the other sign": ("x_term", -1.0),
    "x-term left out": ("x_term", 0.0),
}


def plant(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one of `PLANTED` into sCM."""
    where, what = PLANTED[error]
    if where == "direction":
        monkeypatch.setattr(Scm, "direction", what(Scm.direction))
    else:
        monkeypatch.setattr(
            "fastgen.trainers.scm.step_back", lambda f, v, d, y, t, r: step_back(f, v, d, what * y, t, r)
        )


class Half(Denoiser):
    """The exact student of data N(0, sd^2 I): F* = -tan(t / 2) x / sd, so that f* = x at every t."""

    family = "half"

    def __init__(self, sd: float = SD) -> None:
        super().__init__(None, TrigFlow(sd=sd), Prediction(kind="trig", sd=sd), shape=(3,))
        self.scale, self.sd = nn.Parameter(torch.ones(()).double()), sd

    def raw(self, x, time, cond, extra):
        return -self.scale * expand((time / 2).tan(), x) * x / self.sd


def normal_law(sd: float = SD, d: int = 3) -> Mixture:
    return Mixture(torch.ones(1), torch.zeros(1, d), sd**2 * torch.eye(d)[None])


def scm(student: Denoiser, teacher: Denoiser | None = None, **config) -> Scm:
    return Scm(Scm.Config(**config), student, None if teacher is None else Teacher(teacher))


def tangent(method: Scm, n: int = 16, r: float = 1.0, student: Denoiser | None = None) -> Tensor:
    shape = method.student.shape
    return method.tangent(student or method.student, method.start(batch({"x0": gaussian(n, shape)}, n)), r)[1]


# Exact students


def test_the_exact_student_of_a_gaussian_has_no_tangent():
    method = scm(Half(), normal_law())
    assert float(tangent(method).abs().max()) < 1e-12
    assert float(tangent(method, r=0.5).abs().max()) > 1e-2  # it is not the teacher


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_leave_the_exact_student_a_tangent(error, monkeypatch):
    plant(error, monkeypatch)
    assert float(tangent(scm(Half(), normal_law())).abs().max()) > 1e-2


@pytest.mark.parametrize(("path", "kind"), [(TrigFlow(sd=SD), "trig"), (RectifiedFlow(), "flow"), (VP(), "eps")])
def test_data_at_one_point_have_no_tangent(path, kind):
    """There the teacher is the student; a tangent is a sum of terms that must cancel on every path."""
    point = PointMass(path, kind, torch.tensor([0.3, -0.8, 0.1]).double())
    method = scm(point, point)
    assert float(tangent(method).abs().max()) < 1e-8
    assert len(set(point.seen)) == 16


def test_without_the_derivative_the_teacher_is_a_fixed_point():
    law = mixture()
    assert float(tangent(scm(law, law), r=0.0).abs().max()) == 0
    assert float(tangent(scm(law, law), r=1.0).abs().max()) > 1e-2


def test_from_data_the_velocity_is_that_of_the_drawn_pair():
    law, x0, eps = mixture(), gaussian(8, (2,), 1), gaussian(8, (2,), 2)
    t = torch.linspace(0.1, 1.5, 8).double()
    start = Start(x0, eps, t, TrigFlow(sd=SD).mix(x0, eps, t), None, None, None)
    by_hand = t.cos()[:, None] * eps - t.sin()[:, None] * x0 / SD
    torch.testing.assert_close(scm(law, velocity="data").velocity(start), by_hand, **EXACT)
    step = 1e-6
    moved = [TrigFlow(sd=SD).mix(x0, eps, t + h) / SD for h in (step, -step)]
    torch.testing.assert_close((moved[0] - moved[1]) / (2 * step), by_hand, rtol=1e-7, atol=1e-8)
    own = scm(law, law).velocity(start)
    assert float((own - by_hand).abs().max()) > 0.1
    pair = law(start.x, t, on=TrigFlow(sd=SD))
    torch.testing.assert_close(own, t.cos()[:, None] * pair.eps - t.sin()[:, None] * pair.x0 / SD, **EXACT)


# Units


class Scaled(Denoiser):
    """A network for samples multiplied by sd."""

    family = "scaled"

    def __init__(self, inner: Denoiser, sd: float) -> None:
        super().__init__(None, TrigFlow(sd=sd), Prediction(kind="trig", sd=sd), shape=inner.shape)
        self.inner, self.sd = inner, sd

    def raw(self, x, time, cond, extra):
        return self.inner.raw(x / self.sd, time, cond, extra)


def test_latents_of_deviation_one_are_samples_multiplied_by_sd():
    """SANA-Sprint's convention, latents times sd, gives the tangent of the latents themselves with d = 1."""
    torch.manual_seed(0)
    unit = small(path="TrigFlow")
    nn.init.normal_(unit.net.outer.weight)
    latents, law = gaussian(16, (2,)), normal_law(0.6, 2)
    large = scm(unit, law, data_sd=1.0)
    halved = scm(Scaled(unit, SD), Mixture(law.weights, law.means, SD**2 * law.covs), data_sd=SD)
    starts = [m.start(batch({"x0": x0}, 16)) for m, x0 in ((large, latents), (halved, SD * latents))]
    torch.testing.assert_close(SD * starts[0].x, starts[1].x, **EXACT)
    found = [m.tangent(m.student, start, 1.0)[1] for m, start in zip((large, halved), starts, strict=True)]
    torch.testing.assert_close(found[0], found[1], **EXACT)
    assert float(found[0].abs().max()) > 0.1


def test_norms_and_warm_up():
    g = gaussian(5, (2, 4, 4))
    for norm, size in (("l2", g.flatten(1).norm(dim=1)), ("rms", g.flatten(1).square().mean(1).sqrt())):
        torch.testing.assert_close(normed(TangentConfig(norm=norm), g), g / (size[:, None, None, None] + 0.1), **EXACT)
    assert [ramp(TangentConfig(warmup=4), step) for step in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert ramp(TangentConfig(warmup=0), 0) == 1


def test_the_log_variance_comes_to_be_the_logarithm_of_the_loss():
    torch.manual_seed(0)
    network, t = LogVariance(), 0.05 + 1.45 * torch.rand(512)
    assert float(network(t).detach().abs().max()) == 0
    expected = 2 * t.tan().log() + 0.3  # the loss is 1.35 tan^2 t
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    for _ in range(300):
        u = network(t)
        loss = (expected.exp() * (-u).exp() + u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float((network(t).detach() - expected).abs().mean()) < 0.25


# Angles


def test_angles_follow_their_law_and_stay_where_the_network_knows_them():
    rows, view = batch({}, 4000), TrigFlow(sd=SD)
    t = draw_angle(rows, "tau", (-1.0, 1.4, SD), (0.0, math.pi / 2))
    tau = (SD * t.tan()).log()
    assert abs(float(tau.mean()) + 1) < 0.05 and abs(float(tau.std()) - 1.4) < 0.05
    low, high = angles(view, VP())
    assert low == pytest.approx(0.058268 + 5e-4, abs=1e-6) and high == pytest.approx(1.536597 - 5e-4, abs=1e-6)
    t = draw_angle(rows, "tau", (0.2, 1.6, SD), (low, high))
    assert float(t.min()) >= low and float(t.max()) == pytest.approx(high)
    share = float((t >= high).double().mean())
    assert share == pytest.approx(0.06, abs=0.015)  # the note's figure: what lies beyond the table
    assert angles(view, VP(), EDM()) == (low, high)


def test_rows_at_a_tables_end_keep_their_derivative():
    """At the last index itself times are clamped, and the network's change along t would be lost."""
    torch.manual_seed(0)
    student = small(path="VP", prediction="eps")
    nn.init.normal_(student.net.outer.weight)
    method = scm(student, mixture(), p_mean=9.0, p_std=0.1)
    start = method.start(batch({"x0": gaussian(4, (2,))}, 4))
    assert float(student.path.time(*method.view.levels(start.t)).max()) < 999
    velocity = method.velocity(start)
    _, slow = method.direction(start.t, velocity)
    flow = method.flow(student, None)
    _, whole = torch.func.jvp(flow, (start.x, start.t), (torch.zeros_like(start.x), slow))
    h = 1e-5
    finite = (flow(start.x, start.t + h * slow) - flow(start.x, start.t - h * slow)) / (2 * h)
    torch.testing.assert_close(whole, finite, rtol=1e-5, atol=1e-7)
    assert float(whole.abs().max()) > 1e-4


# Guidance


def guided(**config) -> Scm:
    torch.manual_seed(0)
    student = small(2)
    nn.init.normal_(student.net.outer.weight)
    return scm(student, mixture([0, 1, 1]), **config)


def test_the_teacher_is_guided_by_the_weight_that_the_student_is_told():
    method = guided(guidance=(1.0, 2.5, 4.0), null_share=0.3)
    rows = batch({"x0": gaussian(3000, (2,)), "label": torch.arange(3000) % 2}, 3000)
    start = method.start(rows)
    assert torch.equal(start.told["guidance"], start.w) and "guidance" not in start.cond
    assert {round(float(w), 3) for w in start.w.unique()} == {1.0, 2.5, 4.0}
    torch.testing.assert_close((start.w == 2.5).double().mean(), torch.tensor(1 / 3).double(), atol=0.03, rtol=0)
    dropped = (start.cond["label"] == 2).double().mean()
    torch.testing.assert_close(dropped, torch.tensor(0.3).double(), atol=0.03, rtol=0)
    teacher, view = method.teacher.denoiser, method.view
    whole, part = (teacher(start.x, start.t, c, on=view) for c in (None, start.cond))
    pair = whole.lerp(part, start.w.double())
    expected = method.output.from_pair(pair, *view.levels(start.t))
    torch.testing.assert_close(method.velocity(start), expected, rtol=1e-6, atol=1e-6)
    assert method.sampler().guidance == 2.5
    baked = guided(guidance=2.5)
    assert baked.start(rows).w is None and not baked.student.takes_guidance and baked.sampler().guidance is None
    same = start._replace(w=None, told=start.cond)
    torch.testing.assert_close(
        baked.velocity(same), method.velocity(start._replace(w=torch.full_like(start.w, 2.5))), **EXACT
    )


def test_the_students_answer_comes_to_depend_on_the_weight(tmp_path):
    method = guided(guidance=(1.0, 4.0))
    data = {"x0": gaussian(256, (2,)).float(), "label": torch.arange(256) % 2}
    method.student.float()
    x, t = gaussian(8, (2,)).float(), torch.full((8,), 1.0)

    def by_weight() -> list[Tensor]:
        label = torch.arange(8) % 2
        told = [{"label": label, "guidance": torch.full((8,), w)} for w in (1.0, 4.0)]
        return [method.student(x, t, cond, on=method.view).x0.detach() for cond in told]

    assert torch.equal(*by_weight())
    config = LoopConfig(steps=20, batch=64, optim=OptimConfig(lr=1e-2), save_every=100, log_every=100)
    Loop(method, Rows(data), config, tmp_path).run()
    one, other = by_weight()
    assert float((one - other).abs().max()) > 1e-2


def test_guidance_that_nothing_would_follow_is_refused():
    with pytest.raises(UserError, match="the teacher has no null condition"):
        scm(small(), mixture(), guidance=2.0)
    with pytest.raises(UserError, match=r"guidance=2.0: with method.velocity=data no teacher is followed"):
        guided(guidance=2.0, velocity="data")
    teacher = Teacher(mixture([0, 1, 1]), guidance=3.0)
    with pytest.raises(UserError, match=r"guidance=3.0: with method.velocity=data"):
        Scm(Scm.Config(velocity="data"), small(2), teacher)


def test_a_new_input_under_adapters_is_refused():
    method = guided()
    next(method.student.parameters()).requires_grad_(False)  # as all but the adapters are
    with pytest.raises(UserError, match=r"method.guidance: a new input for it cannot be trained under student.lora"):
        Scm(Scm.Config(guidance=(2.0, 4.0)), method.student, method.teacher)


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"set teacher=PATH, or method\.velocity=data"):
        scm(small())
    with pytest.raises(UserError, match="precision=fp16: scm is trained in fp32, bf16"):
        run(tmp_path, precision="fp16")
    with pytest.raises(UserError, match=r"method.middle=1.6: two steps begin at the angle 1.571"):
        scm(small(), mixture(), middle=1.6)
    with pytest.raises(UserError, match=r"method.middle: this network's steps are those of its table"):
        scm(small(path="VP"), mixture(), middle=1.0)


# Sampling


def test_students_on_tables_are_sampled_where_stock_schedulers_visit():
    spec = scm(small(path="VP", prediction="eps"), mixture()).sampler()
    assert spec.times == {1: (999.0,), 2: (999.0, 499.0), 4: (999.0, 749.0, 499.0, 249.0)}
    assert spec.renoise and spec.keeps_noise and spec.init == "unit"
    assert not scm(small(path="VP"), velocity="data").sampler().keeps_noise


def test_other_students_are_sampled_at_angles():
    spec = scm(small(), mixture(), data_sd=1.0, middle=1.3).sampler()
    half = math.pi / 2
    assert spec.path == TrigFlow(sd=1.0)
    assert spec.times == {1: (half,), 2: (half, 1.3), 4: (half, 0.75 * half, 0.5 * half, 0.25 * half)}
    spec = scm(small(path="EDM"), mixture()).sampler()
    assert spec.times[1] == (pytest.approx(math.atan(160)),) and spec.times[2][1] == 1.1


@pytest.mark.parametrize("path", ["VP", "EDM", "RectifiedFlow", "TrigFlow"])
def test_the_first_state_in_training_is_the_samplers(path):
    torch.manual_seed(1)
    student, z = small(path=path), gaussian(6, (2,))
    nn.init.normal_(student.net.outer.weight)
    view = TrigFlow(sd=0.8)
    spec = few_step_spec(student, view, (1,), None, follows=True)
    t, x = first_states(view, spec, z)
    assert float(t[0]) == pytest.approx(ends(view, student.path)[1])
    torch.testing.assert_close(
        student(x, t, on=view).x0.detach(), few_step.sample(student, spec, z, 1), rtol=1e-6, atol=1e-7
    )


# Networks, turns, resumption


class Rows:
    """A finished data set in memory, repeated."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data, self.n = data, len(data["x0"])

    def get(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: values[rows % self.n] for name, values in self.data.items()}


def run(tmp_path, steps: int = 4, regulariser: dict | None = None, **loop) -> tuple[Loop, Scm]:
    torch.manual_seed(0)
    student = mlp.build(mlp.MLPConfig(width=8, depth=2, dropout=0.1), (2,), None)
    config = {} if regulariser is None else {"regulariser": Regulariser(features="student", kernel=1, **regulariser)}
    method = scm(student, mixture(), tangent=TangentConfig(warmup=2), **config)
    loop = LoopConfig(steps=steps, batch=8, **{"save_every": 2, "log_every": 1, **loop})
    return Loop(method, Rows({"x0": gaussian(64, (2,)).float()}), loop, tmp_path, seed=1), method


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_each_turn_trains_its_own_networks_and_no_other(share, tmp_path):
    loop, method = run(tmp_path, regulariser={"max_time": share})
    loop.run(until=3)
    for turn in method.turns:
        loop._give_turn(turn.trains)
        losses = turn.loss(loop._draw()[0])
        for part in [losses] if isinstance(losses, tuple) else losses:
            part[0].backward()
        for name, network in method.networks.items():
            given = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in network.parameters()]
            assert any(given) if name in turn.trains else not any(given), (turn.trains, name)
            network.zero_grad()
    for frozen in method.frozen.values():
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("regulariser", [None, {"max_time": 0.0}, {"max_time": 0.5}])
def test_resumed_is_the_uninterrupted_run_bit_for_bit(regulariser, tmp_path):
    whole, method = run(tmp_path / "whole", 4, regulariser)
    whole.run()
    first, _ = run(tmp_path / "parts", 4, regulariser)
    first.run(until=2)
    second, again = run(tmp_path / "parts", 4, regulariser)
    assert second.resume() and second.step == 2
    second.run()
    for name, network in method.networks.items():
        state, other = network.state_dict(), again.networks[name].state_dict()
        assert state.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in state.items()), name
    if regulariser is not None:
        vectors = [key for key in method.networks["heads"].state_dict() if key.endswith("._u")]
        assert len(vectors) == 6  # two heads of three convolutions
        fresh = run(tmp_path / "fresh", 4, regulariser)[1].networks["heads"].state_dict()
        moved = [not torch.equal(method.networks["heads"].state_dict()[key], fresh[key]) for key in vectors]
        assert any(moved)


def test_shared_samples_of_the_regulariser_are_the_students_own():
    law = mixture()
    torch.manual_seed(0)
    student = small()
    nn.init.normal_(student.net.outer.weight)
    config = Regulariser(features="student", kernel=1, max_time=0.0, weight=0.7)
    method, rows = scm(student, law, regulariser=config), batch({"x0": gaussian(8, (2,))}, 8)
    method.adversary.heads.double().eval()
    plain = scm(student, law)
    start = method.start(rows)
    judged = student(start.x, start.t, None, on=method.view).x0
    torch.testing.assert_close(method.judged(rows, start), judged, **EXACT)
    expected = plain.loss(rows)[0] + 0.7 * method.adversary.student_loss(rows, judged, None)[0]
    torch.testing.assert_close(method.loss(rows)[0], expected, **EXACT)


def test_a_share_of_judged_samples_starts_from_noise_alone():
    student = small()
    config = Regulariser(features="student", kernel=1, max_time=0.5)
    method, rows = scm(student, mixture(), regulariser=config), batch({"x0": gaussian(400, (2,))}, 400)
    asked = []
    student.forward = lambda x, t, cond=None, *, on=None, r=None, f=student.forward: (
        asked.append((x, t)) or f(x, t, on=on)
    )
    method.judged(rows, method.start(rows))
    ((x, t),) = asked
    first = t == math.pi / 2
    assert 0.4 < float(first.double().mean()) < 0.6
    torch.testing.assert_close(x[first], 0.5 * rows.normal("judged/eps", (2,))[first], **EXACT)


def test_heads_are_shown_data_and_what_the_student_is_judged_by():
    config = Regulariser(features="student", kernel=1, max_time=0.5)
    method, rows = scm(small(), mixture(), regulariser=config), batch({"x0": gaussian(8, (2,))}, 8)
    asked = []
    method.adversary.heads_loss = lambda _batch, real, fake, _cond: asked.append((real, fake))
    method.heads_loss(rows)
    ((real, fake),) = asked
    assert torch.equal(real, rows.x0) and not fake.requires_grad
    assert torch.equal(fake, method.judged(rows, method.start(rows)))


def test_a_closed_form_teacher_has_no_features():
    with pytest.raises(UserError, match="features=teacher: a closed-form teacher has none; set features=student"):
        scm(small(), mixture(), regulariser=AdversaryConfig().model_dump())


def test_diagnosis_falls_to_zero_for_an_exact_student():
    exact, rows = scm(Half(), normal_law()), batch({"x0": gaussian(16, (3,))}, 16)
    assert exact.diagnose(exact.student, rows)["tangent"] < 1e-12
    law = mixture()
    assert scm(law, law).diagnose(law, batch({"x0": gaussian(16, (2,))}, 16))["tangent"] > 1e-2
