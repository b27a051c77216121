"""Flows put into a TRELLIS folder: what comes along, how students are sampled, and what is refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastgen.samplers.flow_euler import FlowEuler
from fastgen.shapes import Shapes
from fastgen.stages.assemble import rescale_of
from fastgen.student import SamplerSpec, Student, save_teacher
from fastgen.teacher import read_denoiser
from fastgen.teachers.trellis.flows import StructureDenoiser
from fastgen.teachers.trellis.folder import FLOWS, ROLES, TrellisFolder
from fastgen.teachers.trellis.models import make
from tests.commands import call, tree_bytes
from tests.crash import dies_at

STEP = 3e-4  # what the students here have moved, about
PARTS = ("structure", "latent")


def moved(base, part, size=STEP):
    """A base's flow whose weights have moved a little."""
    denoiser = read_denoiser(base, part)[0]
    torch.manual_seed(1)
    for parameter in denoiser.net.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return denoiser


def spec(denoiser, steps=(1, 2), rescale_t=3.0, **options):
    times = {n: FlowEuler(steps=n, rescale_t=rescale_t).times() for n in steps}
    return SamplerSpec(path=denoiser.path, times=times, **options)


def student(base, part, folder, size=STEP, **options):
    denoiser = moved(base, part, size)
    Student(denoiser, spec(denoiser, **options), {"method": "mdt", "license": "mit"}).save(folder)
    return folder


@pytest.fixture(scope="module")
def students(text_folder, tmp_path_factory):
    """A student of each part of the text folder."""
    root = tmp_path_factory.mktemp("students")
    return {part: student(text_folder, part, root / part) for part in PARTS}


def run(tmp_path, base, **stage):
    """`fastgen distill` of that one stage; paths by key."""
    entry = {key: str(value) if isinstance(value, os.PathLike) else value for key, value in stage.items()}
    config = {"threads": 1, "stages": [{"name": "made", "stage": "assemble", "base": str(base), **entry}]}
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return call("distill", tmp_path / "config.yaml", f"out={tmp_path / 'run'}", "device=cpu")


def made(tmp_path, base, **stage):
    ended = run(tmp_path, base, **stage)
    assert ended.code == 0, ended.err
    return tmp_path / "run/made/model"


def mistake(tmp_path, base, **stage):
    ended = run(tmp_path, base, **stage)
    assert ended.code == 2 and ended.message.startswith("fastgen: ") and "Traceback" not in ended.err, ended
    assert not (tmp_path / "run/made/model").exists()
    return ended.message


def test_both_students_make_a_whole_official_folder(text_folder, students, tmp_path):
    folder = made(tmp_path, text_folder, **students)
    told, base = (json.loads((f / "pipeline.json").read_text()) for f in (folder, text_folder))
    for key in ("sparse_structure_sampler", "slat_sampler"):
        assert told["args"].pop(key) == {
            "name": "FlowEulerGuidanceIntervalSampler",
            "args": {"sigma_min": 1e-5},
            "params": {"steps": 1, "rescale_t": 3.0, "cfg_strength": 0.0, "cfg_interval": [2.0, 2.0]},
        }
        base["args"].pop(key)
    for part, role in FLOWS.items():
        assert told["args"]["models"].pop(role) == f"ckpts/{part}_flow"
        base["args"]["models"].pop(role)
    assert told == base
    found = TrellisFolder.read(folder)
    assert found.student.steps == (1, 2) and found.student.sampler == "euler" and found.student.parts == PARTS
    for part, source in students.items():
        assert (
            load_file(folder / f"ckpts/{part}_flow.safetensors").keys()
            == found.network(FLOWS[part]).state_dict().keys()
        )
        ours, theirs = (load_file(f) for f in (folder / f"ckpts/{part}_flow.safetensors", source / "flow.safetensors"))
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
        stem = json.loads((folder / f"ckpts/{part}_flow.json").read_text())
        make(stem["name"], stem["args"], "flow.json").load_state_dict(ours, strict=True)
    assert not list((folder / "ckpts").glob("*_flow_txt_*"))  # what was replaced is gone
    for role in ROLES.keys() - set(FLOWS.values()):
        file = found.files(role)[1]
        assert file.samefile(text_folder / file.relative_to(folder))  # linked, not copied
    assert (folder / "encoder/config.json").exists() and found.encoder == str(folder / "encoder")
    assert read_denoiser(folder, "latent")[1]["kind"] == "student"


def test_a_base_keeps_its_files_as_they_were(text_folder, students, tmp_path):
    base = shutil.copytree(text_folder, tmp_path / "base")
    kept = base / "ckpts/slat_dec_mesh_swin8_B_64l8m256c_fp16.safetensors"
    kept.chmod(0o600)
    folder = made(tmp_path, base, structure=students["structure"])
    assert kept.stat().st_mode & 0o777 == 0o600 and kept.stat().st_nlink == 2
    shutil.rmtree(folder)
    assert load_file(kept)


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_no_half_a_folder_and_the_same_end(text_folder, students, tmp_path):
    tree = tree_bytes(text_folder)
    whole = tree_bytes(made(tmp_path / "whole", text_folder, **students))
    for instant in range(200):
        out = tmp_path / str(instant)
        died = dies_at(instant, lambda out=out: made(out, text_folder, **students))
        if (model := out / "run/made/model").exists():
            assert tree_bytes(model) == whole
        if not (out / "run/made/stage.json").exists():
            assert call("distill", out / "config.yaml", f"out={out / 'run'}", "device=cpu", "--resume").code == 0
        assert tree_bytes(model) == whole and tree_bytes(text_folder) == tree
        shutil.rmtree(out)
        if not died:
            break
    assert instant > 10 and not died


def test_where_links_cannot_be_files_are_copied(text_folder, students, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = made(tmp_path, text_folder, **students)
    name = "ckpts/slat_dec_mesh_swin8_B_64l8m256c_fp16.safetensors"
    assert (folder / name).read_bytes() == (text_folder / name).read_bytes()
    assert not (folder / name).samefile(text_folder / name)


def test_one_student_leaves_the_other_stage_to_the_teacher(text_folder, students, tmp_path):
    folder = made(tmp_path, text_folder, latent=students["latent"])
    found, base = TrellisFolder.read(folder), TrellisFolder.read(text_folder)
    assert found.structure == base.structure and found.latent != base.latent and found.student.parts == ("latent",)
    assert [found.kind(part) for part in PARTS] == ["teacher", "student"]
    shapes = Shapes(found)
    assert shapes.settings("structure", steps=2, cfg_strength=1.0).steps == 25  # steps are the student's
    assert shapes.settings("structure", steps=2, cfg_strength=1.0).cfg_strength == 1.0
    assert shapes.settings("latent", steps=2, cfg_strength=1.0).guided == 0


def test_trained_teachers_keep_the_bases_samplers(text_folder, tmp_path):
    (tmp_path / "flows").mkdir()
    flows = {part: tmp_path / "flows" / part for part in PARTS}
    for part, folder in flows.items():
        save_teacher(moved(text_folder, part), folder, {"license": "mit"})
    folder = made(tmp_path, text_folder, **flows)
    found, base = TrellisFolder.read(folder), TrellisFolder.read(text_folder)
    assert (found.structure, found.latent, found.student) == (base.structure, base.latent, None)
    assert not (folder / "fastgen.json").exists()
    denoiser, data = read_denoiser(folder, "structure")
    assert data["kind"] == "teacher" and data["facts"]["license"] == "mit"
    assert torch.equal(denoiser.net.out_layer.weight, moved(text_folder, "structure").net.out_layer.weight)


def test_stems_that_lie_elsewhere_are_brought_along(text_folder, students, tmp_path):
    base = shutil.copytree(text_folder, tmp_path / "text")
    (tmp_path / "other").mkdir()
    told = json.loads((base / "pipeline.json").read_text())
    role, stem = "slat_decoder_mesh", told["args"]["models"]["slat_decoder_mesh"]
    for ending in ("json", "safetensors"):
        shutil.move(base / f"{stem}.{ending}", tmp_path / f"other/mesh.{ending}")
    told["args"]["models"][role] = "../other/mesh"
    told["args"]["models"]["slat_decoder_rf"] = "somebody/else/ckpts/rf"  # of the hub: left to be fetched when wanted
    (base / "pipeline.json").write_text(json.dumps(told))
    folder = made(tmp_path, base, **students)
    shutil.rmtree(tmp_path / "other")
    stems = json.loads((folder / "pipeline.json").read_text())["args"]["models"]
    assert stems[role] == "ckpts/mesh" and stems["slat_decoder_rf"] == "somebody/else/ckpts/rf"
    assert type(TrellisFolder.read(folder).network(role)).__name__ == "SLatMeshDecoder"


def test_a_run_goes_on_and_notices_another_input(text_folder, students, tmp_path):
    base = shutil.copytree(text_folder, tmp_path / "base")
    made(tmp_path, base, **students)
    again = call("distill", tmp_path / "config.yaml", f"out={tmp_path / 'run'}", "device=cpu", "--resume")
    assert again.code == 0 and "done before" in again.err
    file = base / "ckpts/slat_dec_rf_swin8_B_64l8r16_fp16.json"
    file.write_text(file.read_text() + " ")
    ended = call("distill", tmp_path / "config.yaml", f"out={tmp_path / 'run'}", "device=cpu", "--resume")
    assert ended.code == 2 and "content of" in ended.message


def test_the_card_says_what_it_is(text_folder, students, tmp_path):
    folder = made(tmp_path, text_folder, sampler="renoise", **students)
    text = (folder / "README.md").read_text()
    for words in ("license: mit", "A 1, 2-step student", "Steps: 1, 2", "[1.0], [1.0, 0.75]", "Sampler: renoise"):
        assert words in text, words
    assert "is kept in float32: rounded to float16, " in text and "method mdt" in text
    told = json.loads((folder / "fastgen.json").read_text())
    assert told["shapes"] == {"steps": [1, 2], "sampler": "renoise", "parts": list(PARTS)}
    shares = told["facts"]["precision"]["structure"]
    assert 0 < shares["float16"] < shares["bfloat16"] < 1


def test_shares_that_half_precision_cannot_tell(text_folder, tmp_path):
    folder = student(text_folder, "structure", tmp_path / "same", size=0.0)
    told = json.loads((made(tmp_path, text_folder, structure=folder) / "fastgen.json").read_text())
    assert told["facts"]["precision"]["structure"] == {"float16": 1.0, "bfloat16": 1.0}


@pytest.mark.parametrize("part", PARTS)
def test_float16_is_measured_and_told(text_folder, tmp_path, part):
    """Of a student that moved by about what float16 resolves a good share is lost; of one that moved far, little."""
    shares = []
    for size in (2e-5, 2e-3):
        (tmp_path / str(size)).mkdir()
        flow = student(text_folder, part, tmp_path / f"{size}/flow", size=size)
        ended = run(tmp_path / str(size), text_folder, dtype="fp16", **{part: flow})
        assert ended.code == 0 and f"{part} in float16: rounding its weights changes" in ended.err
        folder = tmp_path / f"{size}/run/made/model"
        told = json.loads((folder / "fastgen.json").read_text())["facts"]["precision"][part]
        shares.append(told["error"] / told["change"])
        stored = load_file(folder / f"ckpts/{part}_flow.safetensors")
        assert stored["blocks.0.mlp.mlp.0.weight"].dtype == torch.float16
        assert stored["out_layer.weight"].dtype == torch.float32
        assert json.loads((folder / f"ckpts/{part}_flow.json").read_text())["args"]["use_fp16"] is True
        assert "blocks are float16: rounding its weights" in (folder / "README.md").read_text()
        assert read_denoiser(folder, part)[1]["facts"]["precision"].endswith("widened from float16")
    assert shares[0] > 0.05 > 10 * shares[1], shares


# --- published state dicts


def state_dict(base, part, file, change=lambda tensors: tensors):
    torch.save(change(moved(base, part).net.state_dict()), file)
    return file


def test_a_published_state_dict_becomes_a_student(image_folder, tmp_path):
    flows = {part: state_dict(image_folder, part, tmp_path / f"{part}.pt") for part in PARTS}
    folder = made(tmp_path, image_folder, **flows)
    found = TrellisFolder.read(folder)
    assert found.student.steps == (1, 2) and found.latent.params["rescale_t"] == 3.0
    for part in PARTS:
        net = found.network(FLOWS[part])
        expected = moved(image_folder, part).net.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())
    facts = json.loads((folder / "fastgen.json").read_text())["facts"]
    assert facts["latent"]["file"] == "latent.pt" and len(facts["latent"]["sha256"]) == 64
    asked = {"steps": [1, 2, 4], "rescale_t": 1.0, "sampler": "renoise"}
    (tmp_path / "again").mkdir()
    found = TrellisFolder.read(made(tmp_path / "again", image_folder, **asked, **flows))
    assert found.student.steps == (1, 2, 4) and found.latent.params["rescale_t"] == 1.0


def test_half_precision_state_dicts_are_widened(image_folder, tmp_path):
    halve = lambda tensors: {k: v.half() if ".mlp." in k else v for k, v in tensors.items()}  # noqa: E731
    file = state_dict(image_folder, "structure", tmp_path / "structure.pt", halve)
    folder = made(tmp_path, image_folder, structure=file)
    stored = load_file(folder / "ckpts/structure_flow.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}


class Payload:
    """What a pickle runs when it is read carelessly."""

    def __reduce__(self):
        return (os.mkdir, (str(self.place),))


def test_a_pickle_with_code_is_refused_and_not_run(image_folder, tmp_path):
    payload = Payload()
    payload.place = tmp_path / "ran"
    torch.save({"weights": payload}, tmp_path / "bad.pt")
    message = mistake(tmp_path, image_folder, structure=tmp_path / "bad.pt")
    assert "bad.pt: holds something else than tensors, and reading it could run code; save the flow" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t | {"foreign.weight": torch.zeros(2)}, "tensor 'foreign.weight' has no place in this network"),
        (lambda t: {k: v for k, v in t.items() if k != "out_layer.weight"}, "no tensor 'out_layer.weight'"),
        (lambda t: t | {"out_layer.bias": torch.zeros(3)}, "tensor 'out_layer.bias' is (3,)"),
        (lambda t: {"model": t, "step": 3}, "its entry 'model' is no tensor"),
        (lambda t: list(t.values()), "it holds a list"),
        (lambda t: {}, "it holds a dict"),
    ],
)
def test_state_dicts_that_are_none(image_folder, tmp_path, change, expected):
    file = state_dict(image_folder, "structure", tmp_path / "structure.pt", change)
    message = mistake(tmp_path, image_folder, structure=file)
    assert expected in message and "structure.pt" in message


@pytest.mark.parametrize("content", [b"", b"hello world"])
def test_a_file_of_something_else(content, image_folder, tmp_path):
    (tmp_path / "flow.pt").write_bytes(content)
    assert "flow.pt: not a whole file of weights" in mistake(tmp_path, image_folder, structure=tmp_path / "flow.pt")


def test_weights_that_are_no_numbers(image_folder, tmp_path):
    def spoil(state):
        next(iter(state.values())).view(-1)[0] = float("nan")
        return state

    file = state_dict(image_folder, "structure", tmp_path / "structure.pt", spoil)
    assert "is not finite" in mistake(tmp_path, image_folder, structure=file)


def test_a_student_of_another_flow_than_the_bases_is_told(text_folder, students, tmp_path):
    ours = shutil.copytree(students["structure"], tmp_path / "structure")
    told = json.loads((ours / "fastgen.json").read_text())
    for theirs, warned in ((TrellisFolder.read(text_folder).sha256("structure"), False), ("0" * 64, True)):
        told["facts"]["teacher_sha256"] = theirs
        (ours / "fastgen.json").write_text(json.dumps(told))
        ended = run(tmp_path / theirs[:4], text_folder, structure=ours)
        assert ended.code == 0 and ("was distilled from another flow than" in ended.err) == warned


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"kind": "stu"}, "fastgen.json: damaged (kind 'stu'"),
        ({"facts": "x"}, "fastgen.json: damaged (kind 'student', facts str)"),
        ({"sampler": {"times": {"2": [1.0, 1e-9]}}}, "are none of TRELLIS's sampler"),
    ],
)
def test_a_spoiled_description_of_a_flow(change, expected, text_folder, students, tmp_path):
    ours = shutil.copytree(students["structure"], tmp_path / "structure")
    told = json.loads((ours / "fastgen.json").read_text())
    if "sampler" in change:
        change = {"sampler": {**told["sampler"], **change["sampler"]}}
    (ours / "fastgen.json").write_text(json.dumps({**told, **change}))
    assert expected in mistake(tmp_path, text_folder, structure=ours)


def test_a_count_of_steps_named_twice_is_one(text_folder, students, tmp_path):
    folder = made(tmp_path, text_folder, **students, steps=[2, 1, 2])
    assert TrellisFolder.read(folder).student.steps == (1, 2)


def test_what_a_worlds_flows_were_trained_on_stays_there(text_folder, students, tmp_path):
    base = shutil.copytree(text_folder, tmp_path / "base")
    (base / "latents" / "shapes").mkdir(parents=True)
    (base / "latents" / "shapes" / "000000.safetensors").write_bytes(b"many")
    assert not (made(tmp_path, base, **students) / "latents").exists()


def test_a_cut_state_dict(image_folder, tmp_path):
    file = state_dict(image_folder, "structure", tmp_path / "structure.pt")
    file.write_bytes(file.read_bytes()[:5000])
    assert "structure.pt: not a whole file of weights" in mistake(tmp_path, image_folder, structure=file)
    other = tmp_path / "structure.safetensors"
    other.write_bytes(b"nothing")
    assert "give the folder of a flow, or a .pt state dict" in mistake(tmp_path, image_folder, structure=other)


# --- what is refused


def test_flows_that_do_not_belong(text_folder, image_folder, students, tmp_path):
    told = lambda **stage: mistake(tmp_path, text_folder, **stage)  # noqa: E731
    assert "no flow to put in; set structure, latent or both" in told()
    assert "this folder is the latent flow alone" in told(structure=students["latent"])
    assert "a whole TRELLIS folder; name the folder of one flow" in told(structure=image_folder)
    assert "only TRELLIS folders have parts" in told(structure=tmp_path)
    assert "neither a stage of this run nor an existing path" in told(structure=tmp_path / "nowhere")
    image = student(image_folder, "structure", tmp_path / "image")
    assert "told images, and the base is told texts" in told(structure=image)
    message = mistake(tmp_path, tmp_path / "image", **students)
    assert "no TRELLIS folder; there is no pipeline.json" in message


def test_a_student_of_another_config(text_folder, tmp_path):
    denoiser = moved(text_folder, "structure")
    args = denoiser.net.args.model_dump() | {"num_blocks": 1}
    other = StructureDenoiser(make("SparseStructureFlowModel", args, ""), condition="text")
    Student(other, spec(other), {}).save(tmp_path / "student")
    message = mistake(tmp_path, text_folder, structure=tmp_path / "student")
    assert "another network than the base's: num_blocks is 1, there 2" in message


def test_students_that_official_networks_or_samplers_have_no_place_for(text_folder, tmp_path):
    gap, other, shifted = (moved(text_folder, "structure") for _ in range(3))
    gap.add_gap()
    shifted.time_scale = 1.0
    cases = [
        (gap, spec(gap), "it is told gap beside its time"),
        (shifted, spec(shifted), "its path, times or target are not those"),
        (other, SamplerSpec(path=other.path, times={2: (1.0, 0.5), 3: (1.0, 0.9, 0.1)}), "none of TRELLIS's sampler"),
    ]
    for i, (denoiser, sampler, expected) in enumerate(cases):
        Student(denoiser, sampler, {}).save(tmp_path / str(i))
        assert expected in mistake(tmp_path, text_folder, structure=tmp_path / str(i))


def test_another_normalisation(text_folder, tmp_path):
    denoiser = moved(text_folder, "latent")
    denoiser.normalization = ((0.0,) * 8, (1.0,) * 8)
    Student(denoiser, spec(denoiser), {}).save(tmp_path / "student")
    assert "another normalisation" in mistake(tmp_path, text_folder, latent=tmp_path / "student")


def test_two_students_must_agree(text_folder, students, tmp_path):
    latent = student(text_folder, "latent", tmp_path / "four", steps=(4,), renoise=True)
    both = {"structure": students["structure"], "latent": latent}
    assert "the students were made for 1, 2 and 4" in mistake(tmp_path, text_folder, **both)
    latent = student(text_folder, "latent", tmp_path / "two", steps=(2, 4), renoise=True)
    both = {"structure": students["structure"], "latent": latent}
    assert "were made for euler and renoise; set sampler" in mistake(tmp_path, text_folder, **both)
    assert "steps=[1]: the students were made" in mistake(tmp_path, text_folder, steps=[1], sampler="euler", **both)
    found = TrellisFolder.read(made(tmp_path, text_folder, sampler="euler", **both))
    assert found.student.steps == (2,) and found.structure.params["steps"] == 2


def test_bfloat16_is_refused_with_the_reason(text_folder, students, tmp_path):
    message = mistake(tmp_path, text_folder, dtype="bf16", **students)
    assert "near 0.03 bfloat16 numbers lie 1.2e-4 apart" in message and "use fp32, or fp16" in message.lower()


def test_what_is_for_students_alone(text_folder, students, tmp_path):
    save_teacher(moved(text_folder, "structure"), tmp_path / "teacher", {})
    for key, value in {"steps": [1], "rescale_t": 2.0, "sampler": "euler", "dtype": "fp16"}.items():
        message = mistake(tmp_path, text_folder, structure=tmp_path / "teacher", **{key: value})
        assert f"{key} is for students" in message
    folder = made(tmp_path, text_folder, **students)
    (tmp_path / "again").mkdir()
    assert "a student's folder; give the teacher's" in mistake(tmp_path / "again", folder, **students)


def test_the_spacing_of_times_is_found_again(text_folder):
    path = read_denoiser(text_folder, "structure")[0].path
    for r in (0.5, 1.0, 3.0):
        times = {n: FlowEuler(steps=n, rescale_t=r).times() for n in (1, 2, 5)}
        assert rescale_of(SamplerSpec(path=path, times=times)) == pytest.approx(r)
    assert rescale_of(SamplerSpec(path=path, times={1: (1.0,)})) == 1.0
    assert rescale_of(SamplerSpec(path=path, times={1: (0.9,)})) is None
    assert rescale_of(SamplerSpec(path=path, times={2: (1.0, 0.5)}, two_time=True)) is None
