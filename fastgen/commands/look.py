"""inspect, list, doctor: what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.errors import UserError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]


def inspect(
    path: Annotated[Path, typer.Argument(help="A model, a run, a pair set, or data.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="With --plan.")] = None,
    method: Annotated[
        str | None, typer.Option("--plan", metavar="CONFIG|METHOD", help="What training from this model would take.")
    ] = None,
    vram: Annotated[float | None, typer.Option(min=0.1, help="Of the device, in GiB: what makes it fit?")] = None,
    as_json: Json = False,
) -> None:
    """Say what a path is: a teacher or student and its facts, a run and its stages, pairs, or images.

    With --plan: the memory of weights, averages, moments and gradients of a method on this model, and an estimate of
    activations; KEY=VALUE changes its config. Of a TRELLIS folder both flows are planned.
    """
    if method is None:
        from fastgen.inspection import inspect as look

        if overrides or vram is not None:
            raise UserError("config overrides and --vram go with --plan METHOD")
        _show(look(path), as_json)
        return
    from fastgen.plan import plans

    made = plans(path, method, overrides or [], vram=vram)
    if as_json:
        one, *more = [plan.to_dict() for plan in made]
        print(json.dumps({"kind": "plans", "model": str(path), "plans": [one, *more]} if more else one))
    else:
        print("\n\n".join("\n".join(plan.lines()) for plan in made))


def list_(
    what: Annotated[str, typer.Argument(help="methods, teachers, samplers or configs")], as_json: Json = False
) -> None:
    """List methods, teacher families, samplers or shipped configs."""
    from fastgen.listing import listing

    rows = listing(what)
    if as_json:
        print(json.dumps({what: rows}))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        status = f"  [{row['status']}]" if row.get("status") else ""
        print(f"{row['name']:<{width}}  {row['about']}{status}")


def doctor(as_json: Json = False) -> None:
    """Check this machine: torch build, devices, packages, attention kernels."""
    from fastgen.doctor import problems, report

    rows = report()
    if as_json:
        print(json.dumps({"checks": [row._asdict() for row in rows]}))
    else:
        for row in rows:
            print(f"{row.status:<8} {row.name:<22} {row.detail}")
    if problems(rows):
        raise typer.Exit(1)


def _show(facts: dict[str, Any], as_json: bool, indent: str = "") -> None:
    if as_json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            _show(value, False, indent + "  ")
        else:
            print(f"{indent}{key}: {value}")
