"""A folder of latents: what its reader refuses, how it survives kills, and batches by the number of voxels."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fastgen import files
from fastgen.data import shapes
from fastgen.data.shapes import LatentShapes, Manifest, by_voxels
from fastgen.errors import UserError
from tests.commands import tree_bytes
from tests.crash import dies_at

MEAN, STD = (0.5, -1.0), (2.0, 0.25)
MANIFEST = Manifest(
    image_encoder="a",
    latent_encoder="b",
    structure_encoder="c",
    views=2,
    size=32,
    renderer="none",
    radius=2,
    fov=40,
    up="y",
    seed=0,
    resolution=16,
    structure=(2, 4, 4, 4),
    mean=MEAN,
    std=STD,
)
NAMES = {"a.obj": 5, "b/a.obj": 9, "b/c.ply": 1, "d.glb": 30}


def tensors(name):
    count = NAMES[name]
    generator = torch.Generator().manual_seed(count)
    return {
        "coords": torch.randperm(4096, generator=generator)[:count, None].expand(-1, 3).to(torch.int16) // 256,
        "latent": torch.randn(count, 2, generator=generator),
        "structure": torch.randn(2, 4, 4, 4, generator=generator),
    }


def make(folder, names=tuple(NAMES)):
    """What the maker does, without networks."""
    shapes.agree(folder, MANIFEST)
    shapes.begin(folder, MANIFEST)
    for name in names:
        if not shapes.finished(folder, name, MANIFEST, "0" * 64):
            shapes.write(folder, name, tensors(name), MANIFEST, "0" * 64)
    shapes.close(folder, names, {"x.obj": "x.obj: no faces"})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "set"
    make(folder)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def refusal(folder, **options):
    with pytest.raises(UserError) as error:
        LatentShapes(folder, **{"mean": MEAN, "std": STD, **options}).get([0])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shapes_come_back_as_batches(made):
    data = LatentShapes(made, mean=MEAN, std=STD)
    assert data.names == sorted(NAMES) and data.counts == [NAMES[name] for name in sorted(NAMES)]
    batch = data.get([3, 0])
    latent, first, second = batch["latent"], tensors("d.glb"), tensors("a.obj")
    assert latent.batch == 2 and latent.sites.sizes == (30, 5) and latent.coords.dtype == torch.int32
    assert torch.equal(latent.coords[:30, 1:], first["coords"].int()) and latent.coords[:30, 0].eq(0).all()
    assert torch.equal(latent.feats, torch.cat([first["latent"], second["latent"]]))
    assert torch.equal(batch["structure"], torch.stack([first["structure"], second["structure"]]))
    assert torch.equal(data.get(torch.tensor([0]))["latent"].feats, second["latent"])


def test_decodable_undoes_the_normalisation(made):
    data = LatentShapes(made, mean=MEAN, std=STD)
    feats = data.decodable(data.get([0])["latent"]).feats
    torch.testing.assert_close(feats, tensors("a.obj")["latent"] * torch.tensor(STD) + torch.tensor(MEAN))


def test_another_normalisation_is_refused(made):
    assert "normalised with mean=[0.5, -1.0], the pipeline has [0.5, -1.5]" in refusal(made, mean=(0.5, -1.5))
    assert "normalised with std=[2.0, 0.25], the pipeline has [2.0]" in refusal(made, std=(2.0,))
    LatentShapes(made, mean=list(MEAN), std=list(STD))


def test_what_is_no_finished_set_is_refused(copy, tmp_path):
    assert "no folder of latents (manifest.json is missing)" in refusal(tmp_path)
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").unlink()
    assert "not finished; run the same `fastgen latents` again" in refusal(copy)
    files.write_json(copy / "index.json", {"shapes": [], "skipped": {}})
    assert "no shapes" in refusal(copy)
    index["shapes"][0]["voxels"] = 0
    files.write_json(copy / "index.json", index)
    assert "'shapes.0.voxels'" in refusal(copy)


def test_a_damaged_or_missing_file_is_refused_and_made_again(copy):
    path = shapes.file_of(copy, "a.obj")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "a.obj.safetensors: missing, or not what index.json says" in refusal(copy)
    assert not shapes.finished(copy, "a.obj", MANIFEST, "0" * 64)
    path.write_bytes(data[:50])
    assert not shapes.finished(copy, "a.obj", MANIFEST, "0" * 64)
    path.unlink()
    assert "a.obj.safetensors: missing" in refusal(copy)


def test_a_changed_mesh_or_recipe_is_made_again(made, caplog):
    assert shapes.finished(made, "a.obj", MANIFEST, "0" * 64) and not caplog.text
    assert not shapes.finished(made, "a.obj", MANIFEST, "1" * 64) and "its mesh has changed" in caplog.text
    assert not shapes.finished(made, "a.obj", MANIFEST.model_copy(update={"views": 3}), "0" * 64)


def test_a_folder_of_other_latents_or_things_is_refused(copy, tmp_path):
    with pytest.raises(UserError, match="made with views=2, asked for is 3; choose another folder"):
        shapes.begin(copy, MANIFEST.model_copy(update={"views": 3}))
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="no folder of latents stands here"):
        shapes.begin(copy, MANIFEST)
    (copy / "index.json").unlink()
    with pytest.raises(UserError, match=r"latents without manifest\.json"):
        shapes.begin(copy, MANIFEST)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="stands here"):
        shapes.begin(tmp_path / "file", MANIFEST)


def test_a_kill_at_any_instant_leaves_whole_files_and_the_same_end(tmp_path):
    names = ("a.obj", "b/c.ply")
    make(tmp_path / "whole", names)
    for instant in range(100):
        folder = tmp_path / str(instant)
        died = dies_at(instant, lambda folder=folder: make(folder, names))
        for file in folder.glob("shapes/**/[!.]*.safetensors"):
            assert load_file(file).keys() == {"coords", "latent", "structure"}
        if (folder / "index.json").exists():
            assert len(LatentShapes(folder, mean=MEAN, std=STD)) == 2
        make(folder, names)
        assert tree_bytes(folder) == tree_bytes(tmp_path / "whole")
        if not died:
            break
    assert instant > 10 and not died


@pytest.mark.parametrize("seed", [0, 1])
def test_batches_hold_every_shape_once_and_keep_the_limit(seed):
    counts = torch.randint(1, 1000, (200,), generator=torch.Generator().manual_seed(seed)).tolist()
    for epoch in range(2):
        batches = by_voxels(counts, 1500, seed=seed, epoch=epoch)
        assert sorted(number for batch in batches for number in batch) == list(range(200))
        assert all(sum(counts[number] for number in batch) <= 1500 for batch in batches)
        assert len(batches) < 1.25 * sum(counts) / 1500
        assert batches == by_voxels(counts, 1500, seed=seed, epoch=epoch)
    assert batches != by_voxels(counts, 1500, seed=seed)
    assert batches != by_voxels(counts, 1500, seed=seed + 1, epoch=1)


def test_batches_of_a_folder(made):
    data = LatentShapes(made, mean=MEAN, std=STD)
    assert sorted(i for batch in data.batches(30, seed=0) for i in batch) == [0, 1, 2, 3] and [3] in data.batches(
        30, seed=0
    )
    assert len(data.batches(45, seed=0)) == 1
    with pytest.raises(UserError, match=r"d\.glb has 30 voxels, more than the 29 of a batch"):
        data.batches(29, seed=0)


@pytest.mark.parametrize(("counts", "most"), [([], 5), ([3, 0], 5), ([6, 1], 5)])
def test_empty_sets_and_sets_beyond_the_limit_have_no_batches(counts, most):
    with pytest.raises(ValueError, match="sets of"):
        by_voxels(counts, most, seed=0)
