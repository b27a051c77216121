"""Configs: YAML in, frozen typed models out, and one clear line for every mistake."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from fastgen.errors import UserError, suggestion


class Model(BaseModel):
    """The base of every config class: unknown keys are errors, values are frozen and never NaN or infinite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=False)


M = TypeVar("M", bound=Model)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; missing or malformed files are UserErrors."""
    try:
        tree = yaml.safe_load(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this is a {type(tree).__name__}")
    return tree


def override(tree: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of the tree with every `a.b.c=value` applied, values read as YAML.

    An element of a list of named mappings is reached by its name: `stages.reflow.loop.steps=100`.
    """
    tree = json.loads(json.dumps(tree, default=str))  # a copy; YAML's dates were meant as texts
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise UserError(f"'{assignment}': an override has the form key=value, as in loop.steps=100")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"'{assignment}': the value is not YAML") from error
        *parents, last = key.split(".")
        node: Any = tree
        for part in parents:
            node = _child(node, part, key)
        if isinstance(node, list):
            node[node.index(_child(node, last, key))] = value
        else:
            node[last] = value
    return tree


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        named = {item["name"]: item for item in node if isinstance(item, dict) and "name" in item}
        if part not in named:
            raise UserError(f"'{key}': nothing here is named '{part}' ({suggestion(part, named)})")
        return named[part]
    if isinstance(node.get(part), dict | list):
        return node[part]
    if node.get(part) is not None:
        raise UserError(f"'{key}': '{part}' is a value, it has no keys below it")
    node[part] = {}
    return node[part]


def validate(kind: type[M], tree: Any, where: str) -> M:
    """The tree as a typed model; the first mistake becomes a UserError naming the key and the nearest valid one."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, kind, tree)}") from error


def explain(error: ValidationError, kind: type[BaseModel], tree: Any = None) -> str:
    """One line for the first mistake of a validation; `tree`, what was validated, keeps pydantic's words out."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in (first["loc"] if tree is None else _keys(first, tree)))
    match first["type"]:
        case "extra_forbidden":
            *location, unknown = first["loc"]
            return f"unknown key '{key}' ({suggestion(str(unknown), _fields(kind, location))})"
        case "missing":
            return f"'{key}' is missing and has no default"
        case _:
            message = first["msg"].removeprefix("Value error, ")
            value = repr(first.get("input"))
            shown = value if len(value) <= 60 else value[:57] + "..."
            where = f"'{key}': " if key else ""
            return f"{where}{message[:1].lower()}{message[1:]}, got {shown}"


def _keys(error: ErrorDetails, tree: Any) -> list[int | str]:
    """The keys a user wrote to the mistake: a location without pydantic's own entries (the members of a union)."""
    keys: list[int | str] = []
    for part in error["loc"]:
        inside = part in (range(len(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else ())
        if inside:
            tree = tree[part]
        if inside or (error["type"] == "missing" and part is error["loc"][-1]):
            keys.append(part)
    return keys


def _fields(kind: type[BaseModel], location: Sequence[int | str]) -> set[str]:
    """The valid keys of the model that a location leads to; of all members of a union that it leaves open."""
    models = [kind]
    for part in location:
        annotations = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        leaves = [leaf for annotation in annotations for leaf in _unfold(annotation)]
        if leaves:
            models = [leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
        else:  # not a key, but the member of a union: its class name, or the value of its discriminating field
            models = [m for m in models if part == m.__name__ or part in _tags(m)] or models
    return {name for m in models for name in m.model_fields}


def _tags(model: type[BaseModel]) -> list[Any]:
    fields = model.model_fields.values()
    return [tag for f in fields if get_origin(f.annotation) is Literal for tag in get_args(f.annotation)]


def _unfold(annotation: Any) -> list[Any]:
    """The leaves of a nested annotation: list[A | B] is A and B."""
    arguments = get_args(annotation)
    return [annotation] if not arguments else [leaf for a in arguments for leaf in _unfold(a)]


def plain(model: BaseModel) -> dict[str, Any]:
    """A model as JSON-ready data."""
    return model.model_dump(mode="json")


def dump_yaml(model: BaseModel) -> str:
    """A model as YAML in the order of its fields."""
    return yaml.safe_dump(plain(model), sort_keys=False)


def config_hash(data: Any) -> str:
    """Short hash of a model or of plain data, the same for equal contents."""
    data = plain(data) if isinstance(data, BaseModel) else data
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
