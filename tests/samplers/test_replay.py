"""The replay table: a stock scheduler, driven as stock pipelines drive it, ends where the few-step sampler ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import EDM, VP, Prediction, RectifiedFlow, TrigFlow
from fastgen.samplers import few_step
from fastgen.samplers.replay import TABLE, Replay, refuse_unreplayable, replay, visited
from fastgen.student import SamplerSpec

SD, SD2, ZERO = VP(), VP(beta_start=1e-4, beta_end=0.02, schedule="linear"), VP(zero_snr=True)
COSINE, RF = VP(schedule="squaredcos_cap_v2"), RectifiedFlow()
LIMIT = 3e-5


class Net(Denoiser):
    """A smooth function of sample and time that no two times or states share."""

    family = "stable_diffusion"
    xl = False

    def __init__(self, path: Any, kind: Any, **options: Any) -> None:
        super().__init__(None, path, Prediction(kind=kind), shape=(2, 4, 4), **options)
        self.told: list[float] = []

    def raw(self, x, time, cond, extra):
        self.told.append(float(time[0]))
        phase = (time.double() * 0.0171).sin().to(x.dtype)[:, None, None, None]
        return 0.6 * (x + phase).tanh() + 0.3 * x.roll(1, -1)


class Pixels(Net):
    family = "unet"


def noise(seed: int) -> torch.Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def run(entry: Replay, net: Net, steps: int) -> torch.Tensor:
    """The loop of StableDiffusionPipeline, whose noise comes from a generator."""
    scheduler, generator = entry.make(), torch.Generator().manual_seed(7)
    scheduler.set_timesteps(steps)
    x = noise(0) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = net.raw(scheduler.scale_model_input(x, t), t.expand(len(x)), None, None) * entry.output_scale
        extra = {"generator": generator} if entry.scheduler == "LCMScheduler" else {}
        x = scheduler.step(out, t, x, **extra, return_dict=False)[0]
    return x


def ours(net: Net, spec: SamplerSpec, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    fresh = lambda i: torch.randn(3, 2, 4, 4, generator=generator)  # noqa: E731
    return few_step.sample(net, spec, noise(0), steps, renoise=fresh)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 3e-5, for values up to 15: x0 of an eps network is divided by the last alpha, 0.07."""
    assert float((found - expected).abs().max()) <= LIMIT * max(1.0, float(expected.abs().max()) / 15)


def spec_of(path: Any, times: tuple[tuple[float, ...], ...], **options: Any) -> SamplerSpec:
    return SamplerSpec(path=path, times={len(run): run for run in times}, **({"init": path.init} | options))


def grid(path: Any, *steps: int, **options: Any) -> SamplerSpec:
    return spec_of(path, tuple(path.grid(n) for n in steps), **options)


FOUR = ((999.0,), (999.0, 499.0), (999.0, 749.0, 499.0, 249.0))
LCM_50 = ((999.0,), (999.0, 499.0), (999.0, 759.0, 499.0, 259.0))
CASES = {
    "eps, own noise": (SD, "eps", grid(SD, 1, 2, 4), "DDIMScheduler"),
    "v, own noise": (SD2, "v", grid(SD2, 1, 2, 4), "DDIMScheduler"),
    "x0, own noise, cosine": (COSINE, "x0", grid(COSINE, 1, 2, 4), "DDIMScheduler"),
    "v, zero SNR": (ZERO, "v", grid(ZERO, 1, 2, 4), "DDIMScheduler"),
    "v, zero SNR, sigma": (ZERO, "v", grid(ZERO, 1, 2, init="sigma"), "DDIMScheduler"),
    "eps, uneven steps": (SD, "eps", grid(SD, 1, 3, 7), "DPMSolverMultistepScheduler"),
    "eps, fresh noise": (SD, "eps", spec_of(SD, FOUR, renoise=True), "LCMScheduler"),
    "v, fresh noise, zero SNR": (ZERO, "v", spec_of(ZERO, FOUR, renoise=True), "LCMScheduler"),
    "x0, fresh noise, LCM's own times": (SD, "x0", spec_of(SD, LCM_50, renoise=True), "LCMScheduler"),
    "eps, fresh noise from 799": (SD, "eps", spec_of(SD, ((799.0,), (799.0, 399.0)), renoise=True), "LCMScheduler"),
    "eps, fresh noise near the data": (SD, "eps", spec_of(SD, ((9.0,), (9.0, 4.0)), renoise=True), "LCMScheduler"),
    "eps, one step at 625": (SD, "eps", spec_of(SD, ((625.0,),)), "LCMScheduler"),
    "v, one step at 625, renoise": (SD2, "v", spec_of(SD2, ((625.0,),), renoise=True), "LCMScheduler"),
    "v, one step at 625, zero SNR": (ZERO, "v", spec_of(ZERO, ((625.0,),)), "LCMScheduler"),
    "eps, one step at 625 of sigma z": (SD, "eps", spec_of(SD, ((625.0,),), init="sigma"), "EulerDiscreteScheduler"),
    "v, own noise from sigma z": (SD, "v", grid(SD, 1, 2, 3, init="sigma"), "EulerDiscreteScheduler"),
    "eps, own noise from 799": (SD, "eps", spec_of(SD, ((799.0,), (799.0, 399.0))), "DDIMScheduler"),
    "flow": (RF, "flow", grid(RF, 1, 2, 4), "DPMSolverMultistepScheduler"),
    "flow, many steps": (RF, "flow", grid(RF, 5, 8, 25), "DPMSolverMultistepScheduler"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_stock_scheduler_ends_where_the_few_step_sampler_ends(case):
    path, kind, spec, scheduler = CASES[case]
    net = Net(path, kind, time_scale=1000.0 if path == RF else 1.0)
    entry = replay(net, spec)
    assert entry.scheduler == scheduler and entry.steps == tuple(sorted(spec.times))
    for n in spec.times:
        net.told.clear()
        expected, times = ours(net, spec, n), list(net.told)
        net.told.clear()
        found = run(entry, net, n)
        assert net.told == pytest.approx(times, abs=1e-3) and len(times) == n
        assert_same(found, expected)


def test_every_row_of_the_table_is_among_the_cases():
    entries = {
        case: replay(Net(p, k, time_scale=1000.0 if p == RF else 1.0), s) for case, (p, k, s, _) in CASES.items()
    }
    for row in TABLE:
        assert any(
            entry.scheduler == row.scheduler and row.constants.items() <= entry.config.items()
            for entry in entries.values()
        ), row.students


def test_a_sampler_on_another_path_is_brought_to_the_networks_own():
    """sCM samples on trigonometric times; the scheduler knows indices only."""
    t = [
        math.atan2(*(float(level) for level in SD.levels(torch.tensor(index).double())[::-1]))
        for index in (999.0, 499.0)
    ]
    spec = SamplerSpec(path=TrigFlow(), times={1: (t[0],), 2: tuple(t)}, renoise=True, init="unit")
    net = Net(SD, "eps")
    entry = replay(net, spec)
    assert visited(entry, 2) == (999, 499)
    for n in (1, 2):
        assert_same(run(entry, net, n), ours(net, spec, n))


@pytest.mark.parametrize("case", ["eps, fresh noise", "eps, one step at 625", "v, one step at 625, zero SNR"])
def test_more_steps_than_were_trained_raise(case):
    path, kind, spec, _ = CASES[case]
    entry = replay(Net(path, kind), spec)
    assert entry.guarded
    for n in (max(spec.times) + 1, 50):
        assert visited(entry, n) == ()
        with pytest.raises(ValueError, match="steps"):
            entry.make().set_timesteps(n)


def test_the_truncated_table_is_the_teachers_first_levels():
    from diffusers import DDIMScheduler

    entry = replay(Net(SD, "eps"), spec_of(SD, ((625.0,),)))
    stock = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert entry.config["num_train_timesteps"] == 626 and len(entry.config["trained_betas"]) == 626
    torch.testing.assert_close(entry.make().alphas_cumprod, stock.alphas_cumprod[:626], atol=0, rtol=1e-4)


def test_the_code_makes_the_same_scheduler():
    """Short enough to be copied by hand: no list of betas in it."""
    import diffusers

    for case, (path, kind, spec, _) in CASES.items():
        entry = replay(Net(path, kind, time_scale=1000.0 if path == RF else 1.0), spec)
        assert len(entry.code()) < 500, case
        made = eval(entry.code(), vars(diffusers))
        assert type(made).__name__ == entry.scheduler
        assert {**made.config, "trained_betas": 0} == {**entry.make().config, "trained_betas": 0}
        torch.testing.assert_close(made.alphas_cumprod, entry.make().alphas_cumprod, atol=1e-7, rtol=2e-4)


def test_the_config_survives_its_file(tmp_path):
    import diffusers

    for path, kind, spec, scheduler in CASES.values():
        entry = replay(Net(path, kind, time_scale=1000.0 if path == RF else 1.0), spec)
        entry.make().save_pretrained(tmp_path)
        again = getattr(diffusers, scheduler).from_pretrained(tmp_path)
        for n in spec.times:
            again.set_timesteps(n)
            assert tuple(again.timesteps.tolist()) == visited(entry, n)


def test_pixel_pipelines_do_not_scale_their_input():
    """So Euler, which relies on that, is no scheduler for them."""
    spec = spec_of(SD, ((625.0,),), init="sigma")
    replay(Net(SD, "eps"), spec)
    with pytest.raises(UserError, match="no stock scheduler runs a eps network on VP"):
        replay(Pixels(SD, "eps"), spec)
    assert replay(Pixels(SD, "eps"), grid(SD, 1, 2)).scheduler == "DDIMScheduler"


@pytest.mark.parametrize(
    ("net", "spec", "message"),
    [
        (
            Net(SD, "eps"),
            spec_of(SD, ((999.0, 700.0, 300.0),), renoise=True),
            r"\[999, 700, 300\].*LCMScheduler visits",
        ),
        (Net(SD, "eps"), spec_of(SD, ((999.0, 700.0, 300.0),)), "DDIMScheduler visits n even steps"),
        (Net(ZERO, "v"), grid(ZERO, 3), "n a divisor"),
        (Net(SD, "eps"), spec_of(SD, ((625.4,),)), "whole numbers, 625 say"),
        (Net(SD, "eps"), spec_of(SD, ((999.0,), (749.0, 499.0))), "begin at different times"),
        (Net(SD, "eps"), spec_of(SD, ((999.0, 499.0),), init="sigma", renoise=True), "runs in fastgen alone"),
        (Net(SD, "eps"), SamplerSpec(path=RF, times={1: (1.0,)}), "beyond the network's last noise level"),
        (Net(SD, "eps"), spec_of(SD, ((999.0, 499.0),), two_time=True), "2 steps have the lengths 0.3187, 0.5889"),
        (Net(RF, "flow", time_scale=1000.0), grid(RF, 3), "whole numbers, 667 say"),
        (Net(RF, "flow", time_scale=1000.0), spec_of(RF, ((1.0, 0.6),)), "n a divisor of the network's time scale"),
        (Net(RectifiedFlow(sigma_min=1e-5), "flow", time_scale=1000.0), grid(RF, 1), "no stock scheduler runs a flow"),
        (Net(RF, "flow", time_scale=1.0), grid(RF, 2), "whole numbers"),
        (Net(RF, "flow", time_scale=0.5), grid(RF, 2), "counts time"),
        (Net(SD, "eps", time_scale=2.0), grid(SD, 2), "counts time"),
    ],
)
def test_what_no_constructor_can_express_is_refused(net, spec, message):
    for refuse in (replay, refuse_unreplayable):
        with pytest.raises(UserError, match=message):
            refuse(net, spec)


def test_networks_without_a_stock_pipeline_may_have_any_times():
    class Own(Net):
        family = "mlp"

    for net in (
        Own(RF, "flow"),
        Pixels(RF, "flow", num_classes=10, time_scale=1000.0),
        Pixels(EDM(), "edm", log_time=True),
    ):
        spec = grid(net.path, 3)
        refuse_unreplayable(net, spec)
        with pytest.raises(UserError, match="no stock pipeline"):
            replay(net, spec)
