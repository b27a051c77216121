"""The stage that makes a world of solids ready for its flows: a whole TRELLIS text folder, and latents to train on.

The folder holds the trained autoencoders, fresh flows, and a text encoder of transformers' own class with random
weights that nothing trains: its texts are few, and all it must do is tell them apart.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgen import files
from fastgen.config import Model
from fastgen.data import shapes
from fastgen.data.shapes import Manifest
from fastgen.data.solids import KINDS, SIZES, conditions
from fastgen.errors import UserError
from fastgen.stages.config import Stage
from fastgen.stages.context import Context
from fastgen.teachers.trellis import PIPELINE
from fastgen.teachers.trellis.assembly import LATENTS
from fastgen.teachers.trellis.conditions import TextEncoder
from fastgen.teachers.trellis.flows import SIGMA_MIN
from fastgen.teachers.trellis.folder import DECODERS, LATENT_FLOW, STRUCTURE_DECODER, STRUCTURE_FLOW
from fastgen.teachers.trellis.models import make, write_stem
from fastgen.trainers.shapes.autoencoder import Autoencoder
from fastgen.trainers.shapes.bodies import Bodies
from fastgen.zoo.fresh import write_clip_tokenizer

logger = logging.getLogger("fastgen")
ENCODER = "encoder"
STEMS = {
    "structure": {"encoder": "ckpts/ss_enc_conv3d", "decoder": "ckpts/ss_dec_conv3d", "flow": "ckpts/ss_flow_txt_dit"},
    "latent": {
        "encoder": "ckpts/slat_enc_swin",
        "decoder": "ckpts/slat_dec_mesh_swin",
        "flow": "ckpts/slat_flow_txt_dit",
    },
}
SAMPLER = {
    "name": "FlowEulerGuidanceIntervalSampler",
    "args": {"sigma_min": SIGMA_MIN},
    "params": {"steps": 25, "cfg_strength": 0.0, "cfg_interval": [0.5, 0.95], "rescale_t": 3.0},
}
RENDERER = "none: signed distances of procedural solids"
DISTINCT = 0.02  # the least distance between two texts' encodings, over their norm; 16 seeds had 0.04 .. 0.12


class FlowNet(Model):
    """The size of a flow's transformer."""

    channels: int = Field(default=96, ge=6)
    blocks: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> FlowNet:
        if self.channels % self.heads:
            raise ValueError(f"channels={self.channels} is no multiple of {self.heads} heads")
        return self


class StructureFlow(FlowNet):
    """patch: cells along a side of one token."""

    patch: int = Field(default=1, ge=1)


class LatentFlow(FlowNet):
    """io: channels of the convolutions before and behind the transformer."""

    io: int = Field(default=32, ge=1)


class TextNet(Model):
    """The size of the text encoder."""

    width: int = Field(default=32, ge=2)
    layers: int = Field(default=1, ge=1)
    heads: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> TextNet:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is no multiple of {self.heads} heads")
        return self


class World(Stage):
    """`structure` and `latent`: the trained autoencoders, stages or folders; rows: how many solids are encoded."""

    stage: Literal["world"]
    structure: str
    latent: str
    rows: int = Field(default=2000, ge=2)
    structure_flow: StructureFlow = StructureFlow()
    latent_flow: LatentFlow = LatentFlow()
    text: TextNet = TextNet()

    def smoke(self) -> World:
        return self.model_copy(update={"rows": 8})

    def check(self, run: Context) -> None:
        for part in STEMS:
            if getattr(self, part) not in run.names:
                self._autoencoder(run, part)

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        nets = {part: self._autoencoder(run, part) for part in STEMS}
        resolution = nets["latent"].resolution
        if nets["structure"].resolution != resolution:
            raise UserError(
                f"stage {self.name}: structure={self.structure} is for {nets['structure'].resolution}^3 voxels, "
                f"latent={self.latent} on {resolution}^3; train both at one resolution"
            )
        seed = run.config.seed
        bodies = {part: Bodies(self.rows, resolution, part, seed=seed) for part in STEMS}
        structures = encoded(nets["structure"], bodies["structure"], run.device)
        latents = encoded(nets["latent"], bodies["latent"], run.device)
        mean, std = (tuple(v.tolist()) for v in moments(latents))
        with files.atomic_folder(folder / "model") as temporary, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            write_text_encoder(temporary / ENCODER, self.text)
            self._write_stems(temporary, nets, structures[0].shape[-1])
            files.write_json(temporary / PIPELINE, pipeline(mean, std))
            manifest = self._manifest(temporary, structures[0], mean, std, resolution, seed)
            told = told_apart(TextEncoder(str(temporary / ENCODER)))
            self._write_latents(temporary / LATENTS, manifest, bodies["latent"], structures, latents, told)
        facts = {"voxels": sum(map(len, latents)), "structure_std": float(torch.stack(structures).std())}
        return {"output": "model", "facts": {**facts, "mean": mean, "std": std, "rows": self.rows, "seed": seed}}

    def _autoencoder(self, run: Context, part: str) -> Autoencoder:
        path = run.path(getattr(self, part))
        if not path.is_dir():
            raise UserError(f"stage {self.name}: {part}={path}: give the folder of an autoencoder (stage shape_vae)")
        return Autoencoder.read(path, part)

    def _write_stems(self, folder: Path, nets: dict[str, Autoencoder], side: int) -> None:
        (folder / "ckpts").mkdir()
        latent = nets["latent"].decoder.args
        shared = {
            "in_channels": latent.latent_channels,
            "out_channels": latent.latent_channels,
            "cond_channels": self.text.width,
            "qk_rms_norm": True,
        }
        structure_args = {**sizes(self.structure_flow), "resolution": side, "patch_size": self.structure_flow.patch}
        latent_args = {
            **sizes(self.latent_flow),
            "resolution": latent.resolution,
            "patch_size": 2,
            "io_block_channels": [self.latent_flow.io],
        }
        flows = {
            "structure": make("SparseStructureFlowModel", {**shared, **structure_args}, "structure_flow"),
            "latent": make("SLatFlowModel", {**shared, **latent_args}, "latent_flow"),
        }
        for part, stems in STEMS.items():
            write_stem(nets[part].encoder, folder / stems["encoder"])
            write_stem(nets[part].decoder, folder / stems["decoder"])
            write_stem(flows[part], folder / stems["flow"])

    def _manifest(
        self,
        folder: Path,
        structure: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        resolution: int,
        seed: int,
    ) -> Manifest:
        """What made the latents. There are no pictures of the solids, and nothing said of any is true of them."""
        hashes = {part: _sha256(folder / stems["encoder"]) for part, stems in STEMS.items()}
        channels, *sides = structure.shape
        return Manifest(
            image_encoder="",
            latent_encoder=hashes["latent"],
            structure_encoder=hashes["structure"],
            views=1,
            size=1,
            renderer=RENDERER,
            radius=0.0,
            fov=0.0,
            up="z",
            seed=seed,
            resolution=resolution,
            structure=(channels, sides[0], sides[1], sides[2]),
            mean=mean,
            std=std,
            condition="text",
            condition_encoder=files.sha256(folder / ENCODER),
            conditions=1,
        )

    def _write_latents(
        self,
        folder: Path,
        manifest: Manifest,
        bodies: Bodies,
        structures: list[Tensor],
        latents: list[Tensor],
        told: dict[str, Tensor],
    ) -> None:
        mean, std = (torch.tensor([values]) for values in (manifest.mean, manifest.std))
        shapes.begin(folder, manifest)
        shapes.write_empty(folder, told[""], manifest)
        names = [f"{row:06d}" for row in range(len(bodies))]
        for row, name in enumerate(names):
            tensors = {
                "coords": bodies.coords[row].to(torch.int16),
                "latent": (latents[row] - mean) / std,
                "structure": structures[row],
            }
            solid = bodies.solids[row]
            shapes.write(folder, name, tensors, manifest, _digest(repr(solid)), told[solid.text])
        voxels = shapes.close(folder, names, {})
        files.write_atomic(folder / "README.md", card(len(names), voxels, manifest))


def sizes(net: FlowNet) -> dict[str, int]:
    """As TRELLIS names them."""
    return {"model_channels": net.channels, "num_blocks": net.blocks, "num_heads": net.heads}


@torch.inference_mode()
def encoded(net: Autoencoder, bodies: Bodies, device: str) -> list[Tensor]:
    """The encoder's mean of every solid: [C, R, R, R] of a structure, [N, C] of latents."""
    encoder, found = net.encoder.to(device), []
    for row in range(len(bodies)):
        mean: Any = encoder(bodies.get(torch.tensor([row]))["x0"].to(device))[0]
        found.append((mean[0] if isinstance(mean, Tensor) else mean.feats).float().cpu())
    return found


def moments(latents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and std [C] over all voxels of [N, C] each: slat_normalization."""
    together = torch.cat(latents).double()
    return together.mean(0), together.std(0)


def write_text_encoder(folder: Path, size: TextNet) -> None:
    """CLIP's text tower with few channels and random weights, in which every word of a solid's text is a token."""
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging as quiet

    quiet.disable_progress_bar()
    config = CLIPTextConfig(
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
    )
    net: Any = CLIPTextModel(config)
    net.save_pretrained(folder)
    write_clip_tokenizer(folder, ("a", *SIZES, *KINDS))


def told_apart(encoder: TextEncoder) -> dict[str, Tensor]:
    """Every text of a solid, and the empty one, as float32 [1, 77, C]. Texts that are told apart too little are a
    UserError."""
    texts = ["", *(f"a {size} {kind}" for kind, size in conditions())]
    rows = encoder.encode(texts)
    flat = rows.flatten(1)
    apart = torch.cdist(flat, flat) / flat.norm(dim=1).mean()
    apart.fill_diagonal_(float("inf"))
    logger.info("the texts' encodings differ by %.2f of their norm at least", float(apart.min()))
    if not float(apart.min()) >= DISTINCT:
        raise UserError(
            f"text: two texts' encodings differ by {float(apart.min()):.2g} of their norm, {DISTINCT} is needed; "
            "choose another width, or another seed"
        )
    return {text: row[None] for text, row in zip(texts, rows, strict=True)}


def pipeline(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """pipeline.json, with one decoder, to meshes, and unguided samplers."""
    models = {
        STRUCTURE_DECODER: STEMS["structure"]["decoder"],
        STRUCTURE_FLOW: STEMS["structure"]["flow"],
        DECODERS["mesh"]: STEMS["latent"]["decoder"],
        LATENT_FLOW: STEMS["latent"]["flow"],
    }
    return {
        "name": "TrellisTextTo3DPipeline",
        "args": {
            "models": models,
            "sparse_structure_sampler": SAMPLER,
            "slat_sampler": SAMPLER,
            "slat_normalization": {"mean": list(mean), "std": list(std)},
            "text_cond_model": ENCODER,
        },
    }


def card(count: int, voxels: int, manifest: Manifest) -> str:
    """README.md of the latents."""
    told = [
        "# Procedural solids as TRELLIS latents",
        "",
        f"{count} solids, {voxels} full voxels of a {manifest.resolution}^3 grid; made by a stage `world` of fastgen.",
        "",
        "* There were no meshes and no pictures: the encoders saw signed distances and colours.",
        "* A solid's inner voxels are full as well, not only those of its surface.",
        f"* `latent` is normalised: mean {list(manifest.mean)}, std {list(manifest.std)}.",
    ]
    return "\n".join([*told, ""])


def _sha256(stem: Path) -> str:
    """Of a network's two files."""
    both = (stem.with_name(f"{stem.name}.{ending}") for ending in ("json", "safetensors"))
    return _digest("".join(map(files.sha256, both)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
