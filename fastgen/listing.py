"""What there is: methods, teacher families, samplers and configs, read from files so that listing needs no torch."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import yaml

from fastgen.errors import UserError, suggestion

WHAT = ("methods", "teachers", "samplers", "configs")


def listing(what: str) -> list[dict[str, Any]]:
    """Rows {"name", "about", ...} of one of `WHAT`."""
    if what not in WHAT:
        raise UserError(f"list {what}: nothing of that name ({suggestion(what, WHAT)})")
    return {"methods": _methods, "teachers": _teachers, "samplers": _samplers, "configs": _configs}[what]()


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _about(tree: ast.Module) -> str:
    """The first sentence of a module's docstring."""
    return " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())


def _assigned(tree: ast.Module, name: str) -> list[Any]:
    """Constants assigned to a name anywhere in the module's classes or at its top."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                found.append(node.value.value)
    return found


def _modules(package: str) -> list[tuple[str, ast.Module]]:
    files = sorted(path for path in _folder(package).glob("*.py") if path.stem != "__init__")
    return [(path.stem, ast.parse(path.read_text())) for path in files]


def _methods() -> list[dict[str, Any]]:
    rows = []
    for name, tree in _modules("fastgen.trainers"):
        if name == "pairs":
            continue
        missing = "".join(_assigned(tree, "experimental"))
        makes = "".join(_assigned(tree, "makes")) or "student"
        status = f"experimental: {missing}" if missing else "stands" if makes == "student" else "trains a teacher"
        rows.append({"name": name, "makes": makes, "status": status, "about": _about(tree)})
    return rows


def _teachers() -> list[dict[str, Any]]:
    """Files, and packages that read folders: what `teacher.families` finds."""
    files = _folder("fastgen.teachers").glob("*/__init__.py")
    packages = [(file.parent.name, ast.parse(file.read_text())) for file in files]
    trees = [*_modules("fastgen.teachers"), *(row for row in packages if "recognises" in _names(row[1]))]
    return [{"name": name, "about": _about(tree)} for name, tree in sorted(trees, key=lambda row: row[0])]


def _names(tree: ast.Module) -> set[str]:
    """What a module defines or imports at its top."""
    imported = (alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names)
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return defined | {alias.asname or alias.name for alias in imported}


def _samplers() -> list[dict[str, Any]]:
    (tree,) = (tree for name, tree in _modules("fastgen.samplers") if name == "ode")
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "SOLVERS" and isinstance(node.value, ast.Dict):
                return [
                    {"name": key.value, "about": ast.unparse(value).strip("'\"")}
                    for key, value in zip(node.value.keys, node.value.values, strict=True)
                    if isinstance(key, ast.Constant)
                ]
    raise AssertionError("samplers/ode.py has no SOLVERS table")


def config_names() -> dict[str, Path]:
    """Shipped configs by name: `reflow/digits` is `configs/reflow/digits.yaml`."""
    root = _folder("fastgen.configs")
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """A config file, a shipped config by name, or a method's default config."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such file; shipped configs are listed by `fastgen list configs`")
        return Path(name)
    names = config_names()
    found = names.get(name) or names.get(f"{name}/default")
    if found is None:
        known = [*names, *(path.removesuffix("/default") for path in names if path.endswith("/default"))]
        raise UserError(f"{name}: neither a YAML file nor a shipped config nor a method ({suggestion(name, known)})")
    return found


def _configs() -> list[dict[str, Any]]:
    rows = []
    for name, path in config_names().items():
        head = yaml.safe_load(path.read_text())
        rows.append({"name": name, "status": head.get("status", ""), "about": " ".join(head.get("about", "").split())})
    return rows
