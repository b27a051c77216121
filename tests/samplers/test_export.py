"""Exports: stock diffusers, which cannot import fastgen, makes the student's own images of them."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from safetensors import safe_open

from fastgen.errors import RunFailed, UserError
from fastgen.files import is_complete
from fastgen.paths import VP, RectifiedFlow
from fastgen.samplers.export import check, make
from fastgen.samplers.export.make import Exported, export
from fastgen.student import SamplerSpec, Student
from fastgen.teachers import unet
from tests.commands import call
from tests.samplers import exports

FAMILIES = {"sd1": exports.sd1, "sd2": exports.sd2, "xl": exports.xl}
LIMIT = 2e-3


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    return {name: made(folder)[0] for name, made in FAMILIES.items()}


@pytest.fixture(scope="module")
def exported(students, tmp_path_factory) -> dict[str, Exported]:
    """One export of each family, each of another kind."""
    folder = tmp_path_factory.mktemp("exports")
    kinds = {"sd1": "diffusers", "sd2": "lora", "xl": "single-file"}
    return {name: export(students[name], kind, folder / f"{name}-{kind}") for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def stock_images(exported, tmp_path_factory) -> dict[str, np.ndarray]:
    """What stock diffusers makes of the lines that the command prints, and of a call with nothing but the prompt."""
    lines = {name: made.line for name, made in exported.items()}
    bare = f'pipe = DiffusionPipeline.from_pretrained("{exported["sd1"].folder}")'
    lines["bare"] = f'from diffusers import DiffusionPipeline; {bare}; image = pipe("a red fox").images[0]'
    return exports.stock(lines, tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_makes_the_students_image(family, students, stock_images):
    ours = exports.own(students[family], 1).numpy()
    assert ours.std() > 0.02  # an image, not a plain surface that any network would give
    assert stock_images[family].shape == ours.shape
    assert np.abs(stock_images[family] - ours).max() < LIMIT


def test_called_with_nothing_but_the_prompt_it_raises(stock_images):
    """A student of one step at the pipeline's 50: LCM's original steps are too few for that."""
    assert "original_steps" in str(stock_images["bare"])


def every_step(made: Exported, student: Path) -> dict[str, str]:
    """The printed line, for each number of steps."""
    counts = sorted(Student.load(student).sampler.times)
    return {str(n): made.line.replace("num_inference_steps=1", f"num_inference_steps={n}") for n in counts}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    # sd1 was trained whole and has no LoRA
    [pair for pair in product(FAMILIES, ("diffusers", "lora", "single-file")) if pair != ("sd1", "lora")],
)
def test_every_export_of_every_family_at_every_step_count(family, kind, students, tmp_path):
    made = export(students[family], kind, tmp_path / "out")
    for steps, image in exports.stock(every_step(made, students[family]), tmp_path).items():
        assert np.abs(image - exports.own(students[family], int(steps)).numpy()).max() < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "xl"])
def test_peft_keys_add_the_same(family, students, tmp_path):
    made = export(students[family], "lora", tmp_path / "out", keys="peft")
    image = exports.stock({"image": made.line}, tmp_path)["image"]
    assert np.abs(image - exports.own(students[family], 1).numpy()).max() < LIMIT


@pytest.mark.slow
def test_the_base_model_is_the_one_that_was_named(students, tmp_path):
    made = export(students["sd2"], "lora", tmp_path / "out", base="owner/base")
    assert "owner/base" in made.line and "owner/base" in (made.folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_safe_at_any_guidance(family, students, tmp_path):
    """The pipelines' own default is 7.5 (XL: 5): switched off by the network's config, whatever it is."""
    made = export(students[family], "diffusers", tmp_path / "out")
    lines = {str(w): made.line.replace("num_inf", f"guidance_scale={w}, num_inf") for w in (1.0, 7.5)}
    images = exports.stock({"default": made.line, **lines}, tmp_path)
    np.testing.assert_array_equal(images["7.5"], images["1.0"])
    np.testing.assert_array_equal(images["default"], images["1.0"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family"), [("diffusers", "sd2"), ("diffusers", "xl"), ("lora", "sd2"), ("lora", "xl")]
)
def test_images_of_another_size_than_the_networks(kind, family, students, tmp_path):
    """16 x 32 pixels of a network whose config says 16 x 16."""
    student = Student.load(students[family])
    student.denoiser = student.denoiser.resized(16, 32)
    student.save(tmp_path / "student")
    made = export(tmp_path / "student", kind, tmp_path / "out")
    image = exports.stock({"image": made.line}, tmp_path)["image"]
    assert image.shape == (16, 32, 3)
    assert np.abs(image - exports.own(tmp_path / "student", 1).numpy()).max() < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), [("diffusers", "xl"), ("lora", "sd2"), ("single-file", "sd1")])
def test_half_precision_says_its_error(kind, family, students, tmp_path):
    made = export(students[family], kind, tmp_path / "out", dtype="fp16")
    assert 0 < made.error < 0.2
    weights = sorted(made.folder.rglob("*.safetensors"))
    assert weights and (kind != "diffusers" or all(".fp16." in file.name for file in weights))
    for file in weights:
        with safe_open(file, "pt") as stream:
            assert {stream.get_slice(name).get_dtype() for name in stream.keys()} <= {"F16", "I64"}  # noqa: SIM118
    image = exports.stock({"image": made.line}, tmp_path)["image"]
    assert np.isfinite(image).all()
    assert f"{made.error:.1e} of 1" in (made.folder / "README.md").read_text()


def test_the_card_holds_what_a_user_needs(exported):
    text = (exported["sd2"].folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "openrail" and head["base_model"].endswith("sd2") and "lora" in head["tags"]
    code = text.split("```python\n")[1].split("\n```")[0]
    assert "DDIMScheduler(" in code and "num_inference_steps=1" in code and "guidance_scale=1.0" in code
    assert (
        "; ".join(code.splitlines()).replace("PATH_OF_THIS_FOLDER", str(exported["sd2"].folder)) == exported["sd2"].line
    )
    for words in ("`cfg` 1.0", "CFG Scale 1", "`guidance_scale=1.0`", "metrics: fd | 1.25", "not tried here"):
        assert words in text


def test_files_that_cannot_carry_it_leave_the_guidance_input_out(exported):
    config = json.loads((exported["sd1"].folder / "unet" / "config.json").read_text())
    weights = safetensors.torch.load_file(exported["sd1"].folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert config["time_cond_proj_dim"] == 256 and not weights["time_embedding.cond_proj.weight"].any()
    for name, file in (("sd2", "pytorch_lora_weights"), ("xl", "model")):
        with safe_open(exported[name].folder / f"{file}.safetensors", "pt") as stream:
            assert not [key for key in stream.keys() if "cond_proj" in key]  # noqa: SIM118


def pixels(folder: Path, path: Any, counts: tuple[int, ...]) -> Path:
    """A student of a small unconditional U-Net."""
    torch.manual_seed(0)
    kind = type(path).__name__
    net = unet.build(unet.UNetConfig(path=kind, block_out_channels=(16, 32), layers_per_block=1), (3, 8, 8), None)
    torch.nn.init.normal_(net.net.conv_out.weight, std=0.2)
    spec = SamplerSpec(path=net.path, times={n: net.path.grid(n) for n in counts}, init=net.path.init)
    Student(net, spec, {"method": "reflow"}).save(folder / "student")
    return folder / "student"


@pytest.mark.parametrize(
    ("path", "counts", "pipeline", "scheduler"),
    [
        (VP(), (1, 2, 4), "DDIMPipeline", "DDIMScheduler"),
        (VP(), (1,), "DDPMPipeline", "LCMScheduler"),
        (RectifiedFlow(), (1, 2, 4), "DDPMPipeline", "DPMSolverMultistepScheduler"),
    ],
)
def test_pixel_students_run_in_the_stock_pipelines(path, counts, pipeline, scheduler, tmp_path):
    student = pixels(tmp_path, path, counts)
    made = export(student, "diffusers", tmp_path / "out")
    index = json.loads((made.folder / "model_index.json").read_text())
    assert index["_class_name"] == pipeline and index["scheduler"][1] == scheduler
    assert made.error < 1e-4  # each of the counts was replayed


@pytest.mark.slow
@pytest.mark.parametrize("path", [VP(), RectifiedFlow()])
def test_pixel_students_without_fastgen(path, tmp_path):
    student = pixels(tmp_path, path, (1, 2, 4))
    made = export(student, "diffusers", tmp_path / "out")
    for steps, image in exports.stock(every_step(made, student), tmp_path).items():
        assert np.abs(image - exports.own(student, int(steps)).numpy()).max() < LIMIT


@pytest.mark.parametrize(
    ("family", "kind", "options", "message"),
    [
        ("sd1", "lora", {}, "all its weights were trained, so there is no LoRA"),
        ("sd1", "onnx", {}, "--to onnx: no such choice"),
        ("sd1", "diffusers", {"dtype": "fp8"}, "--dtype fp8"),
        ("sd1", "diffusers", {"keys": "peft"}, "--keys peft: names the tensors of --to lora"),
        ("sd2", "lora", {"keys": "a1111"}, "--keys a1111"),
        ("sd1", "diffusers", {"base": "owner/base"}, "--base owner/base: a diffusers folder is whole"),
    ],
)
def test_choices_that_make_no_sense_are_refused(family, kind, options, message, students, tmp_path):
    with pytest.raises(UserError, match=message):
        export(students[family], kind, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_out_is_a_folder(students, tmp_path):
    with pytest.raises(UserError, match="OUT is a folder"):
        export(students["sd1"], "single-file", tmp_path / "model.safetensors")


def test_pixel_students_have_no_single_file(tmp_path):
    with pytest.raises(UserError, match="goes --to diffusers"):
        export(pixels(tmp_path, VP(), (1,)), "single-file", tmp_path / "out")


def test_a_student_that_lost_its_text_encoder_is_refused(students, tmp_path):
    import shutil

    shutil.copytree(students["sd1"], tmp_path / "student")
    shutil.rmtree(tmp_path / "student" / "text_encoder")
    with pytest.raises(UserError, match="no text encoder or no VAE in it"):
        export(tmp_path / "student", "diffusers", tmp_path / "out")


def test_images_that_differ_are_not_handed_over(students, tmp_path, monkeypatch):
    network_tensors = make.folder.network_tensors

    def broken(denoiser, output_scale=1.0):
        tensors = network_tensors(denoiser, output_scale)
        return tensors | {"conv_out.bias": tensors["conv_out.bias"] + 0.05}

    monkeypatch.setattr(make.folder, "network_tensors", broken)
    with pytest.raises(RunFailed, match=r"off the student's \(0.002 allowed in fp32\); nothing was written"):
        export(students["sd1"], "diffusers", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_stock_diffusers_cannot_load_is_one_line(students, tmp_path, monkeypatch):
    monkeypatch.setattr(make.ldm, "UNET", "model.other.")
    with pytest.raises(RunFailed, match=r"stock diffusers .* cannot run it"):
        export(students["sd1"], "single-file", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["diffusers", "single-file"])
def test_a_full_disk_leaves_nothing(kind, students, tmp_path, monkeypatch):
    """The third file does not fit; an older export in its place stays."""
    export_before = tmp_path / "out"
    export_before.mkdir()
    (export_before / "COMPLETE").touch()
    (export_before / "old").write_text("kept")
    save_file, calls = safetensors.torch.save_file, []

    def full(tensors, file, **options):
        calls.append(file)
        if len(calls) == (3 if kind == "diffusers" else 1):
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, file, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(RunFailed, match="no space left on the device"):
        export(students["sd1"], kind, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"] and (export_before / "old").read_text() == "kept"


def test_an_export_replaces_an_older_one_and_nothing_else(exported, tmp_path):
    assert is_complete(exported["sd1"].folder)
    student = pixels(tmp_path, VP(), (1,))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not made by fastgen"):
        export(student, "diffusers", mine)
    for _ in range(2):
        export(student, "diffusers", tmp_path / "out")


def test_the_command_prints_the_line_and_nothing_else(tmp_path):
    student = pixels(tmp_path, VP(), (1, 2))
    ended = call("export", student, "--to", "diffusers", tmp_path / "out", "--device", "cpu")
    assert ended.code == 0 and ended.out.count("\n") == 1, ended.err
    names: dict[str, Any] = {}
    exec(ended.out, names)
    assert names["image"].size == (8, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "lora"], "a layout of Stable Diffusion"),
        (["--to", "diffuser"], "did you mean 'diffusers'?"),
        (["--to", "diffusers", "--dtype", "half"], "--dtype half"),
        (["--to", "diffusers", "--device", "abacus"], "device=abacus"),
        ([], "--to"),
    ],
)
def test_the_commands_mistakes_are_one_line(words, message, tmp_path):
    student = pixels(tmp_path, VP(), (1,))
    ended = call("export", student, tmp_path / "out", *words)
    assert ended.code == 2 and message in ended.message and ended.err.count("\n") == 1, ended.err
    assert not ended.out and not (tmp_path / "out").exists()


def test_the_difference_sees_one_pixel_and_what_is_no_number():
    image = torch.rand(3, 4, 4)
    off = image.clone()
    off[1, 2, 3] += 0.25
    assert check.difference({1: image, 2: image}, {1: image, 2: off}) == (pytest.approx(0.25), 2)
    off[0, 0, 0] = float("nan")
    assert check.difference({1: image}, {1: off})[0] == float("inf")
    assert check.difference({1: image}, {1: image[:, :2]})[0] == float("inf")
