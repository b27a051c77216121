"""A folder of latents: what its reader refuses, how it survives kills, and batches by the number of voxels."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastgen import files, inspection
from fastgen.config import plain, validate
from fastgen.data import shapes
from fastgen.data.shapes import LatentShapes, Manifest, by_voxels
from fastgen.errors import RunFailed, UserError
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
IMAGES = MANIFEST.model_copy(update={"condition": "image", "condition_encoder": "d", "conditions": 3})
TEXTS = IMAGES.model_copy(update={"condition": "text", "conditions": 2})
NAMES = {"a.obj": 5, "b/a.obj": 9, "b/c.ply": 1, "d.glb": 30}


def tensors(name):
    count = NAMES[name]
    generator = torch.Generator().manual_seed(count)
    return {
        "coords": torch.randperm(4096, generator=generator)[:count, None].expand(-1, 3).to(torch.int16) // 256,
        "latent": torch.randn(count, 2, generator=generator),
        "structure": torch.randn(2, 4, 4, 4, generator=generator),
    }


def conditions(name, manifest):
    generator = torch.Generator().manual_seed(NAMES[name] + 100)
    return torch.randn(manifest.conditions, 4, 3, generator=generator).half()


EMPTY = torch.arange(12.0).reshape(1, 4, 3)


def make(folder, names=tuple(NAMES), manifest=MANIFEST, told=""):
    """What the maker does, without networks."""
    shapes.agree(folder, manifest)
    shapes.begin(folder, manifest)
    for name in names:
        if not shapes.finished(folder, name, manifest, "0" * 64):
            shapes.write(folder, name, tensors(name), manifest, "0" * 64)
        if manifest.condition and not shapes.conditioned(folder, name, manifest, "0" * 64, told):
            shapes.write_conditions(folder, name, conditions(name, manifest), manifest, "0" * 64, told)
    if manifest.condition == "text":
        shapes.write_empty(folder, EMPTY, manifest)
    shapes.close(folder, names, {"x.obj": "x.obj: no faces"})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "set"
    make(folder)
    return folder


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """With texts."""
    folder = tmp_path_factory.mktemp("told") / "set"
    make(folder, manifest=TEXTS)
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


def test_conditions_come_back_by_shape_and_number(told, made):
    data = LatentShapes(told, mean=MEAN, std=STD)
    found = data.condition([3, 0, 3], torch.tensor([1, 0, 0]))
    far, near = conditions("d.glb", TEXTS), conditions("a.obj", TEXTS)
    assert found.dtype == torch.float32 and torch.equal(found, torch.stack([far[1], near[0], far[0]]).float())
    found += 1  # nobody else sees it
    assert torch.equal(data.condition([3], [1])[0], far[1].float())
    assert data.empty.dtype == torch.float32 and torch.equal(data.empty, EMPTY)
    assert LatentShapes(made, mean=MEAN, std=STD).empty is None
    with pytest.raises(IndexError):
        data.condition([0], [2])


def test_what_is_read_again_is_the_same_whether_it_is_kept_or_not(told, monkeypatch):
    kept, small = LatentShapes(told, mean=MEAN, std=STD), LatentShapes(told, mean=MEAN, std=STD)
    monkeypatch.setattr(small, "_room", 60)  # bytes: some of it
    for _ in range(2):
        a, b = kept.get([3, 1]), small.get([3, 1])
        assert torch.equal(a["structure"], b["structure"]) and torch.equal(a["latent"].feats, b["latent"].feats)
        a["latent"].feats.zero_()
        assert torch.equal(kept.condition([2, 1], [0, 1]), small.condition([2, 1], [0, 1]))
    assert len(small._kept) < len(kept._kept)


def test_folders_of_before_conditions_are_read(copy):
    """Neither their manifest nor their index speaks of conditions."""
    for name in ("manifest.json", "index.json"):
        told = json.loads((copy / name).read_text())
        for key in ("condition", "condition_encoder", "conditions"):
            told.pop(key, None)
            for entry in told.get("shapes", []):
                entry.pop(key, None)
        files.write_json(copy / name, told)
    data = LatentShapes(copy, mean=MEAN, std=STD)
    assert len(data) == 4 and data.manifest == MANIFEST and data.manifest.conditions == 0
    with safe_open(shapes.file_of(copy, "a.obj"), "pt") as file:  # as their files have it, so none is made again
        assert json.loads(file.metadata()["fastgen"])["manifest"] == "9c9008ab0d1d1518"
    with pytest.raises(UserError, match="made without conditions, and a flow needs them"):
        data.condition([0], [0])


def test_conditions_are_added_to_latents_that_are_there(copy, made):
    before = {path: path.stat().st_mtime_ns for path in copy.glob("shapes/**/*.safetensors")}
    make(copy, manifest=TEXTS)
    assert len(before) == 4 and all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert LatentShapes(copy, mean=MEAN, std=STD).condition([0], [1]).shape == (1, 4, 3)
    with pytest.raises(UserError, match="its shapes have conditions, asked for are none"):
        shapes.begin(copy, MANIFEST)
    with pytest.raises(UserError, match="made with condition='text', asked for is 'image'"):
        shapes.begin(copy, IMAGES)
    with pytest.raises(UserError, match="made with condition_encoder='d', asked for is 'e'"):
        shapes.begin(copy, TEXTS.model_copy(update={"condition_encoder": "e"}))


def test_other_numbers_of_texts_are_made_anew_and_of_pictures_refused(told, tmp_path):
    folder = shutil.copytree(told, tmp_path / "texts")
    more = TEXTS.model_copy(update={"conditions": 5})
    shapes.begin(folder, more)
    assert "not finished" in refusal(folder)  # the index was of the former ones
    make(folder, manifest=more)
    assert LatentShapes(folder, mean=MEAN, std=STD).condition([0], [4]).shape == (1, 4, 3)
    shapes.begin(tmp_path / "pictures", IMAGES)
    with pytest.raises(UserError, match="made with conditions=3, asked for is 4"):
        shapes.begin(tmp_path / "pictures", IMAGES.model_copy(update={"conditions": 4}))


def test_conditions_of_other_texts_are_made_again(told):
    assert shapes.conditioned(told, "a.obj", TEXTS, "0" * 64)
    assert not shapes.conditioned(told, "a.obj", TEXTS, "0" * 64, "other texts")
    assert not shapes.conditioned(told, "a.obj", TEXTS, "1" * 64)
    assert not shapes.conditioned(told, "a.obj", TEXTS.model_copy(update={"conditions": 3}), "0" * 64)
    assert not shapes.conditioned(told, "none.obj", TEXTS, "0" * 64)


@pytest.mark.parametrize("name", ["conditions/b/a.obj.safetensors", "empty.safetensors"])
def test_damaged_and_missing_conditions_are_refused_and_made_again(told, tmp_path, name):
    folder = shutil.copytree(told, tmp_path / "copy")

    def read():
        data = LatentShapes(folder, mean=MEAN, std=STD)
        return data.condition([1], [0]), data.empty

    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: missing, or not what index\.json says; run the same"):
        read()
    assert shapes.conditioned(folder, "b/a.obj", TEXTS, "0" * 64) == (name == "empty.safetensors")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        read()
    make(folder, manifest=TEXTS)
    assert tree_bytes(folder) == tree_bytes(told)


def test_conditions_of_unequal_lengths_do_not_make_a_batch(told, tmp_path):
    folder = shutil.copytree(told, tmp_path / "copy")
    shapes.write_conditions(folder, "a.obj", torch.zeros(2, 5, 3), TEXTS, "0" * 64)
    shapes.close(folder, sorted(NAMES), {})
    with pytest.raises(UserError, match=r"d\.glb\.safetensors: \[4, 3\], others of its folder are \[5, 3\]"):
        LatentShapes(folder, mean=MEAN, std=STD).condition([0, 3], [0, 0])


def test_empty_shapes_and_infinite_numbers_are_not_written(tmp_path):
    shapes.begin(tmp_path, TEXTS)
    none = {**tensors("a.obj"), "coords": torch.zeros(0, 3, dtype=torch.int16), "latent": torch.zeros(0, 2)}
    with pytest.raises(RunFailed, match=r"a\.obj: not one voxel"):
        shapes.write(tmp_path, "a.obj", none, TEXTS, "0" * 64)
    with pytest.raises(RunFailed, match="'text' is not finite"):  # float16 ends at 65504
        shapes.write(tmp_path, "a.obj", tensors("a.obj"), TEXTS, "0" * 64, torch.full((2, 4, 3), 1e5))
    for bad in (torch.zeros(1, 4, 3), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="for 2 conditions"):
            shapes.write_conditions(tmp_path, "a.obj", bad, TEXTS, "0" * 64)
    with pytest.raises(ValueError, match="empty text"):
        shapes.write_empty(tmp_path, EMPTY, IMAGES)
    with pytest.raises(UserError, match="3 conditions of the kind None"):
        validate(Manifest, {**plain(MANIFEST), "conditions": 3}, "manifest.json")


def test_inspect_counts_and_looks_at_every_file(told, tmp_path):
    found = inspection.inspect(told)
    assert found["kind"] == "latents" and (found["shapes"], found["voxels"], found["left_out"]) == (4, 45, 1)
    assert found["voxels_of_a_shape"] == [1, 30] and (found["condition"], found["empty_text"]) == ("text", True)
    assert (found["conditions_of_a_shape"], found["tokens_of_a_condition"]) == (2, 4)
    folder = shutil.copytree(told, tmp_path / "copy")
    shapes.conditions_of(folder, "d.glb").unlink()
    with pytest.raises(UserError, match=r"d\.glb\.safetensors: missing"):
        inspection.inspect(folder)


@pytest.mark.parametrize("manifest", [MANIFEST, TEXTS])
def test_a_kill_at_any_instant_leaves_whole_files_and_the_same_end(tmp_path, manifest):
    names = ("a.obj", "b/c.ply")
    make(tmp_path / "whole", names, manifest)
    for instant in range(100):
        folder = tmp_path / str(instant)
        died = dies_at(instant, lambda folder=folder: make(folder, names, manifest))
        for file in folder.glob("shapes/**/[!.]*.safetensors"):
            assert load_file(file).keys() == {"coords", "latent", "structure"}
        if (folder / "index.json").exists():
            data = LatentShapes(folder, mean=MEAN, std=STD)
            assert len(data) == 2 and data.describe()["conditions_of_a_shape"] == manifest.conditions
        make(folder, names, manifest)
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
