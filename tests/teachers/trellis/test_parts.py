"""The flows of a TRELLIS folder one by one, by the names of its parts."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.api import open_teacher
from fastgen.errors import UserError
from fastgen.student import save_teacher
from fastgen.teacher import read_denoiser
from fastgen.teachers.mixture import Mixture
from fastgen.teachers.trellis import PARTS
from fastgen.teachers.trellis.conditions import TextEncoder
from fastgen.zoo import trellis

FLOW = "ckpts/ss_flow_img_dit_L_16l8_fp16"


def mistake(act):
    with pytest.raises(UserError) as told:
        act()
    assert "\n" not in str(told.value)
    return str(told.value)


def halve(folder):
    """The blocks' matrices in float16, as in released files."""
    file = folder / f"{FLOW}.safetensors"
    stored = load_file(file)
    save_file({k: v.half() if k.startswith("blocks.") and ".mlp." in k else v for k, v in stored.items()}, file)
    return load_file(file)


def test_each_part_is_a_denoiser_in_float32(copy):
    stored = halve(copy)
    structure, told = read_denoiser(copy, part="structure")
    assert structure.part == "structure" and structure.shape == (8, 4, 4, 4) and told["kind"] == "teacher"
    weights = structure.net.state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(torch.equal(weights[key], value.float()) for key, value in stored.items())
    assert told["facts"]["precision"] == "float32, in part widened from float16"
    latent, told = read_denoiser(copy, part="latent")
    assert latent.part == "latent" and latent.shape == (8,) and told["facts"]["precision"] == "float32"
    assert latent.normalization == (trellis.MEAN, trellis.STD)
    assert told["facts"]["normalization"] == {"mean": list(trellis.MEAN), "std": list(trellis.STD)}


def test_a_text_flow_knows_the_empty_text_where_its_encoder_is_here(text_folder, tmp_path):
    empty = TextEncoder(str(text_folder / "encoder")).empty
    for part in PARTS:
        denoiser, _ = read_denoiser(text_folder, part=part)
        assert denoiser.has_null and torch.equal(denoiser.empty, empty)
    bare = shutil.copytree(text_folder, tmp_path / "bare")
    shutil.rmtree(bare / "encoder")
    assert not read_denoiser(bare, part="latent")[0].has_null


def test_a_teacher_of_a_part_has_that_parts_hash_and_the_folders_licence(copy):
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# It\n")
    first = {part: open_teacher(copy, part=part).sha256 for part in PARTS}
    assert first["structure"] != first["latent"]
    halve(copy)
    second = {part: open_teacher(copy, part=part) for part in PARTS}
    assert second["latent"].sha256 == first["latent"] and second["structure"].sha256 != first["structure"]
    assert second["latent"].facts["license"] == "mit" and second["latent"].facts["teacher"] == "copy"
    assert not any(p.requires_grad for p in second["latent"].parameters())


def test_a_folder_of_two_flows_wants_a_part(image_folder, tmp_path):
    message = mistake(lambda: read_denoiser(image_folder))
    assert "part=structure or part=latent" in message
    assert "no part 'structur' (did you mean 'structure'?)" in mistake(lambda: read_denoiser(image_folder, "structur"))
    mixture = Mixture(torch.ones(2), torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.eye(2).expand(2, 2, 2))
    save_teacher(mixture, tmp_path / "mixture", {})
    message = mistake(lambda: open_teacher(tmp_path / "mixture", part="latent"))
    assert "part=latent: only TRELLIS folders have parts" in message
    closed = {"family": "mixture", "means": [[0.0]], "sd": 1.0}
    assert "a closed-form teacher is none" in mistake(lambda: open_teacher(closed, part="latent"))
