"""An official TRELLIS folder as it is: `pipeline.json`, and for each role a stem with its .json and .safetensors.

Nothing is loaded before it is asked for, and what is loaded belongs to who asked: a pipeline that keeps one stage at a
time has a peak of one stage.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from fastgen import files
from fastgen.config import Model, validate
from fastgen.errors import UserError
from fastgen.nets.weights import fill
from fastgen.sources import hub_file, origin
from fastgen.teachers.trellis import PIPELINE, PIPELINES
from fastgen.teachers.trellis.args import Network
from fastgen.teachers.trellis.conditions import TextEncoder
from fastgen.teachers.trellis.flows import IMAGE, SIGMA_MIN, TEXT, FlowDenoiser, LatentDenoiser, StructureDenoiser
from fastgen.teachers.trellis.models import ELASTIC, make

logger = logging.getLogger("fastgen")
ENCODERS = {IMAGE: "dinov2_vitl14_reg", TEXT: "openai/clip-vit-large-patch14"}
STRUCTURE_FLOW, STRUCTURE_DECODER = "sparse_structure_flow_model", "sparse_structure_decoder"
LATENT_FLOW = "slat_flow_model"
FLOWS = {"structure": STRUCTURE_FLOW, "latent": LATENT_FLOW}  # roles of the parts
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


@dataclass(frozen=True)
class TrellisFolder:
    """What `pipeline.json` says. stems: role -> stem; samplers of both stages; mean, std [C] of the latents."""

    path: Path
    condition: str
    stems: dict[str, str]
    structure: Sampler
    latent: Sampler
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encoder: str

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
        )

    def files(self, role: str) -> tuple[Path, Path]:
        """The .json and the .safetensors of a role: under the folder, else where the stem itself says (a path, or
        owner/repository/stem on the hub)."""
        stem = self.stems.get(role)
        if stem is None:
            raise UserError(f"{self.path / PIPELINE}: names no {role}; it has {', '.join(self.stems)}")
        for base in (self.path / stem, Path(stem).expanduser()):
            description, weights = (base.with_name(f"{base.name}.{ending}") for ending in ("json", "safetensors"))
            if description.exists():
                if not weights.exists():
                    raise UserError(f"{weights}: missing, and its .json is there; fetch it, or the folder, again")
                return description, weights
        parts = stem.split("/")
        if len(parts) < 3 or any(part in ("", ".", "..") for part in parts):  # not owner/repository/stem
            raise UserError(f"{self.path / stem}.json: no such file, for the role {role}; fetch the folder again")
        repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
        return hub_file(repository, f"{inside}.json"), hub_file(repository, f"{inside}.safetensors")

    def describe(self, role: str) -> tuple[str, dict[str, Any], Path]:
        """(class, args, weights) of a role; a class that has no business there is a UserError."""
        description, weights = self.files(role)
        found = files.read_json(description)
        if not isinstance(found, dict):
            raise UserError(f"{description}: not the description of a network")
        told = validate(_Stem, found, str(description))
        if role in ROLES and told.name.removeprefix(ELASTIC) != ROLES[role]:
            raise UserError(f"{description}: a {told.name} stands for the role {role}, which needs a {ROLES[role]}")
        return told.name, told.args, weights

    def network(self, role: str, *, device: str = "cpu", torso: torch.dtype = torch.float32) -> Network:
        """The network of a role with its weights, all of them and no others, in eval mode without gradients.

        torso: what its blocks compute in: float32, or on a GPU float16 (as released) or bfloat16.
        """
        name, args, weights = self.describe(role)
        with torch.device("meta"):
            net = make(name, {**args, "use_fp16": False}, str(weights.with_suffix(".json")))
            net.to_torso(torso)
        fill(net, files.load_tensors(weights), weights)
        return net.to(device).eval().requires_grad_(False)

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
        normalization = (self.mean, self.std)
        sigma_min = self.latent.args.sigma_min
        return LatentDenoiser(net, condition=self.condition, sigma_min=sigma_min, normalization=normalization)

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
        told = {**origin(self.path), "part": part, "condition": self.condition}
        told["precision"] = f"float32, in part widened from {' and '.join(halves)}" if halves else "float32"
        if part == "latent":
            told["normalization"] = {"mean": list(self.mean), "std": list(self.std)}
        return told

    def sha256(self, part: str) -> str:
        """Of a part's two files, wherever they lie."""
        return hashlib.sha256("".join(map(files.sha256, self.files(FLOWS[part]))).encode()).hexdigest()

    def checked(self, role: str) -> Network:
        """The network of a role on the meta device, after its file's headers were held against it: no weights read."""
        name, args, weights = self.describe(role)
        with torch.device("meta"):
            net = make(name, args, str(weights.with_suffix(".json")))
        with files.shapes_only():
            fill(net, files.load_tensors(weights), weights)
        return net
