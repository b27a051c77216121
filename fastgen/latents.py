"""Own meshes to TRELLIS latents, so that they can be distilled on: the published recipe with our own renderer.

A mesh fills [-0.5, 0.5]^3; the voxels that its surface touches get DINOv2's patch tokens of many views, averaged, and
go through the encoder of structured latents; the occupied grid goes through the structure encoder. What the flows are
told of it (`fastgen.data.shape_conditions`) goes beside. What is made lies in the folder that `fastgen.data.shapes`
describes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastgen import files, noise
from fastgen.data import shapes
from fastgen.data.shape_conditions import Conditions, picture
from fastgen.data.shapes import Manifest
from fastgen.data.shards import payload
from fastgen.errors import UserError, require
from fastgen.geometry import mesh as meshes
from fastgen.geometry.cameras import Camera, sphere
from fastgen.geometry.export import z_up
from fastgen.geometry.mesh import Mesh
from fastgen.geometry.voxelise import surface_voxels, voxel_centres
from fastgen.sparse import Voxels
from fastgen.teachers.trellis import PIPELINE
from fastgen.teachers.trellis.args import Network
from fastgen.teachers.trellis.conditions import MEAN, SIDE, STD, ImageEncoder
from fastgen.teachers.trellis.flows import IMAGE
from fastgen.teachers.trellis.folder import ENCODERS, TrellisFolder
from fastgen.teachers.trellis.models import ELASTIC

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("fastgen")
# The encoders lie in image-large, and pipeline.json does not name them.
LATENT_ENCODER, STRUCTURE_ENCODER = "ckpts/slat_enc_swin8_B_64l8_fp16", "ckpts/ss_enc_conv3d_16l8_fp16"
SUFFIXES = (".glb", ".gltf", ".obj", ".off", ".ply", ".stl")
VIEWS, RADIUS, FOV = 150, 2.0, 40.0
RENDERER = "fastgen rasteriser, vertex colours lit from the camera"
TOGETHER = 8  # views that go through the image encoder at once
Up = Literal["y", "z"]


@dataclass(frozen=True)
class Encoders:
    """The three networks, on one device, and sha256 of their files. mean, std [C]: slat_normalization."""

    image: ImageEncoder
    latent: Network
    structure: Network
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hashes: dict[str, str]

    @classmethod
    def load(
        cls,
        folder: TrellisFolder,
        *,
        latent: str = LATENT_ENCODER,
        structure: str = STRUCTURE_ENCODER,
        image: Path | None = None,
        device: str = "cpu",
    ) -> Encoders:
        """From a pipeline's folder, by stems as in pipeline.json; image: a transformers folder of DINOv2. What does not
        fit together is a UserError."""
        folder = replace(folder, stems={**folder.stems, "slat_encoder": latent, "structure_encoder": structure})
        found, hashes = {}, {}
        for role, kind, option in (
            ("slat_encoder", "SLatEncoder", "latent-encoder"),
            ("structure_encoder", "SparseStructureEncoder", "structure-encoder"),
        ):
            described = _found(folder, role, option)
            if (name := folder.describe(role)[0]).removeprefix(ELASTIC) != kind:
                raise UserError(f"--{option}: {described[0]} describes a {name}; a {kind} is needed")
            found[role] = folder.network(role, device=device)
            hashes[role] = hashlib.sha256("".join(map(files.sha256, described)).encode()).hexdigest()
        name = folder.encoder if folder.condition == IMAGE else ENCODERS[IMAGE]
        encoder = ImageEncoder(name, folder=image, device=device)
        hashes["image_encoder"] = payload({key: v.cpu() for key, v in encoder.net.state_dict().items()})
        made = cls(encoder, found["slat_encoder"], found["structure_encoder"], folder.mean, folder.std, hashes)
        made._refuse_misfits(folder.path / PIPELINE)
        return made

    def _refuse_misfits(self, where: Path) -> None:
        width, wanted = self.image.net.config.hidden_size, self.latent.args.in_channels  # type: ignore[union-attr]
        if width != wanted:
            raise UserError(
                f"the image encoder {self.image.folder or self.image.name} has {width} channels and the latent encoder "
                f"takes {wanted}; the official one takes dinov2_vitl14_reg's"
            )
        if self.latent.args.latent_channels != len(self.mean):
            told = f"{len(self.mean)} means for latents of {self.latent.args.latent_channels} channels"
            raise UserError(f"{where}: slat_normalization has {told}")
        if self.structure.args.in_channels != 1 or self.resolution % self.factor:
            raise UserError(f"the structure encoder takes no grid of [1, {self.resolution}^3]; name another one")

    @property
    def resolution(self) -> int:
        """Voxels along a side."""
        return self.latent.args.resolution

    @property
    def factor(self) -> int:
        """Voxels along a side of one cell of the structure's latent."""
        return 2 ** (len(self.structure.args.channels) - 1)

    @property
    def device(self) -> torch.device:
        return self.latent.out_layer.weight.device

    @torch.inference_mode()
    def patches(self, pictures: Tensor) -> Tensor:
        """The image encoder's patch tokens before its last norm [B, C, h, w] of [B, 3, 518, 518] in 0..1."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        tokens = self.image.net(((pictures - mean) / std).to(self.device)).last_hidden_state.float()
        side = SIDE // self.image.net.config.patch_size  # type: ignore[union-attr, operator]
        return tokens[:, -side * side :].movedim(1, -1).unflatten(-1, (side, side))

    @torch.inference_mode()
    def encode(self, coords: Tensor, feats: Tensor) -> dict[str, Tensor]:
        """Voxels [N, 3] with averaged tokens [N, C] to what a folder of latents keeps of a mesh; means, no draws."""
        voxels = Voxels(feats.float(), functional.pad(coords, (1, 0)), 1)
        mean, std = (torch.tensor([values], device=self.device) for values in (self.mean, self.std))
        grid = torch.zeros(1, 1, *[self.resolution] * 3, device=self.device)
        grid[0, 0][tuple(coords.long().T)] = 1
        return {
            "coords": coords.to(torch.int16),
            "latent": ((self.latent(voxels)[0].feats - mean) / std).float(),
            "structure": self.structure(grid)[0][0].float(),
        }

    def manifest(self, *, views: int, size: int, up: Up, seed: int, conditions: Conditions | None = None) -> Manifest:
        side = self.resolution // self.factor
        return Manifest(
            image_encoder=self.hashes["image_encoder"],
            latent_encoder=self.hashes["slat_encoder"],
            structure_encoder=self.hashes["structure_encoder"],
            views=views,
            size=size,
            renderer=RENDERER,
            radius=RADIUS,
            fov=FOV,
            up=up,
            seed=seed,
            resolution=self.resolution,
            structure=(self.structure.args.latent_channels, side, side, side),
            mean=self.mean,
            std=self.std,
            condition=conditions and conditions.condition,  # type: ignore[arg-type]
            condition_encoder=conditions.sha256 if conditions else "",
            conditions=conditions.count if conditions else 0,
        )


def _found(folder: TrellisFolder, role: str, option: str) -> tuple[Path, Path]:
    try:
        return folder.files(role)
    except UserError as error:
        raise UserError(f"{error}; --{option} names another stem, a path perhaps") from error


def make(
    encoders: Encoders,
    source: Path,
    out: Path,
    *,
    views: int = VIEWS,
    size: int = 512,
    up: Up = "y",
    seed: int = 0,
    conditions: Conditions | None = None,
    skip_bad: bool = False,
    advance: Callable[[str, int], None] = lambda name, views: None,
) -> dict[str, str]:
    """The latents of every mesh below `source`, and their `conditions`, into `out`; what is there and whole is kept.

    Returns the meshes that were left out, with the reasons; unless `skip_bad`, one of them is a UserError before
    anything is made. advance(name, views) is told of a mesh's views that are done.
    """
    found = mesh_files(source)
    manifest = encoders.manifest(views=views, size=size, up=up, seed=seed, conditions=conditions)
    shapes.agree(out, manifest)
    maker = _Maker(encoders, manifest, out, conditions, advance)
    hashes = {name: files.sha256(file) for name, file in found.items()}
    todo = {name: missing for name in found if any(missing := maker.missing(name, hashes[name]))}
    if not skip_bad:
        _refuse_bad({name: found[name] for name in todo}, up)
    shapes.begin(out, manifest)
    if conditions is not None and (empty := conditions.empty) is not None:
        shapes.write_empty(out, empty, manifest)
    skipped: dict[str, str] = {}
    for done, (name, missing) in enumerate(todo.items()):
        try:
            maker.make(name, read(found[name], up), hashes[name], *missing)
        except UserError as error:
            if not skip_bad:
                raise
            skipped[name] = _line(error)
            logger.warning("left out: %s", skipped[name])
        else:
            logger.info("%s: mesh %d of %d", name, done + 1, len(todo))
    kept = [name for name in found if name not in skipped]
    if not kept:
        raise UserError(f"{source}: none of its {len(found)} meshes can be used ({next(iter(skipped.values()))})")
    voxels = shapes.close(out, kept, skipped)
    files.write_atomic(out / "README.md", card(manifest, len(kept), voxels, skipped, conditions))
    return skipped


@dataclass(frozen=True)
class _Maker:
    """What is made of one mesh after another."""

    encoders: Encoders
    manifest: Manifest
    out: Path
    conditions: Conditions | None
    advance: Callable[[str, int], None]

    def missing(self, name: str, digest: str) -> tuple[bool, bool]:
        """Whether a mesh lacks its latents, and its conditions; digest: sha256 of its file."""
        latents = not shapes.finished(self.out, name, self.manifest, digest)
        if self.conditions is None:
            return latents, False
        told = self.conditions.told(name)
        return latents, not shapes.conditioned(self.out, name, self.manifest, digest, told)

    def make(self, name: str, mesh: Mesh, digest: str, with_latents: bool, with_conditions: bool) -> None:
        mesh = mesh.to(self.encoders.device)
        if with_latents:
            cameras = directions(self.manifest, digest)
            made = latents(self.encoders, mesh, cameras, advance=partial(self.advance, name))
            shapes.write(self.out, name, made, self.manifest, digest)
        if with_conditions:
            assert self.conditions is not None
            told, made_of = self.conditions.encode(name, mesh, digest, self.manifest), self.conditions.told(name)
            shapes.write_conditions(self.out, name, told, self.manifest, digest, made_of)


def directions(manifest: Manifest, mesh: str) -> list[Camera]:
    """The cameras of a mesh; mesh: sha256 of its file, which with the seed decides the offset of their sequence."""
    rows = torch.tensor([int(mesh[:15], 16)])
    across, along = noise.uniform(manifest.seed, "latents/views", rows, (2,))[0].tolist()
    return sphere(manifest.views, offset=(across, along), radius=manifest.radius, fov=manifest.fov, size=manifest.size)


def latents(
    encoders: Encoders, mesh: Mesh, cameras: Sequence[Camera], *, advance: Callable[[int], None] = lambda views: None
) -> dict[str, Tensor]:
    """What a folder of latents keeps of a mesh with z up in [-0.5, 0.5]^3."""
    coords = surface_voxels(mesh, encoders.resolution)
    return encoders.encode(coords, features(encoders, mesh, coords, cameras, advance=advance))


def mesh_files(folder: Path) -> dict[str, Path]:
    """Every mesh below a folder by its relative name, hidden ones left out; none at all is a UserError."""
    require("trimesh", extra="3d", purpose=f"reading the meshes of {folder}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of meshes")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in found}
    named = {name: named[name] for name in sorted(named) if not any(p.startswith(".") for p in name.split("/"))}
    if not named:
        raise UserError(f"{folder}: no meshes in it ({', '.join(SUFFIXES)})")
    return named


def read(path: Path, up: Up) -> Mesh:
    """A mesh with z up, its bounding box's longest side from -0.5 to 0.5. What cannot be used is a UserError."""
    mesh = meshes.load(path)
    vertices = z_up(mesh.vertices) if up == "y" else mesh.vertices
    try:
        return meshes.fit(Mesh(vertices, mesh.faces, mesh.colours))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _refuse_bad(found: dict[str, Path], up: Up) -> None:
    """One line for each mesh that cannot be used, and a UserError if there is any."""
    bad = []
    for path in found.values():
        try:
            read(path, up)
        except UserError as error:
            bad.append(_line(error))
    for line in bad[1:]:
        logger.warning("%s", line)
    if bad:
        more = f" ({len(bad)} of {len(found)} meshes are bad)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; mend it, or go on without: --on-bad skip")


def _line(error: UserError) -> str:
    return " ".join(str(error).split())


def features(
    encoders: Encoders,
    mesh: Mesh,
    coords: Tensor,
    cameras: Sequence[Camera],
    *,
    advance: Callable[[int], None] = lambda views: None,
) -> Tensor:
    """The image encoder's patch tokens at the voxels [N, 3], averaged over the views, float16 [N, C].

    A voxel takes part in every view, seen or hidden; where it falls outside of a picture it counts as zeros.
    """
    centres = voxel_centres(coords, encoders.resolution)
    total = torch.zeros(())
    for first in range(0, len(cameras), TOGETHER):
        some = cameras[first : first + TOGETHER]
        seen = encoders.patches(torch.stack([pixels(picture(mesh, camera)) for camera in some]))
        total = sum((at_points(*pair, centres) for pair in zip(seen, some, strict=True)), total.to(seen))
        advance(first + len(some))
    return (total / len(cameras)).half()


def pixels(view: Image) -> Tensor:
    """An RGBA picture as the image encoder sees it but for mean and std: on black, [3, 518, 518] in 0..1."""
    from PIL import Image as Pictures

    values = np.asarray(view.resize((SIDE, SIDE), Pictures.Resampling.LANCZOS)).astype(np.float32) / 255
    rgba = torch.from_numpy(values).movedim(-1, 0)
    return rgba[:3] * rgba[3:]


def at_points(tokens: Tensor, camera: Camera, points: Tensor) -> Tensor:
    """Tokens [C, h, w] of a camera's picture at the places where it sees points [N, 3]: bilinear, [N, C]."""
    place = camera.project(points)[:, :2] / camera.size * 2 - 1
    return functional.grid_sample(tokens[None], place.to(tokens)[None, None], align_corners=False)[0, :, 0].T


def card(
    manifest: Manifest, count: int, voxels: int, skipped: dict[str, str], conditions: Conditions | None = None
) -> str:
    """README.md: what the latents are, and what is not as in the original."""
    fewer = "" if manifest.views == VIEWS else f", where the published recipe has {VIEWS}"
    told = [
        "# Meshes as TRELLIS latents",
        "",
        f"{count} meshes, {voxels} voxels of a {manifest.resolution}^3 grid; made by `fastgen latents`.",
        "",
        f"* Views: {manifest.views} of {manifest.size} x {manifest.size} pixels{fewer}.",
        f"* They were NOT rendered by the original's renderer: {manifest.renderer}. Features differ accordingly.",
        f"* Conditions: {conditions.describe() if conditions else 'none'}.",
        f"* `latent` is normalised: mean {list(manifest.mean)}, std {list(manifest.std)}.",
        f"* The meshes' files had {manifest.up} up; latents have z up.",
        "* The terms of the meshes apply, and those of the encoders' weights.",
    ]
    for name, digest in (
        ("image encoder", manifest.image_encoder),
        ("latent encoder", manifest.latent_encoder),
        ("structure encoder", manifest.structure_encoder),
        ("encoder of the conditions", manifest.condition_encoder),
    ):
        if digest:
            told.append(f"* {name}: sha256 `{digest}`")
    if skipped:
        told += ["", f"{len(skipped)} left out:", "", *(f"* {reason}" for reason in skipped.values())]
    return "\n".join([*told, ""])
