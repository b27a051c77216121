"""The stage that trains one of the two autoencoders of a world of solids, and measures what it gives back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator, model_validator

from fastgen import files
from fastgen.config import Model, explain
from fastgen.data.source import Source
from fastgen.errors import RunFailed
from fastgen.stages.config import Stage
from fastgen.stages.context import Context
from fastgen.stages.train import INCIDENTAL
from fastgen.teachers.trellis.models import make
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.loop import check as check_loop
from fastgen.trainers.engine.method import Method
from fastgen.trainers.shapes import measures
from fastgen.trainers.shapes.autoencoder import HALVES, Autoencoder
from fastgen.trainers.shapes.bodies import CHANNELS, Bodies
from fastgen.trainers.shapes.latent_vae import LatentVAE
from fastgen.trainers.shapes.structure_vae import StructureVAE

logger = logging.getLogger("fastgen")
LATENT_CHANNELS = 8
PREVIEWED = 8  # solids that a preview measures
Count = Annotated[int, Field(ge=1)]


class StructureNet(Model):
    """channels: of the encoder's levels, finest first; each but the last halves the grid. blocks: of each level."""

    channels: tuple[Count, ...] = Field(default=(16, 32, 64), min_length=1)
    blocks: int = Field(default=0, ge=0)
    middle: int = Field(default=2, ge=0)

    def build(self, resolution: int) -> Autoencoder:
        args = {"latent_channels": LATENT_CHANNELS, "num_res_blocks": self.blocks, "num_res_blocks_middle": self.middle}
        encoder, decoder = HALVES["structure"].values()
        there = {**args, "in_channels": 1, "channels": self.channels}
        back = {**args, "out_channels": 1, "channels": self.channels[::-1]}
        return Autoencoder(make(encoder, there, "net"), make(decoder, back, "net"), resolution)

    def refuse(self, resolution: int) -> None:
        if resolution % 2 ** (len(self.channels) - 1):
            raise ValueError(f"resolution={resolution} cannot be halved {len(self.channels) - 1} times (net.channels)")


class LatentNet(Model):
    """encoder, decoder: channels. The decoder's end in group norms of 32 groups at an eighth of its width."""

    encoder: int = Field(default=64, ge=6)
    decoder: int = Field(default=256, ge=256, multiple_of=256)
    blocks: int = Field(default=1, ge=0)
    heads: int = Field(default=4, ge=1)
    window: int = Field(default=8, ge=1)

    def build(self, resolution: int) -> Autoencoder:
        args = {
            "resolution": resolution,
            "latent_channels": LATENT_CHANNELS,
            "num_blocks": self.blocks,
            "num_heads": self.heads,
            "attn_mode": "swin",
            "window_size": self.window,
        }
        encoder, decoder = HALVES["latent"].values()
        there = {**args, "in_channels": CHANNELS, "model_channels": self.encoder}
        back = {**args, "model_channels": self.decoder, "representation_config": {"use_color": True}}
        return Autoencoder(make(encoder, there, "net.encoder"), make(decoder, back, "net.decoder"), resolution)

    def refuse(self, resolution: int) -> None:
        """Any resolution will do."""


NETS: dict[str, type[StructureNet] | type[LatentNet]] = {"structure": StructureNet, "latent": LatentNet}
METHODS: dict[str, type[StructureVAE] | type[LatentVAE]] = {"structure": StructureVAE, "latent": LatentVAE}
MEASURES: dict[str, Callable[[Any, Bodies], dict[str, Any]]] = {
    "structure": measures.structures,
    "latent": measures.meshes,
}


class ShapeVAE(Stage):
    """Trains the autoencoder of `part` on the solids of numbers 0 .. rows - 1, voxelised at `resolution`.

    held_out: how many solids, those behind the training's, it is measured on at the end.
    """

    stage: Literal["shape_vae"]
    part: Literal["structure", "latent"]
    resolution: int = Field(default=16, ge=4, le=64)
    rows: int = Field(default=512, ge=1)
    held_out: int = Field(default=50, ge=1)
    net: SerializeAsAny[Model] = Field(default={}, validate_default=True)
    method: SerializeAsAny[Method.Config] = Field(default={}, validate_default=True)
    loop: LoopConfig = Field(default_factory=LoopConfig)

    incidental: ClassVar = frozenset(INCIDENTAL)

    @field_validator("net", "method", mode="before")
    @classmethod
    def _of_the_part(cls, value: Any, info: ValidationInfo) -> Any:
        """`net` and `method` are those of the part; their mistakes keep their own one line."""
        part = info.data.get("part")
        if part is None or isinstance(value, Model):
            return value
        kind = NETS[part] if info.field_name == "net" else METHODS[part].Config
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            raise ValueError(explain(error, kind, value)) from error

    @model_validator(mode="after")
    def _fits(self) -> ShapeVAE:
        self.shape_of_net.refuse(self.resolution)
        return self

    @property
    def shape_of_net(self) -> StructureNet | LatentNet:
        assert isinstance(self.net, StructureNet | LatentNet)  # see _of_the_part
        return self.net

    def smoke(self) -> ShapeVAE:
        few = {"steps": 3, "batch": 1, "micro": None, "save_every": 3, "preview_every": 3, "log_every": 1}
        return self.model_copy(update={"rows": 4, "held_out": 2, "loop": self.loop.model_copy(update=few)})

    def check(self, run: Context) -> None:
        check_loop(self.loop, METHODS[self.part])

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        seed = run.config.seed
        data = Bodies(self.rows, self.resolution, self.part, seed=seed)
        torch.manual_seed(seed)
        net = self.shape_of_net.build(self.resolution)
        loop = Loop(
            METHODS[self.part](self.method, net),
            Source(data, seed),
            self.loop,
            folder,
            seed=seed,
            device=run.device,
            preview=Measured(self.part, self._held_out(seed, min(PREVIEWED, self.held_out))),
            interrupt=run.interrupt,
        )
        if loop.resume():
            logger.info("%s: resumed at step %d of %d", self.name, loop.step, self.loop.steps)
        else:
            loop.log.rewind(0)  # what an attempt wrote that was killed before its first checkpoint
        loop.run()
        self._refuse_diverged(loop)
        found: Autoencoder = loop.student.eval()
        facts = MEASURES[self.part](found, self._held_out(seed, self.held_out))
        logger.info("%s: %d solids that it has not seen: %s", self.name, self.held_out, in_words(facts))
        facts |= {"held_out": self.held_out, "rows": self.rows, "seed": seed}
        with files.atomic_folder(folder / "model") as temporary:
            found.write(temporary, self.part, facts)
        return {"output": "model", "facts": facts}

    def _held_out(self, seed: int, count: int) -> Bodies:
        return Bodies(count, self.resolution, self.part, seed=seed, first=self.rows)

    def _refuse_diverged(self, loop: Loop) -> None:
        """An autoencoder that ends on skipped updates, or with weights that are no numbers, is not written."""
        if loop.bad or not all(bool(p.isfinite().all()) for p in loop.student.parameters()):
            raise RunFailed(
                f"step {loop.step}: loss, gradient or weights are not finite, and no model was written{loop.kept()}; "
                f"lower loop.optim.lr, then --from {self.name}"
            )


class Measured:
    """What the autoencoder gives back of a few solids, to be logged with every preview."""

    def __init__(self, part: str, bodies: Bodies) -> None:
        self.part, self.bodies = part, bodies

    def __call__(self, loop: Loop) -> dict[str, float]:
        return numbers(MEASURES[self.part](loop.student.eval(), self.bodies))


def numbers(facts: dict[str, Any]) -> dict[str, float]:
    """The single numbers among what was measured, and the ends of the latents' std."""
    single = {key: value for key, value in facts.items() if isinstance(value, float)}
    return {**single, "std_least": min(facts["std"]), "std_most": max(facts["std"])}


def in_words(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in numbers(facts).items())
