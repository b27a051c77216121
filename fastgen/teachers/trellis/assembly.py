"""A TRELLIS folder with other flows in it: everything else of its base linked, pipeline.json strictly official.

Also the state dicts in which flows are published alone.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastgen import files
from fastgen.nets.weights import fill
from fastgen.sources import ORIGIN
from fastgen.teacher import FACTS
from fastgen.teachers.trellis import PIPELINE
from fastgen.teachers.trellis.args import Network
from fastgen.teachers.trellis.folder import FLOWS, SAMPLERS, TrellisFolder
from fastgen.teachers.trellis.models import write_stem

logger = logging.getLogger("fastgen")
CARD = "README.md"
LATENTS = "latents"  # in the folder of a toy world: what its flows were trained on, which no copy needs
OWN = (PIPELINE, FACTS, ORIGIN, CARD, files.COMPLETE)  # what an assembled folder has of its own
# The plain FlowEulerSampler cannot be named: the official pipelines hand every sampler the null condition, and that one
# would pass it on to the network. An interval that holds no time is one call a step, as wanted.
SAMPLER = "FlowEulerGuidanceIntervalSampler"
UNGUIDED = {"cfg_strength": 0.0, "cfg_interval": [2.0, 2.0]}


def assemble(base: TrellisFolder, flows: Mapping[str, Network], few: Mapping[str, dict[str, Any]], out: Path) -> None:
    """Fill the folder `out` with the base and these flows, by part, in the dtypes that they have.

    few: {"steps", "rescale_t"} of the parts that are students, whose sampler is replaced. Every stem that lies on this
    machine is brought along and held against its description; others are left to be found by their names.
    """
    told = copy.deepcopy(files.read_json(base.path / PIPELINE))
    replaced = {file for part in flows for file in map(_plain, base.here(FLOWS[part]) or ())}
    for source, name in _tree(base.path):
        if name not in OWN and not name.startswith(f"{LATENTS}/") and _plain(source) not in replaced:
            link(source, out / name)
    for role in base.stems.keys() - {FLOWS[part] for part in flows}:
        told["args"]["models"][role] = _bring(base, role, out)
    for part, net in flows.items():
        stem = f"ckpts/{part}_flow"
        files.make_folder(out / "ckpts")
        write_stem(net, out / stem)
        told["args"]["models"][FLOWS[part]] = stem
    for part, params in few.items():
        sampler = told["args"][SAMPLERS[part]]
        told["args"][SAMPLERS[part]] = {**sampler, "name": SAMPLER, "params": {**params, **UNGUIDED}}
    files.write_json(out / PIPELINE, told)
    made = TrellisFolder.read(out)
    for role in made.stems:
        if made.here(role) is not None:
            made.checked(role)


def _plain(path: Path) -> str:
    """Without dots, and with links left as they are: files of the hub's cache are links out of it."""
    return os.path.abspath(path)


def _tree(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file of a folder that is not hidden, with its name in it; linked folders are followed."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(place, name)
                yield path, path.relative_to(folder).as_posix()


def _bring(base: TrellisFolder, role: str, out: Path) -> str:
    """The stem of a role that is kept: as it was, or in ckpts/ where its files lie outside of the base."""
    stem, found = base.stems[role], base.here(role)
    if found is None:
        logger.warning("%s: the stem %s of %s is not here, and is left as a name", base.path, stem, role)
        return stem
    if all(Path(_plain(file)).is_relative_to(_plain(base.path)) for file in found):
        return os.path.relpath(_plain(base.path / stem), _plain(base.path))
    name = f"ckpts/{Path(stem).name}"
    if (out / f"{name}.json").exists():
        name = f"ckpts/{role}"
    for file in found:
        link(file, out / f"{name}{file.suffix}")
    return name


def link(source: Path, target: Path) -> None:
    """The same file under another name where the file system allows it, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, one without links, or somebody else's file
        shutil.copyfile(source, target)


def fill_from(file: Path, net: Network) -> None:
    """Give a flow the weights of a .pt file.

    Anything but a plain dict of tensors, the flow's own and all of them, is a UserError; so is a pickle with code in
    it, which is not run.
    """
    fill(net, files.load_pickled(file, mend="save the flow's state_dict() alone"), file)
