"""The flows of a TRELLIS folder one by one, by the names of its parts, and a flow's own folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.api import open_teacher
from fastgen.errors import UserError
from fastgen.paths import TrigFlow
from fastgen.samplers.flow_euler import FlowEuler
from fastgen.student import SamplerSpec, Student, save_teacher
from fastgen.teacher import Teacher, read_denoiser
from fastgen.teachers.mixture import Mixture
from fastgen.teachers.trellis import PARTS
from fastgen.teachers.trellis.conditions import TextEncoder
from fastgen.teachers.trellis.flows import LatentDenoiser, StructureDenoiser
from fastgen.teachers.trellis.models import make
from fastgen.zoo import trellis
from tests.teachers.trellis.nets import small, told, voxels

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


# --- a flow's own folder


@pytest.fixture(params=PARTS)
def flow(request):
    """A small text flow in float32, and noise for it."""
    torch.manual_seed(0)
    kind, name = {
        "structure": (StructureDenoiser, "SparseStructureFlowModel"),
        "latent": (LatentDenoiser, "SLatFlowModel"),
    }[request.param]
    more = {"normalization": ((0.5, 0.1, 0.0), (1.0, 2.0, 3.0))} if request.param == "latent" else {}
    made = kind(small(name).float().eval(), condition="text", empty=torch.randn(1, 5, 8), **more)
    x = voxels(3).float() if request.param == "latent" else torch.randn(2, 3, 4, 4, 4)
    return made, x


def answer(denoiser, x, **options):
    """With guidance, so that the null condition speaks too."""
    cond, t = {"text": told()[1].float()}, torch.tensor([0.9, 0.2])
    with torch.no_grad():
        found = Teacher(denoiser)(x, t, cond, guidance=3.0, **options).x0
    return getattr(found, "feats", found)


def test_a_flow_is_saved_as_a_stem_and_answers_the_same(flow, tmp_path):
    denoiser, x = flow
    save_teacher(denoiser, tmp_path / "flow", {"license": "mit"})
    stem = json.loads((tmp_path / "flow/flow.json").read_text())
    net = make(stem["name"], stem["args"], "flow.json")  # by the official class and its arguments
    assert stem["args"]["use_fp16"] is False and type(net) is type(denoiser.net)
    assert load_file(tmp_path / "flow/flow.safetensors").keys() == net.state_dict().keys()
    again, data = read_denoiser(tmp_path / "flow")
    assert type(again) is type(denoiser) and data["facts"] == {"license": "mit"} and again.path == denoiser.path
    assert again.condition == "text" and torch.equal(again.empty, denoiser.empty)
    assert getattr(again, "normalization", 0) == getattr(denoiser, "normalization", 0)
    assert torch.equal(answer(again, x), answer(denoiser, x))
    assert read_denoiser(tmp_path / "flow", part=denoiser.part)[0].part == denoiser.part
    other = next(part for part in PARTS if part != denoiser.part)
    message = mistake(lambda: read_denoiser(tmp_path / "flow", part=other))
    assert f"this folder is the {denoiser.part} flow alone" in message


def test_half_precision_is_widened_when_it_is_written(flow, tmp_path):
    denoiser, _ = flow
    denoiser.net.to_torso(torch.float16)
    save_teacher(denoiser, tmp_path / "flow", {})
    assert {value.dtype for value in load_file(tmp_path / "flow/flow.safetensors").values()} == {torch.float32}
    assert denoiser.net.torso_dtype == torch.float16  # what is saved is left as it was


def test_a_student_of_a_flow_is_a_folder(flow, tmp_path):
    denoiser, x = flow
    times = {n: FlowEuler(steps=n, rescale_t=3).times() for n in (1, 2)}
    spec = SamplerSpec(path=denoiser.path, times=times, renoise=True)
    Student(denoiser, spec, {"method": "mdt", "license": "mit"}).save(tmp_path / "student")
    again = Student.load(tmp_path / "student")
    assert again.sampler == spec and again.facts["method"] == "mdt"
    assert torch.equal(answer(again.denoiser, x), answer(denoiser, x))


def test_a_student_with_a_second_time_is_a_folder_too(flow, tmp_path):
    denoiser, x = flow
    denoiser.add_gap()
    torch.nn.init.ones_(denoiser.extra["gap"].outer.weight)
    save_teacher(denoiser, tmp_path / "flow", {})
    again, cond = read_denoiser(tmp_path / "flow")[0], {"text": told()[1].float()}
    t = torch.tensor([0.9, 0.2])
    found, before = (d(x, t, cond, r=t / 2).x0 for d in (again, denoiser))
    assert torch.equal(getattr(found, "feats", found), getattr(before, "feats", before))


def test_a_flow_on_another_path_keeps_it(tmp_path):
    torch.manual_seed(0)
    denoiser = StructureDenoiser(small("SparseStructureFlowModel").float(), path=TrigFlow(sd=1.0), time_scale=1.0)
    save_teacher(denoiser, tmp_path / "flow", {})
    again = read_denoiser(tmp_path / "flow")[0]
    assert again.path == TrigFlow(sd=1.0) and again.time_scale == 1.0 and again.empty is None


def spoil(folder, **entries):
    data = json.loads((folder / "fastgen.json").read_text())
    data["denoiser"] |= entries
    (folder / "fastgen.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "flow.json").unlink(), "flow.json: no such file"),
        (lambda f: (f / "flow.safetensors").unlink(), "flow.safetensors: no such file"),
        (lambda f: (f / "empty.safetensors").unlink(), "empty.safetensors: no such file"),
        (lambda f: save_file({"text": torch.zeros(1, 5, 7)}, f / "empty.safetensors"), "encoding of 8 channels"),
        (lambda f: save_file({"a": torch.zeros(1)}, f / "flow.safetensors"), "no tensor 'pos_emb'"),
        (lambda f: spoil(f, part="latent"), "needs a SLatFlowModel"),
        (lambda f: spoil(f, part="mesh"), "'part'"),
        (lambda f: spoil(f, shape=[3, 5, 5, 5]), "fastgen.json says (3, 5, 5, 5)"),
    ],
)
def test_damaged_flows_are_told_in_one_line(tmp_path, damage, expected):
    torch.manual_seed(0)
    net = small("SparseStructureFlowModel").float()
    save_teacher(StructureDenoiser(net, condition="text", empty=torch.randn(1, 5, 8)), tmp_path / "flow", {})
    damage(tmp_path / "flow")
    assert expected in mistake(lambda: read_denoiser(tmp_path / "flow"))


def test_every_entry_of_a_description_is_needed(tmp_path):
    torch.manual_seed(0)
    save_teacher(LatentDenoiser(small("SLatFlowModel").float()), tmp_path / "flow", {})
    text = (tmp_path / "flow/fastgen.json").read_text()
    good = json.loads(text)
    for key in good["denoiser"]:
        for entry in ({k: v for k, v in good["denoiser"].items() if k != key}, good["denoiser"] | {key: {"name": "?"}}):
            (tmp_path / "flow/fastgen.json").write_text(json.dumps(good | {"denoiser": entry}))
            mistake(lambda: read_denoiser(tmp_path / "flow"))
