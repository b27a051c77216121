"""An official TRELLIS folder as it is: `pipeline.json`, and for each role a stem with its .json and .safetensors.

A folder whose flows are students says so in a `fastgen.json` beside it. A flow's own folder, as training leaves it, is
one such stem, and is read here too.

Nothing is loaded before it is asked for, and what is loaded belongs to who asked: a pipeline that keeps one stage at a
time has a peak of one stage.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from fastgen import files
from fastgen.config import Model, validate
from fastgen.denoiser import conventions
from fastgen.errors import UserError
from fastgen.nets.weights import fill
from fastgen.sources import hub_file
from fastgen.teacher import FACTS, FORMAT, facts_of
from fastgen.teachers.trellis import PIPELINE, PIPELINES
from fastgen.teachers.trellis.args import Network
from fastgen.teachers.trellis.conditions import TextEncoder
from fastgen.teachers.trellis.flows import (
    EMPTY,
    IMAGE,
    SIGMA_MIN,
    STEM,
    TEXT,
    FlowDenoiser,
    LatentDenoiser,
    Normalization,
    StructureDenoiser,
)
from fastgen.teachers.trellis.models import ELASTIC, make

logger = logging.getLogger("fastgen")
ENCODERS = {IMAGE: "dinov2_vitl14_reg", TEXT: "openai/clip-vit-large-patch14"}
STRUCTURE_FLOW, STRUCTURE_DECODER = "sparse_structure_flow_model", "sparse_structure_decoder"
LATENT_FLOW = "slat_flow_model"
FLOWS = {"structure": STRUCTURE_FLOW, "latent": LATENT_FLOW}  # roles of the parts
SAMPLERS = {"structure": "sparse_structure_sampler", "latent": "slat_sampler"}  # and their samplers' keys
DECODERS = {"mesh": "slat_decoder_mesh", "gaussian": "slat_decoder_gs", "radiance field": "slat_decoder_rf"}
ROLES = {
    STRUCTURE_FLOW: "SparseStructureFlowModel",
    STRUCTURE_DECODER: "SparseStructureDecoder",
    LATENT_FLOW: "SLatFlowModel",
    DECODERS["mesh"]: "SLatMeshDecoder",
    DECODERS["gaussian"]: "SLatGaussianDecoder",
    DECODERS["radiance field"]: "SLatRadianceFieldDecoder",
}


class _SamplerArgs(Model):
    sigma_min: float = Field(default=SIGMA_MIN, ge=0, lt=1)


class Sampler(Model):
    """How a stage is sampled: the official class's name and its default settings (`fastgen.samplers.flow_euler`)."""

    name: str
    args: _SamplerArgs = _SamplerArgs()
    params: dict[str, Any] = Field(default_factory=dict)


class _Normalization(Model):
    mean: tuple[float, ...] = Field(min_length=1)
    std: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fit(self) -> _Normalization:
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError("mean and std need the same number of entries, and std positive ones")
        return self


class _Args(Model):
    models: dict[str, str]
    sparse_structure_sampler: Sampler
    slat_sampler: Sampler
    slat_normalization: _Normalization
    image_cond_model: str | None = None
    text_cond_model: str | None = None

    @field_validator("models")
    @classmethod
    def _needed_roles(cls, models: dict[str, str]) -> dict[str, str]:
        missing = [role for role in (STRUCTURE_FLOW, STRUCTURE_DECODER, LATENT_FLOW) if role not in models]
        if missing:
            raise ValueError(f"no stem for {', '.join(missing)}")
        return models


class _Described(Model):
    name: str
    args: _Args


class _Stem(Model):
    name: str
    args: dict[str, Any]


class Few(Model):
    """How the flows that are students are sampled.

    steps    the counts that they were made for
    sampler  between them: their own direction (euler), or fresh noise (renoise)
    parts    which flows; the other one, if any, is the teacher's
    """

    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    sampler: Literal["euler", "renoise"]
    parts: tuple[Literal["structure", "latent"], ...] = Field(default=("structure", "latent"), min_length=1)

    def at(self, steps: int | None) -> int:
        """A count, by default the smallest; one outside the list is a UserError naming those inside."""
        if steps is not None and steps not in self.steps:
            known = ", ".join(map(str, sorted(self.steps)))
            raise UserError(f"steps={steps}: this student was made for {known}; choose one of them")
        return min(self.steps) if steps is None else steps


class _Own(Model):
    format: int
    kind: Literal["student"]
    shapes: Few
    facts: dict[str, Any]


class _Flow(Model):
    """What `FlowDenoiser.describe` adds."""

    part: Literal["structure", "latent"]
    condition: Literal["image", "text"]
    empty: bool
    normalization: Normalization | None


@dataclass(frozen=True)
class TrellisFolder:
    """What `pipeline.json` says. stems: role -> stem; samplers of both stages; mean, std [C] of the latents; student:
    what fastgen.json adds where flows are students."""

    path: Path
    condition: str
    stems: dict[str, str]
    structure: Sampler
    latent: Sampler
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encoder: str
    student: Few | None = None

    @classmethod
    def read(cls, path: Path) -> TrellisFolder:
        """The folder's description; what is wrong with it is a UserError. No weights are looked at."""
        file = path / PIPELINE
        found = files.read_json(file)
        if not isinstance(found, dict):
            raise UserError(f"{file}: not the description of a pipeline")
        told = validate(_Described, found, str(file))
        if told.name not in PIPELINES:
            raise UserError(f"{file}: the pipeline '{told.name}' is none of TRELLIS's ({', '.join(PIPELINES)})")
        condition, args = PIPELINES[told.name], told.args
        named = (args.image_cond_model if condition == IMAGE else args.text_cond_model) or ENCODERS[condition]
        inside = path / named
        return cls(
            path=path,
            condition=condition,
            stems=args.models,
            structure=args.sparse_structure_sampler,
            latent=args.slat_sampler,
            mean=args.slat_normalization.mean,
            std=args.slat_normalization.std,
            encoder=str(inside) if inside.is_dir() else named,
            student=_student(path / FACTS),
        )

    def files(self, role: str) -> tuple[Path, Path]:
        """The .json and the .safetensors of a role: under the folder, else where the stem itself says (a path, or
        owner/repository/stem on the hub)."""
        stem = self.stems.get(role)
        if stem is None:
            raise UserError(f"{self.path / PIPELINE}: names no {role}; it has {', '.join(self.stems)}")
        if (here := self.here(role)) is not None:
            return here
        parts = stem.split("/")
        if len(parts) < 3 or any(part in ("", ".", "..") for part in parts):  # not owner/repository/stem
            raise UserError(f"{self.path / stem}.json: no such file, for the role {role}; fetch the folder again")
        repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
        return hub_file(repository, f"{inside}.json"), hub_file(repository, f"{inside}.safetensors")

    def here(self, role: str) -> tuple[Path, Path] | None:
        """The same, or None for what is no path on this machine; half a stem is a UserError."""
        for base in (self.path / self.stems[role], Path(self.stems[role]).expanduser()):
            description, weights = (base.with_name(f"{base.name}.{ending}") for ending in ("json", "safetensors"))
            if description.exists():
                if not weights.exists():
                    raise UserError(f"{weights}: missing, and its .json is there; fetch it, or the folder, again")
                return description, weights
        return None

    def describe(self, role: str) -> tuple[str, dict[str, Any], Path]:
        """(class, args, weights) of a role; a class that has no business there is a UserError."""
        description, weights = self.files(role)
        return *_described(description, role), weights

    def network(self, role: str, *, device: str = "cpu", torso: torch.dtype = torch.float32) -> Network:
        """The network of a role with its weights, all of them and no others, in eval mode without gradients.

        torso: what its blocks compute in: float32, or on a GPU float16 (as released) or bfloat16.
        """
        net = _loaded(*self.describe(role), torso)
        shapes_only = any(parameter.is_meta for parameter in net.parameters())
        return net if shapes_only else net.to(device)

    def structure_flow(self, **options: Any) -> StructureDenoiser:
        """The first stage as a denoiser; a text flow still lacks the empty text's encoding (`denoiser.empty`)."""
        net = self.network(STRUCTURE_FLOW, **options)
        return StructureDenoiser(net, condition=self.condition, sigma_min=self.structure.args.sigma_min)

    def latent_flow(self, **options: Any) -> LatentDenoiser:
        """The second stage as a denoiser."""
        net = self.network(LATENT_FLOW, **options)
        if net.args.in_channels != len(self.mean):
            told = f"{len(self.mean)} means for latents of {net.args.in_channels} channels"
            raise UserError(f"{self.path / PIPELINE}: slat_normalization has {told}")
        return LatentDenoiser(
            net,
            condition=self.condition,
            sigma_min=self.latent.args.sigma_min,
            normalization=(self.mean, self.std),
        )

    def flow(self, part: str) -> FlowDenoiser:
        """The flow of a part in float32; a text flow knows the empty text where the encoder is here."""
        made = self.structure_flow() if part == "structure" else self.latent_flow()
        if self.condition == TEXT:
            try:
                made.empty = TextEncoder(self.encoder).empty
            except UserError as error:
                logger.info("%s: without the empty text's encoding (%s)", self.path, error)
        return made

    def facts(self, part: str) -> dict[str, Any]:
        """Of a part: its origin, what its weights were stored as, and the normalisation that it lives in."""
        with files.shapes_only():
            stored = files.load_tensors(self.files(FLOWS[part])[1])
        halves = sorted({str(t.dtype).removeprefix("torch.") for t in stored.values()} - {"float32"})
        told = {**facts_of(self.path), "part": part, "condition": self.condition}
        told["precision"] = f"float32, in part widened from {' and '.join(halves)}" if halves else "float32"
        if part == "latent":
            told["normalization"] = {"mean": list(self.mean), "std": list(self.std)}
        return told

    def kind(self, part: str) -> str:
        """What a part's flow is: "student" or "teacher"."""
        return "student" if self.student is not None and part in self.student.parts else "teacher"

    def sha256(self, part: str | None = None) -> str:
        """Of a part's two files, wherever they lie; None: of the folder, and of stems that lie elsewhere."""
        if part is not None:
            return _together(self.files(FLOWS[part]))
        inside, root = files.sha256(self.path), os.path.abspath(self.path)
        found = [file for role in self.stems for file in self.here(role) or ()]
        outside = [file for file in found if not Path(os.path.abspath(file)).is_relative_to(root)]
        return hashlib.sha256((inside + _together(outside)).encode()).hexdigest() if outside else inside

    def checked(self, role: str) -> Network:
        """The network of a role on the meta device, after its file's headers were held against it: no weights read."""
        name, args, weights = self.describe(role)
        with torch.device("meta"):
            net = make(name, args, str(weights.with_suffix(".json")))
        with files.shapes_only():
            fill(net, files.load_tensors(weights), weights)
        return net


def _together(found: Iterable[Path]) -> str:
    return hashlib.sha256("".join(map(files.sha256, found)).encode()).hexdigest()


def _student(file: Path) -> Few | None:
    """What a fastgen.json says beside a pipeline's; None where there is none."""
    if not file.exists():
        return None
    told = validate(_Own, files.read_json(file), str(file))
    if told.format != FORMAT:
        raise UserError(f"{file}: format {told.format}, this fastgen reads {FORMAT}; upgrade fastgen")
    return told.shapes


def _described(description: Path, role: str) -> tuple[str, dict[str, Any]]:
    found = files.read_json(description)
    if not isinstance(found, dict):
        raise UserError(f"{description}: not the description of a network")
    told = validate(_Stem, found, str(description))
    if role in ROLES and told.name.removeprefix(ELASTIC) != ROLES[role]:
        raise UserError(f"{description}: a {told.name} stands for the role {role}, which needs a {ROLES[role]}")
    return told.name, told.args


def _loaded(name: str, args: dict[str, Any], weights: Path, torso: torch.dtype) -> Network:
    with torch.device("meta"):
        net = make(name, {**args, "use_fp16": False}, str(weights.with_suffix(".json")))
        net.to_torso(torso)
    fill(net, files.load_tensors(weights), weights)
    return net.eval().requires_grad_(False)


def read_flow(folder: Path, data: dict[str, Any]) -> FlowDenoiser:
    """A flow's own folder; data: `FlowDenoiser.describe()`. What does not fit together is a UserError or ValueError."""
    own = validate(_Flow, {key: data[key] for key in _Flow.model_fields if key in data}, str(folder / FACTS))
    told = conventions(data)
    description, weights = folder / f"{STEM}.json", folder / f"{STEM}.safetensors"
    net = _loaded(*_described(description, FLOWS[own.part]), weights, torch.float32)
    empty = files.load_tensors(folder / EMPTY).get(TEXT) if own.empty else None
    if own.empty and (empty is None or empty.shape[-1] != net.args.cond_channels):
        raise UserError(f"{folder / EMPTY}: not the empty text's encoding of {net.args.cond_channels} channels")
    options: dict[str, Any] = {"condition": own.condition, "empty": empty, **told}
    if own.part == "latent":
        options["normalization"] = own.normalization
    made = {"structure": StructureDenoiser, "latent": LatentDenoiser}[own.part](net, **options)
    if made.shape != made._shape(net):
        raise UserError(f"{description}: makes samples of {made._shape(net)}, fastgen.json says {made.shape}")
    return made
