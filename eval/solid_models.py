"""Teacher and student of a world of solids, from the same noise: two TRELLIS text folders that share their decoders.

Paired: the structure stage's latents, and the voxels they fill, against the teacher's at 25 steps; the second stage's
latents on the very voxels that the teacher filled. Unpaired: from the text to a mesh through both stages, which
`eval.solids` judges. Every sample is a function of its row, whatever the batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from fastgen import cond as conditions
from fastgen import files, layout, noise
from fastgen.cond import Cond
from fastgen.data.solids import Solid
from fastgen.errors import UserError
from fastgen.eval.solids import Judge, Verdict, gap_closed, iou, summary
from fastgen.geometry.mesh import Mesh
from fastgen.samplers import few_step, flow_euler
from fastgen.samplers.flow_euler import FlowEuler
from fastgen.sparse import Voxels
from fastgen.student import SamplerSpec
from fastgen.teachers.trellis.conditions import TextEncoder
from fastgen.teachers.trellis.flows import TEXT, FlowDenoiser
from fastgen.teachers.trellis.folder import DECODERS, STRUCTURE_DECODER, TrellisFolder

logger = logging.getLogger("fastgen")
MANY = 25
BATCH = 25  # solids at a time: their meshes are decoded together
OFF, STRUCTURES, LATENTS = "1 - IoU", "RMSE of structures", "RMSE of latents"


@dataclass(frozen=True)
class Row:
    """A model and how it is sampled, in both stages alike.

    rescale_t  spacing of the student's steps; the teacher's is its folder's, as is its guidance
    renoise    fresh noise between the student's steps, in place of the published Euler step
    """

    of: Literal["teacher", "student"]
    steps: int
    rescale_t: float = 1.0
    renoise: bool = False

    @property
    def name(self) -> str:
        if self.of == "teacher" or self.steps == 1:
            return f"{self.of}@{self.steps}"
        return f"{self.of}@{self.steps} {'renoise' if self.renoise else 'euler'} r={self.rescale_t:g}"


TEACHERS = FAR, UNDISTILLED, _ = Row("teacher", MANY), Row("teacher", 1), Row("teacher", 2)
ONE = Row("student", 1)
TWO = tuple(Row("student", 2, 3.0, renoise) for renoise in (False, True))
ROWS = (*TEACHERS, ONE, *TWO)
PAIRED = (*TEACHERS, ONE)  # these at least


class Models:
    """Both folders' flows, the decoders that they share, and the text encoder, on a device.

    cfg_strength: w of the teacher at every time, in place of its folder's settings; None: those.
    """

    def __init__(
        self, teacher: TrellisFolder, student: TrellisFolder, *, cfg_strength: float | None = None, device: str = "cpu"
    ) -> None:
        refuse_strangers(teacher, student)
        self.folder, self.cfg_strength, self.device = teacher, cfg_strength, device
        parts = ("structure", "latent")
        folders = {"teacher": teacher, "student": student}
        self.flows: dict[tuple[str, str], FlowDenoiser] = {
            (of, part): folder.flow(part).to(device).eval() for of, folder in folders.items() for part in parts
        }
        self._structure: Any = teacher.network(STRUCTURE_DECODER, device=device)
        self._mesh: Any = teacher.network(DECODERS["mesh"], device=device)
        self._encoder = TextEncoder(teacher.encoder, device=device)
        self._told: dict[str, Tensor] = {}

    def conditions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{"text": [B, 77, C]}"""
        if new := sorted(set(texts) - self._told.keys()):
            self._told |= dict(zip(new, self._encoder.encode(new), strict=True))
        return {TEXT: torch.stack([self._told[text] for text in texts])}

    def settings(self, row: Row, part: str) -> FlowEuler:
        """How a stage of a row is sampled."""
        if row.of == "student":
            return FlowEuler(steps=row.steps, rescale_t=row.rescale_t)
        sampler = getattr(self.folder, part)
        made = flow_euler.from_pipeline(sampler.name, {**sampler.params, "steps": row.steps}, f"{self.folder.path}")
        if self.cfg_strength is not None:
            made = made.model_copy(update={"cfg_strength": self.cfg_strength, "cfg_interval": (0.0, 1.0)})
        return made

    def structures(self, row: Row, cond: Cond, rows: Tensor, seed: int) -> Tensor:
        """Latents of the first stage, [B, C, R, R, R], for the numbers `rows` int64 [B]."""
        return self._sampled(row, "structure", self.structure_noise(rows, seed), cond, rows, seed)

    def structure_noise(self, rows: Tensor, seed: int) -> Tensor:
        """[B, C, R, R, R]"""
        return noise.normal(seed, "solid/structure", rows.to(self.device), self.flows["teacher", "structure"].shape)

    def filled(self, structures: Tensor) -> Tensor:
        """Which voxels they fill, bool [B, S, S, S]."""
        return self._structure(structures)[:, 0] > 0

    def latents(self, row: Row, filled: Tensor, cond: Cond, rows: Tensor, seed: int) -> Voxels:
        """Latents of the second stage on these voxels, normalised; no sample may be without any."""
        return self._sampled(row, "latent", self.latent_noise(filled, rows, seed), cond, rows, seed)

    def latent_noise(self, filled: Tensor, rows: Tensor, seed: int) -> Voxels:
        """On these voxels, bool [B, S, S, S]."""
        coords = filled.nonzero().int()
        empty = torch.zeros(len(coords), *self.flows["teacher", "latent"].shape, device=self.device)
        return layout.normal_like(Voxels(empty, coords, len(rows)), seed, "solid/latent", rows.to(self.device))

    def meshes(self, latents: Voxels) -> list[Mesh]:
        mean, std = (torch.tensor([values], device=self.device) for values in (self.folder.mean, self.folder.std))
        return self._mesh.represent(self._mesh(latents.with_feats(latents.feats * std + mean)))

    def _sampled(self, row: Row, part: str, z: Any, cond: Cond, rows: Tensor, seed: int) -> Any:
        flow, settings = self.flows[row.of, part], self.settings(row, part)
        if not row.renoise:
            return flow_euler.sample(flow, z, settings, cond)
        spec = SamplerSpec(path=flow.path, times={row.steps: settings.times()}, renoise=True)
        fresh = partial(layout.normal_like, z, seed, f"solid/{part}/renoise", rows.to(self.device))
        return few_step.sample(flow, spec, z, row.steps, cond, renoise=fresh)


def refuse_strangers(teacher: TrellisFolder, student: TrellisFolder) -> None:
    """Folders that are told something else than texts, or whose latents mean different things, are a UserError."""
    for folder in (teacher, student):
        if folder.condition != TEXT:
            raise UserError(f"{folder.path}: solids are told by texts, and this folder takes an {folder.condition}")
    if (teacher.mean, teacher.std) != (student.mean, student.std):
        raise UserError(f"{student.path}: its latents are normalised otherwise than those of {teacher.path}")
    for role in (STRUCTURE_DECODER, DECODERS["mesh"]):
        one, other = ([files.sha256(file) for file in folder.files(role)] for folder in (teacher, student))
        if one != other:
            raise UserError(
                f"{student.path}: its {role} is another than that of {teacher.path}, so their latents cannot be "
                "compared; assemble the student from the teacher's folder"
            )


@dataclass
class Tally:
    """What was found, by the rows' names and in the order of the solids."""

    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    paired: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by measure first; of an RMSE its squares
    kept: dict[str, dict[int, Mesh]] = field(default_factory=dict)  # meshes for pictures, by the solid's number

    def add(self, measure: str, row: Row, values: Tensor) -> None:
        self.paired.setdefault(measure, {}).setdefault(row.name, []).extend(values.tolist())


@torch.inference_mode()
def compare(
    models: Models,
    wanted: Sequence[Solid],
    *,
    first: int,
    seed: int,
    judge: Judge,
    rows: Sequence[Row] = ROWS,
    keep: Sequence[int] = (),
) -> Tally:
    """Models on these solids, whose numbers in the noise are first, first + 1, ...

    rows: which are brought to meshes. keep: places in `wanted` of those whose meshes are kept.
    """
    tally = Tally()
    for places in torch.arange(len(wanted)).split(BATCH):
        asked, numbers = [wanted[i] for i in places.tolist()], first + places
        cond = models.conditions([solid.text for solid in asked])
        structures = {row: models.structures(row, cond, numbers, seed) for row in dict.fromkeys((*PAIRED, *rows))}
        filled = {row: models.filled(latents) for row, latents in structures.items()}
        for row in structures:
            tally.add(OFF, row, 1 - iou(filled[row], filled[FAR]))
            tally.add(STRUCTURES, row, layout.mean((structures[row] - structures[FAR]).square()))
        _pair_latents(tally, models, list(structures), filled[FAR], cond, numbers, seed)
        for row in rows:
            for place, solid, mesh in zip(
                places.tolist(), asked, _made(models, row, filled[row], cond, numbers, seed), strict=True
            ):
                tally.verdicts.setdefault(row.name, []).append(judge.verdict(mesh, (solid.kind, solid.size)))
                if place in keep and mesh is not None:
                    tally.kept.setdefault(row.name, {})[place] = mesh
        logger.info("%d of %d solids are judged", int(places[-1]) + 1, len(wanted))
    return tally


def _pair_latents(
    tally: Tally, models: Models, rows: Sequence[Row], filled: Tensor, cond: Cond, numbers: Tensor, seed: int
) -> None:
    """The second stage on the voxels of the teacher's structures; an empty one has nothing to compare."""
    some = filled.flatten(1).any(1).nonzero()[:, 0].cpu()
    if len(some):
        told = conditions.select(cond, some)
        latents = {row: models.latents(row, filled[some], told, numbers[some], seed) for row in rows}
        for row in rows:
            tally.add(LATENTS, row, layout.mean((latents[row] - latents[FAR]).square()))


def _made(models: Models, row: Row, filled: Tensor, cond: Cond, numbers: Tensor, seed: int) -> list[Mesh | None]:
    """The mesh of each solid from its voxels; None where there are none."""
    found: list[Mesh | None] = [None] * len(filled)
    some = filled.flatten(1).any(1).nonzero()[:, 0].cpu()
    if len(some):
        latents = models.latents(row, filled[some], conditions.select(cond, some), numbers[some], seed)
        for place, mesh in zip(some.tolist(), models.meshes(latents), strict=True):
            found[place] = mesh
    return found


def figures(tally: Tally, known: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """{"paired": {measure: {row: {"value", "gap_closed"}}}, "unpaired": {row: {..., "gap_closed"}}}.

    Paired, the teacher's distance to itself is the zero; 1 - IoU is a mean over solids, an RMSE the root of one.
    known: summaries of further rows, such as what can be reached at all; the teacher's, where the tally has none.
    """
    paired: dict[str, dict[str, dict[str, float | None]]] = {}
    for measure, rows in tally.paired.items():
        means = {name: fmean(values) for name, values in rows.items()}
        values = means if measure == OFF else {name: math.sqrt(value) for name, value in means.items()}
        worst = values[UNDISTILLED.name]
        paired[measure] = {
            name: {"value": value, "gap_closed": gap_closed(worst, value)} for name, value in values.items()
        }
    made = {name: summary(verdicts) for name, verdicts in tally.verdicts.items()}
    unpaired: dict[str, dict[str, Any]] = {name: dict(told) for name, told in (*known.items(), *made.items())}
    worst, best = (unpaired[row.name]["chamfer"] for row in (UNDISTILLED, FAR))
    for told in unpaired.values():
        told["gap_closed"] = gap_closed(worst, told["chamfer"], best)
    return {"paired": paired, "unpaired": unpaired}
