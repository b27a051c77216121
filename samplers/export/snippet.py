"""How to run an exported student with stock diffusers, as lines of Python that the replay runs as they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastgen.samplers import scm
from fastgen.samplers.export.lora_keys import FILE
from fastgen.samplers.replay import Replay

HERE, BASE = "PATH_OF_THIS_FOLDER", "BASE_MODEL"
PROMPT = "a red fox in the snow"
LABEL = 0
TORCH = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """`setup` makes `pipe`; `call(n)` makes `image` in n steps. No line holds a block, so they may be joined by `;`.

    besides: arguments of single numbers of steps
    """

    setup: tuple[str, ...]
    arguments: tuple[str, ...]
    steps: tuple[int, ...]
    besides: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def call(self, steps: int) -> str:
        """One image, its noise from a seeded generator of the CPU."""
        told = [argument.format(steps=steps) for argument in self.arguments]
        told += self.besides.get(steps, ())
        return f"image = pipe({', '.join([*told, 'generator=torch.Generator().manual_seed(0)'])}).images[0]"

    def text(self) -> str:
        return "\n".join([*self.setup, self.call(self.steps[0])])

    def line(self, here: str, base: str) -> str:
        """The same on one line, with the real places."""
        return placed("; ".join(self.text().splitlines()), here, base)


def placed(text: str, here: str, base: str) -> str:
    """Lines with the real places, which stand between double quotes."""
    for name, place in ((HERE, here), (BASE, base)):
        text = text.replace(name, place.replace("\\", "\\\\").replace('"', '\\"'))
    return text


def diffusers_folder(
    entry: Replay,
    dtype: str,
    *,
    text: bool,
    size: tuple[int, int] | None,
    guidance: float | None = None,
    labels: bool = False,
) -> Snippet:
    """Nothing but the folder and the number of steps, the size where the folder cannot say it, and a label.

    guidance: the weight of a network that is told it, where its pipeline's own default is another.
    """
    variant = "" if dtype == "fp32" else f', variant="{dtype}", torch_dtype={TORCH[dtype]}'
    setup = (
        "import torch",
        "from diffusers import DiffusionPipeline",
        f'pipe = DiffusionPipeline.from_pretrained("{HERE}"{variant})',
    )
    weight = () if guidance is None else (f"guidance_scale={guidance!r}",)
    label = (f"class_labels={LABEL}",) if labels else ()
    arguments = (*_prompt(text), *label, "num_inference_steps={steps}", *weight, *_sides(size))
    if entry.scheduler != "SCMScheduler":
        return Snippet(setup=setup, arguments=arguments, steps=entry.steps)
    # Otherwise that pipeline takes the nearest of its own sizes and scales the image afterwards.
    arguments += ("use_resolution_binning=False",) if size is not None else ()
    besides = {n: scm.arguments(n) for n in entry.steps}
    return Snippet(setup=setup, arguments=arguments, steps=entry.steps, besides=besides)


def lora(entry: Replay, dtype: str, pipeline: str, size: tuple[int, int] | None) -> Snippet:
    """The base model, this file, the scheduler, and guidance off."""
    load = (
        f'pipe = {pipeline}.from_pretrained("{BASE}"{_dtype(dtype)})',
        f'pipe.load_lora_weights("{HERE}", weight_name="{FILE}")',
    )
    return _with_scheduler(entry, pipeline, load, size)


def single_file(entry: Replay, dtype: str, pipeline: str, file: str, size: tuple[int, int] | None) -> Snippet:
    """This file with the base model's configs, the scheduler, and guidance off."""
    load = (f'pipe = {pipeline}.from_single_file("{HERE}/{file}", config="{BASE}"{_dtype(dtype)})',)
    return _with_scheduler(entry, pipeline, load, size)


def _with_scheduler(entry: Replay, pipeline: str, load: tuple[str, ...], size: tuple[int, int] | None) -> Snippet:
    setup = ("import torch", f"from diffusers import {entry.scheduler}, {pipeline}", *load)
    return Snippet(
        setup=(*setup, f"pipe.scheduler = {entry.code()}"),
        arguments=(*_prompt(True), "num_inference_steps={steps}", "guidance_scale=1.0", *_sides(size)),
        steps=entry.steps,
    )


def _sides(size: tuple[int, int] | None) -> tuple[str, ...]:
    return () if size is None else (f"height={size[0]}", f"width={size[1]}")


def _prompt(text: bool) -> tuple[str, ...]:
    return (f'"{PROMPT}"',) if text else ()


def _dtype(dtype: str) -> str:
    return "" if dtype == "fp32" else f", torch_dtype={TORCH[dtype]}"
