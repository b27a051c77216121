"""Own meshes as TRELLIS latents: a folder that `fastgen latents` makes, and batches of it by the number of voxels.

    manifest.json                  what made the latents; every later run into the folder must agree with it
    shapes/NAME.safetensors        coords int16 [N, 3], latent float32 [N, C], structure float32 [C', R, R, R] of a mesh
    conditions/NAME.safetensors    "image" float16 [V, L, C] or "text" float16 [V, 77, C]: V things a flow is told of it
    empty.safetensors              "text" float16 [1, 77, C], the empty text's, which guidance leads away from
    index.json                     the finished set: names, voxels and sha256 of the files, and the meshes left out
    README.md                      what it is in words

`latent` is normalised as the second stage's flow has it, (mean - slat mean) / slat std; `structure` is the structure
encoder's mean as it is. Conditions are what the flows are given; a folder may be without.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastgen import files
from fastgen.config import Model, config_hash, plain, validate
from fastgen.data import LATENTS
from fastgen.data.shards import payload
from fastgen.data.voxel_batches import by_voxels
from fastgen.errors import RunFailed, UserError
from fastgen.sparse import Voxels

logger = logging.getLogger("fastgen")
MANIFEST, INDEX, SHAPES, CONDITIONS, EMPTY = "manifest.json", "index.json", "shapes", "conditions", "empty.safetensors"
TOLD = {"condition", "condition_encoder", "conditions"}  # the manifest's fields that the latents do not depend on
KEPT = 1 << 29  # bytes of a set that stay in memory once read: small sets are then read once
AGAIN = "run the same `fastgen latents` again: it makes only what is missing"
TELL = "run `fastgen latents` into it again without --no-conditions"


class Manifest(Model):
    """What decides the latents of a mesh. Hashes are sha256 of the networks' files."""

    format: Literal[1] = 1
    kind: Literal["trellis latents"] = LATENTS
    image_encoder: str
    latent_encoder: str
    structure_encoder: str
    views: int = Field(ge=1)
    size: int = Field(ge=1)
    renderer: str
    radius: float
    fov: float
    up: Literal["y", "z"]
    """Which axis points up in the files of the meshes; latents have z up."""
    seed: int
    resolution: int = Field(ge=1)
    """Voxels along a side."""
    structure: tuple[int, int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """slat_normalization, one entry per channel of the latents."""
    condition: Literal["image", "text"] | None = None
    """What the flows are told of each shape; None: no conditions were made."""
    condition_encoder: str = ""
    conditions: int = Field(default=0, ge=0)
    """How many each shape has."""

    @model_validator(mode="after")
    def _some_or_none(self) -> Manifest:
        if (self.condition is None) != (self.conditions == 0):
            raise ValueError(f"{self.conditions} conditions of the kind {self.condition}")
        return self


class _Entry(Model):
    name: str
    voxels: int = Field(ge=1)
    sha256: str
    conditions: str = ""
    """sha256 of the file of its conditions."""


class _Index(Model):
    shapes: tuple[_Entry, ...]
    skipped: dict[str, str] = Field(default_factory=dict)
    empty: str = ""
    """sha256 of the empty text's file."""


def recognises(folder: Path) -> bool:
    """Whether a folder is one of latents, finished or not."""
    return files.peek_json(folder / MANIFEST).get("kind") == LATENTS


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of latents."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no folder of latents ({MANIFEST} is missing); `fastgen latents` makes one")
    return validate(Manifest, files.read_json(folder / MANIFEST), str(folder / MANIFEST))


def begin(folder: Path, manifest: Manifest) -> None:
    """Create a folder of latents, or go on with one that `agree`s."""
    agree(folder, manifest)
    files.make_folder(folder / SHAPES)
    if not (folder / MANIFEST).exists() or files.read_json(folder / MANIFEST) != plain(manifest):
        (folder / INDEX).unlink(missing_ok=True)  # of a set that had other conditions
        files.write_json(folder / MANIFEST, plain(manifest))


def agree(folder: Path, manifest: Manifest) -> None:
    """Latents there that were made otherwise are a UserError that names the key; so are files of someone else's.

    Conditions may be added where there are none, and the number of texts may follow the captions.
    """
    if not (folder / MANIFEST).exists():
        _refuse_stray(folder)
        return
    there, here = plain(read_manifest(folder)), plain(manifest)
    free = TOLD if there["condition"] is None else {"conditions"} if there["condition"] == "text" else set()
    if there["condition"] is not None and here["condition"] is None:
        raise UserError(f"{folder}: its shapes have conditions, asked for are none; choose another folder")
    for key in here:
        if key not in free and there[key] != here[key]:
            raise UserError(
                f"{folder}: its latents were made with {key}={there[key]!r}, asked for is {here[key]!r}; "
                "choose another folder or delete this one"
            )


def _refuse_stray(folder: Path) -> None:
    """Without a manifest there may be nothing but what `begin` left when it was killed."""
    if not folder.exists():
        return
    if not folder.is_dir() or any(file.name != SHAPES and file.name[:5] != ".tmp-" for file in folder.iterdir()):
        raise UserError(f"{folder}: something that is no folder of latents stands here; choose another place")
    if any((folder / SHAPES).glob("*")):
        raise UserError(f"{folder}: latents without {MANIFEST}; choose another place, or delete them")


def file_of(folder: Path, name: str) -> Path:
    """Where the latents of a mesh lie; name is its path below the folder of meshes, suffix and all."""
    return folder / SHAPES / f"{name}.safetensors"


def conditions_of(folder: Path, name: str) -> Path:
    """Where the conditions of a mesh lie."""
    return folder / CONDITIONS / f"{name}.safetensors"


def write(
    folder: Path,
    name: str,
    tensors: dict[str, Tensor],
    manifest: Manifest,
    mesh: str,
    conditions: Tensor | None = None,
) -> None:
    """The latents of one mesh, whole or not at all; mesh: sha256 of its file. Equal latents have equal bytes.

    conditions: as `write_conditions` takes them; the two files are whole or absent each for itself.
    """
    if not len(tensors["coords"]):
        raise RunFailed(f"{name}: not one voxel of it is occupied; a shape needs a surface inside of the grid")
    _write(file_of(folder, name), tensors, {"manifest": _recipe(manifest), "mesh": mesh})
    if conditions is not None:
        write_conditions(folder, name, conditions, manifest, mesh)


def write_conditions(
    folder: Path, name: str, conditions: Tensor, manifest: Manifest, mesh: str, told: str = ""
) -> None:
    """What the flows are told of one mesh, [V, L, C], kept as float16; told: a hash of what else decides it."""
    if manifest.condition is None or conditions.ndim != 3 or len(conditions) != manifest.conditions:
        raise ValueError(f"{list(conditions.shape)} for {manifest.conditions} conditions [V, L, C]")
    facts = {"manifest": config_hash(manifest), "mesh": mesh, "told": told}
    _write(conditions_of(folder, name), {manifest.condition: conditions.half()}, facts)


def write_empty(folder: Path, empty: Tensor, manifest: Manifest) -> None:
    """The empty text's encoding [1, 77, C], kept as float16."""
    if manifest.condition != "text" or empty.ndim != 3 or len(empty) != 1:
        raise ValueError(f"{list(empty.shape)} for the empty text of conditions of the kind {manifest.condition}")
    _write(folder / EMPTY, {"text": empty.half()}, {})


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise RunFailed(f"{path}: '{key}' is not finite; the network that made it overflows")
    told = json.dumps({**facts, "payload": payload(tensors)}, sort_keys=True)
    files.make_folder(path.parent)
    files.write_atomic(path, save(tensors, metadata={"fastgen": told}))


def _recipe(manifest: Manifest) -> str:
    """A hash of what decides the latents, the same with conditions and without."""
    return config_hash({key: value for key, value in plain(manifest).items() if key not in TOLD})


def finished(folder: Path, name: str, manifest: Manifest, mesh: str) -> bool:
    """Whether this mesh has its latents: from the same file, made the same way, and undamaged."""
    return _made(file_of(folder, name), {"manifest": _recipe(manifest), "mesh": mesh})


def conditioned(folder: Path, name: str, manifest: Manifest, mesh: str, told: str = "") -> bool:
    """Whether this mesh has its conditions: from the same file and `told`, made the same way, and undamaged."""
    return _made(conditions_of(folder, name), {"manifest": config_hash(manifest), "mesh": mesh, "told": told})


def _made(path: Path, wanted: dict[str, str]) -> bool:
    """Whether a file is whole and has these facts."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("fastgen", "{}"))
        whole = facts.get("payload") == payload(files.load_tensors(path))
    except (SafetensorError, OSError, ValueError, UserError):
        whole, facts = False, {}
    if not whole:
        logger.warning("%s: damaged; it is made again", path)
    elif facts["mesh"] != wanted["mesh"]:
        logger.warning("%s: its mesh has changed; it is made again", path)
    return whole and all(facts.get(key) == value for key, value in wanted.items())


def close(folder: Path, names: Sequence[str], skipped: dict[str, str]) -> int:
    """Write the index of a finished set; returns the number of its voxels."""
    manifest, entries = read_manifest(folder), []
    for name in names:
        with safe_open(file_of(folder, name), "pt") as file:
            voxels = file.get_slice("coords").get_shape()[0]
        entry = {"name": name, "voxels": voxels, "sha256": files.sha256(file_of(folder, name))}
        if manifest.condition is not None:
            entry["conditions"] = files.sha256(conditions_of(folder, name))
        entries.append(entry)
    index = {"shapes": entries, "skipped": skipped}
    if manifest.condition == "text":
        index["empty"] = files.sha256(folder / EMPTY)
    files.write_json(folder / INDEX, index)
    return sum(entry["voxels"] for entry in entries)


class LatentShapes:
    """A finished folder of latents as a data set of unequal lengths. Nothing but the index is read at first.

    mean, std: the slat_normalization of the pipeline that will read them; latents normalised by other numbers are a
    UserError, for its flow would see them shifted and scaled.
    """

    def __init__(self, folder: str | Path, *, mean: Sequence[float], std: Sequence[float]) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        for key, asked in (("mean", tuple(mean)), ("std", tuple(std))):
            if (there := getattr(self.manifest, key)) != asked:
                raise UserError(
                    f"{folder}: its latents were normalised with {key}={list(there)}, the pipeline has {list(asked)}; "
                    "make them with that pipeline's folder"
                )
        if not (self.folder / INDEX).is_file():
            raise UserError(f"{folder}: these latents are not finished; {AGAIN}")
        self._index = validate(_Index, files.read_json(self.folder / INDEX), str(self.folder / INDEX))
        if not self._index.shapes:
            raise UserError(f"{folder}: no shapes; make the latents of at least one mesh")
        self._verified: set[Path] = set()
        self._kept: dict[tuple[Path, str, int], Tensor] = {}
        self._room = KEPT

    def __len__(self) -> int:
        return len(self._index.shapes)

    @cached_property
    def names(self) -> list[str]:
        """The meshes' paths below their folder, in the order of the numbers."""
        return [entry.name for entry in self._index.shapes]

    @cached_property
    def counts(self) -> list[int]:
        """The number of voxels of each shape."""
        return [entry.voxels for entry in self._index.shapes]

    def get(self, index: Sequence[int] | Tensor) -> dict[str, Any]:
        """Some of the shapes: {"latent": Voxels [B, C], normalised; "structure": float32 [B, C', R, R, R]}."""
        return {"latent": self.latent(index), "structure": self.structure(index)}

    def latent(self, index: Sequence[int] | Tensor) -> Voxels:
        """The second stage's of some of the shapes, [B, C], normalised."""
        found = self._entries(index)
        coords = [
            torch.nn.functional.pad(self._tensor(entry, "coords").int(), (1, 0), value=i)
            for i, entry in enumerate(found)
        ]
        return Voxels(torch.cat([self._tensor(entry, "latent") for entry in found]), torch.cat(coords), len(found))

    def structure(self, index: Sequence[int] | Tensor) -> Tensor:
        """The first stage's of some of the shapes, float32 [B, C', R, R, R]."""
        return torch.stack([self._tensor(entry, "structure") for entry in self._entries(index)])

    def condition(self, index: Sequence[int] | Tensor, choice: Sequence[int] | Tensor) -> Tensor:
        """What the flows are told of some of the shapes, float32 [B, L, C]; choice [B]: which, 0 .. conditions - 1."""
        kind, count = self.manifest.condition, self.manifest.conditions
        numbers = torch.as_tensor(choice).tolist()
        if kind is None:
            raise UserError(f"{self.folder}: these latents were made without conditions, and a flow needs them; {TELL}")
        if any(not 0 <= number < count for number in numbers):
            raise IndexError(f"conditions {numbers} of {count}")
        found = []
        for entry, number in zip(self._entries(index), numbers, strict=True):
            path = conditions_of(self.folder, entry.name)
            found.append(self._read(path, entry.conditions, kind, number))
            if found[-1].shape != found[0].shape:
                raise UserError(f"{path}: {list(found[-1].shape)}, others of its folder are {list(found[0].shape)}")
        return torch.stack(found).float()

    @cached_property
    def empty(self) -> Tensor | None:
        """The empty text's encoding, float32 [1, 77, C]; None where conditions are no texts."""
        if self.manifest.condition != "text":
            return None
        return self._read(self.folder / EMPTY, self._index.empty, "text").float()

    def describe(self) -> dict[str, Any]:
        """What there is, in numbers; every file is read, and the first that is not as it should be is a UserError."""
        for entry in self._index.shapes:
            self._verify(file_of(self.folder, entry.name), entry.sha256)
            if self.manifest.condition is not None:
                self._verify(conditions_of(self.folder, entry.name), entry.conditions)
        return {
            "shapes": len(self),
            "left_out": len(self._index.skipped),
            "voxels": sum(self.counts),
            "voxels_of_a_shape": [min(self.counts), max(self.counts)],
            "resolution": self.manifest.resolution,
            "structure": list(self.manifest.structure),
            "condition": self.manifest.condition,
            "conditions_of_a_shape": self.manifest.conditions,
            "tokens_of_a_condition": self.condition([0], [0]).shape[1] if self.manifest.conditions else 0,
            "empty_text": self.empty is not None,
        }

    def decodable(self, latent: Voxels) -> Voxels:
        """Normalised latents in the decoders' scale."""
        mean, std = (torch.tensor([v], device=latent.device) for v in (self.manifest.mean, self.manifest.std))
        return latent.with_feats(latent.feats * std + mean)

    def batches(self, most: int, *, seed: int, epoch: int = 0) -> list[list[int]]:
        """One epoch: every shape once, in batches of at most `most` voxels; `by_voxels` of this folder."""
        largest = max(range(len(self)), key=lambda i: self.counts[i])
        if self.counts[largest] > most:
            raise UserError(
                f"{self.folder}: {self.names[largest]} has {self.counts[largest]} voxels, more than the {most} of a "
                "batch; raise the limit, or leave that mesh out"
            )
        return by_voxels(self.counts, most, seed=seed, epoch=epoch)

    def _entries(self, index: Sequence[int] | Tensor) -> list[_Entry]:
        return [self._index.shapes[number] for number in torch.as_tensor(index).tolist()]

    def _tensor(self, entry: _Entry, key: str) -> Tensor:
        return self._read(file_of(self.folder, entry.name), entry.sha256, key)

    def _read(self, path: Path, sha256: str, key: str, row: int = -1) -> Tensor:
        """A tensor of a file, or one row of it; nobody may write into it."""
        if (kept := self._kept.get((path, key, row))) is not None:
            return kept
        self._verify(path, sha256)
        with safe_open(path, "pt") as file:
            found = file.get_tensor(key) if row < 0 else file.get_slice(key)[row]
        if found.nbytes <= self._room:
            self._kept[path, key, row] = found
            self._room -= found.nbytes
        return found

    def _verify(self, path: Path, sha256: str) -> None:
        if path not in self._verified:
            if not path.is_file() or files.sha256(path) != sha256:
                raise UserError(f"{path}: missing, or not what {INDEX} says; {AGAIN}")
            self._verified.add(path)
