"""Kinds of the group `views`: conversions between what networks predict, and the maps between levels and times."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.denoiser import Denoiser
from fastgen.paths import EDM, VP, Pair, Path, Prediction, RectifiedFlow, TrigFlow, carry, shift_time
from tests.goldens.case import Case
from tests.goldens.scm import gmm_tangent as gmm_tangent

TRELLIS_SIGMA_MIN = 1e-5  # a constant of the model, which cases of schedules leave out


def decimal(digits: str) -> float:
    """sigma_data in a tensor's name: "1" is 1, "05" is 0.5."""
    return float(f"0.{digits[1:]}") if digits.startswith("0") else float(digits)


def to_edm(alpha: Tensor, sigma: Tensor) -> Tensor:
    """sigma / alpha, infinite at pure noise."""
    return EDM(start=math.inf, end=0.0).time(alpha, sigma)


def column(v: Tensor, x: Tensor) -> Tensor:
    """[B] shaped to multiply [B, ...]."""
    return v.reshape(-1, *(1,) * (x.ndim - 1))


# --- convert


class Given(Path):
    """Levels as the case gives them, one per sample: nothing about the native path is assumed."""

    def __init__(self, alpha: Tensor, sigma: Tensor) -> None:
        object.__setattr__(self, "given", (alpha, sigma))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.given


class Told(Denoiser):
    """A network whose output is known; it remembers its input."""

    answer: Tensor

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Tensor | None) -> Tensor:
        self.x, self.time = x, time
        return self.answer


def prediction_of(entry: dict[str, Any]) -> Prediction:
    match entry["prediction_type"]:
        case "edm_F":
            return Prediction(kind="edm", sd=entry["sd"])
        case "trig_F":
            return Prediction(kind="trig", sd=entry["sd"])
        case "flow_smin":
            return Prediction(kind="flow", sigma_min=entry["smin"])
        case "eps" | "v" | "x0" | "flow" as kind:
            return Prediction(kind=kind)
        case other:
            pytest.fail(f"unknown prediction_type {other}")


def network_of(entry: dict[str, Any], sigma: Tensor) -> Told:
    """The network that the first words of a case's name mean, with its time convention (see the case's notes)."""
    prediction, options = prediction_of(entry), {}
    match entry["name"].split("_"):
        case ["ddpm", "zsnr", *_]:
            path: Path = VP(zero_snr=True)
        case ["ddpm", *_]:
            path = VP()
        case ["edm", *_]:
            path, options = (
                EDM(start=sigma.max().item(), end=sigma.min().item()),
                {"log_time": prediction.kind == "edm"},
            )
        case ["rf", *_]:
            path = RectifiedFlow()
        case ["trellis", *_]:
            path, options = RectifiedFlow(sigma_min=entry["smin"]), {"time_scale": 1000.0}
        case ["trig", *_]:
            path = TrigFlow(sd=entry["sd"])
        case _:
            pytest.fail(f"no native path is known for the case {entry['name']}")
    return Told(None, path, prediction, shape=(), **options)


def view(name: str, pair: Pair, x: Tensor, here: Path) -> Tensor:
    """One row of the table of views, from the native pair and the native x."""
    alpha, sigma = here.levels(x)
    t = torch.zeros(len(x), dtype=x.dtype)
    scale = torch.hypot(alpha, sigma)
    if trig := re.fullmatch(r"trig_([txF])_sd(\d+)", name):
        path = TrigFlow(sd=decimal(trig[2]))
        x_trig, angle = carry(x, t, here, path)
        if trig[1] == "F":
            return Prediction(kind="trig", sd=path.sd).from_pair(pair, *path.levels(angle))
        return angle if trig[1] == "t" else x_trig
    match name:
        case "x0" | "eps":
            return getattr(pair, name)
        case "score":
            return -pair.eps / column(sigma, x)
        case "rf_x":
            return carry(x, t, here, RectifiedFlow())[0]
        case "rf_sigma":
            return carry(x, t, here, RectifiedFlow())[1]
        case "rf_v":
            return pair.velocity
        case "vp_v":
            return Prediction(kind="v").from_pair(pair, alpha / scale, sigma / scale)
        case "edm_sigma":
            return to_edm(alpha, sigma)
        case _:
            pytest.fail(f"unknown view {name}")


def convert(case: Case) -> None:
    """Every view of every convention, from the bare output and back, and through a network called on another path."""
    for entry in case.data["cases"]:
        name = entry["name"]
        x, y, alpha, sigma, native = (
            case[f"{name}.{key}"] for key in ("x", "net_out", "alpha", "sigma", "native_time")
        )
        views = {match[1]: case[match[0]] for match in case.names(rf"{name}\.view\.(.+)")}
        prediction, here = prediction_of(entry), Given(alpha, sigma)
        pair = prediction.to_pair(y, x, alpha, sigma)
        for key, expected in views.items():
            case.close(view(key, pair, x, here), expected, f"{name}: {key}")
        truth = Pair(views["x0"], views["eps"])
        case.close(prediction.from_pair(truth, alpha, sigma), y, f"{name}: output from the pair")
        case.close(truth.at(alpha, sigma), x, f"{name}: x from the pair")

        network = network_of(entry, sigma)
        network.answer = y
        scale = prediction.input_scale(alpha, sigma)
        fed = x if scale is None else x * column(scale, x)
        for path, x_view, t_view in asked(views):
            found = network.on(path)(views[x_view], views[t_view])
            case.close(network.x, fed, f"{name}: input")
            case.close(network.time, native, f"{name}: time argument")
            case.close(found.x0, truth.x0, f"{name}: x0 through {path}")
            case.close(path.mix(found.x0, found.eps, views[t_view]), views[x_view], f"{name}: pair closes on {path}")


def asked(views: dict[str, Tensor]) -> list[tuple[Path, str, str]]:
    """The paths on which a case gives both an input and its time."""
    digits = [match[1] for name in views if (match := re.fullmatch(r"trig_t_sd(\d+)", name))]
    trig = [(TrigFlow(sd=decimal(d)), f"trig_x_sd{d}", f"trig_t_sd{d}") for d in digits]
    return [(RectifiedFlow(), "rf_x", "rf_sigma"), *trig]


# --- networks of real classes


def unet(case: Case) -> None:
    """A text U-Net of the real class: its own output, and every view of it, natively and through other paths."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from fastgen.teachers.stable_diffusion import StableDiffusionDenoiser

    net: Any = UNet2DConditionModel(**case.data["config"]).eval()
    net.load_state_dict({match[1]: case[match[0]] for match in case.names(r"w\.(.+)")})
    schedule = case.data["schedule"]
    path = VP(
        beta_start=schedule["beta_start"],
        beta_end=schedule["beta_end"],
        n=schedule["num_train_timesteps"],
        schedule=schedule["beta_schedule"],
        zero_snr=schedule["rescale_betas_zero_snr"],
    )
    network = StableDiffusionDenoiser(net, path, prediction_of(case.data), shape=case["x"].shape[1:])
    x, time, cond = case["x"], case["net_time"], {"text": case["in.encoder_hidden_states"]}
    with torch.no_grad():
        case.close(network.raw(x, network.time_input(time), cond, None), case["net_out"], "output in float32")
        exact = network.double().raw(x.double(), network.time_input(time), cond, None)
    case.close(exact, case["net_out_f64"], "output in float64")
    views_of(case, path, time)
    # Where diffusers' own float32 table leaves ours, in alpha squared.
    stock = DDIMScheduler(
        beta_start=path.beta_start,
        beta_end=path.beta_end,
        beta_schedule=path.schedule,
        rescale_betas_zero_snr=path.zero_snr,
    ).alphas_cumprod
    ours = path.levels(torch.arange(path.n, dtype=torch.float64))[0].square()
    off = case.result("max_abs_diff_to_float32_scheduler_alphas_cumprod")
    # Two units in the last place of float32: how that table is rounded depends on torch's version.
    ulps = 2 * torch.finfo(torch.float32).eps
    case.close((ours - stock.double()).abs().max(), off, "distance to the stock table", atol=ulps, rtol=0.0)


def sd3(case: Case) -> None:
    """A flow transformer of the real class, whose time argument is 1000 sigma."""
    from diffusers import SD3Transformer2DModel

    from fastgen.teachers.sd3 import SD3Denoiser

    net: Any = SD3Transformer2DModel(**case.data["config"]).eval()
    network = flow_network(case, SD3Denoiser, net, case["x"].shape[1:], time_scale=1000.0)
    cond = {"text": case["in.encoder_hidden_states"], "pooled": case["in.pooled_projections"]}
    transformer(case, network, case["x"], cond, lambda made: made, case.data["schedule"]["shift"])


def flux(case: Case) -> None:
    """A flow transformer of the real class, whose latents are packed, and whose guidance may be an input."""
    from diffusers import FluxTransformer2DModel

    from fastgen.teachers.flux import FluxDenoiser, pack, positions, unpack

    net: Any = FluxTransformer2DModel(**case.data["config"]).eval()
    x, packed = case["in.x_unpacked"], case["x"]
    network = flow_network(case, FluxDenoiser, net, x.shape[1:])
    height, width = x.shape[-2:]
    case.close(pack(x), packed, "tokens of the latents", atol=0.0, rtol=0.0)
    case.close(unpack(packed, height, width), x, "latents of the tokens", atol=0.0, rtol=0.0)
    case.close(positions(height // 2, width // 2), case["in.img_ids"], "positions", atol=0.0, rtol=0.0)
    assert not case["in.txt_ids"].any()
    cond = {"text": case["in.encoder_hidden_states"], "pooled": case["in.pooled_projections"]}
    if "in.guidance" in case.tensors:
        assert network.takes_guidance
        cond["guidance"] = case["in.guidance"]
    schedule = case.data["schedule"]
    mu = schedule.get("dynamic_exponential_shift_mu")
    shift = schedule.get("shift") if mu is None else math.exp(mu)
    transformer(case, network, x, cond, pack, shift)


def flow_network(case: Case, kind: Any, net: Any, shape: Any, **options: Any) -> Any:
    """A family's denoiser round a network with the case's weights."""
    net.load_state_dict({match[1]: case[match[0]] for match in case.names(r"w\.(.+)")})
    return kind(net, RectifiedFlow(), prediction_of(case.data), shape=shape, **options)


def transformer(case: Case, network: Any, x: Tensor, cond: Any, told: Any, shift: float) -> None:
    """A network's shifted times, and its outputs."""
    case.close(shift_time(case["in.u_unshifted"], shift), case["native_sigma"], "shifted time", rtol=1e-9)
    outputs(case, network, x, cond, told)


def outputs(case: Case, network: Any, x: Tensor, cond: Any, told: Any) -> None:
    """A network's own output (as `told` lays it out) in both precisions, and every view of it."""
    sigma = case["native_sigma"]
    time = network.time_input(sigma)
    case.close(time, case["net_time"], "time argument", rtol=1e-12)
    with torch.no_grad():
        case.close(told(network.raw(x, time, cond, None)), case["net_out"], "output in float32")
        exact = {name: value.double() for name, value in cond.items()}
        made = network.double().raw(x.double(), time, exact, None)
    case.close(told(made), case["net_out_f64"], "output in float64")
    views_of(case, network.path, sigma)


def views_of(case: Case, path: Path, time: Tensor) -> None:
    """Every view of a case's one network, from the output it gives at these times of its path."""
    precise = {"rtol": case.data["tolerance"]["note"]["rtol_of_max_float64_from_given_net_out"]}
    x, alpha, sigma = case["x"].double(), case["native_alpha"], case["native_sigma"]
    for found, expected, name in zip(path.levels(time), (alpha, sigma), ("alpha", "sigma"), strict=True):
        case.close(found, expected, name, **precise)
    network = Told(None, path, prediction_of(case.data), shape=())
    network.answer = case["net_out"].double()  # which the views were worked out from
    pair = network(x, time)
    views = {match[1]: case[match[0]] for match in case.names(r"view\.(.+)")}
    for key, expected in views.items():
        case.close(view(key, pair, x, Given(alpha, sigma)), expected, key, **precise)
    for other, x_view, t_view in asked(views):
        found = network.on(other)(views[x_view], views[t_view])
        case.close(network.x, x, f"input through {other}", **precise)
        case.close(network.time, time, f"time argument through {other}", **precise)
        case.close(found.x0, views["x0"], f"x0 through {other}", **precise)


# --- SANA, whose checks build on those above


def sana_flow(case: Case) -> None:
    from tests.goldens import sana

    sana.flow(case)


def sana_sprint(case: Case) -> None:
    from tests.goldens import sana

    sana.sprint(case)


def scm_steps(case: Case) -> None:
    from tests.goldens import sana

    sana.steps(case)


# --- schedules


def native_path(group: str) -> tuple[Path, str, dict[str, Any]]:
    """The path of a group, the name of its own time, and its network's time convention."""
    match group.split("_"):
        case ["ddpm", "zsnr"]:
            return VP(zero_snr=True), "tau", {}
        case ["ddpm"]:
            return VP(), "tau", {}
        case ["edm"]:
            return EDM(start=math.inf, end=0.0), "sigma", {"log_time": True}
        case ["rf", "shift", _]:
            return RectifiedFlow(), "u", {}
        case ["trellis"]:
            return RectifiedFlow(sigma_min=TRELLIS_SIGMA_MIN), "t", {"time_scale": 1000.0}
        case _:
            pytest.fail(f"unknown group {group}")


def schedules(case: Case) -> None:
    """Levels, angles and network times of every group, and the way back to the group's own time."""
    for group in case.data["groups"]:
        path, own, options = native_path(group)
        given = case[f"{group}.{own}"]
        shift = float(group.split("_")[2]) if "shift" in group else 1.0
        t = shift_time(given, shift)
        alpha, sigma = path.levels(t)
        network = Denoiser(None, path, Prediction(kind="x0"), shape=(), **options)
        levels = {own: (alpha, sigma)}
        for match in case.names(rf"{re.escape(group)}\.(.+)"):
            name, expected = match[1], case[match[0]]
            if angle := re.fullmatch(r"trig_t_sd(\d+)", name):
                other: Path = TrigFlow(sd=decimal(angle[1]))
            elif name == "rf_sigma":
                other = RectifiedFlow()
            else:
                found = {
                    own: lambda g=given: g,
                    "alpha": lambda a=alpha: a,
                    "sigma": lambda s=sigma: s,
                    "sigma_ve": lambda a=alpha, s=sigma: to_edm(a, s),
                    "c_noise": lambda t=t, n=network: n.time_input(t),
                    "net_time": lambda t=t, n=network: n.time_input(t),
                }.get(name)
                assert found, f"unknown tensor {match[0]}"
                case.close(found(), expected, match[0])
                continue
            case.close(other.time(alpha, sigma), expected, match[0])
            levels[name] = other.levels(expected)
        for source, (a, s) in levels.items():
            back = shift_time(path.time(a, s), 1 / shift)
            assert torch.allclose(back, given, rtol=1e-8, atol=1e-8), f"{group}: {own} from {source}"
