"""What a derivative costs: steps of sCM and MeanFlow against a step of our own consistency training.

    OMP_NUM_THREADS=1 python benchmarks/jvp_cost.py [--nets tiny,small] [--runs 3] [--steps 12] [--json FILE]

A step is the method's own loss, the backward pass, Adam and zero_grad: no clipping, no averages, no loop. Random data
(normal, 0.5), batch 16. In each run the methods take turns step by step, so that a drifting machine slows all of them;
of `--steps` steps the first two are dropped and the median is taken, and over runs the median of those, for ratios as
for seconds. Seconds are CPU time of the one thread; `wall` says how much longer the clock ran.

The networks stand beside EDM's SongUNet (2206.00364; unconditional, no dropout, 4 blocks a level, attention at 16 x 16)
but are not of its class: diffusers' UNet2DModel with residual layers that resample, and one head of attention at the
places where SongUNet has it. Parameters and multiply-adds of both are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.config import validate
from fastgen.denoiser import Denoiser
from fastgen.paths import EDM, Prediction
from fastgen.teacher import Teacher
from fastgen.teachers.unet import UNetDenoiser
from fastgen.trainers.engine.method import Batch, Method, find_method, parts_of

BATCH, CHANNELS, BLOCKS, ATTENDED, LR = 16, 32, 4, 16, 1e-4
NETS = {"tiny": (8, (1,)), "small": (16, (1, 2))}  # side in pixels, channels of each level over 32

# Each method: its name, its settings, whether it asks a teacher.
DERIVATIVE = {
    "sCT": ("scm", {"velocity": "data"}, False),
    "sCD": ("scm", {"velocity": "teacher"}, True),
    "MeanFlow, data": ("meanflow", {"velocity": "data"}, False),
    "MeanFlow, teacher": ("meanflow", {"velocity": "teacher"}, True),
}
METHODS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "consistency training": ("consistency", {"kind": "ict"}, False),
    "consistency distillation, Euler": ("consistency", {"kind": "cd", "solver": "euler"}, True),
    "consistency distillation, Heun": ("consistency", {"kind": "cd"}, True),
    **{
        f"{name}, {route}": (method, {**settings, "jvp": {"route": route}}, teacher)
        for name, (method, settings, teacher) in DERIVATIVE.items()
        for route in ("two_pass", "single_pass", "finite")
    },
}
FIRST = next(iter(METHODS))
BOUNDS = {"sCT, two_pass": 2.0, "MeanFlow, data, two_pass": 2.0, "sCT, single_pass": 1.7} | {
    "MeanFlow, data, single_pass": 1.7,
    "sCD, two_pass": 2.4,
    "MeanFlow, teacher, two_pass": 2.4,
}
# Seconds a step of FastGen (NVlabs, 34f30e8) on SongUNet: one thread of a 2-core x86-64 CPU, torch 2.15.
FASTGEN = {
    "tiny": {"consistency training": 0.056, "sCT, two_pass": 0.130, "MeanFlow, data, two_pass": 0.119}
    | {"consistency distillation, Euler": 0.069, "sCD, two_pass": 0.142},
    "small": {"consistency training": 0.39, "sCT, two_pass": 0.74, "MeanFlow, data, two_pass": 0.66}
    | {"consistency distillation, Euler": 0.49, "sCD, two_pass": 0.84},
}


def build(name: str, kind: Literal["edm", "cm"] = "edm") -> UNetDenoiser:
    """Levels with attention down and up as in SongUNet: all blocks on the way down, on the way up the last one."""
    from diffusers import UNet2DModel

    side, widths = NETS[name]
    torch.manual_seed(0)
    attended = [side >> level == ATTENDED for level in range(len(widths))]
    # Every block but the finest ends in a residual layer that doubles the size; the finest has none to end in.
    up = [
        "AttnUpBlock2D" if has else "ResnetUpsampleBlock2D" if level else "UpBlock2D"
        for level, has in enumerate(attended)
    ]
    net: Any = UNet2DModel(
        sample_size=side,
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(CHANNELS * width for width in widths),
        layers_per_block=BLOCKS,
        down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attended),
        up_block_types=tuple(reversed(up)),
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=None,  # one head
        norm_num_groups=8,
        norm_eps=1e-6,
    )
    for block in net.up_blocks:
        for place in range(len(getattr(block, "attentions", ())) - 1):
            block.attentions[place] = nn.Identity()
    nn.init.normal_(net.conv_out.weight, std=0.01)
    prediction = Prediction(kind=kind, sigma_min=0.002 if kind == "cm" else 0.0)
    return UNetDenoiser(net, EDM(), prediction, shape=(3, side, side), log_time=True)


def multiply_adds(denoiser: Denoiser) -> int:
    """Of one sample's forward pass: convolutions, linear layers and the two products of attention."""
    total, handles = 0, []

    def count(module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * (out.numel() // module.weight.shape[0])

    def attended(module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        places = out.shape[-1] * out.shape[-2]
        total += 2 * places * places * out.shape[1]

    for module in denoiser.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(count))
        elif type(module).__name__ == "Attention":
            handles.append(module.register_forward_hook(attended))
    with torch.no_grad():
        denoiser(torch.zeros(1, *denoiser.shape), torch.ones(1))
    for handle in handles:
        handle.remove()
    return total


class SongUNet:
    """Parameters and multiply-adds of EDM's network (training/networks.py: DDPM++), added up from its layers."""

    def __init__(self, name: str) -> None:
        self.parameters = self.multiply_adds = 0
        side, widths = NETS[name]
        self.emb = 4 * CHANNELS
        self.layer(CHANNELS, self.emb, 1, 1)
        self.layer(self.emb, self.emb, 1, 1)
        channels, skips = CHANNELS, [CHANNELS]
        self.layer(3, CHANNELS, 3, side)
        for level, width in enumerate(widths):
            here = side >> level
            if level:
                self.block(channels, channels, here, resampled=True)
                skips.append(channels)
            for _ in range(BLOCKS):
                self.block(channels, CHANNELS * width, here, attention=here == ATTENDED)
                channels = CHANNELS * width
                skips.append(channels)
        for level, width in reversed(list(enumerate(widths))):
            here = side >> level
            if level == len(widths) - 1:
                self.block(channels, channels, here, attention=True)
                self.block(channels, channels, here)
            else:
                self.block(channels, channels, here, resampled=True)
            for place in range(BLOCKS + 1):
                attention = place == BLOCKS and here == ATTENDED
                self.block(channels + skips.pop(), CHANNELS * width, here, attention=attention)
                channels = CHANNELS * width
        self.parameters += 2 * channels
        self.layer(channels, 3, 3, side)

    def layer(self, channels: int, out: int, kernel: int, side: int) -> None:
        weight = channels * out * kernel**2
        self.parameters += weight + out
        self.multiply_adds += weight * side**2

    def block(self, channels: int, out: int, side: int, attention: bool = False, resampled: bool = False) -> None:
        self.parameters += 2 * channels + 2 * out
        self.layer(channels, out, 3, side)
        self.layer(out, out, 3, side)
        self.layer(self.emb, out, 1, 1)
        if channels != out or resampled:
            self.layer(channels, out, 1, side)
        if attention:
            self.parameters += 2 * out
            self.layer(out, 3 * out, 1, side)
            self.layer(out, out, 1, side)
            self.multiply_adds += 2 * side**4 * out


def method_of(key: str, net: str) -> Method:
    name, settings, teacher = METHODS[key]
    kind = find_method(name)
    student = build(net, "cm" if name == "consistency" else "edm").train()
    config = validate(kind.Config, {"name": name, **settings}, key)
    return kind(config, student, Teacher(build(net)) if teacher else None)


class Stepper:
    """One method with its optimiser; a call is a step."""

    def __init__(self, key: str, net: str) -> None:
        self.method, self.step = method_of(key, net), 0
        trained = [p for network in self.method.networks.values() for p in network.parameters()]
        self.optimizer = torch.optim.Adam(trained, lr=LR, betas=(0.9, 0.99), fused=True)
        self.turn = self.method.turns[0]
        assert len(self.method.turns) == 1

    def __call__(self) -> tuple[float, float]:
        """(CPU seconds, wall seconds)."""
        rows = torch.arange(BATCH * self.step, BATCH * (self.step + 1))
        x0 = 0.5 * torch.randn(BATCH, *self.method.student.shape)
        batch = Batch({"x0": x0}, rows, seed=0, step=self.step, steps=1000)
        cpu, wall = time.process_time(), time.perf_counter()
        for loss in parts_of(self.turn.loss(batch)):
            (loss[0] if isinstance(loss, tuple) else loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return time.process_time() - cpu, time.perf_counter() - wall


def run(net: str, keys: Iterable[str], steps: int) -> dict[str, tuple[float, float]]:
    """Medians of one run, (CPU, wall) seconds a step by method."""
    steppers = {key: Stepper(key, net) for key in keys}
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in steppers}
    for turn in range(steps):
        for key, step in steppers.items():
            taken = step()
            if turn >= 2:
                times[key].append(taken)
    return {
        key: (statistics.median(cpu for cpu, _ in taken), statistics.median(wall for _, wall in taken))
        for key, taken in times.items()
    }


def table(net: str, runs: list[dict[str, tuple[float, float]]]) -> list[dict[str, Any]]:
    rows = []
    for key in runs[0]:
        row: dict[str, Any] = {"net": net, "method": key}
        row["seconds"] = statistics.median(r[key][0] for r in runs)
        row["wall"] = statistics.median(r[key][1] / r[key][0] for r in runs)
        row["ratio"] = statistics.median(r[key][0] / r[FIRST][0] for r in runs)
        row["bound"], row["fastgen"] = BOUNDS.get(key), FASTGEN[net].get(key)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print("| net | method | s a step | over consistency training | bound | FastGen, s a step | ours over it | wall |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        bound, other = row["bound"] or "", row["fastgen"]
        beside = f"{other} | {row['seconds'] / other:.2f}" if other else " | "
        told = f"{row['net']} | {row['method']} | {row['seconds']:.3f} | {row['ratio']:.2f} | {bound}"
        print(f"| {told} | {beside} | {row['wall']:.2f} |")


def counts(net: str) -> dict[str, Any]:
    ours, theirs = build(net), SongUNet(net)
    return {
        "parameters": sum(p.numel() for p in ours.parameters()),
        "multiply_adds": multiply_adds(ours),
        "SongUNet_parameters": theirs.parameters,
        "SongUNet_multiply_adds": theirs.multiply_adds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of a derivative, over consistency training.")
    parser.add_argument("--nets", default="tiny,small")
    parser.add_argument("--methods", default="", help="part of the names of those to time; all by default")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keys = [key for key in METHODS if key == FIRST or options.methods in key]
    result: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "nets": {}, "rows": []}
    for net in options.nets.split(","):
        result["nets"][net] = counts(net)
        print(net, json.dumps(result["nets"][net]))
        result["rows"] += table(net, [run(net, keys, options.steps) for _ in range(options.runs)])
    show(result["rows"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
