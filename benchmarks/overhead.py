"""What the house costs: start-up beyond the teacher's own library, and the loop beyond the step it runs.

    python benchmarks/overhead.py [--repeats 5] [--json FILE]

start-up  a whole process that only imports torch and diffusers' UNet class, against `fastgen distill reflow --smoke`
          with its stages reduced to the first, which builds such a UNet and trains it for six steps
loop      a step of `Loop` on the digits against the same mathematics written by hand: the same draws, forward,
          backward, clipping, fused AdamW and average, in turns, so that a drifting machine slows both
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastgen import noise
from fastgen.data.digits import Digits
from fastgen.data.source import Source
from fastgen.teachers import mlp
from fastgen.trainers.engine import averages
from fastgen.trainers.engine.averages import AverageConfig
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.flow_matching import FlowMatching

BATCH, BLOCK = 256, 40
LIBRARY = "import torch; from diffusers import UNet2DModel"


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def start_up(repeats: int) -> dict[str, float]:
    """Medians over alternating whole processes, in seconds."""
    library, ours = [], []
    for _ in range(repeats):
        library.append(seconds([sys.executable, "-c", LIBRARY]))
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "fastgen.cli", "distill", "flow_matching", f"out={folder}/run", "--smoke"]
            ours.append(seconds([sys.executable, *command]))
    excess = statistics.median(b - a for a, b in zip(library, ours, strict=True))
    return {"library_s": statistics.median(library), "fastgen_s": statistics.median(ours), "excess_s": excess}


def digits_net() -> mlp.MLPDenoiser:
    torch.manual_seed(0)
    return mlp.build(mlp.MLPConfig(width=384, depth=3), (1, 8, 8), 10)


def by_hand() -> Callable[[], None]:
    """BLOCK steps of flow matching on the digits, without a loop object."""
    net, source = digits_net(), Source(Digits("train"), 0)
    slow, parameters = averages.slow_copy(net), list(net.parameters())
    follower = averages.Follower(slow, net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    position = 0

    def block() -> None:
        nonlocal position
        for _ in range(BLOCK):
            rows = torch.arange(position, position + BATCH)
            position += BATCH
            data = source.get(rows)
            x0, label = data["x0"], data["label"]
            label = torch.where(noise.uniform(0, "drop", rows) < 0.1, 10, label)
            t, eps = noise.uniform(0, "t", rows), noise.normal(0, "eps", rows, (1, 8, 8))
            tt = t[:, None, None, None]
            pair = net((1 - tt) * x0 + tt * eps, t, {"label": label})
            loss = (pair.velocity - (eps - x0)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            follower.update(0.995)

    return block


def by_loop(folder: Path) -> Callable[[], None]:
    config = LoopConfig(
        steps=10**6, batch=BATCH, save_every=10**6, preview_every=10**6, ema=(AverageConfig(decay=0.995),)
    )
    loop = Loop(FlowMatching(FlowMatching.Config(), digits_net()), Source(Digits("train"), 0), config, folder)
    return lambda: loop.run(until=loop.step + BLOCK)


def loop_overhead(repeats: int) -> dict[str, float]:
    """The ratio of the medians of alternating blocks, and milliseconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        blocks = {"hand": by_hand(), "loop": by_loop(Path(folder))}
        times: dict[str, list[float]] = {name: [] for name in blocks}
        for turn in range(repeats + 1):
            for name, block in blocks.items():
                began = time.perf_counter()
                block()
                if turn:  # the first block of each warms up
                    times[name].append((time.perf_counter() - began) / BLOCK * 1000)
    ratio = statistics.median(b / a for a, b in zip(times["hand"], times["loop"], strict=True))
    return {
        "hand_ms": statistics.median(times["hand"]),
        "loop_ms": statistics.median(times["loop"]),
        "overhead": ratio - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up and loop overhead.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = {
        "start_up": start_up(options.repeats),
        "loop": loop_overhead(4 * options.repeats),
        "threads": torch.get_num_threads(),
    }
    for name, bound in (("start_up.excess_s", 3.0), ("loop.overhead", 0.03)):
        group, key = name.split(".")
        value = result[group][key]
        print(f"{name:<18} {value:8.3f}   aim < {bound}   {'ok' if value < bound else 'MISSED'}")
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
