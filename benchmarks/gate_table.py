"""The gate's checks for everything that could stand at a student's place.

    python benchmarks/gate_table.py RUN [--n 5000]

RUN is a finished quickstart. Rows: its student at every step count, its teacher at 1 and 25 steps, held-out images, and
the fakes. The bounds in `eval/gate.py` were set on this table once and are frozen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastgen.api import open_teacher
from fastgen.data.digits import Digits
from fastgen.eval import gate
from fastgen.eval.fakes import FAKES
from fastgen.eval.gate import Check, Judge
from fastgen.eval.protocol import MANY, classifier_for, whole
from fastgen.samplers.draw import draw
from fastgen.student import Student


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--n", type=int, default=5000)
    options = parser.parse_args()
    n, seed = options.n, 0
    student, teacher = Student.load(options.run / "distil/model"), open_teacher(options.run / "teacher/model")
    train = Digits("train")
    images, labels = whole(train).values()
    held, held_labels = whole(Digits("held_out")).values()
    judge = Judge(classifier_for(train), images, held)
    rows = torch.arange(n)
    asked, null = {"label": rows % 10}, {"label": torch.full((n,), 10)}

    def pair(model: object, steps: int, **options: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images with labels, without, and the labels asked for."""
        made = [draw(model, rows, seed=seed, steps=steps, cond=cond, **options) for cond in (asked, null)]  # type: ignore[arg-type]
        return made[0], made[1], asked["label"]

    table = {f"student@{k}": pair(student, k) for k in sorted(student.sampler.times)}
    table |= {"teacher@1": pair(teacher, 1, solver="euler"), f"teacher@{MANY}": pair(teacher, MANY)}
    table["held-out"] = (held, held, held_labels)
    for name, (fake, _) in FAKES.items():
        made, own = fake(images, labels, n, seed)
        table[name] = (made, made, own)
    many, one = (tuple(judge.see(x) for x in table[name][:2]) for name in (f"teacher@{MANY}", "teacher@1"))
    print("| row | FD | precision | " + " | ".join(gate.BOUNDS) + " |")
    print("|---|" + "---|" * (2 + len(gate.BOUNDS)))
    print("| bound | | | " + " | ".join(f"{'>=' if least else '<='} {b}" for b, least in gate.BOUNDS.values()) + " |")
    for name, (labelled, unlabelled, own) in table.items():
        seen, free = judge.see(labelled), judge.see(unlabelled)
        checks = gate.common_checks(judge, seen, many[0], one[0], deterministic=len(seen.images) == n and "@" in name)
        checks |= gate.shares_check(free, many[1], 10)
        agreement = gate.metrics.label_agreement(own, seen.found)
        reference = gate.metrics.label_agreement(asked["label"], many[0].found)
        checks["label_agreement"] = Check.of("label_agreement", agreement - reference)
        cells = [
            f"{checks[key].value:.3f}{'' if checks[key].passed else ' FAILS'}" if key in checks else "-"
            for key in gate.BOUNDS
        ]
        fd, precision = seen.figures["fd"], seen.figures["precision"]
        print(f"| {name} | {fd:.2f} | {precision:.3f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
