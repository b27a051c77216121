"""`fastgen bench MODEL [--vs MODEL]`: rows of latency, memory and cost, each handed on as soon as it is measured.

Every variant starts from a freshly opened model, and only one model is in memory at a time: a row's memory and set-up
are its own. With --vs the two take turns, variant by variant, so that a drifting machine slows both.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgen import api, files
from fastgen.errors import RunFailed, UserError
from fastgen.eval import hardware, variants
from fastgen.eval.latency import CPU_PLAN, Plan
from fastgen.eval.roofline import Ceiling, Cost, ceiling, cost_of
from fastgen.eval.rows import Row, compared, together
from fastgen.eval.subject import Cell, Subject, dtype_of, refusals
from fastgen.eval.variants import Unavailable, Variant
from fastgen.eval.workload import SCOPES, Workload, resolution
from fastgen.samplers import ode
from fastgen.student import SamplerSpec, Student
from fastgen.teacher import Teacher

FEW = (1, 2, 4)  # step counts of a student with random weights
Model = Student | Teacher
Open = Callable[[torch.device], Model]


@dataclass(frozen=True)
class Options:
    """What is measured. None: for `steps` all of a student's counts, for `plan` the device's own."""

    model: str | None = None
    vs: str | None = None
    random_weights: str | None = None
    steps: tuple[int, ...] | None = None
    batch: tuple[int, ...] = (1,)
    variants: tuple[str, ...] = ("eager",)
    scopes: tuple[str, ...] = ("net", "e2e")
    device: str = "auto"
    teacher_steps: int = api.DEFAULT_TEACHER_STEPS
    guidance: float | None = None
    solver: str = "euler"
    tiny_decoder: Path | None = None
    seed: int = 0
    iterations: int | None = None
    warmup: int | None = None
    limit: float | None = None

    def plan(self, device: torch.device) -> Plan:
        """The protocol's, but for what the user set."""
        plan = Plan() if device.type == "cuda" else CPU_PLAN
        if self.iterations is not None:
            plan = replace(plan, calls=self.iterations, seconds=0.0)
        if self.warmup is not None:
            plan = replace(plan, warmup=self.warmup, warmup_s=0.0)
        return plan if self.limit is None else replace(plan, limit_s=self.limit)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """ "1,2,4" as numbers, each once."""
    try:
        found = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"{option} {text}: whole numbers of at least 1, with commas between")
    return found


class Source(NamedTuple):
    """Where a model comes from, as often as it is opened, and the step counts it is run with."""

    name: str
    role: str
    open: Open
    steps: tuple[int, ...]
    res: str
    teacher: bool


def run(options: Options, *, json_to: str | None, repeats: int) -> Iterator[Row]:
    """The rows of a command one by one, each in the file before the next is measured."""
    rows = bench(options)
    book = None if json_to in (None, "-") else Book(Path(str(json_to)))
    if repeats > 1:
        with tempfile.TemporaryDirectory(prefix="fastgen-") as folder:
            yield from repeated(options, repeats, book or Book(Path(folder) / "rows.jsonl"))
        return
    for row in rows:
        if book is not None:
            book.add(row)
        yield row


def bench(options: Options) -> Iterator[Row]:
    """Check everything, then measure; the rows of --vs come first, so that those of MODEL can say their speed-up."""
    asked = variants.parse(options.variants)
    unknown = set(options.scopes) - set(SCOPES)
    if unknown:
        raise UserError(f"--scope {sorted(unknown)[0]}: known: {', '.join(SCOPES)}")
    tiny = any("decoder" in variant.parts for variant in asked)
    if tiny != (options.tiny_decoder is not None):
        raise UserError("--tiny-decoder FOLDER and a variant tiny-decoder belong together: give both or neither")
    if options.tiny_decoder is not None:
        variants.read_tiny(options.tiny_decoder, torch.device("cpu"))
    device = torch.device(api.pick_device(options.device))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # graphs and events are the current device's
    sources = _sources(options)
    return _Run(options, device, sources, asked).rows()


def _sources(options: Options) -> list[Source]:
    """--vs first; what does not fit together is refused before anything is measured."""
    if (options.model is None) == (options.random_weights is None):
        raise UserError("bench: give the folder of a model, or --random-weights NAME, and not both")
    model: Open = partial(_load, str(options.model))
    other: Open = partial(_load, str(options.vs))
    if options.random_weights is not None:
        model, other = partial(_random_student, options.random_weights), partial(_random_teacher, str(options.vs))
    subject = _source(options, options.model or f"{options.random_weights} (random)", "model", model, None)
    if options.vs is None:
        return _guided([subject], options)
    name = options.vs if options.random_weights is None else f"{options.vs} (random, teacher)"
    rival = _source(options, name, "vs", other, subject.steps)
    if rival.res != subject.res:
        raise UserError(f"--vs {options.vs}: makes {rival.res} pixels, {subject.name} {subject.res}: not comparable")
    return _guided([rival, subject], options)


def _guided(sources: list[Source], options: Options) -> list[Source]:
    if options.guidance is not None and not any(source.teacher for source in sources):
        raise UserError(f"--guidance {options.guidance}: students have it built in; it is for teachers")
    return sources


def _load(path: str, device: torch.device) -> Model:
    return api.load(path, device=str(device)).model


def _random_teacher(name: str, device: torch.device) -> Teacher:
    from fastgen.zoo.fresh import build

    return Teacher(build(name, device))


def _random_student(name: str, device: torch.device) -> Student:
    """A student of 1, 2 and 4 steps on its network's own path."""
    from fastgen.zoo.fresh import build

    denoiser = build(name, device)
    times = {n: denoiser.path.grid(n) for n in FEW}
    return Student(denoiser, SamplerSpec(path=denoiser.path, times=times, init="unit"), {})


def _source(options: Options, name: str, role: str, open_: Open, like: tuple[int, ...] | None) -> Source:
    """Look at the model once, where it costs least; `like` are the step counts of the model it is compared with."""
    model = open_(torch.device("meta" if options.random_weights else "cpu"))
    if isinstance(model, Student):
        asked = like or options.steps or tuple(sorted(model.sampler.times))
        for n in asked:
            model.sampler.at(n)
    else:
        asked = (options.teacher_steps,) if like else options.steps or (options.teacher_steps,)
        for n in asked:
            ode.nfe(options.solver, n)
        if options.guidance is not None and not model.denoiser.has_null:
            raise UserError(f"--guidance {options.guidance}: {name} has no null condition; leave it off")
    height, width = resolution(model.denoiser)
    return Source(name, role, open_, asked, f"{width}x{height}", isinstance(model, Teacher))


class _Run:
    """One command: its sources in their order, and what is measured once for all rows."""

    def __init__(
        self, options: Options, device: torch.device, sources: list[Source], asked: tuple[Variant, ...]
    ) -> None:
        self.options, self.device, self.sources, self.asked = options, device, sources, asked
        self.began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.costs: dict[tuple[str, bool], Cost] = {}
        self.ceilings: dict[str, Ceiling] = {}

    def rows(self) -> Iterator[Row]:
        self.name, self.software = hardware.device_name(self.device), hardware.software(self.device)
        for variant in self.asked:
            rivals: list[Row] = []
            for source in self.sources:
                for row in self._variant(source, variant):
                    if source.role == "vs":
                        rivals.append(row)
                    yield compared(row, rivals) if source.role == "model" else row

    def _variant(self, source: Source, variant: Variant) -> Iterator[Row]:
        """All rows of a model in one variant; those left when it turns out not to be available say why."""
        left = [Cell(*of) for of in product(self.options.scopes, self.options.batch, source.steps)]
        try:
            variants.refuse_without_cuda(variant, self.device)
            for row in self._opened(source, variant, list(left)):
                left.pop(0)
                yield row
        except Unavailable as reason:
            yield from (replace(self._row(source, variant, cell), unavailable=str(reason)) for cell in left)
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _opened(self, source: Source, variant: Variant, cells: list[Cell]) -> Iterator[Row]:
        began = time.perf_counter()
        with refusals(variant):
            model = source.open(self.device)
            _quiet()
            codec: Any = model.denoiser.codec
            if codec is not None:
                codec.modules()  # read now: under inference_mode, weights could not be changed any more
            open_s = time.perf_counter() - began
            variants.put_decoder(model, variant, self.options.tiny_decoder)
            cost = self._cost(source, model, variant)
        with variants.prepared(model, variant):
            with refusals(variant):
                options = {"seed": self.options.seed, "guidance": self._guidance(source), "solver": self.options.solver}
                subject = Subject(model, variant, self.options.plan(self.device), cost=cost, options=options)
                subject.ceiling = self._ceiling(subject)
                works = subject.works(cells)
            for cell, work in works:
                row = replace(self._row(source, variant, cell), nfe=work.nfe, dtype=subject.dtype, open_s=open_s)
                yield self._measured(subject, row, cell, work)

    def _measured(self, subject: Subject, row: Row, cell: Cell, work: Workload) -> Row:
        try:
            with refusals(subject.variant):
                return replace(row, **subject.measured(row, cell, work))
        except Unavailable as reason:
            return replace(row, unavailable=str(reason))

    def _cost(self, source: Source, model: Model, variant: Variant) -> Cost:
        key = (source.role, "decoder" in variant.parts)
        if key not in self.costs:
            self.costs[key] = cost_of(model, guidance=self._guidance(source))
        return self.costs[key]

    def _ceiling(self, subject: Subject) -> Ceiling | None:
        """Measured in the precision of the variant; None on a CPU, where it would claim what nobody asked."""
        if self.device.type != "cuda":
            return None
        if subject.dtype not in self.ceilings:
            self.ceilings[subject.dtype] = ceiling(self.device, dtype_of(subject.net))
        return self.ceilings[subject.dtype]

    def _guidance(self, source: Source) -> float | None:
        """Of a teacher; a student has its own built in."""
        return self.options.guidance if source.teacher else None

    def _row(self, source: Source, variant: Variant, cell: Cell) -> Row:
        """Everything about a row but its figures."""
        return Row(
            model=source.name,
            role=source.role,
            scope=cell.scope,
            variant=variant.name,
            batch=cell.batch,
            steps=cell.steps,
            nfe=ode.nfe(self.options.solver, cell.steps) if source.teacher else cell.steps,
            res=source.res,
            device=self.name,
            dtype=variant.parts.get("dtype", "float32"),
            attention=variant.attention,
            compile=variant.compiled,
            guidance=self._guidance(source),
            solver=self.options.solver if source.teacher else None,
            random_weights=self.options.random_weights is not None,
            sw=self.software,
            seed=self.options.seed,
            began=self.began,
        )


def _quiet() -> None:
    """Models are opened again and again: no bar and no remark each time."""
    if "diffusers" in sys.modules:  # not brought in for a model that does without
        import diffusers
        import transformers

        transformers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.set_verbosity_error()


class Book:
    """The file of rows: JSON lines, each durable before the next is measured; a killed run keeps those it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files.make_folder(path.parent)
        self.read()

    def read(self) -> list[Row]:
        """The rows that are there, without half a row at the end; anything else of that name is the user's own."""
        if not self.path.exists():
            return []
        *lines, half = self.path.read_bytes().split(b"\n")
        try:
            if not lines and half and not half.startswith(b'{"model"'):
                raise ValueError("no row")
            return [Row.from_dict(json.loads(line)) for line in lines]
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"--json {self.path}: holds something else than rows of bench; choose another name"
            ) from error

    def add(self, row: Row) -> None:
        files.append_line(self.path, json.dumps(row.to_dict(), allow_nan=False))


def repeated(options: Options, times: int, book: Book) -> Iterator[Row]:
    """The same in several processes, one after the other; their own rows go to the book, those yielded are medians."""
    runs: list[list[Row]] = []
    for i in range(times):
        before = len(book.read())
        command = [sys.executable, "-m", "fastgen.cli", "bench", *words(options), "--json", str(book.path)]
        code = subprocess.run(command, stdout=sys.stderr).returncode
        runs.append(book.read()[before:])
        if code:
            raise RunFailed(f"bench: process {i + 1} of {times} ended with {code}; the rows so far are in {book.path}")
    for rows in zip(*runs, strict=True):
        row = together(rows)
        yield row
        book.add(row)


def words(options: Options) -> list[str]:
    """The command line of options."""
    found = []
    for name, value in vars(options).items():
        if name == "model" or value is None:
            continue
        flag = "scope" if name == "scopes" else name.replace("_", "-")
        found += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return found if options.model is None else [options.model, *found]
