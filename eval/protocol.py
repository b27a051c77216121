"""What is measured of a teacher and its student: images through the gate, points against the truth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgen.cond import Cond
from fastgen.data import DataSet
from fastgen.eval import gate, metrics
from fastgen.eval.extractors import Classifier, Extractor, load_extractor
from fastgen.eval.gate import Judge, Seen
from fastgen.samplers import ode
from fastgen.samplers.draw import draw
from fastgen.student import Student
from fastgen.teacher import Teacher
from fastgen.teachers.mixture import Mixture

MANY = 25  # the teacher's step count that stands for "slow and good", with Heun
TEACHER_STEPS = (1, 2, 4)
FEW_SOLVERS = ("euler", "dpm++")  # the free baselines: the better of the two stands in the table


def whole(data: DataSet) -> dict[str, Tensor]:
    """All samples of a data set, {"x0": [N, ...], "label": [N] if labelled}."""
    parts = [data.get(index) for index in torch.arange(len(data)).split(1000)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def image_protocol(
    student: Student, teacher: Teacher, train: DataSet, held_out: DataSet, *, n: int, seed: int, extractor: Extractor
) -> dict[str, Any]:
    """FD against steps for both, the gate, and the floor; see `gate` for the checks.

    n samples a row, the same noise for every row. Class-conditional models are sampled twice: with uniform labels and
    with the null label; names of the second run's checks end in "_null".
    """
    if not isinstance(extractor, Classifier):
        raise ValueError("the gate reads labels: it needs a classifier")
    judge = Judge(extractor, whole(train)["x0"], whole(held_out)["x0"])
    classes = teacher.num_classes
    rows = torch.arange(n)
    report: dict[str, Any] = {"n": n, "n_ref": len(train), "seed": seed, "real_floor": judge.floor}
    report["extractor"] = {"name": extractor.name, "sha256": extractor.sha256}
    report["gate"] = {}
    runs: dict[str, Cond] = {"": None}
    if classes is not None:
        runs = {"": {"label": rows % classes}}
        if teacher.denoiser.has_null:
            runs["_null"] = {"label": torch.full((n,), classes)}
    for suffix, cond in runs.items():
        seen = _samples(judge, student, teacher, rows, seed, cond)
        deterministic = student.sampler.keeps_noise
        checks = gate.common_checks(judge, seen["student"], seen["teacher"], seen["one"], deterministic=deterministic)
        if cond is not None and not suffix:
            checks |= gate.agreement_check(seen["student"], seen["teacher"], cond["label"])
        else:
            checks |= gate.shares_check(seen["student"], seen["teacher"], extractor.num_classes)
        report["gate"] |= {name + suffix: check.to_dict() for name, check in checks.items()}
        rows_seen = {**seen, "held_out": judge.held_out}
        report["null" if suffix else "labels"] = {name: one.figures for name, one in rows_seen.items()}
        if not suffix:
            report |= _curves(judge, student, teacher, rows, seed, cond, seen)
    report["gate_passed"] = all(check["passed"] for check in report["gate"].values())
    return report


def _samples(judge: Judge, student: Student, teacher: Teacher, rows: Tensor, seed: int, cond: Cond) -> dict[str, Seen]:
    one = min(student.sampler.times)
    return {
        "student": judge.see(draw(student, rows, seed=seed, steps=one, cond=cond)),
        "teacher": judge.see(draw(teacher, rows, seed=seed, steps=MANY, cond=cond)),
        "one": judge.see(draw(teacher, rows, seed=seed, steps=1, solver="euler", cond=cond)),
    }


def _curves(
    judge: Judge, student: Student, teacher: Teacher, rows: Tensor, seed: int, cond: Cond, seen: dict[str, Seen]
) -> dict[str, Any]:
    """FD against the number of steps, for the teacher with its better few-step solver, and for the student."""
    first, many = seen["one"].figures["fd"], seen["teacher"].figures["fd"]
    teacher_fd, solvers = {1: first}, {1: "euler"}
    for steps in TEACHER_STEPS[1:]:
        tried = {
            solver: judge.frechet(draw(teacher, rows, seed=seed, steps=steps, solver=solver, cond=cond))
            for solver in FEW_SOLVERS
        }
        solvers[steps] = min(tried, key=tried.__getitem__)
        teacher_fd[steps] = tried[solvers[steps]]
    one = min(student.sampler.times)
    student_fd = {one: seen["student"].figures["fd"]}
    for steps in sorted(student.sampler.times)[1:]:
        student_fd[steps] = judge.frechet(draw(student, rows, seed=seed, steps=steps, cond=cond))
    closed = {steps: gate.gap_closed(first, many, fd) for steps, fd in student_fd.items()}
    return {
        "teacher": {"fd": _keys({**teacher_fd, MANY: many}), "solver": _keys({**solvers, MANY: "heun"})},
        "student": {"fd": _keys(student_fd)},
        "gap_closed": _keys(closed),
    }


def _keys(values: dict[int, Any]) -> dict[str, Any]:
    """JSON has no integer keys."""
    return {str(key): value for key, value in values.items()}


def point_protocol(student: Student, teacher: Teacher, *, n: int, seed: int) -> dict[str, Any]:
    """A student of a closed-form mixture against the truth: one-step RMSE to the exact end point from the same noise,
    over the one-step teacher's; straightness over the teacher's; energy distance; the shares of the modes."""
    truth = teacher.denoiser
    if not isinstance(truth, Mixture):
        raise ValueError("points are judged against a closed-form mixture")
    rows = torch.arange(n)
    exact = draw(teacher, rows, seed=seed, steps=200)
    label = None if truth.num_classes is None else {"label": torch.full((n,), truth.num_classes)}
    one = draw(student, rows, seed=seed, steps=min(student.sampler.times), cond=label)
    first = draw(teacher, rows, seed=seed, steps=1, solver="euler")
    real = truth.sample(seed, "evaluate", rows)
    z = torch.randn(n, *teacher.shape, generator=torch.Generator().manual_seed(seed))
    bent = [ode.straightness(model, z, steps=100, cond=label) for model in (student.denoiser, teacher)]
    told = {
        "n": n,
        "seed": seed,
        "rmse": metrics.rmse(one, exact),
        "rmse_ratio": metrics.rmse(one, exact) / metrics.rmse(first, exact),
        "straightness": bent[0],
        "straightness_ratio": bent[0] / bent[1],
        "energy_distance": metrics.energy_distance(one, real),
        "energy_floor": metrics.energy_distance(exact, real),
        "mode_shares": truth.mode_shares(one).tolist(),
        "mode_shares_exact": truth.weights.tolist(),
    }
    # A diverged student has one-step samples, and no path; JSON has no NaN.
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}


def classifier_for(train: DataSet, steps: int = 1000) -> Extractor:
    """The extractor of the gate: the shipped classifier for the digits, else one trained on the training part now."""
    return load_extractor("classifier", train, steps)
