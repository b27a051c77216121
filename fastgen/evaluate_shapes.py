"""`fastgen evaluate MESHES --reference MESHES`: a mesh against a mesh, or folders of them matched by their names.

Nothing is moved where the references lie as generators make them: in [-0.5, 0.5]^3, the longest side at least 0.5. Any
other reference takes its counterpart with it, both through the one map that fits the reference into that cube.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen import api, files
from fastgen.errors import UserError, suggestion
from fastgen.eval import meshes as measures
from fastgen.eval import metrics
from fastgen.eval.backends import Backend, metric_name
from fastgen.eval.extractors import Classifier, Extractor, PooledPixels, RandomConv
from fastgen.eval.inception import SIZE, InceptionExtractor
from fastgen.eval.metrics import Result
from fastgen.eval.tally import Reference, Tally, measure
from fastgen.geometry.cameras import orbit
from fastgen.geometry.export import z_up
from fastgen.geometry.mesh import Mesh, load
from fastgen.geometry.views import render

logger = logging.getLogger("fastgen")
ENDINGS = (".glb", ".obj", ".ply")
POINTS = 100_000  # their floor lies below half of the finest tau for any shape of the unit cube's size
VIEWS, SIDE = 8, 64  # once around, 20 degrees above the horizon; pixels, the most that the small extractors see
SMALLEST = 0.5  # longest side of a reference that is taken as it lies
REACH = 0.5 + 1e-3  # of such a reference: extraction may overshoot the cube
EXTRACTORS = ("random-conv", "pooled-pixels", "inception")


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is to be measured. extractor (random-conv), fid and weights: of the views, which only folders have."""

    meshes: str
    reference: str
    seed: int = 0
    points: int = POINTS
    extractor: str | None = None
    fid: str | None = None
    weights: Path | None = None
    device: str = "auto"


class Pair(NamedTuple):
    """A mesh file, its reference, and the name they share (for two files: the first one's)."""

    name: str
    mesh: Path
    reference: Path


@dataclass(frozen=True)
class Report:
    """What is told of all, and the results of each pair by its name."""

    results: list[Result]
    shapes: dict[str, list[Result]]

    def to_dict(self) -> dict[str, Any]:
        shapes = [{"name": name, "results": [row.to_dict() for row in rows]} for name, rows in self.shapes.items()]
        return {"results": [row.to_dict() for row in self.results], "shapes": shapes}


def holds_meshes(path: str | None) -> bool:
    """Whether this names a mesh file (it need not be there), or a folder in which there is one."""
    if path is None:
        return False
    place = Path(path).expanduser()
    if place.is_dir():
        return bool(_files(place))
    return place.suffix.lower() in ENDINGS


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS and file.is_file())


def evaluate(ask: Ask) -> Report:
    """Distances, normal consistency and soundness; of folders their means, and distances between views.

    Floors: of a distance that of two drawings of the reference; of soundness the reference's own; of views that of two
    halves of the references' views (so at half the number).
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        report = _evaluate(ask)
    for message in dict.fromkeys(str(warning.message) for warning in told):
        logger.warning("%s", message)
    return report


def _evaluate(ask: Ask) -> Report:
    one = not Path(ask.meshes).expanduser().is_dir()
    if one:
        for option, value in {"extractor": ask.extractor, "fid": ask.fid, "weights": ask.weights}.items():
            if value is not None:
                raise UserError(
                    f"--{option} {value}: for the views of folders of meshes; leave it out for a single one"
                )
    device = api.pick_device(ask.device)
    found = pairs(ask.meshes, ask.reference)
    views = None if one else _Views(_extractor(ask), device)
    shapes: dict[str, list[Result]] = {}
    remarks: dict[str, str] = {}
    for pair in found:
        mesh, reference = framed(load(pair.mesh), load(pair.reference), pair.name)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            shapes[pair.name] = compared(mesh, reference, ask, pair)
        for warning in told:
            remarks[pair.name] = str(warning.message)
        logger.info("%s: %s", pair.name, ", ".join(f"{row.metric} {row.value:.4g}" for row in shapes[pair.name]))
        if views is not None:
            views.add(mesh, reference)
    for name, message in list(remarks.items())[:1]:
        logger.warning("%d of %d shapes, %s first: %s", len(remarks), len(found), name, message)
    if views is None:
        return Report(shapes[found[0].name], shapes)
    return Report([*over_all(list(shapes.values())), *views.results(_sha256(found))], shapes)


def pairs(meshes: str, reference: str) -> list[Pair]:
    """Two files, or the files of two folders that have one name but for the ending."""
    given, truth = Path(meshes).expanduser(), Path(reference).expanduser()
    for path, option in ((given, ""), (truth, "--reference ")):
        if not path.exists():
            raise UserError(f"{option}{path}: no such file or folder")
        if not holds_meshes(str(path)):
            raise UserError(f"{option}{path}: no mesh there; give a {', '.join(ENDINGS)} file, or a folder of them")
    if given.is_dir() != truth.is_dir():
        raise UserError(f"{given} --reference {truth}: one is a folder and one a file; give two of a kind")
    if not given.is_dir():
        return [Pair(given.stem, given, truth)]
    ours, theirs = _by_stem(given), _by_stem(truth)
    both = [Pair(name, file, theirs[name]) for name, file in ours.items() if name in theirs]
    if not both:
        told = f"{_some(ours)} here, {_some(theirs)} there"
        raise UserError(f"{given} --reference {truth}: no name is in both ({told}); name them alike but for the ending")
    for path, left in ((given, ours.keys() - theirs.keys()), (truth, theirs.keys() - ours.keys())):
        if left:
            logger.warning("%s: %d without a counterpart are left out: %s", path, len(left), _some(sorted(left)))
    return both


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in _files(folder):
        if file.stem in found:
            raise UserError(f"{folder}: {found[file.stem].name} and {file.name} have one name; keep one of them")
        found[file.stem] = file
    return found


def _some(names: Any) -> str:
    first = list(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")


def framed(mesh: Mesh, reference: Mesh, name: str) -> tuple[Mesh, Mesh]:
    """Both in the frame of the measurement: as they lie, or moved and scaled by what the reference needs."""
    low, high = reference.vertices.amin(0), reference.vertices.amax(0)
    side = float((high - low).max())
    if side == 0:
        raise UserError(f"{name}: all vertices of its reference lie in one point; give one with an extent")
    if side >= SMALLEST and float(reference.vertices.abs().max()) <= REACH:
        return mesh, reference
    logger.info("%s: moved and scaled with its reference, whose longest side is %.4g", name, side)
    centre = (low + high) / 2

    def moved(one: Mesh) -> Mesh:
        return replace(one, vertices=(one.vertices - centre) / side)

    return moved(mesh), moved(reference)


def compared(mesh: Mesh, reference: Mesh, ask: Ask, pair: Pair) -> list[Result]:
    """Every metric of one pair: distances between drawings of both, then the soundness of both."""
    truth = files.sha256(pair.reference)
    rows = measures.compare(mesh, reference, points=ask.points, seed=ask.seed)
    sound, best = measures.soundness(mesh), measures.soundness(reference)
    counts = {
        "watertight": (float(sound.watertight), float(best.watertight)),
        "Euler number": (float(sound.euler), float(best.euler)),
        "components": (float(sound.parts), float(best.parts)),
    }
    facts = [_count(metric, value, floor, 1) for metric, (value, floor) in counts.items()]
    return [replace(row, reference_sha256=truth) for row in (*rows.values(), *facts)]


def _count(metric: str, value: float, floor: float | None, n: int) -> Result:
    """A result that knows neither points nor an extractor."""
    none: dict[str, Any] = {"extractor": None, "extractor_sha256": None, "seed": None}
    return Result(metric=metric, value=value, floor=floor, n_gen=n, n_ref=n, **none)


def over_all(shapes: Sequence[Sequence[Result]]) -> list[Result]:
    """Means over the shapes, of values and of floors; of Euler numbers and components the share that is right."""
    rows = []
    for of_metric in zip(*shapes, strict=True):
        first = of_metric[0]
        value, floor = (statistics.fmean(getattr(row, name) for row in of_metric) for name in ("value", "floor"))
        if first.metric in ("Euler number", "components"):
            right = statistics.fmean(row.value == row.floor for row in of_metric)
            rows.append(_count(f"same {first.metric}", right, None, len(of_metric)))
        elif first.metric == "watertight":
            rows.append(_count("watertight", value, floor, len(of_metric)))
        else:
            rows.append(replace(first, value=value, floor=floor, reference_sha256=None))
    return rows


def _extractor(ask: Ask) -> Extractor:
    """Where views are compared. What would have to be trained on the images first is refused: views have no labels."""
    name = ask.extractor or ("inception" if ask.fid or ask.weights else "random-conv")
    if name != "inception" and (ask.fid or ask.weights):
        raise UserError(f"--extractor {name}: --fid and --weights are about the Inception network; leave one out")
    if name == "inception":
        return InceptionExtractor.load(ask.weights, ask.fid or "tf")
    if name.endswith(".safetensors"):
        found = Classifier.load(name)
        if found.channels != 3:
            raise UserError(f"--extractor {name}: sees {found.channels} channel(s), views have 3")
        return found
    if name not in EXTRACTORS:
        raise UserError(f"--extractor {name}: views are seen by none of that name; {suggestion(name, EXTRACTORS)}")
    return RandomConv(3) if name == "random-conv" else PooledPixels((3, SIDE, SIDE))


class _Views:
    """Both sides' views as an extractor sees them."""

    def __init__(self, extractor: Extractor, device: str) -> None:
        self.extractor, self.device = extractor, device
        self.given, self.truth = Tally(extractor), Tally(extractor)

    def add(self, mesh: Mesh, reference: Mesh) -> None:
        side = SIZE if isinstance(self.extractor, InceptionExtractor) else SIDE
        for tally, one in ((self.given, mesh), (self.truth, reference)):
            tally.update(pictures(one.to(self.device), side))

    def results(self, sha256: str) -> list[Result]:
        """The Frechet and the kernel distance. Whatever the network, the first is no FID: these are no photographs."""
        backend = Backend("own", self.extractor, metrics.frechet)
        rows = measure(self.given, Reference.of_images(self.truth), backend, None)
        called = metric_name("FD", self.extractor)
        name = f"FD-{self.extractor.name}" if called == "FID" else called
        kept = {called: name, "KID": f"KD{name.removeprefix('FD')}"}
        return [replace(row, metric=kept[row.metric], reference_sha256=sha256) for row in rows if row.metric in kept]


def pictures(mesh: Mesh, side: int) -> Tensor:
    """The fixed views of a mesh whose y points up, as files have it: [VIEWS, 3, side, side] in [-1, 1], on white."""
    upright = replace(mesh, vertices=z_up(mesh.vertices))
    seen = [render(upright, camera).picture("shaded") for camera in orbit(VIEWS, size=side)]
    return torch.stack(seen).permute(0, 3, 1, 2) * 2 - 1


def _sha256(found: Sequence[Pair]) -> str:
    """Of the references that were used, by name."""
    told = "".join(f"{pair.name} {files.sha256(pair.reference)}\n" for pair in found)
    return hashlib.sha256(told.encode()).hexdigest()
