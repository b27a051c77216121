"""How near a prepared SANA comes to its teacher, on a small network of the real class trained on made-up latents.

    python benchmarks/prepare_sana.py

Four classes of 4 x 4 x 4 latents (a pattern each, and noise of deviation 0.3), told by made-up embeddings. A network of
width 64 and two blocks is trained on them, told 1000 r, and then prepared in several ways with the same budget.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor

from fastgen import noise
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.teacher import Teacher
from fastgen.teachers.sana import SanaDenoiser
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.method import Batch
from fastgen.trainers.engine.optim import OptimConfig, ScheduleConfig
from fastgen.trainers.prepare import Prepare

SHAPE, TOKENS, WIDTH, CLASSES = (4, 4, 4), 7, 16, 4
TRAIN, PREPARE, BATCH = 1000, 500, 32


class Rows:
    """Latents and embeddings by row."""

    def get(self, rows: Tensor) -> dict[str, Tensor]:
        label = noise.integers(0, "label", rows, CLASSES)
        patterns, texts = _fixed("pattern", SHAPE), _fixed("text", (TOKENS, WIDTH))
        x0 = patterns[label] + 0.3 * noise.normal(0, "data", rows, SHAPE)
        mask = (torch.arange(TOKENS) < 3 + label[:, None]).float()
        return {"x0": x0, "cond.text": texts[label], "cond.text_mask": mask}


def _fixed(tag: str, shape: tuple[int, ...]) -> Tensor:
    return noise.normal(1, tag, torch.arange(CLASSES), shape)


def network() -> SanaDenoiser:
    torch.manual_seed(0)
    net: Any = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=8,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=WIDTH,
        sample_size=4,
    )
    return SanaDenoiser(net, RectifiedFlow(), Prediction(kind="flow"), shape=SHAPE, time_scale=1000.0)


def teacher() -> SanaDenoiser:
    """The network after TRAIN steps of flow matching, with Adam and a cosine."""
    denoiser, flow = network(), RectifiedFlow()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAIN)
    for step in range(TRAIN):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH)
        batch = Batch(Rows().get(rows), rows, seed=0, step=step, steps=TRAIN)
        eps, r = batch.normal("eps", SHAPE), batch.uniform("r")
        velocity = denoiser(flow.mix(batch.x0, eps, r), r, batch.cond).velocity
        loss = (velocity - (eps - batch.x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"teacher: loss {float(loss.detach()):.3f} after {TRAIN} steps", flush=True)
    return denoiser.eval()


def held() -> Batch:
    rows = torch.arange(10**6, 10**6 + 256)
    return Batch(Rows().get(rows), rows, seed=0, step=PREPARE, steps=PREPARE)


def prepared(truth: SanaDenoiser, rate: float, **options: Any) -> Iterator[str]:
    """A row of the table: the embedding's error, and the velocity's over the levels before and after (mean, worst)."""
    method = Prepare(Prepare.Config(**options), copy.deepcopy(truth).requires_grad_(True), Teacher(truth))
    yield f"{method.embedding_error:.3f}"
    optim, schedule = OptimConfig(lr=rate), ScheduleConfig(warmup=50, decay="cosine")
    config = LoopConfig(steps=PREPARE, batch=BATCH, optim=optim, schedule=schedule, save_every=PREPARE)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(method, Rows(), config, Path(folder))
        for _ in range(2):
            errors = method.errors(method.student.eval(), held())
            yield f"{sum(errors.values()) / len(errors):.4f}, {max(errors.values()):.4f}"
            if loop.step == 0:
                loop.run()


def main() -> None:
    torch.set_num_threads(1)
    truth = teacher()
    rows = {
        "dense time alone": {"qk_norm": False},
        "dense time, QK-norm": {},
        "the same, from the data": {"data_weight": 1.0},
    }
    print("| | embedding off | velocity off at first (mean, worst) | after the run |\n|---|---|---|---|")
    for name, options in rows.items():
        print(f"| {name} | {' | '.join(prepared(truth, 3e-4, **options))} |", flush=True)


if __name__ == "__main__":
    main()
