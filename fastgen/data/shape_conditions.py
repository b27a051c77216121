"""What TRELLIS's flows are told of own meshes: pictures of them for an image pipeline, captions for a text one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastgen import noise
from fastgen.data.shapes import Manifest
from fastgen.data.shards import payload
from fastgen.errors import UserError
from fastgen.geometry.cameras import Camera, sphere
from fastgen.geometry.mesh import Mesh
from fastgen.geometry.views import render
from fastgen.teachers.trellis.conditions import SIDE, ImageEncoder, TextEncoder
from fastgen.teachers.trellis.flows import IMAGE, TEXT

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = 24  # of each mesh in the published data
# The original's pictures: any fov of these degrees, from where the ball round the unit cube just fills the view.
FOVS = (10.0, 70.0)
LARGER = 2  # side of a picture over that of a view: 1024 over 512, as published
TRIES = 4  # sequences of cameras: a sheet seen from its edge shows no subject


class Conditions(Protocol):
    """Makes the conditions of meshes.

    condition, sha256    what kind they are, and a hash of the encoder
    count                how many each mesh has
    empty                the empty text's [1, 77, C], or None
    """

    condition: str
    sha256: str
    count: int

    @property
    def empty(self) -> Tensor | None: ...

    def told(self, name: str) -> str:
        """A hash of what decides the conditions of a mesh beside the mesh itself."""
        ...

    def encode(self, name: str, mesh: Mesh, digest: str, manifest: Manifest) -> Tensor:
        """[count, L, C] of a mesh with z up in [-0.5, 0.5]^3; digest: sha256 of its file."""
        ...

    def describe(self) -> str:
        """In words, for the card."""
        ...


class Pictures:
    """Pictures by fastgen's own rasteriser, prepared and encoded as `generate --image` does with a picture."""

    condition, empty = IMAGE, None

    def __init__(
        self, encoder: ImageEncoder, sha256: str, count: int, *, advance: Callable[[str, int], None] = lambda *_: None
    ) -> None:
        """advance(name, count): told of a mesh's pictures that are done."""
        self.encoder, self.sha256, self.count, self.advance = encoder, sha256, count, advance

    @property
    def bytes(self) -> int:
        """On disk, of each mesh."""
        config: Any = self.encoder.net.config
        tokens = 1 + config.num_register_tokens + (SIDE // config.patch_size) ** 2
        return 2 * self.count * tokens * config.hidden_size

    def told(self, name: str) -> str:
        return f"{LARGER} x size, fov {FOVS}"

    def encode(self, name: str, mesh: Mesh, digest: str, manifest: Manifest) -> Tensor:
        found: list[Tensor] = []
        for attempt in range(TRIES):
            for camera in picture_cameras(self.count, manifest, digest, attempt):
                try:
                    found.append(self.encoder.encode([picture(mesh, camera)])[0])
                except UserError:  # no subject from there: another direction takes its place
                    continue
                self.advance(name, len(found))
                if len(found) == self.count:
                    return torch.stack(found)
        unseen = self.count * TRIES - len(found)
        raise UserError(
            f"{name}: {unseen} of {unseen + len(found)} pictures of it show no subject, it is too thin; mend the mesh, "
            "or leave it out"
        )

    def describe(self) -> str:
        fewer = "" if self.count == PICTURES else f", where the published data have {PICTURES}"
        return (
            f"{self.count} pictures of each mesh{fewer}, as DINOv2's tokens. The pictures are NOT the original's "
            "renders: fastgen's rasteriser draws vertex colours lit from the camera"
        )


class Captions:
    """Captions as CLIP's tokens; a mesh that has fewer than another repeats its own from the first on."""

    condition = TEXT

    def __init__(self, encoder: TextEncoder, captions: Mapping[str, Sequence[str]]) -> None:
        """captions: of each mesh by its name, at least one."""
        self.encoder, self._captions = encoder, captions
        self.count = max(map(len, captions.values()))
        tokenizer, net = encoder.parts
        words = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        weights = payload({key: value.cpu() for key, value in net.state_dict().items()})
        self.sha256 = hashlib.sha256(f"{weights} {words}".encode()).hexdigest()

    @property
    def empty(self) -> Tensor:
        return self.encoder.empty

    def told(self, name: str) -> str:
        return hashlib.sha256(json.dumps(self._captions[name]).encode()).hexdigest()

    def encode(self, name: str, mesh: Mesh, digest: str, manifest: Manifest) -> Tensor:
        texts = self._captions[name]
        return self.encoder.encode(texts)[torch.arange(self.count) % len(texts)]

    def describe(self) -> str:
        fewest = min(map(len, self._captions.values()))
        repeated = "" if fewest == self.count else f"; meshes with fewer, at least {fewest}, repeat theirs"
        return f"{self.count} captions of each mesh, as CLIP's tokens{repeated}"


def picture_cameras(count: int, manifest: Manifest, digest: str, attempt: int = 0) -> list[Camera]:
    """The cameras of a mesh's pictures, all over the sphere; digest: sha256 of its file, which with the seed decides
    the offset of their sequence and their fields of view. attempt: another sequence."""
    rows = torch.tensor([int(digest[:15], 16)])
    across, along, *spread = noise.uniform(manifest.seed, "latents/pictures", rows, (2 + count,), attempt)[0].tolist()
    narrow, wide = (math.sin(math.radians(fov / 2)) ** 2 for fov in FOVS)
    cameras = []
    for camera, u in zip(sphere(count, offset=(across, along), radius=1.0), spread, strict=True):
        half = math.sqrt(narrow + u * (wide - narrow))  # sine of half the field of view; 1 / distance^2 is uniform
        x, y, z = (math.sqrt(3) / 2 / half * coordinate for coordinate in camera.eye)
        fov = math.degrees(2 * math.asin(half))
        cameras.append(replace(camera, eye=(x, y, z), fov=fov, size=LARGER * manifest.size))
    return cameras


def picture(mesh: Mesh, camera: Camera) -> Image:
    """What a camera sees, RGBA."""
    from PIL import Image as Pictures

    view = render(mesh, camera)
    values = torch.cat([view.shaded, view.alpha[..., None]], -1)
    return Pictures.fromarray((values * 255).round().clamp(0, 255).to(torch.uint8).numpy(force=True))
