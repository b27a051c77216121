"""MDT against formulas: a Gaussian whose average velocity is known, gradients by hand, voxels against dense samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import VP, Prediction, RectifiedFlow
from fastgen.samplers import few_step
from fastgen.samplers.replay import replay, visited
from fastgen.sparse import Voxels
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.teachers.mixture import Mixture
from fastgen.trainers import mdt
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.method import parts_of
from fastgen.trainers.engine.optim import OptimConfig
from fastgen.trainers.engine.times import TimesConfig
from fastgen.trainers.mdt import MDT, normalised, vd_error
from tests.trainers.truth import batch, gaussian, gradients, small

RF = RectifiedFlow()
SD = 0.5
PLAIN = {"d_norm": False, "cfg_vm": 0, "cfg_vd": 0}


class Gauss(Denoiser):
    """phi(x, t) = x (1 - S / A(t)) / t, A^2 = (1 - t)^2 S^2 + t^2: exact for data of N(0, S^2); S is its weight."""

    family = "gauss"

    def __init__(self, sd: float = SD) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=(2,))
        self.sd = nn.Parameter(torch.tensor(sd, dtype=torch.float64))

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        t = time[:, None]
        return x * (1 - self.sd / ((1 - t).square() * self.sd**2 + t**2).sqrt()) / t


def truth() -> Teacher:
    return Teacher(Mixture(torch.ones(1), torch.zeros(1, 2), SD**2 * torch.eye(2)[None]))


def made(student: Denoiser | None = None, teacher: Teacher | None = None, **options) -> MDT:
    return MDT(MDT.Config(**{**PLAIN, **options}), student or Gauss(), teacher or truth())


def rows(n: int = 64):
    return batch({"x0": SD * gaussian(n, (2,), 9)}, n)


def at(method: MDT, t: float, x: float = 1.0) -> mdt.Point:
    x_t, t_b = torch.full((1, 2), x).double(), torch.tensor([t], dtype=torch.float64)
    return mdt.Point(x_t, t_b, None, method.velocity_of(method.teacher(x_t, t_b, on=RF)))


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


# Guidance


class Linear(Denoiser):
    """v = a x + b with the label, a x without; counts its rows."""

    family = "linear"

    def __init__(self) -> None:
        super().__init__(None, RF, Prediction(kind="flow"), shape=(2,), num_classes=3)
        self.b = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.calls: list[int] = []

    def raw(self, x, time, cond, extra):
        label = self.label(cond, len(x))
        self.calls.append(len(x))
        return 0.3 * x + torch.where(label < 3, self.b, 0.0)[:, None]


def labelled(n: int):
    return batch({"x0": gaussian(n, (2,), 2), "label": torch.arange(n) % 3}, n)


@pytest.mark.parametrize(("w", "rows_asked"), [(0, 8), (None, 8), (2.5, 16)])
def test_teacher_is_guided_by_one_more_than_w_and_asked_once_without(w, rows_asked):
    network = Linear()
    method = made(Linear(), Teacher(network), cfg_vm=w)
    drawn = labelled(8)
    z, t = gaussian(8, (2,), 3), torch.full((8,), 0.4, dtype=torch.float64)
    point = method.point(drawn, "cfg_vm", drawn.x0, z, t, method.condition(drawn))
    torch.testing.assert_close(point.v, 0.3 * point.x + (1 + (w or 0)) * 0.7, rtol=1e-12, atol=1e-12)
    assert network.calls == [rows_asked]


def test_of_several_weights_every_row_draws_its_own():
    method = made(Linear(), Teacher(Linear()), cfg_vd=[1.0, 4.0])
    weights = method.guidance(labelled(200), "cfg_vd")
    assert set(weights.tolist()) == {2.0, 5.0} and 60 < int((weights == 2).sum()) < 140


def test_rows_without_condition_are_dropped_for_both(monkeypatch):
    method = made(Linear(), Teacher(Linear()), p_uncond=0.5)
    share = (method.condition(labelled(400))["label"] == 3).double().mean()
    assert 0.4 < share < 0.6
    assert torch.equal(made(Linear(), Teacher(Linear())).condition(labelled(9))["label"], torch.arange(9) % 3)


# Times


def test_times_leave_room_for_the_difference():
    wide = batch({"x0": gaussian(4000, (2,))}, 4000)
    method = MDT(MDT.Config(cfg_vm=0, cfg_vd=0), PerVoxel(), Teacher(PerVoxel()))
    t = method.times(wide)
    assert float(t.min()) >= 0.01001 and float(t.max()) <= 1
    share = (t - 0.01001) / (1 - 0.01001)
    assert float(share.mean()) == pytest.approx(0.69673, abs=0.008)  # of sigmoid(N(1, 1)), by quadrature
    method = made(t_schedule=TimesConfig(kind="uniform"), distill_type="continuous")
    assert float(method.times(wide).mean()) == pytest.approx(0.5, abs=0.02) and float(method.times(wide).min()) < 0.01


@pytest.mark.parametrize("s", [0.0, 1e-3])
def test_below_the_interval_the_difference_ends_where_the_path_does(s):
    student = small()
    student.path = path = RectifiedFlow(sigma_min=s)
    method = MDT(MDT.Config(**PLAIN, distill_interval=0.2, t_min=0.01), student, truth())
    times = torch.tensor([0.05, 0.2, 0.7], dtype=torch.float64)
    x = gaussian(3, (2,), 2)
    point = mdt.Point(x, times, None, method.velocity_of(method.teacher(x, times, on=path)))
    steps = torch.tensor([0.05 - s, 0.2 - s, 0.2], dtype=torch.float64)[:, None]
    phi = method.average_velocity(None)
    before = phi(x - steps * point.v, times - steps[:, 0])
    torch.testing.assert_close(method.earlier(point)[1], torch.tensor([s, s, 0.5], dtype=torch.float64))
    torch.testing.assert_close(method.discrete(point)[1], (phi(x, times) - before) / steps)
    found = method.times(rows(4000))
    assert s + 0.01 <= found.min() < 0.1 and found.max() <= 1


# What is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lambda_vm": 0, "lambda_vd": 0}, "nothing would be trained"),
        ({"distill_type": "cm"}, "set lambda_vd=0"),
        ({"distill_type": "cm", "lambda_vd": 0, "exact_difference": True}, "belongs to distill_type=discrete"),
        ({"t_min": 0.0}, "greater than or equal to"),
        ({"multiphase": 2}, "belongs to distill_type=cm"),
        ({"jvp": {"route": "finite"}}, "belongs to distill_type=continuous"),
        ({"cfg_vm": []}, "at least 1 item"),
        ({"cfg_vd": [1.0, -2.0]}, "greater than or equal to 0"),
        ({"p_uncond": 0.1, "cfg_vm": 3.0}, "rows without condition would be taught"),
        ({"lambda_vd": 0, "share_noise": False}, "lambda_vd is 0"),
        ({"distill_interval": 1e-9}, "greater than or equal to"),
        ({"rescale_t": 1e300}, "less than or equal to"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        MDT.Config(**{**PLAIN, **options})


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(UserError, match="set teacher=PATH"):
        MDT(MDT.Config(**PLAIN), Gauss())
    with pytest.raises(UserError, match="never asks a teacher"):
        made(velocity="data")
    with pytest.raises(UserError, match=r"method\.cfg_vm=40\.0: the teacher has no null condition; set it to 0"):
        made(cfg_vm=40.0)
    assert made(cfg_vd=100.0, lambda_vd=0).needs == {"x0"}  # what costs nothing is not asked for
    with pytest.raises(UserError, match=r"t begins at 0\.95, and .* ends at 0\.936: lower method\.t_min"):
        made(Eps(), Teacher(Eps()), t_min=0.95)
    with pytest.raises(UserError, match=r"guidance=3: mdt's weights are method\.cfg_vm"):
        made(Linear(), Teacher(Linear(), guidance=3.0))
    with pytest.raises(UserError, match=r"weights are bfloat16: MDT moves a weight by 1e-4 or less"):
        made(mlp.build(mlp.MLPConfig(width=8, depth=1), (2,), None).bfloat16())


def test_a_step_of_the_published_rate_moves_float32_and_not_bfloat16():
    """AdamW moves a weight of 0.03 by about lr."""
    for dtype, moves in ((torch.float32, True), (torch.bfloat16, False)):
        weight = nn.Parameter(torch.full((4,), 0.03, dtype=dtype))
        before = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=4e-8, weight_decay=0.0)
        weight.square().sum().backward()
        optimizer.step()
        assert (not torch.equal(weight.detach(), before)) == moves


# Sampling


def test_samplers_of_a_gaussian_student():
    """One step is exact; a partial step of the average velocity is not, fresh noise is (std 0.6708 and 0.5754)."""
    z = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fresh = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def std(steps: int, **options) -> float:
        spec = made(**options).sampler()
        return float(few_step.sample(Gauss(), spec, z, steps, renoise=lambda i: fresh).std())

    assert std(1) == pytest.approx(0.5, abs=2e-3)
    assert std(2, rescale_t=1.0) == pytest.approx(0.6708, abs=3e-3)
    assert std(2, rescale_t=3.0) == pytest.approx(0.5754, abs=3e-3)
    assert std(2, rescale_t=1.0, sampler="renoise") == pytest.approx(0.5, abs=2e-3)
    spec = made(rescale_t=3.0).sampler()
    assert spec.times == {1: (1.0,), 2: (1.0, 0.75)} and spec.keeps_noise and not spec.renoise


class Eps(Denoiser):
    """A network of Stable Diffusion's kind: it predicts noise, on a table of levels that ends before pure noise."""

    family, xl = "stable_diffusion", False

    def __init__(self) -> None:
        super().__init__(None, VP(), Prediction(kind="eps"), shape=(2,))
        self.weight = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        return self.weight * torch.tanh(x + time[:, None] / 500)


@pytest.mark.parametrize(("sampler", "scheduler"), [("euler", "DDIMScheduler"), ("renoise", "LCMScheduler")])
def test_stock_schedulers_step_a_student_on_a_table_of_levels(sampler, scheduler):
    """Its Euler steps are DDIM's; tests/samplers/test_replay.py holds both schedulers against ours."""
    student = Eps()
    spec = made(student, Teacher(Eps()), sampler=sampler).sampler()
    assert spec.times[1] == pytest.approx((RF.time(*VP().levels(torch.tensor(999.0))).item(),))
    entry = replay(student, spec)
    assert entry.scheduler == scheduler and entry.steps == (1, 2)
    assert [visited(entry, n) for n in entry.steps] == [(999,), (999, 499)]


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
