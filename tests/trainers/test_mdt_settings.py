"""What MDT takes and refuses: guidance, times, settings, and how its students are stepped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import VP, Prediction, RectifiedFlow
from fastgen.samplers import few_step
from fastgen.samplers.replay import replay, visited
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.trainers import mdt
from fastgen.trainers.engine.times import TimesConfig
from fastgen.trainers.mdt import MDT
from tests.trainers.gauss import PLAIN, RF, Gauss, made, rows, truth
from tests.trainers.truth import batch, gaussian, small

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


@pytest.mark.parametrize(("lambda_vm", "w"), [(1, 2.0), (0, 5.0)])
def test_the_diagnosis_is_against_the_teacher_that_is_followed(lambda_vm, w, monkeypatch):
    asked = []
    monkeypatch.setattr(mdt.ode, "solve", lambda teacher, z, **options: asked.append(options["guidance"]) or z)
    method = made(Linear(), Teacher(Linear()), lambda_vm=lambda_vm, cfg_vm=2.0, cfg_vd=5.0)
    method.diagnose(Linear(), labelled(4))
    assert asked == [1 + w]


def test_rows_without_condition_are_dropped_for_both(monkeypatch):
    method = made(Linear(), Teacher(Linear()), p_uncond=0.5)
    share = (method.condition(labelled(400))["label"] == 3).double().mean()
    assert 0.4 < share < 0.6
    assert torch.equal(made(Linear(), Teacher(Linear())).condition(labelled(9))["label"], torch.arange(9) % 3)


# Times


def test_times_leave_room_for_the_difference():
    wide = batch({"x0": gaussian(4000, (2,))}, 4000)
    method = MDT(MDT.Config(cfg_vm=0, cfg_vd=0), Gauss(), truth())
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
