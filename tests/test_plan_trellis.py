"""The plan of a TRELLIS folder: both flows, counted from their files, with activations of grids and of voxels."""

from __future__ import annotations

import json

import pytest
import torch

from fastgen import plan
from fastgen.api import open_teacher
from fastgen.errors import UserError
from fastgen.student import save_teacher
from fastgen.teacher import read_denoiser
from fastgen.teachers import unet
from tests.commands import call
from tests.footprints import remember_footprints

PARTS = ("structure", "latent")
FEW = (
    *(f"stages.{part}.{setting}" for part in PARTS for setting in ("loop.micro=2", "method.lambda_vd=0")),
    "stages.latent.loop.micro_tokens=1000",
)


def held(module):
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@pytest.fixture(scope="module", autouse=True)
def remembered():
    with pytest.MonkeyPatch.context() as patch:
        yield remember_footprints(patch)


@pytest.fixture(scope="module")
def few(image_folder):
    return plan.plans(image_folder, "mdt", FEW)


def test_both_flows_are_counted_as_their_files_have_them(few, image_folder):
    assert [one.stage for one in few] == list(PARTS)
    for part, one in zip(PARTS, few, strict=True):
        student, teacher = read_denoiser(image_folder, part)[0], open_teacher(image_folder, part=part)
        teacher.denoiser.store_in(torch.float16)
        count, of = sum(p.numel() for p in student.parameters()), one.footprint
        assert of.weights["teacher"] == pytest.approx(held(teacher), rel=0.01)
        assert of.weights["teacher"] < 0.7 * of.weights["student"]
        assert of.weights["student"] == pytest.approx(held(student), rel=0.01)
        assert of.parameters == {"teacher": count, "student": count}
        assert of.moments == {"student": 8 * count} and of.gradients == 4 * count
        assert of.activations > 0 and of.codec == 0 and of.averages == {}
    assert [one.footprint.voxels for one in few] == [0, 1000]


def test_the_config_by_its_own_name_gives_the_same(few, image_folder):
    assert plan.plans(image_folder, "mdt/trellis-image-large", FEW) == few


def more(few, folder, *settings):
    """How much the activations of both parts grow with settings of their stages."""
    overrides = [f"stages.{setting}" for setting in settings]
    made = plan.plans(folder, "mdt", (*FEW, *overrides))
    return [b.footprint.activations / a.footprint.activations for a, b in zip(few, made, strict=True)]


def test_activations_grow_with_rows_and_with_voxels(few, image_folder):
    structure, latent = more(few, image_folder, "structure.loop.micro=4", "latent.loop.micro_tokens=2000")
    # Not of weights in half precision, which any batch has, nor of conditions where the rows are as many.
    assert 1.7 < structure < 2.1 and 1.3 < latent < 2.1


@pytest.mark.parametrize(
    ("setting", "low", "high"), [("loop.precision=fp32", 1.2, 2.1), ("student.gradient_checkpointing=true", 0.3, 0.95)]
)
def test_activations_follow_precision_and_checkpoints(setting, low, high, few, image_folder):
    assert all(low < one < high for one in more(few, image_folder, *(f"{part}.{setting}" for part in PARTS)))


def test_without_a_limit_each_row_is_a_shell_of_20_000_voxels_as_far_as_the_grid_has_room(image_folder):
    _, latent = plan.plans(
        image_folder, "mdt", (*FEW, "stages.latent.loop.micro_tokens=null", "stages.latent.loop.micro=1")
    )
    assert latent.footprint.voxels == 16**3 and latent.loop["voxels"] == 16**3


def test_a_folder_for_texts_takes_the_config_for_texts(text_folder, monkeypatch):
    asked, find = [], plan.find_config
    monkeypatch.setattr(plan, "find_config", lambda name: asked.append(name) or find(name))
    both = tuple(f"stages.{part}.method.lambda_vd=1" for part in PARTS)  # the others are without, which is quicker
    made = plan.plans(text_folder, "mdt", (*FEW, *both))
    assert asked == ["mdt/trellis-text-large"]
    assert all(one.footprint.activations > 0 for one in made)


def test_the_command_prints_both_and_one_object(image_folder):
    words = ("inspect", image_folder, *FEW, "--plan", "mdt")
    told = call(*words, "--vram", "24").out
    assert "stage structure, batch 256, micro 2, precision fp16\n" in told
    assert "stage latent, batch 256, micro 2, precision fp16, voxels 1000\n" in told
    assert told.count("  fits") == 2 and "1,000 voxels in made-up shells." in told
    made = json.loads(call(*words, "--json").out)
    assert (made["kind"], made["model"]) == ("plans", str(image_folder))
    structure, latent = made["plans"]
    assert (structure["stage"], latent["stage"]) == PARTS and structure["kind"] == latent["kind"] == "plan"
    assert "voxels" not in structure and latent["voxels"] == 1000
    assert latent["bytes"]["total"] > latent["bytes"]["activations_estimate"] > 0


def test_an_image_teacher_is_still_one_plan(tmp_path):
    net = unet.build(unet.UNetConfig(block_out_channels=(16, 32), layers_per_block=1), (1, 8, 8), 4)
    save_teacher(net, tmp_path / "unet", {})
    made = json.loads(call("inspect", tmp_path / "unet", "stages.mdt.loop.batch=4", "--plan", "mdt", "--json").out)
    assert made["kind"] == "plan" and made["bytes"]["activations_estimate"] > 0 and "voxels" not in made
    ended = call("inspect", tmp_path / "unet", "--plan", "mdt/trellis-image-large")
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mdt/trellis-text-large", "this config is for conditions of kind text, and .* for conditions of kind image"),
        ("mdt/default", "no stage of this config trains a flow, and .* is a TRELLIS folder"),
        ("reflow", "no stage of this config trains a flow"),
        ("mdtx", "mdtx: neither a YAML file"),
    ],
)
def test_a_config_for_something_else_is_refused_in_one_line(name, expected, image_folder):
    with pytest.raises(UserError, match=expected) as error:
        plan.plans(image_folder, name)
    assert "\n" not in str(error.value)
