"""A TRELLIS folder as something that makes meshes: image or text -> occupied voxels -> latents -> mesh or Gaussians.

One network is in memory at a time, unless it is told to keep them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgen import cond as conditions
from fastgen import layout, noise
from fastgen.cond import Cond
from fastgen.errors import RunFailed, UserError, suggestion
from fastgen.layout import normal_like
from fastgen.samplers import few_step, flow_euler
from fastgen.samplers.flow_euler import FlowEuler
from fastgen.sparse import Voxels
from fastgen.student import SamplerSpec
from fastgen.teacher import Teacher
from fastgen.teachers.trellis import PARTS, PIPELINE
from fastgen.teachers.trellis.conditions import ImageEncoder, TextEncoder
from fastgen.teachers.trellis.flows import IMAGE, TEXT, FlowDenoiser
from fastgen.teachers.trellis.folder import DECODERS, SAMPLERS, STRUCTURE_DECODER, Sampler, TrellisFolder

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastgen.geometry.mesh import Mesh

logger = logging.getLogger("fastgen")
TAG = "shape"
RULES = ("euler", "renoise")
TORSOS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Float32 numbers that the mesh decoder and the extraction hold at their peak, for each voxel and channel of the trunk:
# 64 fine voxels of an eighth of the width, a few times over. Measured at full size: 41, and 90 MiB besides.
PEAK_PER_CHANNEL = 64 / 8 * 6


class Shapes:
    """A pipeline's folder on a device.

    torso    what the networks' blocks compute in: "fp32", or on a GPU "fp16" (as released) or "bf16"
    encoder  a transformers folder of the image or text encoder; None: by its name in pipeline.json
    keep     keep every network that has been used: faster for many shapes, and all of them in memory
    """

    def __init__(
        self,
        folder: TrellisFolder,
        *,
        device: str = "cpu",
        torso: str = "fp32",
        encoder: Path | None = None,
        keep: bool = False,
    ) -> None:
        if torso not in TORSOS:
            raise UserError(f"dtype={torso}: not one of {', '.join(TORSOS)}")
        if torso == "fp16" and device == "cpu":
            raise UserError("dtype=fp16: the CPU's half precision is slow and untested; use fp32, or a GPU")
        self.folder, self.device, self.keep = folder, device, keep
        self.torso = TORSOS[torso]
        self._kept: dict[Any, nn.Module] = {}
        kind = ImageEncoder if folder.condition == IMAGE else TextEncoder
        self.encoder: Any = kind(folder.encoder, folder=encoder, device=device)

    def settings(self, part: str, **changes: Any) -> FlowEuler:
        """A stage's sampler as the folder has it, with the changes that are not None.

        A student has its own counts of steps and no guidance. Where one flow alone is a student's, steps are meant for
        it, and guidance for the other.
        """
        stage: Sampler = getattr(self.folder, part)
        given = {key: value for key, value in changes.items() if value is not None}
        if (student := self.folder.student) is not None:
            whole = len(student.parts) == len(PARTS)
            if part not in student.parts:
                given.pop("steps", None)
            elif "cfg_strength" in given and whole:
                raise UserError("guidance: this student has it built in; leave it off")
            else:
                given = {**given, "steps": student.at(given.get("steps"))}
                given.pop("cfg_strength", None)
        where = f"{self.folder.path / PIPELINE}: {SAMPLERS[part]}"
        return flow_euler.from_pipeline(stage.name, {**stage.params, **given}, where)

    def rule(self, part: str, asked: str | None = None) -> str:
        """How a stage goes on between its steps: "euler", as published, or "renoise", which is for students."""
        student = self.folder.student
        if asked is not None and student is None:
            raise UserError(f"sampler={asked}: for a student's folder; a teacher is stepped as its {PIPELINE} says")
        if asked is not None and asked not in RULES:
            raise UserError(f"sampler={asked}: no such sampler ({suggestion(asked, RULES)})")
        if student is None or part not in student.parts:
            return "euler"
        return student.sampler if asked is None else asked

    def check(self, *, sampler: str | None = None, **changes: Any) -> None:
        """Refuse what a stage cannot do; options as of `structure`."""
        for part in PARTS:
            self.rule(part, sampler)
            self.settings(part, **changes)

    def condition(self, asked: Sequence[Image] | Sequence[str]) -> Cond:
        """Conditions of images, or of texts with the empty one's, and then the encoder is let go."""
        cond = {self.folder.condition: self.encoder.encode(asked)}
        if self.folder.condition == TEXT:
            cond["empty"] = self.encoder.empty
        if not self.keep:
            self.encoder = type(self.encoder)(self.encoder.name, folder=self.encoder.folder, device=self.device)
        return conditions.to(cond, "cpu")

    @torch.inference_mode()
    def structure(
        self, cond: Cond, *, seed: int = 0, first: int = 0, sampler: str | None = None, **changes: Any
    ) -> Tensor:
        """Occupied voxels of each condition, int32 [N, 4] = (sample, x, y, z), by the first stage.

        sampler: see `rule`; changes: of the sampler's settings (steps, rescale_t, cfg_strength, cfg_interval). A sample
        without a voxel is a RunFailed.
        """
        assert cond is not None
        settings, rule = self.settings("structure", **changes), self.rule("structure", sampler)
        model, told = self._flow("structure", cond)
        n = len(told[self.folder.condition])
        rows = torch.arange(first, first + n, device=self.device)
        fresh = partial(noise.normal, seed, f"{TAG}/structure", rows, model.shape)
        latent = _sampled(model, fresh, settings, rule, told)
        del model
        decoder = self._network(STRUCTURE_DECODER)
        coords = (decoder(latent) > 0).nonzero()[:, [0, 2, 3, 4]].int()
        filled = torch.bincount(coords[:, 0], minlength=n)
        if not filled.all():
            empty = int(filled.eq(0).nonzero()[0]) + first
            raise RunFailed(f"shape {empty}: the structure stage filled no voxel; try another seed or other input")
        logger.info("structure: %s voxels", ", ".join(map(str, filled.tolist())))
        return coords

    @torch.inference_mode()
    def latents(
        self,
        cond: Cond,
        coords: Tensor,
        *,
        seed: int = 0,
        first: int = 0,
        sampler: str | None = None,
        **changes: Any,
    ) -> Voxels:
        """Structured latents on these voxels by the second stage, in the decoders' scale; options as above."""
        assert cond is not None
        settings, rule = self.settings("latent", **changes), self.rule("latent", sampler)
        model, told = self._flow("latent", cond)
        n = len(told[self.folder.condition])
        if not len(coords):
            raise UserError("no voxels: the structure is empty")
        empty = torch.zeros(len(coords), *model.shape, device=self.device)
        rows = torch.arange(first, first + n, device=self.device)
        fresh = partial(normal_like, Voxels(empty, coords.to(self.device), n), seed, f"{TAG}/latent", rows)
        made = _sampled(model, fresh, settings, rule, told)
        mean, std = (torch.tensor([values], device=self.device) for values in (self.folder.mean, self.folder.std))
        return made * std + mean

    def meshes(self, latents: Voxels) -> list[Mesh]:
        """The surface of each sample, z up, within [-0.5, 0.5]^3."""
        self._refuse_too_many(latents)
        return self._decoded("mesh", latents)

    def gaussians(self, latents: Voxels) -> list[Any]:
        """The 3D Gaussians of each sample (`teachers.trellis.gaussian_decoder.Gaussians`)."""
        return self._decoded("gaussian", latents)

    @torch.inference_mode()
    def _decoded(self, kind: str, latents: Voxels) -> list[Any]:
        decoder = self._network(DECODERS[kind])
        return decoder.represent(decoder(latents))

    def _flow(self, stage: str, cond: dict[str, Any]) -> tuple[Teacher, dict[str, Any]]:
        """A stage's flow as a teacher, and the conditions on its device."""
        made: FlowDenoiser = self._made(stage, partial(getattr(self.folder, f"{stage}_flow"), torso=self.torso))
        told = dict(conditions.to(cond, self.device) or {})
        made.empty = told.pop("empty", None)
        return Teacher(made), told

    def _network(self, role: str) -> Any:
        return self._made(role, partial(self.folder.network, role, torso=self.torso))

    def _made(self, key: str, load: Callable[..., Any]) -> Any:
        if key in self._kept:
            return self._kept[key]
        if not self.keep:
            self._kept.clear()
            if self.device != "cpu":
                torch.cuda.empty_cache()
        self._kept[key] = load(device=self.device)
        return self._kept[key]

    def _refuse_too_many(self, latents: Voxels) -> None:
        """What the mesh will need at its peak, estimated before anything is computed; too much is a UserError."""
        _, args, _ = self.folder.describe(DECODERS["mesh"])
        need = int(len(latents.feats) * args["model_channels"] * PEAK_PER_CHANNEL * 4)
        free = available_bytes(self.device)
        logger.info("mesh: about %.2g GiB for %d voxels", need / 2**30, len(latents.feats))
        if need > free:
            told = f"needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
            raise UserError(
                f"{len(latents.feats)} voxels: their mesh {told}; make one shape at a time, or use a larger device"
            )


def _sampled(model: Teacher, fresh: Callable[..., Any], settings: FlowEuler, rule: str, cond: Cond) -> Any:
    """Clean samples; fresh(draw=i): unit noise, of the first state (0) and of those between the steps. Numbers that are
    not finite are a RunFailed."""
    made = _stepped(model, fresh, settings, rule, cond)
    if not bool(layout.finite(made).all()):
        part = model.denoiser.part
        raise RunFailed(f"the {part} flow gave numbers that are not finite; see its weights, or try --dtype fp32")
    return made


def _stepped(model: Teacher, fresh: Callable[..., Any], settings: FlowEuler, rule: str, cond: Cond) -> Any:
    if rule == "euler":
        return flow_euler.sample(model, fresh(draw=0), settings, cond)
    spec = SamplerSpec(path=model.path, times={settings.steps: settings.times()}, renoise=True)
    renoise = lambda i: fresh(draw=i)  # noqa: E731
    return few_step.sample(model.denoiser, spec, fresh(draw=0), settings.steps, cond, renoise=renoise)


def available_bytes(device: str) -> int:
    """Memory that can be had now: of the GPU, or of the machine."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
