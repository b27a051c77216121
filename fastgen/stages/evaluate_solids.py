"""The stage that measures few-step flows of a world of solids against the 25-step teacher: see `eval.solid_models`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from fastgen import files, images
from fastgen.data import solids as made
from fastgen.data.solids import Solid, solids
from fastgen.errors import UserError
from fastgen.eval.solid_models import FAR, OFF, ROWS, UNDISTILLED, Models, Tally, compare, figures
from fastgen.eval.solids import Judge, has_surface, iou, summary
from fastgen.geometry.mesh import Mesh
from fastgen.geometry.views import save_gif, turntable
from fastgen.stages.config import Stage
from fastgen.stages.context import Context
from fastgen.teachers.trellis import PARTS, recognises
from fastgen.teachers.trellis.folder import DECODERS, STRUCTURE_DECODER, TrellisFolder
from fastgen.trainers.shapes.bodies import CHANNELS, Bodies

logger = logging.getLogger("fastgen")
HELD_OUT = 1_000_000  # the first number of a solid that no training set reaches
RESOLUTION = 64  # of the true meshes: the mesh decoders'
SIDE = 96  # pixels of a turntable
TRUE, REBUILT = "true solids", "autoencoders"
ENCODERS = {"SparseStructureEncoder": "structure", "SLatEncoder": "latent"}
FIGURES = "evaluate.json"
NEEDED = {FAR.name, UNDISTILLED.name}  # of a baseline: gaps are counted between these


class EvaluateSolids(Stage):
    """`student` against `teacher`, two TRELLIS text folders, on solids that no training saw.

    cfg_strength: w of the teacher at every time, as a student was taught it; null: as its folder says. The student is
    judged at one step and at two, times 1 and 0.75, by both samplers, whatever its own folder asks for. baseline: the
    folder of a finished evaluation by the same teacher and settings, whose teacher's rows are taken over.
    """

    stage: Literal["evaluate_solids"]
    teacher: str
    student: str
    baseline: str | None = None
    n: int = Field(default=200, ge=1)
    first: int = Field(default=HELD_OUT, ge=0, le=10**12)
    seed: int = Field(default=0, ge=0, le=2**32 - 1)  # of solids and noise; the run's is the training's
    cfg_strength: float | None = Field(default=None, ge=0)
    points: int = Field(default=4000, ge=100)
    frames: int = Field(default=24, ge=2)  # of the turntables

    incidental: ClassVar = frozenset({"baseline", "frames"})

    def settings(self) -> tuple[str, ...]:
        return ()

    def smoke(self) -> EvaluateSolids:
        return self.model_copy(update={"n": 2, "points": 200, "frames": 2})

    def check(self, run: Context) -> None:
        for key in ("teacher", "student"):
            reference = getattr(self, key)
            if reference not in run.names and not recognises(run.path(reference)):
                raise UserError(
                    f"stage {self.name}: {key}={reference} is no TRELLIS folder; give one that a stage assembles"
                )
        if self.teacher not in run.names:
            self._refuse_student(TrellisFolder.read(run.path(self.teacher)))
        if self.baseline is not None and self.baseline not in run.names:
            self._read_baseline(run)

    def work(self, run: Context, folder: Path) -> dict[str, Any]:
        teacher, student = (TrellisFolder.read(run.path(getattr(self, key))) for key in ("teacher", "student"))
        self._refuse_student(teacher)
        models = Models(teacher, student, cfg_strength=self.cfg_strength, device=run.device)
        wanted = solids(torch.arange(self.first, self.first + self.n), seed=self.seed)
        judge, shown = Judge(points=self.points), one_of_each_kind(wanted)
        told = {key: getattr(self, key) for key in ("n", "first", "seed", "cfg_strength", "points")}
        told["teacher"] = {part: teacher.sha256(part) for part in PARTS}
        known = self._known(run, told)
        if not known:
            known = floors(teacher, self.n, judge, first=self.first, seed=self.seed)
        rows = [row for row in ROWS if row.name not in known]
        tally = compare(models, wanted, first=self.first, seed=self.seed, judge=judge, rows=rows, keep=shown)
        report = {"settings": told, **figures(tally, known)}
        for line in table(report):
            logger.info("%s", line)
        report["pictures"] = write_pictures(folder, wanted, shown, tally, self.frames)
        files.write_json(folder / FIGURES, report)
        return {"output": FIGURES, "figures": report}

    def _known(self, run: Context, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
        """The rows of the baseline that have nothing to do with its student; other settings there are a UserError."""
        if self.baseline is None:
            return {}
        found = self._read_baseline(run)
        for key, value in settings.items():
            if found["settings"].get(key) != value:
                theirs = found["settings"].get(key)
                raise UserError(f"stage {self.name}: baseline={self.baseline} has {key}={theirs}, here it is {value}")
        return {name: told for name, told in found["unpaired"].items() if not name.startswith("student")}

    def _refuse_student(self, teacher: TrellisFolder) -> None:
        if teacher.student is not None:
            raise UserError(
                f"stage {self.name}: teacher={self.teacher} is a student's folder, and its 25 steps are no standard; "
                "give the folder that it was distilled from"
            )

    def _read_baseline(self, run: Context) -> dict[str, Any]:
        """The figures of the folder `baseline`; what is no evaluation of solids is a UserError."""
        assert self.baseline is not None
        path = run.path(self.baseline)
        found = files.peek_json(path / FIGURES)
        rows = found.get("unpaired")
        if not isinstance(found.get("settings"), dict) or not isinstance(rows, dict) or not rows.keys() >= NEEDED:
            raise UserError(
                f"stage {self.name}: baseline={self.baseline}: no finished evaluation of solids; give the folder of one"
            )
        return found


def one_of_each_kind(wanted: Sequence[Solid]) -> list[int]:
    """Where the first solid of each kind stands, in the order of the kinds."""
    kinds = [solid.kind for solid in wanted]
    return [kinds.index(kind) for kind in made.KINDS if kind in kinds]


@torch.inference_mode()
def floors(teacher: TrellisFolder, n: int, judge: Judge, *, first: int, seed: int) -> dict[str, dict[str, float]]:
    """What no flow can do better: the true solids, and these through the autoencoders, where the encoders are there."""
    wanted = solids(torch.arange(first, first + n), seed=seed)
    asked = [(solid.kind, solid.size) for solid in wanted]
    true = [judge.verdict(made.mesh(solid, RESOLUTION), told) for solid, told in zip(wanted, asked, strict=True)]
    encoders = find_encoders(teacher)
    if encoders is None:
        logger.info("%s: no encoders of solids there, so no row of what the autoencoders make of them", teacher.path)
        return {TRUE: summary(true)}
    structure, decoder = (cast(Any, teacher.network(role)) for role in (STRUCTURE_DECODER, DECODERS["mesh"]))
    shown = {part: Bodies(n, decoder.args.resolution, part, seed=seed, first=first) for part in PARTS}
    rebuilt, off = [], []
    for place, told in enumerate(asked):
        filled, voxels = (cast(Any, shown[part].get(torch.tensor([place]))["x0"]) for part in PARTS)
        off.append(1 - iou(structure(encoders["structure"](filled)[0]) > 0, filled > 0))
        rebuilt.append(judge.verdict(decoder.represent(decoder(encoders["latent"](voxels)[0]))[0], told))
    return {TRUE: summary(true), REBUILT: {**summary(rebuilt), OFF: float(torch.cat(off).mean())}}


def find_encoders(folder: TrellisFolder) -> dict[str, Any] | None:
    """The networks that made the latents of solids, by part; None where they do not lie in the folder.

    No pipeline names its encoders: they are known by their class, and by what they are shown.
    """
    found: dict[str, Any] = {}
    for file in sorted((folder.path / "ckpts").glob("*.json")):
        part = ENCODERS.get(files.peek_json(file).get("name", ""))
        if part is not None:
            found[part] = replace(folder, stems={part: f"ckpts/{file.stem}"}).network(part)
    shown = {"structure": 1, "latent": CHANNELS}
    fit = {part: net for part, net in found.items() if net.args.in_channels == shown[part]}
    return fit if len(fit) == len(shown) else None


def table(report: dict[str, Any]) -> list[str]:
    """The figures, for reading."""
    measures = list(report["paired"])
    lines = ["from the same noise, against the teacher at 25 steps: value, gap closed"]
    lines.append(" " * 24 + "".join(f"{measure:>23}" for measure in measures))
    for name in report["paired"][OFF]:
        cells = (report["paired"][measure][name] for measure in measures)
        lines.append(f"{name:24}" + "".join(f"{one['value']:14.4f}{_share(one['gap_closed'])}" for one in cells))
    lines.append("from a text to a mesh: distance to the solid, gap closed, kind and size, kind, empty")
    for name, told in report["unpaired"].items():
        shares = f"{told['kind_and_size']:9.3f}{told['kind']:8.3f}{told['empty']:6d}"
        more = f"   {OFF} {told[OFF]:.4f}" if OFF in told else ""
        lines.append(f"{name:24}{told['chamfer']:9.4f}{_share(told['gap_closed'])}{shares}{more}")
    return lines


def _share(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f" {value:8.1%}"


def write_pictures(
    folder: Path, wanted: Sequence[Solid], shown: Sequence[int], tally: Tally, frames: int
) -> dict[str, list[str]]:
    """`solids.gif` and its first picture `solids.png`; returns what columns and rows are."""
    rows: dict[str, list[Mesh | None]] = {TRUE: [made.mesh(wanted[place], RESOLUTION) for place in shown]}
    for name, meshes in tally.kept.items():
        rows[name] = [meshes.get(place) for place in shown]
    pictures = torch.cat([torch.cat([turned(mesh, frames) for mesh in meshes], 2) for meshes in rows.values()], 1)
    save_gif(folder / "solids.gif", pictures)
    images.save_png(folder / "solids.png", pictures[0].movedim(-1, 0).float() / 127.5 - 1)
    return {"columns": [wanted[place].text for place in shown], "rows": list(rows)}


def turned(mesh: Mesh | None, frames: int) -> Tensor:
    """Once around a mesh, uint8 [frames, SIDE, SIDE, 3]; white where there is nothing to be seen."""
    if mesh is None or not has_surface(mesh):
        return torch.full((frames, SIDE, SIDE, 3), 255, dtype=torch.uint8)
    return turntable(mesh.to("cpu"), frames=frames, size=SIDE)
