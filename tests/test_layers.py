"""Imports go one way: core < samplers < eval < trainers < app.

Read from the source, so an import inside a function or under TYPE_CHECKING counts too. A module looked up by name at
run time (a method, by the name in a config) is no import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastgen

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("core", "samplers", "eval", "trainers", "app")
# The app layer stands beside core in fastgen/: this is the list of its modules.
APP = {
    "api",
    "bench",
    "bench_shapes",
    "cli",
    "commands",
    "compare",
    "doctor",
    "evaluate",
    "evaluate_shapes",
    "inspection",
    "latents",
    "listing",
    "plan",
    "quickstart",
    "references",
    "samples",
    "shapes",
    "stages",
}
# What `fastgen/__init__.py` takes from `fastgen.api` when asked: importing it is importing the app.
LAZY = set(fastgen.__all__) - {"__version__"}


def modules() -> dict[str, Path]:
    """Every module of the package by its import name, `fastgen` itself left out: its lazy names reach into the app."""
    found = {}
    for folder in ("fastgen", *fastgen.ROOT_FOLDERS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "fastgen" else ("fastgen", *parts)
            found[".".join(parts)] = path
    del found["fastgen.__init__"]
    return found


def layer(module: str) -> int:
    """Where a module stands in LAYERS."""
    part = module.split(".")[1]
    if part in APP | LAZY:
        return LAYERS.index("app")
    return LAYERS.index(part) if part in LAYERS else LAYERS.index("core")


def imports(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported from fastgen; `from fastgen import x` is fastgen.x."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parent, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.startswith("fastgen."))


def upward(module: str, source: str) -> list[str]:
    """The imports of a module that go against the arrows."""
    return [
        f"{module}:{line} ({LAYERS[layer(module)]}) imports {name} ({LAYERS[layer(name)]})"
        for line, name in imports(module, source)
        if layer(name) > layer(module)
    ]


def test_no_import_goes_up():
    found = modules()
    assert {layer(name) for name in found} >= {layer(f"fastgen.{part}") for part in ("paths", "samplers", "trainers")}
    assert [line for name, path in found.items() for line in upward(name, path.read_text())] == []


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("fastgen.paths", "from fastgen.trainers.reflow import Reflow", "fastgen.trainers.reflow.Reflow"),
        ("fastgen.paths", "def f():\n    import fastgen.samplers.ode", "fastgen.samplers.ode"),
        ("fastgen.nets.unet", "from fastgen import eval as e", "fastgen.eval"),
        ("fastgen.nets.unet", "from ... import x\nfrom .. import eval", "fastgen.eval"),
        ("fastgen.nets.unet", "from ..samplers import ode", "fastgen.samplers.ode"),
        (
            "fastgen.samplers.ode",
            "if TYPE_CHECKING:\n    from fastgen.eval.metrics import fd",
            "fastgen.eval.metrics.fd",
        ),
        ("fastgen.eval.metrics", "from fastgen.trainers.engine import loop", "fastgen.trainers.engine.loop"),
        ("fastgen.trainers.engine.loop", "from fastgen.cli import main", "fastgen.cli.main"),
        ("fastgen.trainers.reflow", "from fastgen import load", "fastgen.load"),
        ("fastgen.student", "from fastgen.doctor import report", "fastgen.doctor.report"),
    ],
)
def test_a_planted_arrow_is_found(module, source, target):
    assert [line.split(" imports ")[1].split(" ")[0] for line in upward(module, source)] == [target]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastgen.trainers.reflow", "from fastgen import errors, samplers, eval\nfrom fastgen.paths import VP"),
        ("fastgen.cli", "from fastgen.stages import run\nimport fastgen.trainers.engine.loop\nfrom . import compare"),
        ("fastgen.eval.metrics", "import torch\nfrom trainers import other\nfrom fastgen.samplers import ode"),
        ("fastgen.trainers.engine.loop", "from .optim import step\nfrom ..reflow import Reflow"),
    ],
)
def test_a_downward_arrow_is_allowed(module, source):
    assert upward(module, source) == []


def test_the_app_list_names_modules_of_the_core_folder():
    """A name in APP that stands in another layer's folder would free that folder from the rule."""
    assert APP.isdisjoint({*LAYERS, *fastgen.ROOT_FOLDERS})
