"""SD 1.5 at 512 px and SDXL at 1024 px, full size, random weights, on one CUDA GPU: the tables of docs/benchmarks.md.

    python benchmarks/h200.py --out runs/h200 [--seconds 480]

A teacher of 25 guided steps (its network sees a batch of two) against students of 1, 2 and 4 steps. The first part,
eager and regional compilation end to end, is meant to end within eight minutes; CUDA graphs, the whole grid and the
attention kernels follow. Rows go to OUT/rows.jsonl as they are measured and OUT/table.md is written anew after each;
begun again with the same OUT, parts that are whole are left out. After --seconds no further row is begun.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout alone will do

import torch

from fastgen.bench import Book, Options, run
from fastgen.eval.rows import Row, markdown
from fastgen.files import write_atomic

NAMES = ("sd15", "sdxl")
GUIDANCE = 7.5
FIRST = ("bf16", "bf16+compile-regional")
GRAPHS = ("bf16+cuda-graph", "bf16+reduce-overhead", "bf16+compile-full")
KERNELS = ("bf16+sdpa-flash", "bf16+sdpa-cudnn", "bf16+sdpa-efficient", "bf16+xformers")
PLAIN = ("eager", "tf32", "fp16", "bf16+channels_last", "bf16+channels_last+compile-regional")


def parts() -> Iterator[Options]:
    """In the order of their worth: what a short loan of a machine must bring comes first."""
    for name in NAMES:
        base = Options(random_weights=name, vs=name, guidance=GUIDANCE, device="cuda", limit=10.0)
        yield replace(base, variants=FIRST, scopes=("e2e",), steps=(1,))
    for variants in (GRAPHS[:1], FIRST, GRAPHS[1:], KERNELS, PLAIN):
        for name in NAMES:
            base = Options(random_weights=name, vs=name, guidance=GUIDANCE, device="cuda", limit=10.0)
            scopes = ("net",) if variants is KERNELS else ("e2e", "bare", "net")
            yield replace(base, variants=variants, scopes=scopes, steps=(1,) if variants is KERNELS else (1, 2, 4))
    for name in NAMES:
        base = Options(random_weights=name, device="cuda", limit=10.0)
        yield replace(base, variants=FIRST, scopes=("e2e",), steps=(1,), batch=(4, 16))


def left(options: Options, rows: list[Row]) -> Options | None:
    """The variants of a part that are not whole in the file; None where all are."""
    there = {(row.model, row.scope, row.variant, row.batch, row.steps) for row in rows if row.role == "model"}

    def whole(variant: str) -> bool:
        cells = product(options.scopes, (variant,), options.batch, options.steps or ())
        return there.issuperset((f"{options.random_weights} (random)", *cell) for cell in cells)

    missing = tuple(variant for variant in options.variants if not whole(variant))
    return replace(options, variants=missing) if missing else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/h200"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here: full-size networks are not timed on a CPU")
    began, book = time.monotonic(), Book(asked.out / "rows.jsonl")
    for options in parts():
        todo = left(options, book.read())
        if todo is None:
            continue
        for row in run(todo, json_to=str(book.path), repeats=1):
            told = row.unavailable or f"{row.p50_ms:.2f} ms"
            print(f"{row.model} {row.role} {row.variant} {row.scope} {row.batch} {row.steps}: {told}", flush=True)
            write_atomic(asked.out / "table.md", markdown(book.read()))
            if time.monotonic() - began > asked.seconds:
                print(f"{asked.seconds:.0f} s are over; again with --out {asked.out} to go on")
                return


if __name__ == "__main__":
    main()
