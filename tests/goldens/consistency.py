"""Golden kinds of the consistency group."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.nets.lora import UNET_TARGETS, LoraConfig, add_lora, lora_settings, lora_tensors
from fastgen.paths import VP, Prediction
from fastgen.samplers.export import lora_keys
from fastgen.teacher import Teacher
from fastgen.teachers.stable_diffusion import (
    StableDiffusionDenoiser,
    guidance_embedding,
    guidance_frequencies,
    waves,
)
from fastgen.trainers.engine.method import Batch
from fastgen.trainers.lcm import Lcm, boundary, chosen, ddim_points
from tests.goldens.analytic import analytic_flow as analytic_flow
from tests.goldens.case import Case
from tests.goldens.ict import ict_schedule as ict_schedule


def lora_layout(case: Case) -> None:
    """Names and shapes of a U-Net's adapters: peft's, those that `load_lora_weights` reads, and kohya's."""
    assert case.data["lora_targets"] == list(UNET_TARGETS)
    rank, alpha = case.result("rank"), case.result("alpha")
    net = UNet2DConditionModel(**case.data["unet_config"])
    denoiser = StableDiffusionDenoiser(net, VP(), Prediction(kind="eps"), shape=(4, 8, 8))
    add_lora(denoiser, LoraConfig(rank=rank, alpha=alpha), seed=0)
    tensors, settings = lora_tensors(denoiser), lora_settings(denoiser)
    assert (settings["rank"], settings["alpha"]) == (rank, alpha)
    assert set(settings["targets"]) == set(UNET_TARGETS)
    assert shapes(tensors) == case.data["loadable_keys"]
    peft = {name.removeprefix("base_model.model."): shape for name, shape in case.data["peft_keys"].items()}
    assert {name.removeprefix("unet."): shape for name, shape in shapes(tensors).items()} == peft
    assert shapes(lora_keys.kohya(tensors, settings)[0]) == case.data["kohya_keys"]


class Given(Denoiser):
    """A network that answers with what it was given, [B, ...]."""

    has_null = True
    null = {"text": torch.zeros(1, 1, 1)}  # noqa: RUF012

    def __init__(self, path: VP, kind: Any, answer: Tensor) -> None:
        super().__init__(None, path, Prediction(kind=kind), shape=tuple(answer.shape[1:]))
        self.answer, self.asked = nn.Parameter(answer), []

    def raw(self, x: Tensor, time: Tensor, cond: Any, extra: Any) -> Tensor:
        self.asked.append((x, time, cond))
        return self.answer

    def add_guidance(self) -> None:
        """Its answer is the same for every weight."""


class Drawn(Batch):
    """The case's draws: DDIM points by index, noise, and the place of w in its range."""

    def __init__(self, case: Case, share: Tensor) -> None:
        data = {"x0": case["x0"], "cond.text": torch.ones(len(share), 1, 1)}
        super().__init__(data, torch.arange(len(share)), seed=0, step=0, steps=1)
        self.draws = {"index": case["index"], "noise": case["noise"], "w": share}

    def _draw(self, tag: str, *_: Any, **__: Any) -> Tensor:
        return self.draws[tag]

    integers = normal = uniform = _draw  # type: ignore[assignment]


def lcm(case: Case) -> None:
    """Tables, embedding of w, boundary scalings, the guided step, target and losses, for eps and v networks."""
    told = case.data["settings"]
    path = VP(beta_start=told["beta_start"], beta_end=told["beta_end"], schedule=told["schedule"])
    case.close(path.table()[0].square(), case["alphas_cumprod"], "alphas_cumprod")
    points, earlier = ddim_points(path, told["num_ddim_timesteps"])
    assert torch.equal(points.long(), case["ddim_timesteps"]) and path.n // len(points) == told["topk"]
    case.close(path.levels(earlier)[0].square(), case["ddim_alpha_prev"], "ddim_alpha_prev")
    for n, times in case.data["lcm_scheduler_timesteps"].items():
        assert chosen(points.tolist(), int(n)) == tuple(times)
    for match in case.names(r"w_embedding_(\d+)(_f64)?"):
        w, width = case["w"].double() if match[2] else case["w"], int(match[1])
        found = guidance_embedding(w, width) if match[2] else nearest_embedding(w, width, case[match[0]])
        case.close(found, case[match[0]], match[0])
    at = {"": case["timesteps"].float(), "_start": case["start_timesteps"].float()}
    for name, t in at.items():
        skip, out = boundary(t, told["timestep_scaling"], told["sigma_data"])
        case.close(skip, case[f"c_skip{name}"], f"c_skip{name}")
        case.close(out, case[f"c_out{name}"], f"c_out{name}")
    for name, kind in {"epsilon": "eps", "v_prediction": "v"}.items():
        lcm_losses(case, path, name, kind)


def nearest_embedding(w: Tensor, width: int, expected: Tensor) -> Tensor:
    """The float32 embedding of w with each frequency moved by at most one unit in its last place.

    Which way exp rounds near a tie depends on the processor (diffusers' own function is 9e-4 off another machine's),
    and angles of 15,000 show it. The case in float64 leaves no such freedom.
    """
    own = guidance_frequencies(width // 2, w)
    tried = [own, *(torch.nextafter(own, own + side) for side in (1, -1))]
    found = torch.stack([waves(w, frequencies, width) for frequencies in tried])
    off = (found - expected).abs().amax(1).unflatten(1, (2, -1)).amax(1)  # by try and frequency
    assert torch.equal(found[0], guidance_embedding(w, width))
    return found.gather(0, off.argmin(0).repeat(2).expand(1, *expected.shape))[0]


def lcm_losses(case: Case, path: VP, name: str, kind: str) -> None:
    """One kind of network: what its step passes through, and each loss."""
    told, w = case.data["settings"], case["w_per_sample"]
    student, target = (Given(path, kind, case[f"{who}_out"]) for who in ("student", "target"))
    truth = Given(path, kind, torch.cat([case["teacher_uncond_out"], case["teacher_cond_out"]]))
    low, high = float(w.min()), float(w.max())
    drawn = Drawn(case, (w - low) / (high - low))
    for loss, expected in case.data[name].items():
        c = {"huber_c": float(loss.removeprefix("huber_c"))} if loss.startswith("huber") else {}
        settings = {key: told[key] for key in ("num_ddim_timesteps", "timestep_scaling", "sigma_data")}
        config = Lcm.Config(loss="huber" if c else "l2", w_min=low, w_max=high, **c, **settings)
        method = Lcm(config, student, Teacher(truth))
        method.slow["target"] = target
        case.close(method.loss(drawn)[0], expected, f"{name}.{loss}")
    (z, t, cond), (z_prev, earlier, _) = student.asked[-1], target.asked[-1]
    case.close(t, case["start_timesteps"].double(), "start_timesteps")
    case.close(earlier, case["timesteps"].double(), "timesteps")
    case.close(cond["guidance"], 1 + w, "guidance")
    case.close(z, case["z_t"], "z_t")
    case.close(z_prev, case[f"{name}.x_prev"], f"{name}.x_prev")
    case.close(method.consistent(student, z, t, cond), case[f"{name}.model_pred"], f"{name}.model_pred")
    case.close(method.target(z, t, earlier, drawn.cond, w), case[f"{name}.target"], f"{name}.target")


def shapes(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def tiny_losses(case: Case) -> None:
    """One loss after the other, by the family that its name begins with: `tiny_FAMILY.py` holds `check`."""
    checked: dict[str, Any] = {}
    for name, entry in {**case.data["cases"], "ict": case.data["ict"]}.items():
        family = name.split("_")[0]
        checked.setdefault(family, importlib.import_module(f"tests.goldens.tiny_{family}"))
        checked[family].check(case, name, entry)
