"""Meshes as files that other programs open: GLB, OBJ and PLY through trimesh, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgen.errors import UserError, require, suggestion
from fastgen.files import write_atomic
from fastgen.geometry.mesh import Mesh, check
from fastgen.geometry.texture import Textured, bake

SUFFIXES = ("glb", "obj", "ply")


def y_up(vertices: Tensor) -> Tensor:
    """(x, y, z) with z up -> (x, z, -y) with y up, as the original writes its meshes."""
    x, y, z = vertices.unbind(-1)
    return torch.stack([x, z, -y], -1)


def z_up(vertices: Tensor) -> Tensor:
    """The inverse of `y_up`, for files that come from this module."""
    x, y, z = vertices.unbind(-1)
    return torch.stack([x, -z, y], -1)


def save_mesh(path: str | Path, mesh: Mesh, *, texture: int | None = None, source: Mesh | None = None) -> None:
    """Write a mesh in the format of its suffix, y up, with its colours per vertex.

    texture: side in pixels of a texture instead (GLB, OBJ), which takes its colours from `source`, a finer mesh, where
    one is given. An OBJ then has NAME.mtl and NAME.png beside it.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in SUFFIXES:
        raise UserError(f"{path}: no mesh is written as '{path.suffix}'; {suggestion(kind, SUFFIXES)}")
    if texture is not None and kind == "ply":
        raise UserError(f"{path}: a .ply holds colours per vertex and no texture; write .glb or .obj")
    trimesh = require("trimesh", extra="3d", purpose=f"writing {path}")
    check(mesh, str(path))
    if texture is not None:
        _write_textured(path, kind, bake(mesh, texture, source), trimesh)
    else:
        write_atomic(path, _plain(mesh, trimesh).export(file_type=kind))


def _plain(mesh: Mesh, trimesh: Any, **visual: Any) -> Any:
    """A trimesh object with the same vertices and faces, in their order."""
    vertices = y_up(mesh.vertices.detach().float().cpu()).numpy()
    colours = None
    if mesh.colours is not None and not visual:
        colours = (mesh.colours.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return trimesh.Trimesh(vertices, mesh.faces.cpu().numpy(), vertex_colors=colours, process=False, **visual)


def _write_textured(path: Path, kind: str, baked: Textured, trimesh: Any) -> None:
    from trimesh.visual.material import PBRMaterial, SimpleMaterial

    image = Image.fromarray(baked.image.numpy())
    material = (
        PBRMaterial(name=path.stem, baseColorTexture=image, metallicFactor=0.0, roughnessFactor=1.0)
        if kind == "glb"
        else SimpleMaterial(name=path.stem, image=image)
    )
    visual = trimesh.visual.TextureVisuals(uv=baked.uv.numpy(), material=material)
    whole = _plain(baked.mesh, trimesh, visual=visual)
    if kind == "glb":
        write_atomic(path, whole.export(file_type="glb"))
        return
    text, beside = trimesh.exchange.obj.export_obj(whole, return_texture=True, mtl_name=f"{path.stem}.mtl")
    for name, data in beside.items():  # the .obj names them, so it comes last
        write_atomic(path.with_name(name), data)
    write_atomic(path, text)
