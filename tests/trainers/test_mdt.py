"""MDT against formulas: a Gaussian whose average velocity is known, gradients by hand, voxels against dense samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.samplers import few_step
from fastgen.sparse import Voxels
from fastgen.teacher import Teacher
from fastgen.teachers.mixture import Mixture
from fastgen.trainers import mdt
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.method import parts_of
from fastgen.trainers.engine.optim import OptimConfig
from fastgen.trainers.engine.times import TimesConfig
from fastgen.trainers.mdt import MDT, normalised, vd_error
from tests.trainers.gauss import PLAIN, RF, SD, Gauss, at, made, rows, truth
from tests.trainers.truth import batch, gaussian, gradients, small

# The exact student


@pytest.mark.parametrize(
    ("t", "v", "phi", "slope", "left"),
    [
        (0.6, 1.25, 0.34905097, 1.51629849, 0.00883007),
        (1.0, 1.0, 0.5, 0.50440639, 0.00440639),
        (0.2, 0.0, -0.59016994, 2.92235658, -0.00569863),
    ],
)
def test_exact_students_difference_leaves_what_the_formulas_say(t, v, phi, slope, left):
    method = made()
    point = at(method, t)
    found, difference = method.discrete(point)
    prediction, aim = method.target(point)
    for value, expected in ((point.v, v), (found, phi), (difference, slope), (prediction - aim, left)):
        torch.testing.assert_close(value, torch.full((1, 2), expected, dtype=torch.float64), rtol=0, atol=6e-9)


def test_what_is_left_halves_with_the_interval():
    left = []
    for interval in (0.01, 0.005, 0.0025):
        method = made(distill_interval=interval)
        prediction, aim = method.target(at(method, 0.6))
        left.append(float((prediction - aim)[0, 0].detach()))
    assert left[0] / left[1] == pytest.approx(2, abs=0.03) and left[1] / left[2] == pytest.approx(2, abs=0.015)


class EulerMean(Denoiser):
    """The mean velocity along the teacher's Euler path of these steps, the last one as short as it must be."""

    family = "euler mean"

    def __init__(self, step: float) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=(2,))
        self.step, self.teacher = step, truth()

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        end, t = x, time
        while (t > 1e-9).any():
            v = self.teacher(end, t.clamp(min=1e-6), on=RF).velocity
            step = t.clamp(max=self.step)
            end, t = end - step[:, None] * v, t - step
        return (x - end) / time.clamp(min=1e-6)[:, None]


def test_with_exact_differences_the_mean_of_the_euler_path_is_the_fixed_point():
    for t in (0.05, 0.3, 0.73, 1.0):
        method = made(EulerMean(0.2), distill_interval=0.2, t_min=0.01, exact_difference=True)
        prediction, aim = method.target(at(method, t))
        torch.testing.assert_close(prediction, aim, rtol=0, atol=1e-9)
    released = made(EulerMean(0.2), distill_interval=0.2)
    prediction, aim = released.target(at(released, 0.73))
    assert float((prediction - aim).abs().min()) > 0.05


@pytest.mark.parametrize("lambda_vd", [0.0, 1.0])
def test_the_exact_student_has_no_gradient_when_continuous(lambda_vd):
    method = made(distill_type="continuous", lambda_vd=lambda_vd)
    loss, found = gradients(method, rows())
    off = made(Gauss(0.6), distill_type="continuous", lambda_vd=lambda_vd)
    scale = gradients(off, rows())[1]["sd"].abs()
    assert found["sd"].abs() < 1e-6 * scale and loss < 1e-12


def test_the_exact_student_is_consistent():
    method = made(distill_type="cm", lambda_vd=0)
    assert float(gradients(method, rows())[0]) < 1e-4


@pytest.mark.parametrize("error", ["slope added", "teacher turned round", "time forwards"])
def test_planted_errors_move_the_exact_student(error, monkeypatch):
    method = made(distill_type="continuous", lambda_vd=0)
    point, continuous = MDT.point, MDT.continuous
    if error == "slope added":
        monkeypatch.setattr(MDT, "continuous", lambda self, p: (lambda f, g: (f, -g))(*continuous(self, p)))
    elif error == "teacher turned round":
        monkeypatch.setattr(MDT, "point", lambda self, *a: (lambda p: p._replace(v=-p.v))(point(self, *a)))
    else:
        monkeypatch.setattr(MDT, "point", lambda self, *a: (lambda p: p._replace(t=1.01 - p.t))(point(self, *a)))
    assert gradients(method, rows())[1]["sd"].abs() > 0.1


# The two losses


def test_distillation_moves_samples_towards_the_teachers_clean_ones():
    """-gradient on f is along x0_teacher - x0_student; with vd_one_minus_t it is scaled by 1 - t.

    u goes along the teacher's velocity, so u - v_T = (1 - t dphi/dx) (v_S - v_T), here S / A times the difference.
    """
    student = Gauss(0.8)
    method = made(student, distill_type="continuous", lambda_vm=0)
    x_t, t = gaussian(32, (2,), 3), torch.linspace(0.1, 0.9, 32, dtype=torch.float64)
    point = mdt.Point(x_t, t, None, method.velocity_of(method.teacher(x_t, t, on=RF)))
    prediction, aim = method.target(point)
    gap, f = (prediction - aim).detach(), gaussian(32, (2,), 4).requires_grad_()
    (pushed,) = torch.autograd.grad(vd_error(gap, f).mean(), f)
    torch.testing.assert_close(pushed, 2 * gap / gap.numel(), rtol=1e-12, atol=1e-15)
    (scaled,) = torch.autograd.grad(vd_error(gap, f, (1 - t)[:, None]).mean(), f)
    torch.testing.assert_close(scaled, (1 - t)[:, None] * pushed, rtol=1e-12, atol=1e-15)
    # x' = z - f, so x' moves by +pushed, towards the teacher.
    own = Mixture(torch.ones(1), torch.zeros(1, 2), 0.8**2 * torch.eye(2)[None])
    away = method.teacher(x_t, t, on=RF).x0 - own(x_t, t, on=RF).x0
    share = 0.8 / ((1 - t).square() * 0.8**2 + t**2).sqrt()
    torch.testing.assert_close(gap * t[:, None], share[:, None] * away, rtol=1e-6, atol=1e-8)


def test_value_of_distillation_is_its_gap_and_reaches_neither_gap_nor_teacher():
    gap, f = gaussian(8, (2,), 1).requires_grad_(), gaussian(8, (2,), 2).requires_grad_()
    error = vd_error(gap, f)
    torch.testing.assert_close(error, gap.square())
    assert torch.autograd.grad(error.sum(), gap, allow_unused=True) == (None,)
    teacher = Teacher(small())
    for part in parts_of(made(small(), teacher, d_norm=True).loss(rows())):
        part[0].backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("options", "generated"), [({"lambda_vd": 0}, 0), ({"lambda_vm": 0}, 1), ({}, 1)])
def test_a_loss_without_weight_costs_nothing(options, generated, monkeypatch):
    """Network calls of student (at t = 1: the generator's) and teacher."""
    method, times = made(distill_type="discrete", **options), []
    forward = Gauss.forward
    monkeypatch.setattr(
        Gauss, "forward", lambda self, x, t, *a, **k: (times.append(t), forward(self, x, t, *a, **k))[1]
    )
    list(parts_of(method.loss(rows())))
    losses = sum(options.get(f"lambda_{key}", 1) > 0 for key in ("vm", "vd"))
    assert len(times) == 2 * losses + generated and sum(bool((t == 1).all()) for t in times) == generated


def test_the_papers_factor_reaches_the_gradient_of_distillation():
    found = []
    for factor in (False, True):
        method = made(Gauss(0.8), lambda_vm=0, vd_one_minus_t=factor)
        method.times = lambda batch: torch.full((64,), 0.25, dtype=torch.float64)
        found.append(gradients(method, rows()))
    torch.testing.assert_close(found[1][0], found[0][0])  # of the value nothing changes
    torch.testing.assert_close(found[1][1]["sd"], 0.75 * found[0][1]["sd"], rtol=1e-10, atol=0)


def test_distillation_looks_at_what_one_step_makes():
    method, drawn = made(Gauss(0.8)), rows()
    f, x = method.generated(drawn, drawn.x0, None)
    z = drawn.normal_like("generator", drawn.x0)
    torch.testing.assert_close(x, few_step.sample(method.student, method.spec, z, 1), rtol=1e-12, atol=1e-12)
    assert f.requires_grad and not x.requires_grad


def test_noise_is_shared_or_fresh():
    states = []

    class Seen(MDT):
        def point(self, batch, key, x0, z, t, cond):
            states.append((z, t))
            return super().point(batch, key, x0, z, t, cond)

    for share in (True, False):
        list(parts_of(Seen(MDT.Config(**PLAIN, share_noise=share), Gauss(), truth()).loss(rows())))
    (z, t), (z_vd, t_vd), (fresh, _), (z_fresh, t_fresh) = states
    assert torch.equal(z, z_vd) and torch.equal(t, t_vd) and torch.equal(t, t_fresh)
    assert torch.equal(z, fresh) and not torch.equal(fresh, z_fresh)


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_slopes_are_normalised_over_whole_samples(norm):
    dense = gaussian(2, (3, 4), 6)
    size = dense.flatten(1).norm(dim=1) / (math.sqrt(12) if norm == "rms" else 1)
    expected = dense / (size + 0.1)[:, None, None]
    torch.testing.assert_close(normalised(dense, 0.1, norm), expected)
    coords = torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 1, 1))).int()
    ragged = Voxels(dense.flatten(0, 1), coords, 2)
    torch.testing.assert_close(normalised(ragged, 0.1, norm).feats, expected.flatten(0, 1))


def test_phases_end_at_their_lower_boundary():
    """t - interval just above, at and below a boundary of four phases."""
    method = made(distill_type="cm", lambda_vd=0, multiphase=4)
    for earlier, end in ((0.51, 0.5), (0.5, 0.5), (0.49, 0.25), (0.99, 0.75), (0.1, 0.0)):
        point = at(method, earlier + 0.01)
        phi = method.average_velocity(None)(point.x, point.t)
        first, _ = method.consistency(point)
        torch.testing.assert_close(first, point.x - (earlier + 0.01 - end) * phi, rtol=1e-9, atol=1e-9)


# Voxels


class PerVoxel(Denoiser):
    """y = tanh(a x + b t), on dense samples and on voxels."""

    family = "per voxel"

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(None, RectifiedFlow(sigma_min=1e-5), Prediction(kind="flow", sigma_min=1e-5), shape=(3,))
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=dtype)) for value in (0.7, -0.4))

    def raw(self, x, time, cond, extra):
        if isinstance(x, Voxels):
            return x.with_feats(torch.tanh(self.a * x.feats + self.b * x.rows(time[:, None])))
        return torch.tanh(self.a * x + self.b * time.reshape(-1, *[1] * (x.ndim - 1)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", ["discrete", "continuous", "cm"])
def test_a_full_grid_of_voxels_is_a_dense_sample(kind, dtype, tolerance):
    options = {"distill_type": kind, "d_norm": True, "lambda_vd": float(kind != "cm")}
    x0 = gaussian(2, (2, 2, 2, 3), 8).to(dtype)
    coords = torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 2, 2))).int()
    ragged = Voxels(x0.reshape(-1, 3), coords, 2)

    def rows_of(x):
        drawn = batch({"x0": x}, 2)
        normal = drawn.normal_like
        # The noise of voxels is drawn as [N, C] per sample, which for a full grid are the numbers of [X, Y, Z, C].
        drawn.normal_like = lambda tag, like, draw=0: normal(tag, like, draw).to(dtype)
        drawn.uniform = lambda tag, shape=(), draw=0: torch.tensor([0.3, 0.8], dtype=dtype)
        return drawn

    found = []
    for x in (x0, ragged):
        config = MDT.Config(**{**PLAIN, **options, "t_schedule": TimesConfig(kind="uniform")})
        found.append(gradients(MDT(config, PerVoxel(dtype), Teacher(PerVoxel(dtype))), rows_of(x)))
    (dense, g), (sparse, h) = found
    torch.testing.assert_close(sparse, dense, rtol=tolerance, atol=0)
    for name in g:
        torch.testing.assert_close(h[name], g[name], rtol=tolerance, atol=tolerance * float(g[name].abs()))


@pytest.mark.parametrize("kind", ["discrete", "continuous", "cm"])
def test_a_sample_without_voxels_changes_nothing(kind):
    config = MDT.Config(**{**PLAIN, "distill_type": kind, "d_norm": True, "lambda_vd": float(kind != "cm")})
    coords = torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 2, 2))).int()
    feats, found = gaussian(16, (3,), 8), []
    for samples, times in ((2, (0.3, 0.8)), (3, (0.3, 0.5, 0.8))):
        place = coords.clone()
        place[:, 0] *= samples - 1  # of three the second is empty
        drawn = batch({"x0": Voxels(feats, place, samples)}, samples)
        drawn.normal_like = lambda tag, like, draw=0: like.with_feats(gaussian(16, (3,), len(tag)))
        drawn.uniform = lambda tag, shape=(), draw=0, t=times: torch.tensor(t, dtype=torch.float64)
        method = MDT(config, PerVoxel(torch.float64), Teacher(PerVoxel(torch.float64)))
        method.times = lambda drawn: drawn.uniform("t")
        found.append(gradients(method, drawn))
    (two, g), (three, h) = found
    torch.testing.assert_close(three, two, rtol=1e-12, atol=0)
    for name in g:
        torch.testing.assert_close(h[name], g[name], rtol=1e-12, atol=0)


# Learning


class TimeOnly(Denoiser):
    """phi = a(t) x."""

    family = "time only"

    def __init__(self) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=(1,))
        self.net = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def raw(self, x, time, cond, extra):
        return self.net(time[:, None]) * x


class Drawn:
    def get(self, rows):
        return {"x0": SD * torch.randn(len(rows), 1, generator=torch.Generator().manual_seed(int(rows[0])))}


@pytest.mark.parametrize(("lambda_vd", "steps"), [(0.0, 500), pytest.param(1.0, 1000, marks=pytest.mark.slow)])
def test_a_gaussian_is_learned_from_its_velocity(lambda_vd, steps, tmp_path):
    torch.manual_seed(0)
    student, teacher = TimeOnly(), Teacher(Mixture(torch.ones(1), torch.zeros(1, 1), SD**2 * torch.eye(1)[None]))
    fit = torch.optim.Adam(student.parameters(), 3e-3)
    for _ in range(400):
        t = torch.rand(256)
        v = (t - (1 - t) * SD**2) / ((1 - t) ** 2 * SD**2 + t**2)
        loss = (student.net(t[:, None])[:, 0] - v).square().mean()
        fit.zero_grad()
        loss.backward()
        fit.step()
    z = torch.linspace(-2, 2, 9)[:, None]
    method = made(student, teacher, t_schedule=TimesConfig(kind="uniform"), lambda_vd=lambda_vd)
    ratio = lambda: float((few_step.sample(student, method.sampler(), z, 1) / z)[0])  # noqa: E731
    assert abs(ratio()) < 0.1
    config = LoopConfig(steps=steps, batch=256, optim=OptimConfig(lr=1e-3), clip=None, log_every=1000, save_every=1000)
    Loop(method, Drawn(), config, tmp_path).run()
    assert abs(ratio() - SD) < 0.03
