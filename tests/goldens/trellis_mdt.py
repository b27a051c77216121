"""Kinds of the group `trellis` that are MDT's losses: the released trainers' on tiny networks, dense and sparse."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from fastgen.sparse import Voxels
from fastgen.teacher import Teacher
from fastgen.teachers.trellis.flows import FlowDenoiser, LatentDenoiser, StructureDenoiser
from fastgen.teachers.trellis.models import make
from fastgen.trainers.engine.method import Batch
from fastgen.trainers.mdt import MDT, Point
from tests.goldens.case import Case

HALVES = ("blocks", "input_blocks", "out_blocks")  # whose gradients are grouped one level deeper


class Drawn(Batch):
    """The noises and times of the case in place of fastgen's own."""

    def __init__(self, case: Case, x0: Any) -> None:
        self.case, self.like = case, x0
        data = {"x0": x0, "cond.image": case["in.cond"]}
        super().__init__(data, torch.arange(len(x0)), seed=0, step=0, steps=1)

    def normal_like(self, tag: str, x: Any, draw: int = 0) -> Any:
        drawn = self.case[{"noise": "in.noise", "generator": "in.noise_fake"}[tag]]
        return x.with_feats(drawn) if isinstance(x, Voxels) else drawn

    def uniform(self, tag: str, shape: tuple[int, ...] = (), draw: int = 0) -> Tensor:
        assert tag == "t"
        return self.case["in.t_raw"]


class Recorded(MDT):
    """Keeps the times, predictions and targets."""

    seen: list[tuple[Tensor, Tensor, Tensor]]

    def target(self, at: Point) -> tuple[Tensor, Tensor]:
        found = super().target(at)
        self.seen.append((at.t, *(v.feats if isinstance(v, Voxels) else v for v in found)))
        return found


def denoiser(case: Case, who: str, kind: type[FlowDenoiser]) -> FlowDenoiser:
    head = case.data["model"]
    net = make(head["class_model"], head["args"], str(case.file))
    net.load_state_dict({match[1]: case[match[0]] for match in case.names(rf"{who}\.(.+)")}, strict=True)
    return kind(net, sigma_min=case.data["sigma_min"])


def mdt_dense(case: Case) -> None:
    losses(case, StructureDenoiser, case["in.x0"])


def mdt_sparse(case: Case) -> None:
    losses(case, LatentDenoiser, Voxels(case["in.x0"], case["in.coords"], len(case["in.cond"])))


def losses(case: Case, kind: type[FlowDenoiser], x0: Any) -> None:
    """Every case's losses, predictions, targets and gradients. p_uncond and sigma_min are the whole file's."""
    assert case.result("p_uncond") == 0
    assert case.result("sigma_min") == kind(denoiser(case, "student", kind).net).path.sigma_min  # type: ignore[attr-defined]
    for i, told in enumerate(case.data["cases"]):
        one_case(case, kind, x0, i, told)


def tolerances(case: Case, kind: str) -> tuple[float, float]:
    """(of losses, of gradients), relative: a difference over 0.01 in float32 amplifies rounding."""
    if kind == "discrete":
        return case.noted("loss rel"), case.noted("gradient norms rel")
    found = re.search(r"([\d.e-]+) / ([\d.e-]+) otherwise", case.data["tolerance"]["note"])
    assert found, f"{case.key}: the note names no tolerances for {kind}"
    return float(found[1]), float(found[2])


def one_case(case: Case, kind: type[FlowDenoiser], x0: Any, i: int, told: dict[str, Any]) -> None:
    named = ("distill_type", "cfg_vm", "cfg_vd", "lambda_vm", "lambda_vd", "d_norm")
    config = MDT.Config(
        **{key: told[key] for key in named}, distill_interval=told["interval"], t_schedule={"kind": "uniform"}
    )
    method = Recorded(config, denoiser(case, "student", kind), Teacher(denoiser(case, "teacher", kind)))
    method.seen, logs, total = [], dict[str, Tensor](), torch.zeros(())
    for part, extra in method.loss(Drawn(case, x0)):  # type: ignore[misc]
        part.backward()
        total, logs = total + part.detach(), {**logs, **extra}
    rtol, gradient_rtol = tolerances(case, told["distill_type"])
    case.close(total, told["loss"], f"case {i}: loss", rtol=rtol)
    for key in ("loss_vm", "loss_vd"):
        assert (key in logs) == (key in told), f"case {i}: {key}"
        if key in told:
            case.close(logs[key], told[key], f"case {i}: {key}", rtol=rtol)
    order = [key for key in ("vm", "vd") if told[f"lambda_{key}"]]
    for key, (t, prediction, aim) in zip(order, method.seen, strict=True):
        case.close(t, case[f"case{i}.t"], f"case {i}: t")
        case.close(prediction, case[f"case{i}.{key}.pred"], f"case {i}: {key}'s prediction")
        case.close(aim, case[f"case{i}.{key}.target"], f"case {i}: {key}'s target")
    gradients(case, method, i, told, gradient_rtol)


def gradients(case: Case, method: MDT, i: int, told: dict[str, Any], rtol: float) -> None:
    net = method.student.net
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    squares = defaultdict[str, float](float)
    for name, gradient in found.items():
        parts = name.split(".")
        squares[".".join(parts[: 2 if parts[0] in HALVES else 1])] += float(gradient.double().square().sum())
    case.close(sum(squares.values()) ** 0.5, told["grad_norm_total"], f"case {i}: gradient norm", rtol=rtol)
    assert squares.keys() == told["grad_norm_by_group"].keys()
    for group, norm in told["grad_norm_by_group"].items():
        case.close(squares[group] ** 0.5, norm, f"case {i}: gradient norm of {group}", rtol=rtol)
    for match in case.names(rf"case{i}\.grad\.(.+)"):
        case.close(found[match[1]], case[match[0]], f"case {i}: gradient of {match[1]}", rtol=rtol)
    teacher = method.teacher
    assert teacher is not None and all(p.grad is None for p in teacher.parameters())
