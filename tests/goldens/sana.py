"""Kinds of the group `views` on SANA: the base network, Sprint's on TrigFlow, and the stock scheduler's steps."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fastgen.paths import Pair, Path, Prediction, RectifiedFlow, TrigFlow
from fastgen.samplers import few_step
from fastgen.student import SamplerSpec
from tests.goldens.case import Case
from tests.goldens.views import Told, flow_network, outputs, transformer


def flow(case: Case) -> None:
    """SANA's transformer, whose time argument is 1000 sigma timestep_scale."""
    network, cond = network_of(case)
    transformer(case, network, case["x"], cond, lambda made: made, case.data["schedule"]["shift"])


def sprint(case: Case) -> None:
    """SANA-Sprint's, told sigma itself and a guidance weight; called on TrigFlow as its student is."""
    network, cond = network_of(case)
    assert network.takes_guidance
    outputs(case, network, case["x"], cond, lambda made: made)
    path, t = TrigFlow(sd=1.0), case["view.trig_t_sd1"]
    case.close(case["in.trig_t_used"], t, "angle", rtol=1e-12)
    with torch.no_grad():
        pair = network.double()(case["view.trig_x_sd1"], t, {name: v.double() for name, v in cond.items()}, on=path)
    found = Prediction(kind="trig", sd=1.0).from_pair(pair, *path.levels(t))
    case.close(found, case["view.trig_F_sd1"], "F of the network on TrigFlow")


def network_of(case: Case) -> tuple[Any, dict[str, Tensor]]:
    """The network of a case and the condition that it was called with."""
    from diffusers import SanaTransformer2DModel

    from fastgen.teachers.sana import SanaDenoiser

    net: Any = SanaTransformer2DModel(**case.data["config"]).eval()
    scale = 1000 * net.config.timestep_scale
    network = flow_network(case, SanaDenoiser, net, case["x"].shape[1:], time_scale=scale)
    cond = {"text": case["in.encoder_hidden_states"], "text_mask": case["in.encoder_attention_mask"]}
    if network.takes_guidance:
        cond["guidance"] = case["in.guidance_scale"]
    return network, cond


class LongTrig(TrigFlow):
    """TrigFlow as the stock scheduler runs it: its first time 1.57080 lies 3.7e-6 beyond pi / 2, where ours ends."""

    start = TrigFlow.start + 1e-5

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t.cos(), self.sd * t.sin()


class LongFlow(RectifiedFlow):
    """The rectified flow to the same end: 1 + 3.7e-6."""

    start = RectifiedFlow.start + 1e-5


def steps(case: Case) -> None:
    """diffusers' SCMScheduler as our few-step sampler, with outputs that are given and with SANA-Sprint's network: to
    the case's tolerance at its own times, and at ours (which end at pi / 2) as near as 3.7e-6 of time can tell."""
    n, sd = case.result("num_inference_steps"), case.result("sigma_data")
    given = case["timesteps"].double()
    (name,) = {match[1] for note in case.data["notes"] if (match := re.search(r"network (\w+)", note))}
    network, cond = network_of(Case(case.file.with_name(f"{name}.json")))
    network.path = LongFlow()
    told, seed = Told(None, LongTrig(), Prediction(kind="trig", sd=1.0), shape=()), case.result(r"generator_seed.*")
    for who in ("fixed", "sprint"):
        generator = torch.Generator().manual_seed(seed)
        noise = [torch.randn(case[f"{who}.{i}.unit_noise"].shape, generator=generator) for i in range(n)]
        first, condition = case[f"{who}.init_latents"] / sd, cond if who == "sprint" else None
        spec = SamplerSpec(path=LongTrig(), times={n: tuple(given[:-1].tolist())}, renoise=True)
        seen: list[tuple[Tensor, Tensor, Tensor]] = []  # state, x0 and F of each call

        def call(x: Tensor, t: Tensor, cond: Any, *, on: Path, who: str = who, seen: list[Any] = seen) -> Pair:
            told.answer = case[f"{who}.{len(seen)}.model_output"] / sd
            pair = told(x, t, on=on) if who == "fixed" else network(x, t, cond, on=on)
            seen.append((x, pair.x0, Prediction(kind="trig", sd=1.0).from_pair(pair, *on.levels(t))))
            return pair

        fresh = lambda i, noise=noise: noise[i - 1]  # noqa: E731
        x0 = few_step.sample(call, spec, first / initial_scale(spec, n), n, condition, renoise=fresh)  # type: ignore
        ends = [*(x for x, _, _ in seen[1:]), spec.path.mix(x0, noise[-1], given[-1:].expand(len(x0)))]
        for i, ((x, clean, output), after) in enumerate(zip(seen, ends, strict=True)):
            found = {"sample": x, "model_output": output, "pred_x0": clean, "prev_sample": after}
            case.close(noise[i], case[f"{who}.{i}.unit_noise"], f"{who}: noise {i}", atol=0.0)
            for what, value in found.items():
                case.close(sd * value, case[f"{who}.{i}.{what}"], f"{who}: {what} {i}")
        end = case[f"{who}.final_latents_div_sigma_data"]
        case.close(x0, end, f"{who}: end")
    ours, times = TrigFlow(sd=1.0), tuple(min(t, TrigFlow.start) for t in given[:-1].tolist())
    network.path = RectifiedFlow()
    spec = SamplerSpec(path=ours, times={n: times}, renoise=True)
    x0 = few_step.sample(network, spec, first / initial_scale(spec, n), n, cond, renoise=fresh)
    case.close(x0, end, "end on our path", atol=1e-4)


def initial_scale(spec: SamplerSpec, n: int) -> float:
    """What the sampler multiplies its first noise by."""
    return float(few_step.initial(spec, torch.ones(1, dtype=torch.float64), n))
