"""Students: a denoiser, how to sample it in few steps (plain data), and the facts of its making; a folder on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any, Literal

import yaml
from safetensors.torch import save_file
from torch import Tensor

from fastgen import files
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import Path, path_from_dict, path_to_dict
from fastgen.teacher import EXTRA, FACTS, FORMAT, damage_explained, read_denoiser

LORA, ADAPTERS, SETTINGS = "lora", "adapters.safetensors", "settings.json"


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """One rule for every few-step student: pair = net(x, t); x' = alpha' x0 + sigma' (fresh or own eps).

    path      the path whose times are listed
    times     {n: the n times at which an n-step student is evaluated}, falling; the last step ends on clean data
    renoise   fresh noise between steps (consistency models) instead of the network's own eps (flows, DDIM)
    two_time  the network is also told the time it steps to (MeanFlow)
    guidance  the usual weight of a network that takes it as an input (`Denoiser.takes_guidance`)
    follows   whether one step takes a noise to where the teacher's ODE takes it; None: unless it renoises
    init      the first state is z times sigma at the first time ("sigma"), or times hypot(alpha, sigma) ("unit"),
              which is what DDIM and LCM schedulers feed
    """

    path: Path
    times: dict[int, tuple[float, ...]] = field(hash=False)
    renoise: bool = False
    two_time: bool = False
    guidance: float | None = None
    follows: bool | None = None
    init: Literal["sigma", "unit"] = "sigma"

    def __post_init__(self) -> None:
        if not self.times:
            raise ValueError("a sampler needs the times of at least one number of steps")
        for n, times in self.times.items():
            if n < 1 or n != len(times) or not all(earlier > later for earlier, later in pairwise(times)):
                raise ValueError(f"{n} steps need {n} falling times, got {times}")
            # All of them, so that a NaN in the list fails too.
            if not all(self.path.end <= t <= self.path.start for t in times):
                raise ValueError(f"{n} steps: {times} leave the path, {self.path.start} .. {self.path.end}")
        if self.init not in ("sigma", "unit"):
            raise ValueError(f"init={self.init!r}; known: sigma, unit")

    @property
    def keeps_noise(self) -> bool:
        """Whether a sample is bound to its noise as the teacher's is, so that the two can be compared one by one."""
        return not self.renoise if self.follows is None else self.follows

    def at(self, steps: int) -> tuple[float, ...]:
        """The times of an n-step run; a count outside the student's list is a UserError naming those inside."""
        if steps not in self.times:
            known = ", ".join(str(n) for n in sorted(self.times))
            raise UserError(f"steps={steps}: this student was made for {known}; choose one of them")
        return self.times[steps]

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": path_to_dict(self.path),
            "times": {str(n): list(times) for n, times in self.times.items()},
            "renoise": self.renoise,
            "two_time": self.two_time,
            "guidance": self.guidance,
            "follows": self.follows,
            "init": self.init,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> SamplerSpec:
        times = {int(n): tuple(times) for n, times in data["times"].items()}
        return SamplerSpec(**{**data, "path": path_from_dict(data["path"]), "times": times})


@dataclass
class Adapters:
    """The low-rank changes of a student (`fastgen.nets.lora`): tensors by name, and rank, alpha and targets."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    def write(self, folder: FilePath) -> None:
        folder.mkdir()
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}, folder / ADAPTERS)
        files.write_json(folder / SETTINGS, self.settings)

    @staticmethod
    def read(folder: FilePath) -> Adapters | None:
        if not folder.is_dir():
            return None
        return Adapters(files.load_tensors(folder / ADAPTERS), files.read_json(folder / SETTINGS))


@dataclass
class Student:
    """`facts` holds method, guidance baked in, teacher and config hashes, metrics, licence: what the card tells."""

    denoiser: Denoiser
    sampler: SamplerSpec
    facts: dict[str, Any]
    adapters: Adapters | None = None  # of a student whose weights are its teacher's plus low-rank changes

    def save(self, folder: str | FilePath) -> None:
        """Write the folder whole or not at all: weights, `fastgen.json` and the model card."""
        data = {"kind": "student", "sampler": self.sampler.to_dict(), "facts": self.facts}
        with files.atomic_folder(folder) as temporary:
            write_model(temporary, self.denoiser, data)
            if self.adapters is not None:
                self.adapters.write(temporary / LORA)
            files.write_atomic(temporary / "README.md", card(self))

    @staticmethod
    def load(folder: str | FilePath) -> Student:
        """Read a student folder; anything else is a UserError saying what is missing."""
        denoiser, data = read_denoiser(folder)
        if data.get("kind") != "student":
            raise UserError(f"{folder}: a teacher, not a student; distil it, or load it with fastgen.load_teacher")
        with damage_explained(FilePath(folder) / FACTS):
            adapters = Adapters.read(FilePath(folder) / LORA)
            return Student(denoiser, SamplerSpec.from_dict(data["sampler"]), data["facts"], adapters)


def save_teacher(denoiser: Denoiser, folder: str | FilePath, facts: dict[str, Any]) -> None:
    """Write a network trained here as a teacher folder, whole or not at all."""
    with files.atomic_folder(folder) as temporary:
        write_model(temporary, denoiser, {"kind": "teacher", "facts": facts})


def write_model(folder: FilePath, denoiser: Denoiser, data: dict[str, Any]) -> None:
    """The network's files and `fastgen.json`."""
    denoiser.write(folder)
    if denoiser.extra:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in denoiser.extra.state_dict().items()}
        save_file(tensors, folder / EXTRA)
    files.write_json(folder / FACTS, {"format": FORMAT, **data, "denoiser": denoiser.describe()})


def card(student: Student) -> str:
    """The model card: how to run it, where it comes from, under which terms."""
    facts, steps = student.facts, ", ".join(str(n) for n in sorted(student.sampler.times))
    terms = facts.get("license") or "the teacher's terms apply"
    head = {"library_name": "fastgen", "license": facts.get("license") or "other"}
    head |= {key: facts[key] for key in ("license_link", "base_model") if facts.get(key)}
    rows = [f"| {key} | {_cell(value)} |" for key, value in facts.items() if isinstance(value, str | int | float)]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False) + "---",
            f"# A {steps}-step student by {facts.get('method', 'distillation')}",
            "",
            "```python",
            "import fastgen",
            'images = fastgen.load("PATH_OF_THIS_FOLDER").generate(num=4, seed=0)',
            "```",
            f"Steps: {steps}. {_guidance(student.sampler)} Licence: {terms}.",
            "",
            "| fact | value |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _guidance(spec: SamplerSpec) -> str:
    if spec.guidance is None:
        return "Guidance is part of the weights: leave it off."
    return f"Guidance is an input of the network, {spec.guidance:g} unless another weight is given as `guidance`."


def _cell(value: Any) -> str:
    """A value that cannot break out of its row of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
