"""How much memory a training stage takes on one device, before anything is loaded, and what makes it fit.

Weights, averages, moments and gradients are counted from the method's own networks, built on the meta device out of
configs and safetensors headers. Activations are an estimate: the losses run there too (see `memory.peak_bytes`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import files, sources
from fastgen.config import override, plain, validate
from fastgen.errors import UserError
from fastgen.listing import config_names, find_config
from fastgen.memory import peak_bytes
from fastgen.nets.weights import weight_files
from fastgen.sparse import Voxels
from fastgen.stages.config import load_run
from fastgen.stages.context import Context
from fastgen.stages.train import Train
from fastgen.stand_ins import TOKENS, rows_of, without_encoders
from fastgen.teachers import trellis
from fastgen.teachers.trellis.flows import TEXT, FlowDenoiser
from fastgen.trainers.engine.averages import slow_copy
from fastgen.trainers.engine.method import Batch, Method, find_method, parts_of
from fastgen.trainers.engine.optim import OptimConfig

GIB = 2**30
RESERVE = GIB  # assumed, not counted: the driver's own part, workspaces of convolutions, fragmentation
HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK, SMALL = 256, 4096  # of 8-bit moments: numbers that share a float32 scale, and tensors that keep 32 bits
HOW = "the losses on the meta device: one micro-batch, forward and backward, with fused attention and autocast"

# In this order, each on top of those before it: first what costs no quality, then what costs the least.
REMEDIES = (
    ("micro-batches of one row", "loop.micro=1"),
    ("gradient checkpointing", "student.gradient_checkpointing=true"),
    ("8-bit Adam", "loop.optim.name=adamw8bit"),
    ("frozen weights in bfloat16", "teacher_precision=bf16"),
    ("low-rank adapters in place of full copies", "student.lora={}"),
)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one stage on one device.

    monitor  the copy of a network that measures its update now and then, when activations are gone
    codec    text encoders and decoder, there while data are encoded and previews drawn, not in a step
    voxels   not bytes: how many the activations are estimated with; 0 for samples on a grid
    """

    weights: dict[str, int]
    averages: dict[str, int]
    moments: dict[str, int]
    gradients: int
    activations: int
    monitor: int
    codec: int
    parameters: dict[str, int]
    voxels: int = 0

    @property
    def resident(self) -> int:
        """What stays from step to step."""
        return sum(sum(part.values()) for part in (self.weights, self.averages, self.moments))

    @property
    def total(self) -> int:
        step = self.gradients + max(self.activations, self.monitor)
        return self.resident + max(step, self.codec) + RESERVE


@dataclass(frozen=True)
class Remedy:
    """One change of the config, on top of the remedies before it, and what the stage takes then."""

    name: str
    setting: str
    total: int


@dataclass(frozen=True)
class Plan:
    """The footprint of a method on a model, and the remedies in order as far as they were asked for."""

    model: str
    method: str
    stage: str
    loop: dict[str, Any]
    footprint: Footprint
    vram: int | None = None
    remedies: list[Remedy] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        return None if self.vram is None else self.footprint.total <= self.vram

    @property
    def how(self) -> str:
        """What the estimate of activations rests on."""
        voxels = self.footprint.voxels
        return f"{HOW}, of {voxels:,} voxels in made-up shells" if voxels else HOW

    @property
    def settings(self) -> str | None:
        """The first remedy that fits and those before it, as keys of the stage; None: none is needed, or none helps."""
        if self.fits is not False or not self.remedies or self.vram is None or self.remedies[-1].total > self.vram:
            return None
        return " ".join(remedy.setting for remedy in self.remedies)

    def to_dict(self) -> dict[str, Any]:
        print_ = self.footprint
        return {
            "kind": "plan",
            "model": self.model,
            "method": self.method,
            "stage": self.stage,
            **self.loop,
            "parameters": print_.parameters,
            "bytes": {
                "weights": print_.weights,
                "averages": print_.averages,
                "moments": print_.moments,
                "gradients": print_.gradients,
                "activations_estimate": print_.activations,
                "monitor_instead_of_activations": print_.monitor,
                "codec_instead_of_a_step": print_.codec,
                "reserve_assumed": RESERVE,
                "total": print_.total,
            },
            "activations_how": self.how,
            "vram_bytes": self.vram,
            "fits": self.fits,
            "remedies": [dataclasses.asdict(remedy) for remedy in self.remedies],
            "fits_with": self.settings,
        }

    def lines(self) -> Iterator[str]:
        """The plan as a table in GiB."""
        of = self.footprint
        told = f"stage {self.stage}, " + ", ".join(f"{key} {value}" for key, value in self.loop.items())
        yield f"{self.method} on {self.model}: {told}"
        for kind, rows in (("weights", of.weights), ("average", of.averages), ("moments", of.moments)):
            for name, size in rows.items():
                count = f"{of.parameters[name]:,} parameters" if kind == "weights" else ""
                yield _line(f"{kind} {name}", size, count)
        yield _line("gradients", of.gradients)
        yield _line("activations", of.activations, "an estimate")
        yield _line("or the update monitor", of.monitor, "a copy of a network, when activations are gone")
        if of.codec:
            yield _line("or encoders and decoder", of.codec, "while data are encoded and previews drawn")
        yield _line("reserve", RESERVE, "assumed: driver, workspaces, fragmentation")
        yield _line("total", of.total, "" if self.fits is None else "fits" if self.fits else "does not fit")
        for remedy in self.remedies:
            yield _line(f"+ {remedy.setting}", remedy.total, remedy.name)
        if self.fits is False:
            yield (
                f"fits with, in stage {self.stage}: {self.settings}" if self.settings else "none of these makes it fit"
            )
        yield f"Activations: {self.how}."


def _line(what: str, size: int, note: str = "") -> str:
    return f"  {what:<42} {size / GIB:8.2f} GiB  {note}".rstrip()


def plans(model: Path | str, name: str, overrides: Sequence[str] = (), *, vram: float | None = None) -> list[Plan]:
    """As `plan`; for a TRELLIS folder, by the config for its condition, one for each stage that trains a flow."""
    condition = _condition(model)
    if condition is None:
        return [plan(model, name, overrides, vram=vram)]
    stages, context = _stages(model, _config_for(name, condition), overrides)
    told = f"{model} is a TRELLIS folder for conditions of kind {condition}; use a config such as mdt"
    if not (flows := [stage for stage in stages if stage.part is not None]):
        raise UserError(f"--plan {name}: no stage of this config trains a flow, and {told}")
    if (other := _made_for(context)) not in (None, condition):
        raise UserError(f"--plan {name}: this config is for conditions of kind {other}, and {told}")
    return [_planned(str(model), stage, context, vram) for stage in flows]


def plan(model: Path | str, name: str, overrides: Sequence[str] = (), *, vram: float | None = None) -> Plan:
    """The footprint of a method (or of a config, by name or file) on a model, and with `vram` in GiB the remedies."""
    return _planned(str(model), *stage_of(model, name, overrides), vram)


def _planned(model: str, stage: Train, context: Context, vram: float | None) -> Plan:
    first = footprint(stage, context)
    limit = None if vram is None else int(vram * GIB)
    loop: dict[str, Any] = {"batch": stage.loop.batch, "micro": stage.loop.micro or stage.loop.batch}
    loop |= {"precision": stage.loop.precision} | ({"voxels": first.voxels} if first.voxels else {})
    remedies = []
    if limit is not None and first.total > limit:
        for remedy in _remedies(stage, first.total, lambda changed: footprint(changed, context).total):
            remedies.append(remedy)
            if remedy.total <= limit:
                break
    return Plan(model, stage.method.name, stage.name, loop, first, limit, remedies)


def stage_of(model: Path | str, name: str, overrides: Sequence[str] = ()) -> tuple[Train, Context]:
    """The last stage of a config that makes a student, on the meta device, with the model for all that it begins from:
    what earlier stages make is of the same size."""
    stages, context = _stages(model, name, overrides)
    return next((s for s in reversed(stages) if find_method(s.method.name).makes == "student"), stages[-1]), context


def _stages(model: Path | str, name: str, overrides: Sequence[str]) -> tuple[list[Train], Context]:
    run, stages = load_run(find_config(name), [f"teacher={model}", *overrides])
    names = tuple(stage.name for stage in stages)
    training = [stage for stage in stages if isinstance(stage, Train)]
    if not training:
        raise UserError(f"--plan {name}: this config has no stage that trains")
    return [_begun(stage, names) for stage in training], Context(run, Path(run.out), "meta")


def _begun(stage: Train, names: tuple[str, ...]) -> Train:
    """With the model itself in the place of what earlier stages make, of which the context then knows none."""
    made = {key: "teacher" for key, reference in stage.inputs().items() if reference in names and key != "pairs"}
    return stage.model_copy(update=made)


def _condition(model: Path | str) -> str | None:
    """What the flows of a TRELLIS folder are told, "image" or "text"; None for other models."""
    if not sources.exists(model) or Path(model).expanduser().is_file():
        return None
    folder = sources.locate(model)
    described = files.peek_json(folder / trellis.PIPELINE)
    return trellis.PIPELINES[described["name"]] if trellis.recognises(folder) else None


def _config_for(name: str, condition: str) -> str:
    """A method's config for TRELLIS in place of the method's name."""
    names = config_names()
    return name if name in names else next((n for n in names if n.startswith(f"{name}/trellis-{condition}")), name)


def _made_for(run: Context) -> str | None:
    """The kind of condition of the TRELLIS folder that a config names for --smoke, if it does."""
    named = run.config.smoke_teacher
    if not isinstance(named, str) or not named.startswith(f"{sources.ZOO}trellis-"):
        return None
    return named.removeprefix(f"{sources.ZOO}trellis-").split("-")[0]


def refuse_if_too_large(stage: Train, run: Context, memory: int | None = None) -> None:
    """Before anything is loaded: weights that alone exceed the device's memory (bytes) are a UserError."""
    context = dataclasses.replace(run, device="meta")
    memory = device_memory(run.device) if memory is None else memory
    size = _weights(stage, context)
    if size <= memory:
        return
    told = f"stage {stage.name}: the weights alone take {size / GIB:.1f} GiB, {run.device} has {memory / GIB:.1f} GiB"
    settings = []
    for remedy in _remedies(stage, size, lambda changed: _weights(changed, context)):
        settings.append(remedy.setting)
        if remedy.total <= memory:
            raise UserError(f"{told}; they take {remedy.total / GIB:.1f} GiB with {' '.join(settings)}")
    raise UserError(f"{told}; use a smaller teacher or a larger device")


def device_memory(device: str) -> int:
    """Bytes of a device, used or not."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def footprint(stage: Train, run: Context) -> Footprint:
    """The bytes of a stage, whose references must be models that exist. `run.device` is "meta"."""
    method = build(stage, run)
    weights, parameters = sizes(method)
    trained = {name: [p for p in net.parameters() if p.requires_grad] for name, net in method.networks.items()}
    followed = {name: average.of for name, average in method.averages.items()}
    followed |= {average.name: "student" for average in stage.loop.ema}
    optim = {name: stage.loop.networks.get(name, stage.loop.optim) for name in trained}
    codec = getattr(method.student.codec, "folder", None)
    data = rows_of(method.student, stage.loop.micro or stage.loop.batch, stage.loop.micro_tokens)
    gradients, activations = _step(stage, method, trained, data)
    return Footprint(
        weights=weights,
        averages={name: _bytes(trained[of]) for name, of in followed.items()},
        moments={name: sum(_moments(p, optim[name]) for p in found) for name, found in trained.items()},
        gradients=gradients,
        activations=activations,
        monitor=max(_bytes(parameters) for parameters in trained.values()),
        codec=0 if codec is None else _codec_bytes(codec),
        parameters=parameters,
        voxels=len(data["x0"].sites) if isinstance(data["x0"], Voxels) else 0,
    )


def build(stage: Train, run: Context) -> Method:
    """The stage's method with its networks on the meta device."""
    with files.shapes_only():
        teacher = run.open_teacher(stage.teacher, stage.part) if stage.teacher else None
        like: Any = teacher if teacher is not None else run.open_teacher(stage.init or "teacher", stage.part)
        student = stage.make_student(run, teacher, like)
        for flow in (student, *([] if teacher is None else [teacher.denoiser])):
            if isinstance(flow, FlowDenoiser) and flow.condition == TEXT and flow.empty is None:
                flow.empty = torch.empty(1, TOKENS[TEXT], flow.net.args.cond_channels)  # that of the latents, in a run
        method = stage.build(run, student, teacher)
    for module in (*method.networks.values(), *method.frozen.values()):
        module.to("meta")
    return method


def _weights(stage: Train, run: Context) -> int:
    return sum(sizes(build(stage, run))[0].values())


def sizes(method: Method) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes and parameters of each network; a tensor that several hold counts with the first, frozen ones before."""
    seen: set[int] = set()
    sizes, counts = {}, {}
    for name, module in {**method.frozen, **method.networks}.items():
        own = {id(t): t for t in (*module.parameters(), *module.buffers()) if id(t) not in seen}
        seen |= own.keys()
        sizes[name] = _bytes(own.values())
        counts[name] = sum(t.numel() for t in own.values() if isinstance(t, nn.Parameter))
    return sizes, counts


def _step(
    stage: Train, method: Method, trained: dict[str, list[nn.Parameter]], data: dict[str, Any]
) -> tuple[int, int]:
    """Gradients and activations of the turn that takes the most of both."""
    for name, average in method.averages.items():
        method.slow[name] = slow_copy(method.networks[average.of])
    without_encoders((*method.networks.values(), *method.frozen.values(), *method.slow.values()))
    if method.teacher is not None:
        method.teacher.guidance_interval = None  # whether a level lies inside is a matter of values; inside takes more
    found = [(0, 0)]
    rows = torch.arange(len(next(iter(data.values()))), device="meta")
    batch = Batch(data, rows, seed=0, step=0, steps=stage.loop.steps)
    for turn in method.turns:
        if not turn.same_batch:
            batch = Batch(data, rows, seed=0, step=turn.start, steps=stage.loop.steps)
        for name, network in method.networks.items():
            network.train(name in turn.trains)
            for parameter in trained[name]:
                parameter.requires_grad_(name in turn.trains).grad = None
        own = [p for name in turn.trains for p in trained[name]]
        for parameter in own:  # as in any micro-batch but the first
            parameter.grad = torch.empty_like(parameter)

        def step(loss: Any = turn.loss, batch: Batch = batch) -> None:
            for part in parts_of(loss(batch)):
                (part[0] if isinstance(part, tuple) else part).backward()

        found.append((_bytes(own), peak_bytes(step, HALF[stage.loop.precision])))
    return max(found, key=sum)


def _moments(parameter: Tensor, config: OptimConfig) -> int:
    """Both moments of one tensor: float32, or bytes with a scale for every block."""
    n = parameter.numel()
    return 2 * (n + 4 * -(-n // BLOCK)) if config.name == "adamw8bit" and n >= SMALL else 8 * n


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _codec_bytes(folder: Path) -> int:
    """Weights of text encoders and VAE in float32, as the codec holds them."""
    parts = {"text_encoder": "model", "text_encoder_2": "model", "vae": "diffusion_pytorch_model"}
    with files.shapes_only():
        there = [(folder / part, stem) for part, stem in parts.items() if (folder / part).is_dir()]
        found = [file for where, stem in there for file in weight_files(where, stem)]
        return sum(4 * t.numel() for file in found for t in files.load_tensors(file).values())


def _remedies(stage: Train, least: int, measure: Callable[[Train], int]) -> Iterator[Remedy]:
    """The stage with one remedy after the other, without those that it cannot take or that save nothing."""
    method = find_method(stage.method.name)
    for name, setting in REMEDIES:
        settings = [setting]
        if "teacher_precision" in setting and (stage.teacher is None or "bf16" not in method.precisions):
            continue
        if "lora" in setting and (stage.student.lora is not None or stage.init is None):
            continue
        if "adamw8bit" in setting:
            settings += [f"loop.networks.{n}.name=adamw8bit" for n in stage.loop.networks]
        changed = validate(type(stage), override(plain(stage), settings), f"stage {stage.name}")
        try:
            total = measure(changed)
        except UserError:  # a network without blocks to compute again, or without a U-Net's layers
            continue
        if total < least:
            yield Remedy(name, " ".join(settings), total)
            stage, least = changed, total
