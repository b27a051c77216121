"""A tiny Stable Diffusion that has learnt something, its student, and stock diffusers called as anyone would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgen import api
from fastgen.samplers import ode
from fastgen.samplers.export.make import export
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.machine import execute
from tests import tiny
from tests.samplers.exports import stock

COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (235, 235, 235)}
STAGES = """
guidance: 2.0
size: 16
stages:
  - name: teacher
    stage: train
    init: teacher
    caption_dropout: 0.1
    method: {name: flow_matching}
    loop: {steps: 600, batch: 32, optim: {lr: 1.0e-3}, schedule: {decay: cosine}, preview_every: 600}
  - name: pairs
    stage: pairs
    teacher: teacher
    pairs: {num: 512, solver: dpm++, steps: 25, null_share: 0.0, batch: 64}
  - name: student
    stage: train
    init: teacher
    pairs: pairs
    method: {name: reflow, times: steps}
    loop: {steps: 600, batch: 32, optim: {lr: 5.0e-4}, schedule: {decay: cosine}, preview_every: 600}
"""


def made(tmp_path: Path) -> Path:
    pictures, rng = tmp_path / "pictures", np.random.default_rng(0)
    pictures.mkdir()
    for i in range(48):
        name, colour = list(COLOURS.items())[i % 4]
        pixels = np.clip(np.array(colour) + rng.normal(0, 12, (16, 16, 3)) + rng.normal(0, 20, 3), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(pictures / f"{i:02d}.png")
        (pictures / f"{i:02d}.txt").write_text(f"a {name} wall")
    config = tmp_path / "config.yaml"
    config.write_text(
        STAGES.replace("init: teacher\n    caption", f"init: {tiny.stable_diffusion(tmp_path / 'sd')}\n    caption")
    )
    given = [f"data={{path: {pictures}, size: 16}}", f"out={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
    head, stages = load_run(config, given)
    context = Context(head, Path(head.out), "cpu", names=tuple(stage.name for stage in stages))
    execute(head, stages, context, resume=False)
    return Path(head.out)


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.slow
def test_a_stock_call_with_nothing_but_the_prompt_is_no_worse_than_the_one_step_teacher(tmp_path):
    """The stock defaults, 50 steps and guidance 7.5, by the picture; one step as the card says, by the latents: to a
    random VAE any two pictures are about equally different."""
    out = made(tmp_path)
    export(out / "student/model", "diffusers", tmp_path / "student")
    prompts = [f"a {name} wall" for name in COLOURS]
    call = (
        "import torch; from diffusers import StableDiffusionPipeline as P; "
        "image = P.from_pretrained('student')(%r, generator=torch.Generator().manual_seed(0), %s).images[0]"
    )
    options = {"default": "output_type='np'", "one": "num_inference_steps=1, guidance_scale=1.0, output_type='latent'"}
    lines = {f"{i} {kind}": call % (p, more) for i, p in enumerate(prompts) for kind, more in options.items()}
    found = {name: torch.from_numpy(image) for name, image in stock(lines, tmp_path).items()}

    teacher = api.load_teacher(out / "teacher/model", device="cpu", guidance=2.0).model
    codec, z = teacher.denoiser.codec, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = codec.encode_prompts(prompts)
    with torch.inference_mode():
        many = ode.solve(teacher, z.expand(4, -1, -1, -1), steps=25, solver="dpm++", cond=cond)
        once = ode.solve(teacher, z.expand(4, -1, -1, -1), steps=1, solver="euler", cond=cond)
        pictures, blurred = ((codec.decode(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) for x in (many, once))
    default = torch.stack([found[f"{i} default"] for i in range(4)])
    one = torch.stack([found[f"{i} one"] for i in range(4)])
    print(f"pictures: {rmse(default, pictures):.3f}, teacher at one step {rmse(blurred, pictures):.3f}")
    print(f"latents: {rmse(one, many):.3f}, teacher at one step {rmse(once, many):.3f}")
    assert rmse(default, pictures) <= rmse(blurred, pictures)
    assert rmse(one, many) <= 0.5 * rmse(once, many)
