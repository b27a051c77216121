"""Without the packages of the extra [3d]: one line each, which names the package and the extra."""

from __future__ import annotations

import sys

import pytest
import torch

from fastgen.errors import UserError
from fastgen.eval.meshes import compare
from fastgen.geometry import export, marching, mesh, sdf, texture
from tests.geometry import shapes


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("trimesh", lambda folder: mesh.load(folder / "a.obj")),
        ("trimesh", lambda folder: export.save_mesh(folder / "a.glb", shapes.cube())),
        ("fast_simplification", lambda folder: mesh.simplify(shapes.cube(), 8)),
        ("skimage", lambda folder: marching.marching_cubes(shapes.sphere(shapes.corners(6)))),
        ("xatlas", lambda folder: texture.bake(shapes.cube(), 32)),
        ("scipy", lambda folder: mesh.component_labels(shapes.cube())),
        ("scipy", lambda folder: sdf.signed_distance(shapes.cube(), 4)),
        ("scipy", lambda folder: compare(shapes.cube(), shapes.cube(), points=10)),
    ],
)
def test_an_absent_package_is_one_line(package, call, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"'{package}[a-z.]*': pip install 'fastgen-distill\[3d\]'") as error:
        call(tmp_path)
    assert "\n" not in str(error.value)


def test_what_needs_none_of_them_works_without(monkeypatch):
    for package in ("trimesh", "skimage", "xatlas", "scipy", "fast_simplification"):
        monkeypatch.setitem(sys.modules, package, None)
    found = shapes.surface(shapes.sphere(shapes.corners(6)))
    assert mesh.is_closed(mesh.weld(found)) and torch.isfinite(found.vertices).all()
