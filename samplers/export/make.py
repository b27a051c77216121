"""Exports: written beside their place, replayed by stock diffusers there, and put in place only if the images agree."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastgen import files, sources
from fastgen.denoiser import Denoiser
from fastgen.errors import RunFailed, UserError, suggestion
from fastgen.samplers import scm
from fastgen.samplers.export import check, folder, ldm, snippet
from fastgen.samplers.export.card import Told, card
from fastgen.samplers.export.lora_keys import FILE, HALVES, Keys, lora_file
from fastgen.samplers.fold import alone, fold_gap
from fastgen.samplers.replay import Replay, pipeline_of, replay
from fastgen.student import Adapters, Student

logger = logging.getLogger("fastgen")
Kind = Literal["diffusers", "lora", "single-file"]
WEIGHTS = "model.safetensors"
# What the pipelines of networks that are told their guidance take it to be if nothing is said.
USUAL_GUIDANCE = {
    "LatentConsistencyModelPipeline": 8.5,
    "StableDiffusionXLPipeline": 5.0,
    scm.PIPELINE: 4.5,
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was made: the folder, how to run it in one line of Python, the largest difference the replay found."""

    folder: Path
    line: str
    error: float


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export, all choices made."""

    student: Student
    kind: Kind
    out: Path
    keys: Keys
    dtype: str
    entry: Replay
    pipeline: str
    asked_base: str | None = None

    @property
    def denoiser(self) -> Denoiser:
        return self.student.denoiser

    @property
    def text(self) -> bool:
        return self.pipeline != "pixels"

    @property
    def guidance(self) -> float | None:
        """The weight of a network that is told it; None for all others."""
        return self.student.sampler.guidance

    @property
    def base(self) -> str:
        """What a LoRA is added to, and whose configs go with a single file: as asked, else as far as the facts tell."""
        if self.asked_base is not None:
            return self.asked_base
        facts = self.student.facts
        other = facts.get("init") if facts.get("init_sha256") != facts.get("teacher_sha256") else None
        if other == "teacher":  # the run's own word for it, no place
            other = None
        return str(other or facts.get("base_model") or facts.get("teacher") or snippet.BASE)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels where they are not what the base model makes by itself."""
        net: Any = self.denoiser.net
        own, codec = net.config.sample_size, self.denoiser.codec
        if self.pipeline == scm.PIPELINE:  # which makes 1024 x 1024 of its own accord, whatever the network says
            own = 1024 // getattr(codec, "factor", 1) if own == 32 else (0, 0)
        sides = (own, own) if isinstance(own, int) else tuple(own)
        assert codec is not None
        return None if tuple(self.denoiser.shape[1:]) == sides else codec.image_shape[1:]  # type: ignore[return-value]

    @property
    def noise(self) -> torch.dtype:
        """The precision in which the stock pipeline draws its noise."""
        return torch.float32 if self.pipeline == scm.PIPELINE else folder.DTYPES[self.dtype]

    def snippet(self) -> snippet.Snippet:
        if self.kind == "diffusers":
            says = self.pipeline != scm.PIPELINE and folder.says_size(self.denoiser)
            size = None if says else self.size
            weight = None if USUAL_GUIDANCE.get(self.pipeline) == self.guidance else self.guidance
            labels = self.denoiser.num_classes is not None
            return snippet.diffusers_folder(
                self.entry, self.dtype, text=self.text, size=size, guidance=weight, labels=labels
            )
        if self.kind == "lora":
            return snippet.lora(self.entry, self.dtype, self.pipeline, self.size)
        return snippet.single_file(self.entry, self.dtype, self.pipeline, WEIGHTS, self.size)

    def told(self, error: float) -> Told:
        """What the card says; error: see there."""
        return Told(
            kind=self.kind,
            facts=self.student.facts,
            entry=self.entry,
            snippet=self.snippet(),
            dtype=self.dtype,
            error=error,
            text=self.text,
            base=self.base,
            guidance=self.guidance,
        )


def export(
    student: str | Path,
    kind: str,
    out: str | Path,
    *,
    keys: str | None = None,
    dtype: str = "fp32",
    base: str | None = None,
    steps: int | None = None,
    device: str = "cpu",
) -> Exported:
    """Make the folder `out` of a student folder: a whole diffusers pipeline, a LoRA file, or a single file.

    keys   of a LoRA file, "kohya" (default) or "peft"
    base   the folder or hub id of the base model, for the line of a LoRA or a single file and its card
    steps  of a student whose network is told how far it steps: the only number of steps that the export is for
    dtype  "fp32", where images that differ by more than 2e-3 are RunFailed, or "fp16" / "bf16", whose error is told
    What the student or the layout does not allow is a UserError, before anything is written.
    """
    if base is not None and kind == "diffusers":
        raise UserError(f"--base {base}: a diffusers folder is whole; it goes with --to lora and --to single-file")
    job = _job(_for(Student.load(student), steps), str(student), kind, Path(out), keys, dtype)
    job = replace(job, asked_base=base)
    job.denoiser.to(device).eval().requires_grad_(False)
    if job.denoiser.codec is not None:
        job.denoiser.codec.to(device)
    files.make_folder(job.out.parent)
    with files.atomic_folder(job.out) as place, _scratch(job.out) as original:
        ours = check.own_images(job.denoiser, job.student.sampler, job.noise)
        _write(job, place, original)
        job.denoiser.to("meta")  # its weights are on the disk now, and the stock pipeline needs their memory
        if job.denoiser.codec is not None:
            job.denoiser.codec.release()
        error = _replayed(job, ours, place, original, torch.device(device))
        files.write_atomic(place / "README.md", card(job.told(error)))
    if kind != "diffusers" and not sources.exists(job.base):
        logger.warning(
            "base model %s: not found from here; name its folder or hub id with --base, or mend the line", job.base
        )
    return Exported(folder=job.out, line=job.snippet().line(str(job.out), job.base), error=error)


def _for(student: Student, steps: int | None) -> Student:
    """The student for one of its step counts, where an export can hold no more than one."""
    if steps is not None and not student.sampler.two_time:
        raise UserError(f"--steps {steps}: this student's export serves all of its step counts; leave it off")
    return replace(student, sampler=alone(student.sampler, steps))


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside the export, for what its snippet needs besides it; gone afterwards."""
    place = out.with_name(f".tmp-base-{out.name}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _job(student: Student, name: str, kind: str, out: Path, keys: str | None, dtype: str) -> Job:
    """The export's choices; a UserError for what the student or the layout does not allow."""
    for option, value, known in (("--to", kind, get_args(Kind)), ("--dtype", dtype, tuple(folder.DTYPES))):
        if value not in known:
            raise UserError(f"{option} {value}: no such choice ({suggestion(value, known)})")
    if keys is not None and (kind != "lora" or keys not in get_args(Keys)):
        raise UserError(f"--keys {keys}: names the tensors of --to lora, one of {', '.join(get_args(Keys))}")
    if out.suffix == ".safetensors":
        raise UserError(f"{out}: OUT is a folder, which gets the weights and a card; leave out the ending")
    told = student.sampler.guidance is not None
    pipeline = pipeline_of(student.denoiser, told=told)
    entry = replay(student.denoiser, student.sampler)
    assert pipeline is not None  # else there is no replay
    if kind != "diffusers" and pipeline in ("pixels", scm.PIPELINE):
        raise UserError(
            f"--to {kind}: a layout of Stable Diffusion; this {student.denoiser.family} goes --to diffusers"
        )
    if pipeline != "pixels" and not getattr(student.denoiser.codec, "reads_text", False):
        raise UserError(
            f"{name}: no text encoder or no VAE in it, which every export needs; put those of its teacher there"
        )
    if kind == "single-file" and told:
        raise UserError(
            "--to single-file: the network takes guidance as an input, which this layout has no place for; "
            "use --to diffusers"
        )
    if kind == "lora" and student.adapters is None:
        raise UserError(
            f"{name}: all its weights were trained, so there is no LoRA in it; use --to diffusers or --to single-file"
        )
    if kind == "lora" and entry.output_scale != 1:
        raise UserError(f"--to lora: {entry.notes}, which a LoRA does not reach; use --to diffusers")
    chosen: Any = {"kind": kind, "keys": keys or "kohya"}
    return Job(student=student, out=out, dtype=dtype, entry=entry, pipeline=pipeline, **chosen)


def _write(job: Job, place: Path, base: Path) -> None:
    """The export's files into `place`, and into `base` what its snippet needs beside them."""
    denoiser = job.denoiser
    if job.entry.gap is not None:
        fold_gap(denoiser, job.entry.gap)
    tensors = folder.network_tensors(denoiser, job.entry.output_scale)
    if job.kind == "diffusers":
        if job.pipeline == scm.PIPELINE:
            folder.write_sana(place, denoiser, tensors, job.entry.make(), job.dtype)
        elif job.text:
            told = job.guidance is not None
            folder.write_stable_diffusion(place, denoiser, tensors, job.entry.make(), job.dtype, told=told)
        else:
            folder.write_pixels(place, denoiser, tensors, job.entry.make(), job.dtype)
        return
    if job.kind == "lora":
        assert job.student.adapters is not None
        adapters = job.student.adapters
        found, metadata = lora_file(adapters.tensors, adapters.settings, job.keys)
        folder.write_tensors(place / FILE, found, job.dtype, metadata)
        tensors = without(tensors, adapters)
    else:
        folder.write_tensors(place / WEIGHTS, _single_file(job, tensors), job.dtype)
    _write_base(base, job, tensors)


def _write_base(base: Path, job: Job, tensors: dict[str, Tensor]) -> None:
    """The base model as its users have it: guidance as ever, and a scheduler that the snippet has to replace."""
    import diffusers

    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    folder.write_stable_diffusion(base, job.denoiser, tensors, scheduler, "fp32", guided=True)


def _single_file(job: Job, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    codec: Any = job.denoiser.codec
    parts = {name: module.state_dict() for name, module in codec.modules().items()} | {"unet": tensors}
    configs = {name: files.read_json(codec.folder / name / "config.json") for name in parts if name != "unet"}
    net: Any = job.denoiser.net
    try:
        return ldm.single_file(parts, configs | {"unet": dict(net.config)})
    except (KeyError, ValueError) as error:
        raise UserError(f"--to single-file: {error.args[0]}; use --to diffusers") from error


def without(tensors: dict[str, Tensor], adapters: Adapters) -> dict[str, Tensor]:
    """The network before its adapters were added: W - (alpha / rank) B A."""
    scale, found = adapters.settings["alpha"] / adapters.settings["rank"], dict(tensors)
    for name, down in adapters.tensors.items():
        if name.endswith(HALVES[0]):
            path = name.removesuffix(HALVES[0])
            layer, up = f"{path.removeprefix('unet.')}.weight", adapters.tensors[path + HALVES[1]]
            change = (up.flatten(1).float() @ down.flatten(1).float()).reshape(found[layer].shape)
            found[layer] = found[layer] - scale * change.to(found[layer].device)
    return found


def _replayed(job: Job, ours: dict[int, Tensor], place: Path, base: Path, device: torch.device) -> float:
    """The largest difference between the student's images and stock diffusers'; RunFailed beyond what is allowed."""
    import diffusers

    version = diffusers.__version__
    try:
        theirs = check.stock_images(job.snippet(), str(place), str(base), device)
    except Exception as error:  # what two libraries raise for files that they do not know how to read
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunFailed(
            f"{job.out}: stock diffusers {version} cannot run it ({reason}); nothing was written"
        ) from error
    off, steps = check.difference(ours, theirs)
    allowed = check.LIMIT if job.dtype == "fp32" else 1.0
    if not off <= allowed:
        raise RunFailed(
            f"{job.out}: at {steps} step(s) the image of stock diffusers {version} is {off:.2g} off the student's "
            f"({allowed:g} allowed in {job.dtype}); nothing was written"
        )
    logger.info("replayed by stock diffusers %s: largest difference of a pixel %.1e of 1", version, off)
    return off
