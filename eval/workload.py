"""What is timed: one batch of images from fixed noise, as the network's part, as the whole way, or as bare networks.

net   the sampler's run from conditions and noise on the device: the network calls, and the arithmetic between them
e2e   prompts to pictures: tokens and text encoder, net, decoder, and the uint8 pixels in the host's memory
bare  every network that e2e calls, one after the other, on recorded inputs: what no pipeline can go below

Noise is drawn beforehand; the null condition is encoded once. Models of pixels have neither text nor decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fastgen import cond as conditions
from fastgen import noise
from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.eval.latency import Stages
from fastgen.samplers import few_step, ode
from fastgen.student import Student
from fastgen.teacher import Teacher

SCOPES = ("net", "e2e", "bare")
TAG = "bench"
# Under 77 letters each: the vocabulary of a model with random weights has one token a letter.
PROMPTS = (
    "a photograph of a red fox in fresh snow, morning light",
    "an oil painting of a harbour at dusk",
    "a wooden table with a bowl of lemons and a newspaper",
    "a hand-drawn map of an island with mountains",
)
Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Workload:
    """A model at one step count, batch and guidance. `run(scope)` is one call."""

    def __init__(
        self,
        model: Student | Teacher,
        *,
        steps: int,
        batch: int,
        seed: int = 0,
        guidance: float | None = None,
        solver: str = "euler",
        stages: Stages | None = None,
    ) -> None:
        self.model, self.steps, self.batch, self.guidance, self.solver = model, steps, batch, guidance, solver
        self.stages = stages or Stages()
        self.recorded: list[Call] = []
        denoiser = model.denoiser
        rows = torch.arange(batch, device=denoiser.device)
        self._z = noise.normal(seed, TAG, rows, denoiser.shape)
        fresh = range(1, steps) if isinstance(model, Student) and model.sampler.renoise else range(0)
        self._fresh = {i: noise.normal(seed, f"{TAG}/renoise", rows, denoiser.shape, draw=i) for i in fresh}
        self._prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
        self._cond = self._condition(rows)

    def _condition(self, rows: Tensor) -> Cond:
        denoiser = self.model.denoiser
        if reads_text(denoiser):
            if self.guidance is not None:
                _ = denoiser.null  # encoded now, and kept by the codec
            return conditions.to(denoiser.codec.encode_prompts(self._prompts), denoiser.device)  # type: ignore[union-attr]
        return None if denoiser.num_classes is None else {"label": rows % denoiser.num_classes}

    @property
    def nfe(self) -> int:
        """Network calls of a run (guidance doubles their batch, not their number)."""
        return self.steps if isinstance(self.model, Student) else ode.nfe(self.solver, self.steps)

    @torch.inference_mode()
    def run(self, scope: str) -> object:
        """One batch, in a scope; "bare" needs `record` first."""
        if scope == "net":
            return self._net(self._cond)
        if scope == "e2e":
            return self._e2e()
        assert self.recorded, "record() comes first"
        return [network(*arguments, **options) for network, arguments, options in self.recorded]

    def record(self) -> None:
        """Remember the inputs of every network of one whole call; before the networks are compiled."""
        with outermost_calls() as self.recorded:
            self.run("e2e")

    def _net(self, cond: Cond) -> Tensor:
        if isinstance(self.model, Student):
            options: dict[str, Any] = {"renoise": self._fresh.__getitem__}
            return few_step.sample(self.model.denoiser, self.model.sampler, self._z, self.steps, cond, **options)
        return ode.solve(self.model, self._z, steps=self.steps, solver=self.solver, cond=cond, guidance=self.guidance)

    def _e2e(self) -> Tensor:
        denoiser, cond = self.model.denoiser, self._cond
        if reads_text(denoiser):
            with self.stages("text"):
                cond = denoiser.codec.encode_prompts(self._prompts)  # type: ignore[union-attr]
        with self.stages("net"):
            x = self._net(cond)
        if denoiser.codec is not None:
            with self.stages("decode"):
                x = denoiser.codec.decode(x)
        with self.stages("copy"):
            return pixels(x).cpu()


def pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1] -> uint8 [B, H, W, C] where x lies; NaN is not looked for, which would wait for it."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def reads_text(denoiser: Denoiser) -> bool:
    """Whether its conditions are prompts."""
    return denoiser.codec is not None and denoiser.num_classes is None


def resolution(denoiser: Denoiser) -> tuple[int, int]:
    """Height and width in pixels; models that make no images are UserErrors."""
    shape = denoiser.shape if denoiser.codec is None else denoiser.codec.image_shape
    if len(shape) != 3:
        raise UserError(f"this model makes samples of shape {shape}, which are no images; there is nothing to bench")
    return shape[1], shape[2]


@contextmanager
def outermost_calls() -> Iterator[list[Call]]:
    """The calls of networks inside: modules called by no other module (Denoiser and Teacher count as none)."""
    calls: list[Call] = []
    depth = 0

    def enter(module: nn.Module, arguments: Any) -> None:
        nonlocal depth
        depth += not isinstance(module, Denoiser | Teacher)

    def leave(module: nn.Module, arguments: Any, options: Any, output: Any) -> None:
        nonlocal depth
        if isinstance(module, Denoiser | Teacher):
            return
        depth -= 1
        if depth == 0:
            calls.append((module, arguments, options))

    hooks: list[Any] = [register_module_forward_pre_hook(enter)]
    hooks.append(register_module_forward_hook(leave, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def networks(call: Callable[[], object]) -> list[nn.Module]:
    """The networks that a call runs, each once, single layers left out."""
    with outermost_calls() as calls:
        call()
    found: dict[int, nn.Module] = {id(module): module for module, _, _ in calls if next(module.children(), None)}
    return list(found.values())
