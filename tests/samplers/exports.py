"""Students to be exported, and stock diffusers in a process of its own that cannot import fastgen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.nets.lora import LoraConfig, add_lora, lora_settings, lora_tensors, merged
from fastgen.paths import VP
from fastgen.samplers import few_step
from fastgen.student import Adapters, SamplerSpec, Student
from fastgen.teacher import read_denoiser
from tests import tiny

PROMPT = "a red fox in the snow"
# The families of the exports: (how the teacher is made, whether the student is a LoRA, its sampler).
GRID = {n: VP().grid(n) for n in (1, 2, 4)}
LCM = {1: (999.0,), 2: (999.0, 499.0), 4: (999.0, 749.0, 499.0, 249.0)}

_STOCK = """
import importlib.util, json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fastgen", "samplers", "trainers", "eval"):
            raise ImportError("no fastgen here")
sys.meta_path.insert(0, Blocked())
try:
    import fastgen
except ImportError:
    pass
else:
    sys.exit("fastgen can be imported")
import numpy
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
for owner in (DiffusionPipeline, VaeImageProcessor):
    owner.numpy_to_pil = staticmethod(list)  # the image before it is rounded to 8 bits
images = {}
for name, line in json.load(open(sys.argv[1])).items():
    names = {}
    try:
        exec(line, names)
        images[name] = names["image"]
    except ValueError as error:
        images[name] = numpy.array(str(error))
numpy.savez(sys.argv[2], **images)
"""


def stock(lines: dict[str, str], folder: Path) -> dict[str, np.ndarray]:
    """What each line of Python makes as `image`, [H, W, 3] in [0, 1], or the words of its ValueError."""
    (folder / "lines.json").write_text(json.dumps(lines))
    subprocess.run(
        [sys.executable, "-I", "-c", _STOCK, "lines.json", "images.npz"],
        cwd=folder,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    with np.load(folder / "images.npz") as found:
        return dict(found)


def own(student: Path, steps: int, prompt: str = PROMPT) -> Tensor:
    """The student's image by fastgen, [H, W, 3] in [0, 1], from the noise of a generator seeded with 0."""
    loaded, generator = Student.load(student), torch.Generator().manual_seed(0)
    denoiser = loaded.denoiser.eval()
    draw = lambda _: torch.randn(1, *denoiser.shape, generator=generator)  # noqa: E731
    codec = denoiser.codec
    cond = None if codec is None else codec.encode_prompts([prompt])
    with torch.inference_mode():
        x0 = few_step.sample(denoiser, loaded.sampler, draw(0), steps, cond, renoise=draw)
        image = x0 if codec is None else codec.decode(x0)
    return (image[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)


def sd1(folder: Path) -> tuple[Path, Path]:
    """SD 1.x, eps, trained whole, one step at index 625 as SIM makes it: (student, teacher)."""
    return _student(folder, tiny.stable_diffusion(folder / "sd1"), {1: (625.0,)}, renoise=False, lora=False)


def sd2(folder: Path) -> tuple[Path, Path]:
    """SD 2.x, v, with an OpenCLIP text encoder, LoRA, deterministic in 1, 2 and 4 steps."""
    teacher = tiny.stable_diffusion(folder / "sd2", prediction_type="v_prediction")
    config = teacher / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "gelu"}))
    return _student(folder, teacher, GRID, renoise=False, lora=True)


def xl(folder: Path) -> tuple[Path, Path]:
    """SDXL, LoRA, fresh noise between 1, 2 and 4 steps. Stock single-file loading tells the two text encoders apart by
    their widths, so these differ as the real ones do."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    teacher = tiny.sdxl(folder / "xl")
    config = json.loads((teacher / "text_encoder_2" / "config.json").read_text())
    wide = CLIPTextConfig(**{**config, "hidden_size": 48, "num_attention_heads": 4, "hidden_act": "gelu"})
    torch.manual_seed(3)
    CLIPTextModelWithProjection(wide).save_pretrained(teacher / "text_encoder_2")
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True}
    tiny.unet(
        cross_attention_dim=tiny.TEXT + 48, projection_class_embeddings_input_dim=tiny.TEXT + 48, **added
    ).save_pretrained(teacher / "unet")
    return _student(folder, teacher, LCM, renoise=True, lora=True)


def _student(folder: Path, teacher: Path, times: dict[int, Any], *, renoise: bool, lora: bool) -> tuple[Path, Path]:
    denoiser, _ = read_denoiser(teacher)
    torch.manual_seed(1)
    adapters = None
    if lora:
        denoiser = add_lora(denoiser, LoraConfig(rank=4, alpha=8), seed=0)
        for tensor in lora_tensors(denoiser).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
        adapters = Adapters(lora_tensors(denoiser), lora_settings(denoiser))
        denoiser = merged(denoiser)
    else:
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    spec = SamplerSpec(path=denoiser.path, times=times, renoise=renoise, init="unit")
    facts = {"init": "teacher", "init_sha256": "0" * 64}  # the run's word for it, which is no place
    facts |= {"method": "reflow", "base_model": str(teacher), "license": "openrail", "metrics": {"fd": 1.25}}
    place = folder / f"{teacher.name}-student"
    Student(denoiser, spec, facts, adapters).save(place)
    return place, teacher
