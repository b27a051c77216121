"""`fastgen bench TRELLIS --structure MESH`: rows of stages, what they are given, and one line for every mistake.

Nothing here looks at how long anything took.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from fastgen import bench_shapes as app
from fastgen.bench_shapes import STAGES, Injected, ShapeOptions, Subject, bench, parse
from fastgen.errors import UserError
from fastgen.eval.meshes import compare
from fastgen.geometry import flexicubes
from fastgen.geometry.export import save_mesh
from fastgen.geometry.mesh import component_labels
from fastgen.geometry.voxelise import surface_voxels
from fastgen.shapes import Shapes
from fastgen.teachers.trellis.folder import TrellisFolder
from fastgen.zoo import trellis
from tests.commands import call
from tests.geometry import shapes

pytest.importorskip("trimesh", reason="trimesh is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")
ONCE = {"iterations": 1, "warmup": 0, "steps": (1,), "device": "cpu"}
NAMES = ["condition", "structure", "structure decode", "latent", "mesh decode", "extraction", "gaussians"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """image/ and text/ (tiny TRELLIS folders, the second without its encoder), and meshes; rod.ply has few voxels."""
    root = tmp_path_factory.mktemp("bench")
    trellis.write(root / "image", "trellis-image-large")
    trellis.write(root / "text", "trellis-text-base")
    shutil.rmtree(root / "text" / "encoder")
    cube = shapes.cube(0.3)
    ball = shapes.icosphere(0.2, 2)
    save_mesh(root / "ball.ply", ball)
    save_mesh(root / "rod.ply", replace(ball, vertices=ball.vertices * torch.tensor([0.1, 0.1, 1])))
    save_mesh(root / "open.ply", replace(cube, faces=cube.faces[1:]))
    return root


def options(folder, model="image", **changes):
    told = {"model": str(folder / model), "structure": folder / "rod.ply", **ONCE}
    return ShapeOptions(**{**told, **changes})


def subject(folder, model="image", **changes):
    told = options(folder, model, **changes)
    return Subject(told, Shapes(TrellisFolder.read(folder / model), encoder=told.encoder))


def mistake(*said):
    ended = call("bench", *said, "--device", "cpu")
    assert ended.code == 2 and not ended.out and "Traceback" not in ended.err, ended
    return ended.message.removeprefix("fastgen: ")


def test_every_stage_is_a_row_and_all_of_them_another(folder):
    rows = list(bench(options(folder)))
    assert [row.scope for row in rows] == [*NAMES, "e2e"]
    voxels = len(Injected(folder / "rod.ply", 16).coords)
    for row in rows:
        assert row.unavailable is None and row.calls == 1 and row.role == "model" and row.p50_ms is not None
        assert (row.res, row.dtype, row.variant) == (f"{voxels} voxels", "float32", "eager")
        assert (row.peak_alloc_mib, row.peak_reserved_mib) == (None, None)  # no GPU, no claim
        assert set(row.stages_ms) == ({*NAMES[:-1], "copy"} if row.scope == "e2e" else set())
    assert [row.nfe for row in rows] == [1, 1, 1, 1, 1, 0, 1, 5]
    assert [row.guidance for row in rows] == [None, 6, None, 6, None, None, None, 6]


def runner(told):
    run = app._Run(told, [])
    run.name, run.software = "a machine", {}
    return run


def test_steps_batches_and_guidance(folder):
    rows = list(runner(subject(folder, steps=(2, 3), batch=(1, 2), guidance=1.0))._rows(parse("eager"), STAGES[3:4]))
    cells = [(row.batch, row.steps, row.nfe, row.guidance) for row in rows]
    assert cells == [(1, 2, 2, 1), (1, 3, 3, 1), (2, 2, 2, 1), (2, 3, 3, 1)]
    run = runner(subject(folder, steps=None, batch=(3,)))
    assert [(row.batch, row.steps) for row in run._rows(parse("eager"), STAGES[:1])] == [(3, 1)]
    assert [(row.steps, row.guidance) for row in run._rows(parse("eager"), STAGES[1:2])] == [(25, 6)]


@torch.inference_mode()
def test_what_stages_make(folder):
    """On the injected voxels, of the batch and the steps asked for, and anew with each call."""
    told = subject(folder)
    made = {stage.scope: stage.open(told)(2, 1) for stage in STAGES}
    count = len(told.injected.coords)
    assert made["condition"]().shape == (2, 1 + 4 + 37**2, 32)
    assert made["structure"]().shape == (2, 8, 4, 4, 4)
    coords = made["structure decode"]()
    assert coords.shape[1] == 5 and coords[:, 2:].max() < 16 and set(coords[:, 0].tolist()) == {0, 1}
    latents, again = made["latent"](), made["latent"]()
    assert latents.lengths.tolist() == [count, count] and latents.sites is not again.sites
    assert torch.equal(latents.feats, again.feats) and not torch.equal(*latents.feats.split(count))
    assert torch.equal(latents.coords[count:, 1:], told.injected.coords)
    assert made["mesh decode"]().feats.shape == (2 * 64 * count, 101)
    assert [len(splats.xyz) for splats in made["gaussians"]()] == [32 * count] * 2
    assert len(made["extraction"]()) == 2


def test_the_extraction_sees_the_meshs_own_surface(folder):
    """The larger of its parts is the ball, scaled to fill the cube; the inner side of the layer is the other."""
    injected = Injected(folder / "ball.ply", 8)
    assert torch.equal(injected.coords, surface_voxels(injected.mesh, 8)) and len(injected.coords) > 100
    feats, fine = injected.features
    assert feats.shape == (64 * len(injected.coords), 101) and len(fine.unique(dim=0)) == len(fine)
    found = flexicubes.from_features(feats, fine, 32)
    labels = component_labels(found)
    assert int(labels.max()) == 1
    sizes = [found.subset(labels == part) for part in (0, 1)]
    outer = max(sizes, key=lambda part: float(part.vertices.norm(dim=1).mean()))
    rows = compare(outer, injected.mesh, points=4000, taus=(0.05,))
    assert rows["CD-L1"].value - rows["CD-L1"].floor < 0.35 / 32 and rows["normal consistency"].value > 0.95


def test_no_encoder_is_a_reason_and_the_rest_is_measured(folder):
    rows = {row.scope: row for row in bench(options(folder, "text", scopes=("e2e",)))}
    assert rows["e2e"].unavailable is None and "condition" not in rows["e2e"].stages_ms
    assert rows["e2e"].notes[0].startswith("without the condition, skipped: ")
    (row,) = runner(subject(folder, "text"))._measured(parse("eager"), STAGES[:1])
    assert row.unavailable.startswith("skipped: ") and row.p50_ms is None
    assert subject(folder, "text", encoder=folder / "x").shapes.encoder.folder == folder / "x"


def test_what_cannot_be_had_is_a_reason(folder, monkeypatch, tmp_path):
    told = subject(folder)
    run = runner(told)
    monkeypatch.setattr(app, "available_bytes", lambda device: 1000)
    (row,) = run._measured(parse("eager"), STAGES[4:5])
    assert row.unavailable.startswith("out of memory: ") and row.calls == 0

    def absent(**names):
        raise UserError(f"{names} is not here")

    monkeypatch.setattr(app.backends, "use", absent)
    (row,) = run._measured(parse("spconv+xformers"), STAGES[4:5])
    assert row.unavailable == "{'conv': 'spconv', 'attention': 'xformers'} is not here"
    del told.folder.stems["slat_decoder_gs"]
    with pytest.raises(app.Unavailable, match="names no slat_decoder_gs"):
        STAGES[-1].open(told)


def test_json_and_the_table(folder, tmp_path):
    quick = ("--iterations", "1", "--warmup", "0", "--steps", "1", "--device", "cpu", "--scope", "e2e")
    ended = call("bench", folder / "image", "--structure", folder / "rod.ply", *quick, "--json", "-")
    assert ended.code == 0, ended.err
    (row,) = json.loads(ended.out)["rows"]
    assert row["scope"] == "e2e" and row["res"].endswith(" voxels") and list(row["stages_ms"])[-1] == "copy"
    assert f"{row['res'].split()[0]} voxels of 16^3" in ended.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["image"], "image: a TRELLIS folder is measured on a mesh's voxels; give --structure MESH"),
        (["plain", "--structure", "rod.ply"], "--structure rod.ply: for a TRELLIS folder; plain is none"),
        (["gone", "--structure", "rod.ply"], "for a TRELLIS folder; gone is none"),
        (["image", "--structure", "open.ply"], "--structure open.ply: not closed"),
        (["image", "--structure", "gone.ply"], "gone.ply: no such file"),
        (["image", "--structure", "broken.ply"], "broken.ply: not readable as a mesh"),
        (["image", "--structure", "rod.ply", "--vs", "text"], "--vs text: not for TRELLIS's stages"),
        (["image", "--structure", "rod.ply", "--solver", "heun"], "--solver heun: not for TRELLIS's stages"),
        (["image", "--structure", "rod.ply", "--scope", "bare"], "--scope bare: a TRELLIS folder has net, e2e"),
        (["image", "--structure", "rod.ply", "--guidance", "0"], "--guidance 0.0: at least 1"),
        (["image", "--structure", "rod.ply", "--dtype", "int8"], "dtype=int8: not one of"),
        (["image", "--structure", "rod.ply", "--dtype", "fp16"], "dtype=fp16"),
        (["image", "--structure", "rod.ply", "--variants", "bf16"], "--variants bf16: of a TRELLIS folder they are"),
        (["image", "--structure", "rod.ply", "--variants", "xformers+flash_attn"], "one for attention joined by +"),
        (["plain", "--dtype", "bf16"], "--dtype bf16: of TRELLIS folders; leave it out"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, words, expected):
    for name in ("image", "text", "rod.ply", "open.ply"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "plain").mkdir()
    (tmp_path / "broken.ply").write_bytes(b"no mesh at all")
    monkeypatch.chdir(tmp_path)
    assert expected in mistake(*words)


def test_a_missing_file_of_a_late_stage_is_told_first(folder, tmp_path):
    torn = shutil.copytree(folder / "image", tmp_path / "torn")
    (torn / "ckpts" / "slat_dec_gs_swin8_B_64l8gs32_fp16.safetensors").unlink()
    assert "slat_dec_gs" in mistake(torn, "--structure", folder / "rod.ply")
