"""Own meshes as TRELLIS latents: a folder that `fastgen latents` makes, and batches of it by the number of voxels.

    manifest.json              what made the latents; every later run into the folder must agree with it
    shapes/NAME.safetensors    coords int16 [N, 3], latent float32 [N, C], structure float32 [C', R, R, R] of a mesh
    index.json                 the finished set: names, voxels and sha256 of the files, and the meshes left out
    README.md                  what it is in words

`latent` is normalised as the second stage's flow has it, (mean - slat mean) / slat std; `structure` is the structure
encoder's mean as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastgen import files
from fastgen.config import Model, config_hash, plain, validate
from fastgen.data.shards import payload
from fastgen.data.source import shuffled
from fastgen.errors import UserError
from fastgen.sparse import Voxels

logger = logging.getLogger("fastgen")
MANIFEST, INDEX, SHAPES = "manifest.json", "index.json", "shapes"
OPEN = 4  # batches that still take shapes
AGAIN = "run the same `fastgen latents` again: it makes only what is missing"


class Manifest(Model):
    """What decides the latents of a mesh. Hashes are sha256 of the networks' files."""

    format: Literal[1] = 1
    kind: Literal["trellis latents"] = "trellis latents"
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


class _Entry(Model):
    name: str
    voxels: int = Field(ge=1)
    sha256: str


class _Index(Model):
    shapes: tuple[_Entry, ...]
    skipped: dict[str, str] = Field(default_factory=dict)


def begin(folder: Path, manifest: Manifest) -> None:
    """Create a folder of latents, or go on with one that `agree`s."""
    agree(folder, manifest)
    files.make_folder(folder / SHAPES)
    if not (folder / MANIFEST).exists():
        files.write_json(folder / MANIFEST, plain(manifest))


def agree(folder: Path, manifest: Manifest) -> None:
    """Latents there that were made otherwise are a UserError that names the key; so are files of someone else's."""
    path = folder / MANIFEST
    if not path.exists():
        _refuse_stray(folder)
        return
    there, here = plain(validate(Manifest, files.read_json(path), str(path))), plain(manifest)
    for key in here:
        if there[key] != here[key]:
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


def write(folder: Path, name: str, tensors: dict[str, Tensor], manifest: Manifest, mesh: str) -> None:
    """The latents of one mesh, whole or not at all; mesh: sha256 of its file. Equal latents have equal bytes."""
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    facts = {"manifest": config_hash(manifest), "mesh": mesh, "payload": payload(tensors)}
    path = file_of(folder, name)
    files.make_folder(path.parent)
    files.write_atomic(path, save(tensors, metadata={"fastgen": json.dumps(facts, sort_keys=True)}))


def finished(folder: Path, name: str, manifest: Manifest, mesh: str) -> bool:
    """Whether this mesh has its latents: from the same file, made the same way, and undamaged."""
    path = file_of(folder, name)
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
    elif facts["mesh"] != mesh:
        logger.warning("%s: its mesh has changed; it is made again", path)
    return whole and facts["mesh"] == mesh and facts["manifest"] == config_hash(manifest)


def close(folder: Path, names: Sequence[str], skipped: dict[str, str]) -> int:
    """Write the index of a finished set; returns the number of its voxels."""
    entries = []
    for name in names:
        data = file_of(folder, name).read_bytes()
        with safe_open(file_of(folder, name), "pt") as file:
            voxels = file.get_slice("coords").get_shape()[0]
        entries.append({"name": name, "voxels": voxels, "sha256": hashlib.sha256(data).hexdigest()})
    files.write_json(folder / INDEX, {"shapes": entries, "skipped": skipped})
    return sum(entry["voxels"] for entry in entries)


class LatentShapes:
    """A finished folder of latents as a data set of unequal lengths. Nothing but the index is read at first.

    mean, std: the slat_normalization of the pipeline that will read them; latents normalised by other numbers are a
    UserError, for its flow would see them shifted and scaled.
    """

    def __init__(self, folder: str | Path, *, mean: Sequence[float], std: Sequence[float]) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / MANIFEST).is_file():
            raise UserError(f"{folder}: no folder of latents ({MANIFEST} is missing); `fastgen latents` makes one")
        self.manifest = validate(Manifest, files.read_json(self.folder / MANIFEST), str(self.folder / MANIFEST))
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
        self._verified: set[str] = set()

    def __len__(self) -> int:
        return len(self._index.shapes)

    @property
    def names(self) -> list[str]:
        """The meshes' paths below their folder, in the order of the numbers."""
        return [entry.name for entry in self._index.shapes]

    @property
    def counts(self) -> list[int]:
        """The number of voxels of each shape."""
        return [entry.voxels for entry in self._index.shapes]

    def get(self, index: Sequence[int] | Tensor) -> dict[str, Any]:
        """Some of the shapes: {"latent": Voxels [B, C], normalised; "structure": float32 [B, C', R, R, R]}."""
        found = [self._read(self._index.shapes[number]) for number in torch.as_tensor(index).tolist()]
        coords = [torch.nn.functional.pad(one["coords"].int(), (1, 0), value=i) for i, one in enumerate(found)]
        latent = torch.cat([one["latent"] for one in found])
        return {
            "latent": Voxels(latent, torch.cat(coords), len(found)),
            "structure": torch.stack([one["structure"] for one in found]),
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

    def _read(self, entry: _Entry) -> dict[str, Tensor]:
        path = file_of(self.folder, entry.name)
        if entry.name not in self._verified:
            if not path.is_file() or files.sha256(path) != entry.sha256:
                raise UserError(f"{path}: missing, or not what {INDEX} says; {AGAIN}")
            self._verified.add(entry.name)
        return files.load_tensors(path)


def by_voxels(counts: Sequence[int], most: int, *, seed: int, epoch: int = 0) -> list[list[int]]:
    """Numbers 0 .. n - 1 in batches whose counts add up to at most `most`, fixed by seed and epoch.

    They come in the epoch's shuffled order and go into the first open batch that has room; a batch is closed when the
    four newest are open, which wastes little and keeps the batches' order close to the shuffled one.
    """
    if not counts or min(counts) < 1 or max(counts) > most:
        raise ValueError(f"{len(counts)} sets of {min(counts, default=0)} to {max(counts, default=0)} for {most}")
    n = len(counts)
    order = shuffled(seed, torch.arange(epoch * n, (epoch + 1) * n).numpy(), n).tolist()
    batches: list[list[int]] = []
    room: list[int] = []
    for number in order:
        first = max(0, len(batches) - OPEN)
        fitting = (i for i in range(first, len(batches)) if counts[number] <= room[i])
        place = next(fitting, len(batches))
        if place == len(batches):
            batches.append([])
            room.append(most)
        batches[place].append(number)
        room[place] -= counts[number]
    return batches
