"""The replay before hand-over: the snippet of the card, run by stock diffusers, must make the student's own images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.samplers import few_step
from fastgen.samplers.export.snippet import LABEL, PROMPT, Snippet, placed
from fastgen.student import SamplerSpec

LIMIT = 2e-3  # of pixels in [0, 1], in float32


@torch.inference_mode()
def own_images(denoiser: Denoiser, spec: SamplerSpec, dtype: torch.dtype) -> dict[int, Tensor]:
    """{steps: [3, H, W] in [0, 1]} by `few_step` and the codec, from the noise that the snippet's generator draws.

    The stock pipelines draw in the precision they run in, which decides the numbers; all else is float32 here.
    """
    codec = denoiser.codec
    cond: Cond = codec.encode_prompts([PROMPT]) if codec is not None else None
    if denoiser.num_classes is not None:
        cond = {"label": torch.full((1,), LABEL, device=denoiser.device)}
    found = {}
    for steps in sorted(spec.times):
        generator = torch.Generator().manual_seed(0)
        draw = lambda _: torch.randn(1, *denoiser.shape, generator=generator, dtype=dtype).to(  # noqa: B023, E731
            denoiser.device, torch.float32
        )
        x0 = few_step.sample(denoiser, spec, draw(0), steps, cond, renoise=draw)
        image = codec.decode(x0) if codec is not None else x0
        found[steps] = (image[0] / 2 + 0.5).clamp(0, 1).cpu()
    return found


@torch.inference_mode()
def stock_images(snippet: Snippet, here: str, base: str, device: torch.device) -> dict[int, Tensor]:
    """{steps: [3, H, W] in [0, 1]}: the snippet's lines as they stand, but for the rounding to 8 bits at the end."""
    names: dict[str, Any] = {}
    with _quiet(), _not_rounded():
        exec(placed("\n".join(snippet.setup), here, base), names)
        names["pipe"].to(device)
        names["pipe"].watermark = None  # XL's, where the package for it is installed: no fault of the student's
        names["pipe"].set_progress_bar_config(disable=True)
        found = {}
        for steps in snippet.steps:
            exec(placed(snippet.call(steps), here, base), names)
            found[steps] = torch.from_numpy(names["image"]).permute(2, 0, 1).float()
    return found


def difference(ours: dict[int, Tensor], theirs: dict[int, Tensor]) -> tuple[float, int]:
    """(largest difference of a pixel, at how many steps); infinite where an image is not finite or of another size."""
    off = {steps: _off(image, theirs[steps]) for steps, image in ours.items()}
    worst = max(off, key=lambda steps: off[steps])
    return off[worst], worst


def _off(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not theirs.isfinite().all():
        return float("inf")
    return float((ours - theirs).abs().max())


@contextmanager
def _not_rounded() -> Iterator[None]:
    """Let pipelines hand out their images as arrays in [0, 1]: 8 bits would round by as much as is allowed here."""
    from diffusers import DiffusionPipeline
    from diffusers.image_processor import VaeImageProcessor

    kept: list[tuple[Any, Any]] = [
        (owner, owner.__dict__["numpy_to_pil"]) for owner in (DiffusionPipeline, VaeImageProcessor)
    ]
    for owner, _ in kept:
        owner.numpy_to_pil = staticmethod(list)
    try:
        yield
    finally:
        for owner, method in kept:
            owner.numpy_to_pil = method


@contextmanager
def _quiet() -> Iterator[None]:
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries: list[Any] = [diffusers.utils.logging, transformers.utils.logging]
    loud = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in loud:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in loud:
            library.enable_progress_bar()
