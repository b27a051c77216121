"""`fastgen.load(...).generate(...)`: any model folder; samples depend on nothing but seed, number and label."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen.api import Generator, open_teacher, pick_device
from fastgen.errors import UserError
from fastgen.paths import RectifiedFlow
from fastgen.student import SamplerSpec, Student, save_teacher
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from tests.commands import MIXTURE

SHAPE, CLASSES = (1, 4, 4), 3


def network(classes=CLASSES, shape=SHAPE):
    """A small network away from its start, where all outputs are zero."""
    torch.manual_seed(0)
    denoiser = mlp.build(mlp.MLPConfig(width=16, depth=1), shape, classes)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return denoiser


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher and a student of the same network, as folders."""
    root = tmp_path_factory.mktemp("models")
    path = RectifiedFlow()
    spec = SamplerSpec(path=path, times={2: path.grid(2), 1: path.grid(1)}, renoise=True)
    save_teacher(network(), root / "teacher", {"license": "mit"})
    Student(network(), spec, {}).save(root / "student")
    return root


@pytest.fixture(params=["teacher", "student"])
def model(request, folders):
    return fastgen.load(folders / request.param, device="cpu")


def test_load_tells_teacher_from_student(folders):
    student, teacher = fastgen.load(folders / "student"), fastgen.load(str(folders / "teacher"))
    assert isinstance(student.model, Student) and student.steps == (1, 2)
    assert isinstance(teacher.model, Teacher) and teacher.steps is None
    assert teacher.model.facts == {"teacher": "teacher", "license": "mit"}


def test_the_kind_can_be_forced(folders):
    forced = fastgen.load_teacher(folders / "student", guidance=2.0)
    assert isinstance(forced.model, Teacher) and forced.model.guidance == 2.0
    assert torch.equal(
        fastgen.load_student(folders / "student").sample(num=2), fastgen.load(folders / "student").sample(num=2)
    )
    with pytest.raises(UserError, match="a teacher, not a student"):
        fastgen.load_student(folders / "teacher")


def test_loading_what_is_no_model_is_a_user_error(tmp_path):
    for load in (fastgen.load, fastgen.load_teacher, fastgen.load_student):
        with pytest.raises(UserError, match="no such folder"):
            load(tmp_path / "nowhere")
        with pytest.raises(UserError, match="not a checkpoint that any family knows"):
            load(tmp_path)


def test_a_sample_depends_on_seed_number_and_label_only(model):
    many = model.sample(num=7, seed=5, labels=torch.tensor([0, 1, 2, 0, 1, 2, 3 - 1]), steps=2)
    assert many.shape == (7, *SHAPE) and many.dtype == torch.float32 and many.isfinite().all()
    again = model.sample(num=7, seed=5, labels=torch.tensor([0, 1, 2, 0, 1, 2, 2]), steps=2, batch=2)
    # Another batch is another matrix product, whose sums may be taken in another order.
    assert torch.allclose(many, again, atol=1e-5)
    assert torch.equal(many, model.sample(num=7, seed=5, labels=torch.tensor([0, 1, 2, 0, 1, 2, 2]), steps=2))
    fewer = model.sample(num=4, seed=5, label=0, steps=2)
    assert torch.allclose(fewer[[0, 3]], many[[0, 3]], atol=1e-5)
    assert not torch.allclose(fewer[1], many[1], atol=1e-2)
    assert not torch.allclose(model.sample(num=1, seed=6, label=0, steps=2)[0], many[0], atol=1e-2)


def test_no_label_means_the_null_label(model):
    null = model.sample(num=3, seed=1, steps=1)
    labelled = [model.sample(num=3, seed=1, steps=1, label=k) for k in range(CLASSES)]
    assert all(not torch.allclose(null, one, atol=1e-3) for one in labelled)


def test_a_network_that_knows_no_missing_label_is_given_each_in_turn():
    denoiser = network()
    denoiser.null_label = False
    made = Generator(Teacher(denoiser)).sample(num=4, steps=1)
    asked = Generator(Teacher(denoiser)).sample(num=4, steps=1, labels=torch.tensor([0, 1, 2, 0]))
    assert torch.equal(made, asked)


def test_defaults_are_the_students_fewest_steps_and_25_of_a_teacher(folders):
    student, teacher = (fastgen.load(folders / name) for name in ("student", "teacher"))
    assert torch.equal(student.sample(num=2), student.sample(num=2, steps=1))
    assert not torch.equal(student.sample(num=2), student.sample(num=2, steps=2))
    assert torch.equal(teacher.sample(num=2), teacher.sample(num=2, steps=25, solver="heun"))


def test_guidance_moves_a_teachers_samples(folders):
    teacher = fastgen.load(folders / "teacher")
    plain = teacher.sample(num=2, label=1, steps=3)
    assert torch.allclose(teacher.sample(num=2, label=1, steps=3, guidance=1.0), plain, atol=1e-5)
    assert not torch.allclose(teacher.sample(num=2, label=1, steps=3, guidance=3.0), plain, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num": 0}, "num=0"),
        ({"batch": 0}, "batch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"steps": 0}, "steps=0"),
        ({"steps": -1}, "steps=-1"),
        ({"label": 3}, "the classes 0 .. 2"),
        ({"label": -1}, "the classes 0 .. 2"),
        ({"label": 1, "labels": torch.zeros(1, dtype=torch.int64)}, "give one of them"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"int64 \[1\]"),
        ({"labels": torch.zeros(1)}, r"int64 \[1\]"),
        ({"guidance": 2.0}, "guidance"),
        ({"solver": "hein"}, "solver"),
    ],
)
def test_options_out_of_range_are_user_errors(model, options, expected):
    with pytest.raises(UserError, match=expected):
        model.sample(**options)


def test_a_student_takes_its_own_step_counts_only(folders):
    with pytest.raises(UserError, match=r"steps=3: this student was made for 1, 2"):
        fastgen.load(folders / "student").sample(steps=3)


def test_generate_gives_pictures_of_the_samples(model):
    pictures = model.generate(num=3, seed=2, label=1, steps=1)
    samples = model.sample(num=3, seed=2, label=1, steps=1)
    assert [picture.size for picture in pictures] == [(4, 4)] * 3
    expected = ((samples[0, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert list(pictures[0].tobytes()) == expected.flatten().tolist()
    with pytest.raises(UserError, match="does not read text"):
        model.generate("a red fox")


def test_closed_form_teachers_are_described_not_loaded():
    teacher = open_teacher(MIXTURE)
    assert teacher.shape == (2,) and Generator(teacher).sample(num=3, steps=2).shape == (3, 2)
    with pytest.raises(UserError, match="which are no images"):
        Generator(teacher).generate()
    with pytest.raises(UserError, match="unconditional"):
        Generator(teacher).sample(label=0)
    for description, expected in (
        ({"family": "mixtur"}, "did you mean 'mixture'"),
        ({"family": "mlp"}, "only the closed-form family"),
        ({**MIXTURE, "weight": [1]}, "unknown key 'weight'"),
        ({}, "no teacher family"),
    ):
        with pytest.raises(UserError, match=expected):
            open_teacher(description)


def test_devices():
    assert pick_device("cpu") == "cpu"
    assert pick_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("nonsense", "meta", ""):
        with pytest.raises(UserError, match=f"device={name}: not available here"):
            pick_device(name)
