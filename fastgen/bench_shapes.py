"""`fastgen bench TRELLIS --structure MESH`: the stages of a TRELLIS folder one by one, on the voxels of a given mesh.

Every input fills another number of voxels, and untrained weights fill any: so the second stage is given the voxels that
the mesh's surface touches, and the extraction the mesh's own distances. The other inputs are noise, for no stage's work
depends on its numbers. One network is in memory at a time, but for `e2e`, which holds all that it runs.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fastgen import api, noise
from fastgen.bench import Book, Options, repeated
from fastgen.errors import UserError
from fastgen.eval import hardware
from fastgen.eval.latency import Stages, time_call, watch_for
from fastgen.eval.rows import Row
from fastgen.eval.subject import refusals
from fastgen.eval.variants import Unavailable, Variant
from fastgen.geometry import flexicubes, sdf, voxelise
from fastgen.geometry.export import z_up
from fastgen.geometry.mesh import fit, is_closed, load
from fastgen.samplers import flow_euler
from fastgen.shapes import PEAK_PER_CHANNEL, TAG, Shapes, available_bytes
from fastgen.sources import exists, locate
from fastgen.sparse import Voxels, backends
from fastgen.teachers.trellis import PIPELINE, recognises
from fastgen.teachers.trellis import conditions as encoders
from fastgen.teachers.trellis.flows import IMAGE, FlowDenoiser
from fastgen.teachers.trellis.folder import DECODERS, LATENT_FLOW, STRUCTURE_DECODER, STRUCTURE_FLOW, TrellisFolder
from fastgen.teachers.trellis.mesh_decoder import FINER

logger = logging.getLogger("fastgen")
SCOPES = ("net", "e2e")  # of --scope: the stages apart; those that lead to a mesh, one after the other
EAGER = "eager"
LIBRARIES = {"spconv": "conv", "xformers": "attention", "flash_attn": "attention"}  # of --variants, in torch's place
TOKENS = {IMAGE: 1 + 4 + 37**2, "text": encoders.TOKENS}  # of a condition: class, registers and patches of DINOv2
Call = Callable[[], Any]
Make = Callable[[int, int], Call]  # (batch, steps) -> what is timed


@dataclass(frozen=True)
class ShapeOptions(Options):
    """What is measured; what a TRELLIS folder has no use for is refused. steps: None are the folder's own."""

    structure: Path | None = None
    dtype: str | None = None
    encoder: Path | None = None


def folder_of(model: str | None) -> Path | None:
    """The TRELLIS folder that this names, or None."""
    folder = locate(model) if model is not None and exists(model) else None
    return folder if folder is not None and recognises(folder) else None


def run(options: ShapeOptions, *, json_to: str | None, repeats: int) -> Iterator[Row]:
    """The rows one by one, each in the file before the next is measured."""
    rows = bench(options)
    with tempfile.TemporaryDirectory(prefix="fastgen-") as folder:
        book = Book(Path(folder) / "rows.jsonl" if json_to in (None, "-") else Path(str(json_to)))
        if repeats > 1:
            yield from repeated(options, repeats, book)
            return
        for row in rows:
            book.add(row)
            yield row


def bench(options: ShapeOptions) -> Iterator[Row]:
    """Check everything, then measure."""
    folder = folder_of(options.model)
    if folder is None:
        raise UserError(f"--structure {options.structure}: for a TRELLIS folder; {options.model or 'nothing'} is none")
    if options.structure is None:
        raise UserError(f"{options.model}: a TRELLIS folder is measured on a mesh's voxels; give --structure MESH")
    _refuse(options)
    asked = [parse(name) for name in options.variants]
    device = api.pick_device(options.device)
    torso = options.dtype or ("fp32" if device == "cpu" else "fp16")
    shapes = Shapes(TrellisFolder.read(folder), device=device, torso=torso, encoder=options.encoder)
    for role in shapes.folder.stems:
        shapes.folder.checked(role)  # a missing or foreign file is told now, and not after the stages before it
    return _Run(Subject(options, shapes), asked).rows()


def _refuse(options: ShapeOptions) -> None:
    for name in ("vs", "random_weights", "tiny_decoder", "solver", "teacher_steps"):
        if getattr(options, name) != getattr(Options, name):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: not for TRELLIS's stages; leave it out"
            )
    for scope in set(options.scopes) - set(SCOPES):
        raise UserError(f"--scope {scope}: a TRELLIS folder has {', '.join(SCOPES)}")
    if options.guidance is not None and options.guidance < 1:
        raise UserError(f"--guidance {options.guidance}: at least 1, which is without; it is 1 + cfg_strength")


def parse(name: str) -> Variant:
    """A variant of --variants: eager, or libraries in torch's place joined by "+"."""
    if name == EAGER:
        return Variant(name, {"plain": EAGER})
    libraries = name.split("+")
    parts = {LIBRARIES.get(library, ""): library for library in libraries}
    if "" in parts or len(parts) < len(libraries):
        known = f"{EAGER}, or {', '.join(LIBRARIES)}, one for convolution and one for attention joined by +"
        raise UserError(f"--variants {name}: of a TRELLIS folder they are {known}; its precision is --dtype")
    return Variant(name, parts)


class Injected:
    """A closed mesh, scaled to fill [-0.5, 0.5]^3, in place of what the first stage would fill.

    coords int32 [N, 3]: the voxels of a grid of resolution^3 that its surface touches.
    """

    def __init__(self, file: Path, resolution: int) -> None:
        mesh = load(file)
        if not is_closed(mesh):
            raise UserError(f"--structure {file}: not closed, so it has no inside to measure from; mend its holes")
        # Files have y up. A hair within the cube: rounded, its vertices must not leave it.
        upright = replace(mesh, vertices=z_up(mesh.vertices))
        self.mesh, self.resolution = fit(upright, 0.5 - voxelise.EDGE), resolution
        self.coords = voxelise.surface_voxels(self.mesh, resolution)
        logger.info("--structure %s: %d voxels of %d^3", file, len(self.coords), resolution)

    def batched(self, batch: int) -> Tensor:
        """The voxels of so many samples, int32 [B * N, 4]."""
        sample = torch.arange(batch, dtype=torch.int32).repeat_interleave(len(self.coords))
        return torch.cat([sample[:, None], self.coords.repeat(batch, 1)], 1)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """What the mesh decoder would say for this very surface: [64 N, 101] and the fine voxels [64 N, 3].

        Beyond the voxels all counts as outside, as for the decoder's own, so the layer's inner side is extracted too.
        """
        size = self.resolution * FINER
        distances = sdf.signed_distance(self.mesh, size)
        parts = torch.cartesian_prod(*(torch.arange(FINER),) * 3)
        fine = (self.coords.long()[:, None] * FINER + parts).reshape(-1, 3)
        x, y, z = (fine[:, None] + torch.tensor(flexicubes.CORNERS)).unbind(-1)
        feats = torch.zeros(len(fine), sum(flexicubes.CHANNELS.values()))
        # The extraction takes the width of a cube off.
        feats[:, : len(flexicubes.CORNERS)] = distances[x, y, z] + 1 / size
        return feats, fine


class Subject:
    """A folder on a device, and what its stages are given."""

    def __init__(self, options: ShapeOptions, shapes: Shapes) -> None:
        assert options.structure is not None
        self.options, self.shapes, self.folder, self.device = options, shapes, shapes.folder, shapes.device
        self.loading: dict[str, Any] = {"device": shapes.device, "torso": shapes.torso}
        self.injected = Injected(options.structure, self.folder.describe(LATENT_FLOW)[1]["resolution"])

    def settings(self, stage: str, steps: int | None = None) -> flow_euler.FlowEuler:
        """Of a flow's sampler: the folder's, with the steps and the guidance that were asked for."""
        w = None if self.options.guidance is None else self.options.guidance - 1
        return self.shapes.settings(stage, steps=steps, cfg_strength=w)

    def normal(self, what: str, batch: int, shape: Sequence[int]) -> Tensor:
        rows = torch.arange(batch, device=self.device)
        return noise.normal(self.options.seed, f"{TAG}/{what}", rows, tuple(shape))

    def network(self, role: str) -> Any:
        if role not in self.folder.stems:
            raise Unavailable(f"{PIPELINE} names no {role}")
        return self.folder.network(role, **self.loading)

    def sampled(self, stage: str, denoiser: FlowDenoiser, start: Callable[[int], Callable[[], Any]]) -> Make:
        """A flow from what `start` of a batch makes, told noise in place of tokens."""
        kind, width = self.folder.condition, denoiser.net.args.cond_channels
        denoiser.empty = None if kind == IMAGE else self.normal("empty", 1, (TOKENS[kind], width))

        def make(batch: int, steps: int) -> Call:
            cond = {kind: self.normal("tokens", batch, (TOKENS[kind], width))}
            settings, fresh = self.settings(stage, steps), start(batch)
            return lambda: flow_euler.sample(denoiser, fresh(), settings, cond)

        return make

    def latents(self, batch: int) -> Callable[[], Voxels]:
        """Latents on the injected voxels: new ones each time, for sites keep what is looked up in them."""
        channels, count = len(self.folder.mean), len(self.injected.coords)
        mean, std = (torch.tensor(values, device=self.device) for values in (self.folder.mean, self.folder.std))
        feats = self.normal("latent", batch, (count, channels)).flatten(0, 1) * std + mean
        coords = self.injected.batched(batch).to(self.device)
        return lambda: Voxels(feats, coords, batch)


def _condition(subject: Subject) -> Make:
    """The encoder's stage, of a drawn disc or a short text; Unavailable where there is no encoder."""
    known = subject.shapes.encoder  # a new one each time: what has encoded stays in memory
    encoder = type(known)(known.name, folder=known.folder, device=known.device)
    disc, side = Image.new("RGBA", (encoders.SIDE,) * 2), encoders.SIDE
    ImageDraw.Draw(disc).ellipse((side // 6, side // 6, side * 5 // 6, side * 5 // 6), fill=(200, 120, 40, 255))
    asked = [disc if subject.folder.condition == IMAGE else "a wooden chair"]
    try:
        encoder.encode(asked)
    except UserError as error:
        raise Unavailable(f"skipped: {error}") from error
    return lambda batch, steps: partial(encoder.encode, asked * batch)


def _structure(subject: Subject) -> Make:
    denoiser = subject.folder.structure_flow(**subject.loading)
    return subject.sampled("structure", denoiser, lambda n: subject.normal("structure", n, denoiser.shape).clone)


def _structure_decode(subject: Subject) -> Make:
    decoder = subject.network(STRUCTURE_DECODER)
    args = subject.folder.describe(STRUCTURE_FLOW)[1]

    def make(batch: int, steps: int) -> Call:
        z = subject.normal("structure", batch, (args["in_channels"], *(args["resolution"],) * 3))
        return lambda: (decoder(z) > 0).nonzero()

    return make


def _latent(subject: Subject) -> Make:
    denoiser = subject.folder.latent_flow(**subject.loading)
    return subject.sampled("latent", denoiser, subject.latents)


def _decode(kind: str, subject: Subject) -> Make:
    """Of the mesh its decoder alone; Gaussians whole, for what follows there is a change of names."""
    decoder = subject.network(DECODERS[kind])

    def make(batch: int, steps: int) -> Call:
        latents = subject.latents(batch)
        if kind != "mesh":
            return lambda: decoder.represent(decoder(latents()))
        count = batch * len(subject.injected.coords)
        need = count * decoder.args.model_channels * PEAK_PER_CHANNEL * 4
        if need > available_bytes(subject.device):
            raise Unavailable(f"out of memory: {count} voxels would need about {need / 2**30:.1f} GiB")
        return lambda: decoder(latents())

    return make


def _extraction(subject: Subject) -> Make:
    feats, fine = (v.to(subject.device) for v in subject.injected.features)
    size = subject.injected.resolution * FINER
    return lambda batch, steps: lambda: [flexicubes.from_features(feats, fine, size) for _ in range(batch)]


class Stage(NamedTuple):
    """scope: the name in the rows; calls: of a network, for each step of a sampler; open: reads what it needs."""

    scope: str
    open: Callable[[Subject], Make]
    sampler: str | None = None
    calls: int = 1


STAGES = (
    Stage("condition", _condition),
    Stage("structure", _structure, sampler="structure"),
    Stage("structure decode", _structure_decode),
    Stage("latent", _latent, sampler="latent"),
    Stage("mesh decode", partial(_decode, "mesh")),
    Stage("extraction", _extraction, calls=0),
    Stage("gaussians", partial(_decode, "gaussian")),
)
E2E = STAGES[:-1]


class _Run:
    """One command: every variant, in it every stage, batch and step count."""

    def __init__(self, subject: Subject, asked: Sequence[Variant]) -> None:
        self.options, self.subject, self.asked = subject.options, subject, asked
        self.device = torch.device(subject.device)
        self.watch, self.plan = watch_for(self.device), self.options.plan(self.device)
        self.began = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def rows(self) -> Iterator[Row]:
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # events are the current device's
        self.name, self.software = hardware.device_name(self.device), hardware.software(self.device)
        parts: dict[str, list[tuple[Stage, ...]]] = {"net": [(stage,) for stage in STAGES], "e2e": [E2E]}
        for variant, scope in product(self.asked, self.options.scopes):
            for stages in parts[scope]:
                yield from self._measured(variant, stages)
                gc.collect()  # the networks are let go
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _measured(self, variant: Variant, stages: tuple[Stage, ...]) -> Iterator[Row]:
        """The rows of a stage, or of all one after the other, opened once; without figures, the reason why."""
        notes: list[str] = []
        makes, open_s = dict[str, Make](), 0.0
        for row in self._rows(variant, stages):
            try:
                with self._settings(variant), refusals(variant):
                    if not makes:
                        began = time.perf_counter()
                        makes = self._opened(stages, notes)
                        open_s = time.perf_counter() - began
                    calls = {scope: make(row.batch, row.steps) for scope, make in makes.items()}
                    yielded = replace(row, open_s=open_s, notes=tuple(notes), **self._figures(calls, row))
            except Unavailable as reason:
                yielded = replace(row, unavailable=str(reason))
            yield yielded

    def _opened(self, stages: tuple[Stage, ...], notes: list[str]) -> dict[str, Make]:
        """By scope. Among others the condition may be missing, which is noted."""
        makes = {}
        for stage in stages:
            try:
                makes[stage.scope] = stage.open(self.subject)
            except Unavailable as reason:
                if stage is not E2E[0] or len(stages) == 1:
                    raise
                notes.append(f"without the condition, {reason}")
        return makes

    @contextmanager
    def _settings(self, variant: Variant) -> Iterator[None]:
        """The libraries of a variant, float32 that means float32, no gradients."""
        try:
            chosen = backends.use(conv=variant.parts.get("conv"), attention=variant.parts.get("attention"))
        except UserError as error:
            raise Unavailable(str(error)) from error
        cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
        with chosen, cudnn, torch.inference_mode():
            yield

    def _figures(self, calls: dict[str, Call], row: Row) -> dict[str, Any]:
        stages, meter = Stages(self.watch), hardware.Meter(self.device)
        parts = stages if row.scope == "e2e" else None
        timing = time_call(partial(_chain, calls, stages), self.watch, self.plan, stages=parts, around=meter)
        device, read = vars(timing.device).copy(), meter.reading
        return {
            "calls": device.pop("n"),
            **device,
            "warmup": timing.warmup,
            "wall_p50_ms": timing.wall.p50_ms,
            "launch_bound": timing.launch_bound,
            "first_call_ms": timing.first_call_ms,
            "stages_ms": timing.stages_ms,
            "images_per_s": row.batch / timing.device.p50_ms * 1000,
            "peak_alloc_mib": read.peak_alloc_mib,
            "peak_reserved_mib": read.peak_reserved_mib,
        }

    def _rows(self, variant: Variant, stages: tuple[Stage, ...]) -> Iterator[Row]:
        """Everything about the rows but their figures. What is sampled has a row for each count of steps."""
        sampled = [stage for stage in stages if stage.sampler]
        own = tuple(dict.fromkeys(self.subject.settings(str(stage.sampler)).steps for stage in sampled))
        for batch, steps in product(self.options.batch, (self.options.steps or own) if sampled else (1,)):
            weights = {1 + self.subject.settings(str(stage.sampler), steps).cfg_strength for stage in sampled}
            yield Row(
                model=str(self.options.model),
                role="model",
                scope=stages[0].scope if len(stages) == 1 else "e2e",
                variant=variant.name,
                batch=batch,
                steps=steps,
                nfe=sum(self.subject.settings(s.sampler, steps).steps if s.sampler else s.calls for s in stages),
                res=f"{len(self.subject.injected.coords)} voxels",
                device=self.name,
                dtype=str(self.subject.shapes.torso).removeprefix("torch."),
                attention=variant.attention,
                compile="none",
                guidance=weights.pop() if len(weights) == 1 else None,
                solver="euler" if sampled else None,
                sw=self.software,
                seed=self.options.seed,
                began=self.began,
            )


def _chain(calls: dict[str, Call], stages: Stages) -> None:
    """One stage after the other; of all of them the meshes, which come last, go to the host."""
    for scope, call in calls.items():
        with stages(scope):
            made = call()
    if len(calls) > 1:
        with stages("copy"):
            [mesh.to("cpu") for mesh in made]
