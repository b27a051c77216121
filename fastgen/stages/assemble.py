"""The stage that puts trained flows into a TRELLIS folder: a complete one, which the official pipeline can load."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, field_validator
from torch import nn

import fastgen
from fastgen import files, noise
from fastgen.config import plain
from fastgen.errors import UserError
from fastgen.layout import mean_all
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.samplers.flow_euler import FlowEuler
from fastgen.sources import ORIGIN
from fastgen.sparse import Voxels
from fastgen.stages.config import Stage
from fastgen.stages.context import PICKLED, Context
from fastgen.student import SamplerSpec
from fastgen.teacher import FACTS, FORMAT, damage_explained, facts_of, read_denoiser, refuse_other_part
from fastgen.teachers.trellis import PARTS, recognises
from fastgen.teachers.trellis.assembly import CARD, SAMPLER, assemble, fill_from
from fastgen.teachers.trellis.flows import TIME_SCALE, FlowDenoiser
from fastgen.teachers.trellis.folder import FLOWS, Few, TrellisFolder

logger = logging.getLogger("fastgen")
PUBLISHED = (1, 2)  # steps of a student that comes as a state dict, and does not say
KEPT = ("license", "license_name", "license_link", "base_model")
PROBE_SIDE, PROBE_TOKENS = 8, 16  # of what a flow is tried with: a cube of voxels, and tokens of noise


@dataclass(frozen=True)
class Given:
    """A flow that is put in. sampler: how a student is stepped; None: of a teacher, or of a state dict."""

    denoiser: FlowDenoiser
    kind: str
    sampler: SamplerSpec | None
    facts: dict[str, Any]


class Assemble(Stage):
    """`base` with the flows `structure` and `latent`: folders of one flow, or .pt state dicts of published students.

    steps, rescale_t, sampler  of students; None: their own. A state dict has none: 1 and 2 steps, the times of the
                               base's sampler, Euler
    dtype                      of the students' blocks
    """

    stage: Literal["assemble"]
    base: str
    structure: str | None = None
    latent: str | None = None
    steps: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, min_length=1)
    rescale_t: float | None = Field(default=None, gt=0)
    sampler: Literal["euler", "renoise"] | None = None
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"

    @field_validator("dtype")
    @classmethod
    def _no_bf16(cls, value: str) -> str:
        if value == "bf16":
            raise ValueError(
                "near 0.03 bfloat16 numbers lie 1.2e-4 apart, and few-step training moves weights by less: it would be "
                "undone. Use fp32, or fp16, whose loss is measured"
            )
        return value

    @field_validator("structure", "latent")
    @classmethod
    def _no_single_file(cls, value: str | None) -> str | None:
        if value is not None and value.endswith(".safetensors"):
            raise ValueError(f"give the folder of a flow, or a {PICKLED} state dict")
        return value

    @property
    def flows(self) -> dict[str, str]:
        """References by part."""
        return {part: reference for part in PARTS if (reference := getattr(self, part)) is not None}

    def check(self, run: Context) -> None:
        if not self.flows:
            raise UserError(f"stage {self.name}: no flow to put in; set structure, latent or both")
        if self.base not in run.names:
            self._base(run)
        for part, reference in self.flows.items():
            if reference not in run.names:
                self._refuse_other_folder(part, run.path(reference))

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        base = self._base(run)
        given = {part: self._given(run, base, part) for part in self.flows}
        few, params = self._few(base, given)
        facts = self._facts(run, base, given) | {"precision": self._precision(run, base, given)}
        with files.atomic_folder(folder / "model") as temporary:
            assemble(base, {part: flow.denoiser.net for part, flow in given.items()}, params, temporary)
            if few is not None:
                told = {"format": FORMAT, "kind": "student", "shapes": plain(few), "facts": facts}
                files.write_json(temporary / FACTS, told)
            elif "base_model" in facts:
                files.write_json(temporary / ORIGIN, {"base_model": facts["base_model"]})
            files.write_atomic(temporary / CARD, card(base, given, few, params, facts))
        return {"output": "model", "facts": facts}

    def _base(self, run: Context) -> TrellisFolder:
        path = run.path(self.base)
        if not path.is_dir() or not recognises(path):
            raise UserError(f"stage {self.name}: base={self.base}: no TRELLIS folder; there is no pipeline.json of one")
        if run.out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"stage {self.name}: out={run.out} lies inside base={self.base}; choose another out=")
        found = TrellisFolder.read(path)
        if found.student is not None:
            raise UserError(
                f"stage {self.name}: base={self.base} is a student's folder; give the teacher's, and both flows"
            )
        return found

    def _refuse_other_folder(self, part: str, path: Path) -> None:
        """Whatever is neither the folder of this flow nor a state dict."""
        if path.is_dir() and recognises(path):
            raise UserError(f"stage {self.name}: {part}={path}: a whole TRELLIS folder; name the folder of one flow")
        if path.is_dir():
            refuse_other_part(path, part)
        elif path.suffix != PICKLED:
            raise UserError(f"stage {self.name}: {part}={path}: give the folder of a flow, or a {PICKLED} state dict")

    def _given(self, run: Context, base: TrellisFolder, part: str) -> Given:
        path = run.path(self.flows[part])
        self._refuse_other_folder(part, path)
        if path.is_file():
            logger.info("%s: %s: a state dict, taken for a student", self.name, path)
            made = base.flow(part)
            fill_from(path, made.net)
            self._refuse_not_finite(part, made)
            return Given(made, "student", None, {"file": path.name, "sha256": run.sha256(self.flows[part])})
        denoiser, data = read_denoiser(path, part)
        assert isinstance(denoiser, FlowDenoiser)
        self._refuse_misfit(base, part, denoiser)
        self._refuse_not_finite(part, denoiser)
        kind, facts = data.get("kind"), data.get("facts", {})
        if kind not in ("teacher", "student") or not isinstance(facts, dict):
            raise UserError(f"{path / FACTS}: damaged (kind {kind!r}, facts {type(facts).__name__})")
        if kind == "teacher":
            return Given(denoiser, "teacher", None, facts)
        if (taught := facts.get("teacher_sha256")) is not None and taught != base.sha256(part):
            told = f"{part}={self.flows[part]} was distilled from another flow than base={self.base} has"
            logger.warning("%s: %s; is that meant?", self.name, told)
        with damage_explained(path / FACTS):
            return Given(denoiser, "student", SamplerSpec.from_dict(data["sampler"]), facts)

    def _refuse_not_finite(self, part: str, denoiser: FlowDenoiser) -> None:
        state = denoiser.net.state_dict()
        name = next((name for name, value in state.items() if not value.isfinite().all()), None)
        if name is not None:
            raise UserError(f"stage {self.name}: {part}={self.flows[part]}: its weight {name} is not finite")

    def _refuse_misfit(self, base: TrellisFolder, part: str, denoiser: FlowDenoiser) -> None:
        """A flow that would not be understood in the place of the base's."""
        where = f"stage {self.name}: {part}={self.flows[part]}"
        ours, theirs = dict(denoiser.net.args), dict(base.checked(FLOWS[part]).args)
        for key, value in theirs.items():
            if key not in ("use_fp16", "use_checkpoint") and ours[key] != value:
                raise UserError(f"{where}: another network than the base's: {key} is {ours[key]}, there {value}")
        if denoiser.condition != base.condition:
            raise UserError(f"{where}: told {denoiser.condition}s, and the base is told {base.condition}s")
        if denoiser.extra:
            told = " and ".join(denoiser.extra)
            raise UserError(f"{where}: it is told {told} beside its time, which no TRELLIS network has a place for")
        s = getattr(base, part).args.sigma_min
        official = (RectifiedFlow(sigma_min=s), Prediction(kind="flow", sigma_min=s), TIME_SCALE, False)
        if (denoiser.path, denoiser.prediction, denoiser.time_scale, denoiser.log_time) != official:
            raise UserError(f"{where}: its path, times or target are not those of TRELLIS's sampler")
        own = getattr(denoiser, "normalization", None)
        if own is not None and own != (base.mean, base.std):
            raise UserError(f"{where}: trained on latents of another normalisation than the base's slat_normalization")

    def _few(self, base: TrellisFolder, given: dict[str, Given]) -> tuple[Few | None, dict[str, dict[str, Any]]]:
        """How the students are sampled: for fastgen.json, and by part for pipeline.json. None: there is none."""
        students = {part: flow for part, flow in given.items() if flow.kind == "student"}
        asked: dict[str, Any] = {"steps": self.steps, "rescale_t": self.rescale_t, "sampler": self.sampler}
        asked["dtype"] = None if self.dtype == "fp32" else self.dtype
        if not students:
            if set_ := [key for key, value in asked.items() if value is not None]:
                raise UserError(f"stage {self.name}: {set_[0]} is for students, and these flows are teachers")
            return None, {}
        lists = [set(flow.sampler.times if flow.sampler else self.steps or PUBLISHED) for flow in students.values()]
        steps = tuple(sorted(set(self.steps or set.intersection(*lists))))
        if not steps or not all(set(steps) <= known for known in lists):
            known_all = " and ".join(", ".join(map(str, sorted(known))) for known in lists)
            told = f"the students were made for {known_all}; set stages.{self.name}.steps to what both have"
            raise UserError(f"stage {self.name}: steps={list(steps)}: {told}")
        rules = {"renoise" if flow.sampler and flow.sampler.renoise else "euler" for flow in students.values()}
        if self.sampler is None and len(rules) > 1:
            raise UserError(f"stage {self.name}: the students were made for {' and '.join(sorted(rules))}; set sampler")
        few = Few.model_validate({"steps": steps, "sampler": self.sampler or rules.pop(), "parts": tuple(students)})
        return few, {
            part: {"steps": min(steps), "rescale_t": self._rescale(base, part, flow)} for part, flow in students.items()
        }

    def _rescale(self, base: TrellisFolder, part: str, flow: Given) -> float:
        """The spacing of a student's times; times of another form are a UserError."""
        if flow.sampler is not None:
            found = rescale_of(flow.sampler)
            if found is None:
                told = f"its times {flow.sampler.times} are none of TRELLIS's sampler"
                raise UserError(f"stage {self.name}: {part}={self.flows[part]}: {told}")
            return found if self.rescale_t is None else self.rescale_t
        return self.rescale_t or getattr(base, part).params.get("rescale_t", 1.0)

    def _precision(self, run: Context, base: TrellisFolder, given: dict[str, Given]) -> dict[str, dict[str, float]]:
        """What half precision does, or would do, to each student; its blocks are brought to the dtype, in place."""
        found = {}
        for part, flow in given.items():
            if flow.kind != "student":
                continue
            teacher = base.flow(part)
            found[part] = unmoved(flow.denoiser.net, teacher.net)
            if self.dtype == "fp16":
                found[part] |= rounding(flow.denoiser.to(run.device), teacher.to(run.device), run.config.seed)
                flow.denoiser.net.to_torso(torch.float16)
                logger.warning("%s: %s in float16: %s", self.name, part, in_words(found[part]))
        return found

    def _facts(self, run: Context, base: TrellisFolder, given: dict[str, Given]) -> dict[str, Any]:
        told = facts_of(base.path)
        for flow in given.values():
            told = {**flow.facts, **told}
        facts: dict[str, Any] = {key: told[key] for key in KEPT if key in told}
        facts |= {"base": base.path.name, "base_sha256": run.sha256(self.base), "dtype": self.dtype}
        return facts | {part: flow.facts for part, flow in given.items()} | {"fastgen": fastgen.__version__}


def rescale_of(sampler: SamplerSpec) -> float | None:
    """r of the times r s / (1 + (r - 1) s), s = 1 - i / n, that a sampler has for every n; None: it has others."""
    if not isinstance(sampler.path, RectifiedFlow) or sampler.two_time or sampler.guidance is not None:
        return None
    n, times = max(sampler.times.items())
    s, t = 1 - 1 / n, times[min(1, n - 1)]
    r = t * (1 - s) / (s * (1 - t)) if s > 0 and 0 < t < 1 else 1.0
    r = round(r, 6)
    if not r:
        return None
    for n, times in sampler.times.items():
        wanted = FlowEuler(steps=n, rescale_t=r).times()
        if not all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(times, wanted, strict=True)):
            return None
    return r


def unmoved(student: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """Which share of a student's weights half precision cannot tell from the teacher's, by its name."""
    pairs = list(zip(student.parameters(), teacher.parameters(), strict=True))
    count = sum(ours.numel() for ours, _ in pairs)
    halves = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    return {
        name: sum(int((ours.to(dtype) == theirs.to(dtype)).sum()) for ours, theirs in pairs) / count
        for name, dtype in halves.items()
    }


@torch.no_grad()
def rounding(student: FlowDenoiser, teacher: FlowDenoiser, seed: int) -> dict[str, float]:
    """Root mean squares over one-step outputs from noise: between the student with its blocks rounded to float16 and
    the student as it is ("error"), and between student and teacher ("change")."""
    rounded = copy.deepcopy(student)
    rounded.net.to_torso(torch.float16)
    rounded.net.to_torso(torch.float32)
    rows = torch.zeros(1, dtype=torch.long, device=student.device)
    x: Any = noise.normal(seed, "assemble/x", rows, student.shape)
    if student.part == "latent":
        side = torch.arange(min(PROBE_SIDE, student.net.args.resolution), dtype=torch.int32)
        coords = torch.cartesian_prod(torch.zeros(1, dtype=torch.int32), side, side, side).to(student.device)
        x = Voxels(noise.normal(seed, "assemble/x", rows, (len(coords), *student.shape))[0], coords, 1)
    tokens = noise.normal(seed, "assemble/tokens", rows, (PROBE_TOKENS, student.net.args.cond_channels))
    cond, t = {student.condition: tokens}, torch.ones(1, device=student.device)
    half, whole, before = (model(x, t, cond).x0 for model in (rounded, student, teacher))
    pairs = {"error": (half, whole), "change": (whole, before)}
    return {name: float(mean_all((a - b).square()).sqrt()) for name, (a, b) in pairs.items()}


def in_words(loss: dict[str, float]) -> str:
    """Of `rounding`."""
    error, change = loss["error"], loss["change"]
    share = f"{100 * error / change:.2g} % of the" if change else "beside a"
    return f"rounding its weights changes a one-step output by {error:.2g} (rms), {share} {change:.2g} of training"


def card(
    base: TrellisFolder,
    given: dict[str, Given],
    few: Few | None,
    params: dict[str, dict[str, Any]],
    facts: dict[str, Any],
) -> str:
    """The folder's README.md: what it is, how to run it, in which precision and why, under which terms."""
    head = {"library_name": "fastgen", "license": facts.get("license") or "other"}
    head |= {key: facts[key] for key in KEPT[1:] if facts.get(key)}
    asked = '"a wooden chair"' if base.condition == "text" else "--image chair.png"
    steps = "" if few is None else f" --steps {min(few.steps)}"
    kind = "TRELLIS" if few is None else f"A {', '.join(map(str, sorted(few.steps)))}-step student of TRELLIS"
    flows = " and ".join(f"{part} flow ({flow.kind})" for part, flow in given.items())
    rows = [f"| {part} flow | {_made(flow)} |" for part, flow in given.items()]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False) + "---",
        f"# {kind}, told {base.condition}s",
        "",
        f"The {flows} of this folder took the place of what its base has, `{base.path.name}`; all else is the base's. "
        "The layout is TRELLIS's own.",
        "",
        "```bash",
        f"fastgen generate PATH_OF_THIS_FOLDER {asked} --out chair.glb{steps}",
        "```",
        "",
        *(_few_words(few, params, facts) if few is not None else ["The flows are float32."]),
        f"Licence: {facts.get('license') or 'the terms of the base apply'}.",
        "",
        "| part | made by |",
        "|---|---|",
        *rows,
        f"| everything else | base, sha256 `{facts['base_sha256']}` |",
        "",
    ]
    return "\n".join(lines)


def _few_words(few: Few, params: dict[str, dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    grids = "; ".join(
        f"{part} "
        + ", ".join(
            f"{list(map(_short, FlowEuler(steps=n, rescale_t=told['rescale_t']).times()))}" for n in sorted(few.steps)
        )
        for part, told in params.items()
    )
    other = "renoise" if few.sampler == "euler" else "euler"
    return [
        f"Steps: {', '.join(map(str, sorted(few.steps)))}, a network call each, at the times {grids}. Sampler: "
        f"{few.sampler} (`--sampler {other}` is the other). Guidance is part of the students' weights: leave it off.",
        "",
        f"`pipeline.json` is written for the official pipeline (which was not run on it) and asks for {min(few.steps)} "
        f"by Euler. The sampler there is {SAMPLER}, for that pipeline hands every sampler a null condition, which the "
        "plain one cannot take; the interval holds no time, so nothing is guided.",
        "",
        *(f"{line}." for part, told in facts["precision"].items() for line in _precision_words(part, told)),
        "",
    ]


def _precision_words(part: str, told: dict[str, float]) -> list[str]:
    if "error" in told:
        return [f"The {part} flow's blocks are float16: {in_words(told)}"]
    half, brain = (f"{100 * told[name]:.3g} %" for name in ("float16", "bfloat16"))
    again = f"rounded to float16, {half} of its weights would be those of the base again, to bfloat16 {brain}"
    return [f"The {part} flow is kept in float32: {again}"]


def _short(time: float) -> float:
    return round(time, 4)


def _made(flow: Given) -> str:
    keys = ("method", "training_steps", "file", "sha256", "teacher_sha256", "config_hash")
    told = [f"{key} {flow.facts[key]}" for key in keys if flow.facts.get(key)]
    return " ".join("; ".join(told).split()).replace("|", "\\|") or flow.kind
