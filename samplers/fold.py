"""Students that are told how far they step, in stock pipelines, which have no such input.

In a run of n equal steps that number is a constant, and so is what the network adds to the embedding of its time: it is
folded into that embedding's last bias. One folder for each number of steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastgen.denoiser import GAP, Denoiser, rf_time
from fastgen.errors import UserError
from fastgen.nets.scalar import fold
from fastgen.student import SamplerSpec

EQUAL = 1e-6  # steps that differ by no more are one number to a float32 network
NOTE = "the embedding of the length of a step is folded into a bias, for runs of {steps} step(s) and no other"


def alone(spec: SamplerSpec, steps: int | None) -> SamplerSpec:
    """The sampler of one of its step counts; None: of all."""
    return spec if steps is None else replace(spec, times={steps: spec.at(steps)})


def constant_gap(denoiser: Denoiser, spec: SamplerSpec) -> float:
    """How far every step of a two-time student goes in rectified-flow time, as its network is told; a UserError where
    that is more than one number."""
    if len(spec.times) > 1:
        known = ", ".join(str(n) for n in sorted(spec.times))
        raise UserError(
            "--steps: the network is told how far it steps, which becomes part of its weights: one folder for each "
            f"number of steps; choose one of {known}"
        )
    ((n, times),) = spec.times.items()
    ends = torch.tensor([*times, spec.path.end], dtype=torch.float64)
    told = rf_time(denoiser.path.levels(denoiser.path.time(*spec.path.levels(ends))))
    gaps = (told[:-1] - told[1:]).tolist()
    if max(gaps) - min(gaps) > EQUAL:
        lengths = ", ".join(f"{gap:.4g}" for gap in gaps)
        raise UserError(
            f"sampler: {n} steps have the lengths {lengths} to this network, which no stock pipeline can tell it one "
            "by one; one step can be exported (method.steps=[1])"
        )
    return gaps[0]


def fold_gap(denoiser: Denoiser, gap: float) -> None:
    """Fold what a U-Net adds to the embedding of its time for steps of this length into that embedding's last bias."""
    net: Any = denoiser.net
    told = torch.tensor([gap], device=denoiser.device)
    fold(net.time_embedding.linear_2, denoiser.extra[GAP](told)[0])
