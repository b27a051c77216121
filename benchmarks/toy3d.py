"""Few-step students of a toy 3-D world's teacher: three seeds, what each loss is worth, and the published setting.

    fastgen distill mdt/toy3d out=RUN
    python benchmarks/toy3d.py RUN [OUT [key=value ...]] [--seeds 0 1 2] [--rows ROW ...]

The students' stages of RUN's own config are run again in OUT/ROW-SEED on RUN's teacher, with the row's overrides and
then those given; what is finished there is not run again, what was begun goes on. Prints two tables, of medians over
the seeds, each number's own. Rows with a bound (see BOUND) have `!` behind a gap that is closed by less.

    vm          as the config has it: velocity matching alone, without guidance
    vm+vd       with velocity distillation at a weight of 0.1, for the few steps that it stays stable
    w=1, w=3    guidance w of the velocity that is matched, and of the teacher they are compared with
    published   the released defaults (w = 40 and 100, d_norm, the released times) and rates, for as many steps
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fastgen.config import override, read_yaml
from fastgen.errors import UserError
from fastgen.eval.solid_models import LATENTS, OFF, ONE, STRUCTURES, UNDISTILLED
from fastgen.files import make_folder, read_json, write_atomic
from fastgen.stages.config import REFERENCES, load_run
from fastgen.stages.context import Context
from fastgen.stages.evaluate_solids import FIGURES
from fastgen.stages.machine import execute
from fastgen.stages.report import hardware, versions

STUDENTS = ("structure-student", "latent-student")
STAGES = (*STUDENTS, "student", "evaluate")
RATES = dict(zip(STUDENTS, ("4.0e-8", "1.0e-8"), strict=True))
STABLE = dict(zip(STUDENTS, (600, 800), strict=True))  # steps with velocity distillation
BOUND = 0.5


def each(line: str) -> list[str]:
    """An override of both students."""
    return [f"stages.{name}.{line}" for name in STUDENTS]


def guided(w: float) -> list[str]:
    return [*each(f"method.cfg_vm={w}"), f"stages.evaluate.cfg_strength={w}"]


ROWS: dict[str, list[str]] = {
    "vm": [],
    "vm+vd": [*each("method.lambda_vd=0.1"), *(f"stages.{name}.loop.steps={n}" for name, n in STABLE.items())],
    **{f"w={w}": guided(w) for w in (1, 3)},
    "published": [
        *each("method={name: mdt}"),
        *(f"stages.{name}.loop.optim={{lr: {rate}}}" for name, rate in RATES.items()),
        *each("loop.schedule={}"),
        *each("loop.clip={most: 1.0, percentile: 95, window: 1000}"),
        *each("loop.ema=[]"),
    ],
}
WITHOUT_BOUND = ("vm+vd", "published")
Found = dict[str, list[dict[str, Any]]]  # figures by row, one for each seed


def students_of(teacher: Path) -> dict[str, Any]:
    """The config of a finished run with its students' stages alone, which read what the run has made by its paths."""
    tree = read_yaml(teacher / "config.yaml")
    run, stages = load_run(teacher / "config.yaml", [])
    made = Context(run, teacher, "cpu", names=tuple(stage.name for stage in stages))
    if missing := set(STAGES) - set(made.names):
        raise UserError(f"{teacher}: no stage {', '.join(sorted(missing))}; give a run of mdt/toy3d")
    kept = [copy.deepcopy(stage) for stage in tree["stages"] if stage["name"] in STAGES]
    for stage in kept:
        for key in REFERENCES:
            if stage.get(key) in made.names and stage[key] not in STAGES:
                stage[key] = str(Path(str(made.artefact(stage[key]))).resolve())
    return {**tree, "stages": kept}


def evaluated(tree: dict[str, Any], out: Path, row: str, seed: int, more: Sequence[str]) -> dict[str, Any]:
    """The figures of one row's student, made if they are not there."""
    folder = out / f"{row}-{seed}"
    changed = override(tree, [f"out={folder}", f"seed={seed}", *ROWS[row], *more])
    stage = next(stage for stage in changed["stages"] if stage["name"] == "evaluate")
    if baseline := baseline_of(out, folder, stage):
        stage["baseline"] = str(baseline)
    config = make_folder(out) / f"{row}-{seed}.yaml"
    write_atomic(config, yaml.safe_dump(changed, sort_keys=False))
    run, stages = load_run(config, [])
    execute(run, stages, Context(run, folder, "cpu"), resume=(folder / "config.yaml").exists())
    return read_json(folder / "evaluate" / FIGURES)


def baseline_of(out: Path, own: Path, stage: dict[str, Any]) -> Path | None:
    """A finished evaluation against the same teacher, sampled alike: its rows of the teacher hold for this one too."""
    for file in sorted(out.glob(f"*/evaluate/{FIGURES}")):
        settings = read_json(file)["settings"]
        same = all(settings[key] == stage.get(key, settings[key]) for key in ("n", "first", "seed", "points"))
        if same and settings["cfg_strength"] == stage.get("cfg_strength") and own not in file.parents:
            return file.parent.resolve()
    return None


def middle(reports: Sequence[dict[str, Any]], *keys: str) -> float:
    """The median over seeds of one number; NaN where it has no meaning."""
    found = []
    for report in reports:
        value: Any = report
        for key in keys:
            value = value[key]
        found.append(value)
    return math.nan if None in found else statistics.median(found)


def share(value: float, bounded: bool) -> str:
    return "" if math.isnan(value) else f"{100 * value:.0f} %{' !' if bounded and value < BOUND else ''}"


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def named(
    found: dict[str, list[dict[str, Any]]], names: Callable[[dict[str, Any]], Sequence[str]]
) -> Iterator[tuple[str, str, str]]:
    """(row, model, title) of a table: what does not hang on the student stands there once for each w of its teacher."""
    seen: set[tuple[str, float | None]] = set()
    for row, reports in found.items():
        w = reports[0]["settings"]["cfg_strength"]
        for name in names(reports[0]):
            own = name.startswith("teacher") and w is not None
            key = (name, w if own else None)
            if name.startswith("student"):
                yield row, name, f"{row}: {name}"
            elif key not in seen:
                seen.add(key)
                yield row, name, f"{name}, w = {w:g}" if own else name


def bounded(row: str, name: str) -> bool:
    return row not in WITHOUT_BOUND and name.startswith("student")


def paired(found: Found) -> list[str]:
    """One step from the same noise, against the teacher at 25 steps."""
    measures = (OFF, STRUCTURES, LATENTS)
    rows = [line(["same noise, one step", *(cell for name in measures for cell in (name, "gap closed"))])]
    rows.append("|---" * (1 + 2 * len(measures)) + "|")
    for row, name, title in named(found, lambda report: (UNDISTILLED.name, ONE.name)):
        cells = []
        for measure in measures:
            value, gap = (middle(found[row], "paired", measure, name, key) for key in ("value", "gap_closed"))
            cells += [f"{value:.4f}", share(gap, bounded(row, name))]
        rows.append(line([title, *cells]))
    return rows


def unpaired(found: Found) -> list[str]:
    """From a text to a mesh."""
    rows = [line(["text to mesh", "Chamfer", "gap closed", "kind and size", "kind", "empty"]), "|---" * 6 + "|"]
    for row, name, title in named(found, lambda report: list(report["unpaired"])):
        told = partial(middle, found[row], "unpaired", name)
        cells = [f"{told('chamfer'):.4f}", share(told("gap_closed"), bounded(row, name))]
        cells += [f"{told('kind_and_size'):.3f}", f"{told('kind'):.3f}", f"{told('empty'):g}"]
        rows.append(line([title, *cells]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/toy3d-table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("more", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if "=" in options.out.name:
        parser.error(f"{options.out}: overrides stand behind OUT")
    tree = students_of(options.teacher)
    found: Found = {row: [] for row in options.rows}
    for seed in options.seeds:  # a seed of every row before the next seed: what is there first is a whole table
        for row, reports in found.items():
            reports.append(evaluated(tree, options.out, row, seed, options.more))
    print(
        f"{len(options.seeds)} seeds, {found[options.rows[0]][0]['settings']['n']} solids; {hardware()}, {versions()}"
    )
    for table in (paired(found), unpaired(found)):
        print("\n" + "\n".join(table))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"toy3d.py: {error}") from None
