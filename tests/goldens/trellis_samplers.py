"""Kinds of the group `trellis` that are samplers: official loops round official networks."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fastgen.cond import Cond
from fastgen.paths import Pair
from fastgen.samplers import ode
from fastgen.samplers.flow_euler import FlowEuler, sample
from fastgen.sparse import Voxels
from fastgen.teacher import Teacher
from fastgen.teachers.trellis.flows import FlowDenoiser, LatentDenoiser, StructureDenoiser
from tests.goldens.case import Case
from tests.goldens.trellis_nets import network


class Recorded(Teacher):
    """A teacher whose null condition is the case's, and which keeps what it says and how many rows it was asked."""

    def __init__(self, denoiser: FlowDenoiser, null: Tensor) -> None:
        super().__init__(denoiser)
        self.pairs: list[Any] = []
        self.doubled: list[bool] = []
        denoiser.unconditional = lambda cond: {"image": null}  # type: ignore[method-assign]

    def forward(self, x: Any, t: Tensor, cond: Cond = None, **options: Any) -> Pair:
        rows: list[int] = []
        handle = self.denoiser.net.register_forward_pre_hook(lambda _net, args: rows.append(len(args[1])))
        self.pairs.append(super().forward(x, t, cond, **options))
        handle.remove()
        assert len(rows) == 1, "one batched evaluation per step"
        self.doubled.append(rows[0] == 2 * len(t))
        return self.pairs[-1]


def settings(case: Case, **changes: Any) -> FlowEuler:
    told = {key: value for key, value in case.data["sampler"].items() if key != "sigma_min"}
    return FlowEuler(**{**told, **changes})


def states(model: Teacher, noise: Any, chosen: FlowEuler, cond: Cond) -> list[Any]:
    """All states behind the noise: those of `sample`."""
    path = model.path
    final = (1.0, path.sigma_min)  # type: ignore[attr-defined]
    run = ode.trajectory(
        model, noise, solver="euler", cond=cond, times=chosen.times(), guidance=chosen.weight, final=final
    )
    return list(run)[1:]


def sampler_dense(case: Case) -> None:
    sigma_min = case.data["sampler"]["sigma_min"]
    denoiser = StructureDenoiser(network(case, case.data["model"]), sigma_min=sigma_min)
    noise, cond, null = case["in.noise"], {"image": case["in.cond"]}, case["in.neg_cond"]
    chosen = settings(case)
    case.close(torch.tensor([*chosen.times(), 0.0], dtype=torch.float64), _double(case.data["t_seq"]), "times")
    assert [chosen.weight(t) != 1 for t in chosen.times()] == case.data["guided_steps"]
    teacher = Recorded(denoiser, null)
    found = states(teacher, noise, chosen, cond)
    assert teacher.doubled == case.data["guided_steps"]
    case.close(torch.stack(found), case["interval.pred_x_t"], "states")
    case.close(torch.stack([pair.x0 for pair in teacher.pairs]), case["interval.pred_x_0"], "clean predictions")
    case.close(sample(Recorded(denoiser, null), noise, chosen, cond), case["interval.samples"], "end")
    always = settings(case, cfg_interval=(0.0, 1.0))
    case.close(torch.stack(states(teacher, noise, always, cond)), case["cfg.pred_x_t"], "states, always guided")
    case.close(sample(Recorded(denoiser, null), noise, always, cond), case["cfg.samples"], "end, always guided")
    for match in case.names(r"plain(\d+)\.samples"):
        steps, warp = int(match[1]), re.search(r"rescale_t=([\d.]+)", case.data[f"plain{match[1]}"])
        assert warp, "how the times of an unguided run are spaced"
        plain = FlowEuler(steps=steps, rescale_t=float(warp[1]))
        case.close(sample(denoiser, noise, plain, cond), case[match[0]], "end, unguided")


def sampler_slat(case: Case) -> None:
    sigma_min = case.data["sampler"]["sigma_min"]
    denoiser = LatentDenoiser(network(case, case.data["model"]), sigma_min=sigma_min)
    coords, cond, chosen = case["in.coords"], {"image": case["in.cond"]}, settings(case)
    noise = Voxels(case["in.noise"], coords, len(cond["image"]))
    teacher = Teacher(denoiser)
    found = states(teacher, noise, chosen, cond)
    case.close(torch.stack([state.feats for state in found]), case["out.pred_x_t"], "states")
    end = sample(teacher, noise, chosen, cond)
    case.close(end.feats, case["out.samples"], "end")
    latents = end * case["norm.std"][None] + case["norm.mean"][None]
    case.close(latents.feats, case["out.slat_denormalised"], "in the decoders' units")


def _double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
