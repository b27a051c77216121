"""Shapes with their conditions as rows of a training set."""

from __future__ import annotations

import pytest
import torch

from fastgen.config import validate
from fastgen.data import DataConfig, detect, open_data
from fastgen.data.shape_rows import ShapeRows
from fastgen.data.shapes import LatentShapes
from fastgen.data.source import Source
from fastgen.errors import UserError
from fastgen.sparse import Voxels
from tests.data.test_shapes import EMPTY, IMAGES, MANIFEST, MEAN, NAMES, STD, TEXTS, conditions, make, tensors

ORDER = sorted(NAMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    for manifest in (MANIFEST, IMAGES, TEXTS):
        make(root / str(manifest.condition), manifest=manifest)
    return root


def opened(folder):
    return LatentShapes(folder, mean=MEAN, std=STD)


@pytest.mark.parametrize(("manifest", "part"), [(IMAGES, "latent"), (TEXTS, "structure")])
def test_a_row_is_a_shape_with_one_of_its_conditions(folders, manifest, part):
    rows = ShapeRows(opened(folders / manifest.condition), part, manifest.condition)
    each = manifest.conditions
    assert len(rows) == 4 * each and rows.num_classes is None and rows.captions is None
    assert rows.shape == ((2, 4, 4, 4) if part == "structure" else (2,))
    index = torch.tensor([4 * each - 1, 0, each + 1])
    batch = rows.get(index)
    places = [(ORDER[3], each - 1), (ORDER[0], 0), (ORDER[1], 1)]
    told = torch.stack([conditions(name, manifest)[i] for name, i in places]).float()
    assert batch.keys() == {"x0", f"cond.{manifest.condition}"}
    assert torch.equal(batch[f"cond.{manifest.condition}"], told)
    x0 = batch["x0"]
    assert isinstance(x0, Voxels) == (part == "latent")
    for found, (name, _) in zip(x0.parts() if part == "latent" else x0, places, strict=True):
        assert torch.equal(found, tensors(name)[part])


def test_rows_depend_on_their_number_alone(folders):
    one, other = (ShapeRows(opened(folders / "text"), "latent") for _ in range(2))
    other.get(torch.arange(7))
    for index in range(len(one)):
        a, b = one.get(torch.tensor([index])), other.get(torch.tensor([3, index]))
        assert torch.equal(a["x0"].feats, b["x0"][1].feats) and torch.equal(a["x0"].coords, b["x0"][1].coords)
        assert torch.equal(a["cond.text"][0], b["cond.text"][1])


def test_an_epoch_has_every_pair_once(folders):
    rows = ShapeRows(opened(folders / "image"), "structure")
    source = Source(rows, seed=3)
    pairs = {(shape, choice): 0 for shape in range(4) for choice in range(3)}
    keys = {conditions(ORDER[shape], IMAGES)[choice].float().sum().item(): (shape, choice) for shape, choice in pairs}
    assert len(keys) == len(pairs)
    for batch in torch.arange(12, 24).split(5):  # the second epoch, in unequal batches
        found = source.get(batch)
        for x0, told in zip(found["x0"], found["cond.image"], strict=True):
            shape, choice = keys[told.sum().item()]
            assert torch.equal(x0, tensors(ORDER[shape])["structure"])
            pairs[shape, choice] += 1
    assert set(pairs.values()) == {1}


def test_tokens_are_voxels_or_the_cells_of_the_grid(folders):
    shapes = opened(folders / "text")
    index = torch.tensor([6, 7, 0, 3])
    assert ShapeRows(shapes, "latent").tokens(index) == [30, 30, 5, 9]
    assert ShapeRows(shapes, "structure").tokens(index) == [64] * 4
    batch = ShapeRows(shapes, "latent").get(index)["x0"]
    assert ShapeRows(shapes, "latent").tokens(index) == list(batch.sites.sizes)


def test_the_empty_text_is_there_for_guidance(folders):
    assert torch.equal(ShapeRows(opened(folders / "text"), "latent").empty, EMPTY)
    assert ShapeRows(opened(folders / "image"), "latent").empty is None


def test_a_flow_needs_conditions_of_its_kind(folders):
    with pytest.raises(UserError, match="None: latents without conditions, and a flow needs them; run"):
        ShapeRows(opened(folders / "None"), "structure")
    with pytest.raises(UserError, match="of the kind 'text', the flow is told 'image'"):
        ShapeRows(opened(folders / "text"), "structure", "image")


@pytest.mark.parametrize("kind", ["latents", "auto"])
def test_as_data_of_a_config(folders, kind):
    config = validate(DataConfig, {"kind": kind, "path": str(folders / "text")}, "data")
    assert detect(folders / "text") == "latents"
    with pytest.raises(UserError, match="latents of shapes, which a train stage reads that has part: structure"):
        open_data(config)
    with pytest.raises(UserError, match=r"data\.size is not used by kind=latents"):
        open_data(config.model_copy(update={"size": 8}))


def test_latents_need_a_path():
    with pytest.raises(UserError, match=r"data\.kind=latents needs data\.path"):
        open_data(DataConfig(kind="latents"))
