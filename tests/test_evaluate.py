"""`fastgen evaluate` as a user calls it: protocols, files of statistics, kept samples, prompts, and every mistake."""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fastgen import api, images, references, samples
from fastgen import evaluate as evaluation
from fastgen.errors import UserError
from fastgen.eval import inception, presets
from fastgen.eval.clip_score import ClipScore
from fastgen.eval.extractors import RandomConv
from fastgen.eval.inception import InceptionExtractor
from fastgen.eval.metrics import frechet
from fastgen.evaluate import Ask, evaluate
from fastgen.paths import RectifiedFlow
from fastgen.student import SamplerSpec, Student, save_teacher
from fastgen.teachers import mlp
from tests.commands import call
from tests.eval.test_clip_score import save_clip
from tests.inception import save_pth, smooth_images
from tests.tiny import stable_diffusion

SHAPE, CLASSES = (3, 8, 8), 3
PLAIN = {"extractor": "random-conv", "num": 20, "device": "cpu"}


@pytest.fixture(autouse=True)
def no_weights_of_the_machines(monkeypatch):
    monkeypatch.delenv("FASTGEN_WEIGHTS_DIR", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """student/, uncond/ (a teacher), weights.pth, and images: real/ (80), few/ (4 of them), other/ (24)."""
    root = tmp_path_factory.mktemp("evaluate")
    path = RectifiedFlow()
    for name, classes in (("student", CLASSES), ("uncond", None)):
        torch.manual_seed(0)
        denoiser = mlp.build(mlp.MLPConfig(width=16, depth=1), SHAPE, classes)
        for p in denoiser.parameters():
            torch.nn.init.normal_(p, std=0.3)
        if classes:
            Student(denoiser, SamplerSpec(path=path, times={1: path.grid(1)}, renoise=False), {}).save(root / name)
        else:
            save_teacher(denoiser, root / name, {})
    write_images(root / "real", 80)
    write_images(root / "few", 4)
    write_images(root / "other", 24, seed=5)
    save_pth(root, "weights.pth")
    return root


def write_images(place, count, *, side=8, seed=1):
    place.mkdir()
    for i, pixels in enumerate(smooth_images(count, side=side, seed=seed)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{i:03d}.png")
    return place


def mistake(*words):
    """The one line of a command that ends with 2; the last, where something was told before it."""
    ended = call("evaluate", *words)
    assert ended.code == 2 and not ended.out, ended
    return ended.message.removeprefix("fastgen: ")


def run(**fields):
    return {row.metric: row for row in evaluate(Ask(**{**PLAIN, **fields}))}


def test_samples_are_seen_in_batches_that_make_no_difference(folder):
    one = run(model=str(folder / "student"), reference=str(folder / "real"), batch=20)
    many = run(model=str(folder / "student"), reference=str(folder / "real"), batch=7)
    assert one.keys() == many.keys() >= {"FD-random-conv", "KID", "precision", "recall", "nearest"}
    for name, row in one.items():
        assert many[name].value == pytest.approx(row.value, rel=1e-4, abs=1e-6), name
        assert row.n_gen == 20 and row.reference_sha256 == many[name].reference_sha256


def test_no_more_than_a_batch_is_ever_made_at_once(folder, monkeypatch):
    sizes, make = [], samples.Made._make
    monkeypatch.setattr(
        samples.Made, "_make", lambda self, rows, *rest: sizes.append(len(rows)) or make(self, rows, *rest)
    )
    run(model=str(folder / "student"), reference=str(folder / "real"), batch=6)
    assert sizes == [6, 6, 6, 2]


def test_statistics_stand_for_the_images_they_were_made_of(folder, tmp_path):
    saved = tmp_path / "own.safetensors"
    pictures = run(model=str(folder / "student"), reference=str(folder / "real"), save_reference=saved)
    statistics = run(model=str(folder / "student"), reference=str(saved))
    assert list(statistics) == ["FD-random-conv"]
    # 20 images in 256 dimensions: the images' own row took the exact route for singular covariances.
    assert statistics["FD-random-conv"].value == pytest.approx(pictures["FD-random-conv"].value, abs=1e-3)
    with safe_open(saved, "pt") as file:
        facts = file.metadata()
    assert facts["data"] == "real/train" and facts["images"] == "64"
    assert facts["pixels_sha256"] == pictures["KID"].reference_sha256
    foreign = tmp_path / "foreign.npz"
    run(model=str(folder / "student"), reference=str(folder / "real"), save_reference=foreign)
    row = run(model=str(folder / "student"), reference=str(foreign))["FD-random-conv"]
    assert row.value == pytest.approx(statistics["FD-random-conv"].value) and row.n_ref is None


def test_statistics_alone_can_be_made(folder, tmp_path):
    words = ["--reference", folder / "real", "--extractor", "random-conv", "--save-reference", tmp_path / "a.npz"]
    ended = call("evaluate", *words)
    assert ended.code == 0 and f"wrote {tmp_path / 'a.npz'}" in ended.err, ended.err
    assert np.load(tmp_path / "a.npz")["mu"].shape == (256,)


def test_kept_samples_are_not_made_again(folder, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    fields = {"model": str(folder / "student"), "reference": str(folder / "real"), "samples": kept, "batch": 8}
    first = run(**fields)
    assert sorted(p.name for p in kept.iterdir()) == [*(f"{i:06d}.png" for i in range(20)), "samples.json"]
    before = {p.name: p.stat().st_mtime_ns for p in kept.iterdir()}
    (kept / "000019.png").unlink()  # as after a kill
    made = []
    original = samples.Made._make
    monkeypatch.setattr(
        samples.Made, "_make", lambda self, rows, *rest: made.append(rows) or original(self, rows, *rest)
    )
    again = run(**fields)
    assert [rows.tolist() for rows in made] == [[16, 17, 18, 19]]
    assert {name: row.value for name, row in again.items()} == {name: row.value for name, row in first.items()}
    assert all(p.stat().st_mtime_ns == before[p.name] for p in kept.iterdir() if p.name < "000016.png")
    for change in ({"seed": 1}, {"steps": 1}, {"model": str(folder / "uncond")}):
        with pytest.raises(UserError, match=f"made with another {next(iter(change))}"):
            run(**{**fields, **change})
    run(**{**fields, "samples": tmp_path / "said", "steps": 1})
    with pytest.raises(UserError, match=r"made with another steps \(1, now None\)"):
        run(**{**fields, "samples": tmp_path / "said"})


def test_a_folder_of_samples_is_claimed_by_the_first_images_and_not_by_a_mistake(folder, tmp_path):
    fields = {"model": str(folder / "student"), "samples": tmp_path / "kept"}
    with pytest.raises(UserError, match="no such file or folder"):
        run(**fields, reference="nowhere")
    assert not (tmp_path / "kept").exists()


def test_a_folder_of_other_things_is_not_written_into(folder):
    with pytest.raises(UserError, match="unknown making"):
        run(model=str(folder / "student"), reference=str(folder / "real"), samples=folder / "other")


def test_images_that_are_there_are_measured_without_a_model(folder, tmp_path):
    rows = run(samples=folder / "other", reference=str(folder / "real"), num=None)
    assert rows["FD-random-conv"].n_gen == 24 and rows["FD-random-conv"].seed is None
    pixels = smooth_images(24, side=8, seed=5)
    np.savez(tmp_path / "other.npz", pixels.permute(0, 2, 3, 1).numpy())
    batch = run(samples=tmp_path / "other.npz", reference=str(folder / "real"), num=None)
    assert {name: row.value for name, row in batch.items()} == {name: row.value for name, row in rows.items()}
    see, real = RandomConv(3), smooth_images(80, side=8, seed=1)
    train = [i for i in range(80) if i % 5]
    expected = frechet(see(pixels.float() / 127.5 - 1), see(real[train].float() / 127.5 - 1))
    assert rows["FD-random-conv"].value == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_inception_says_which_network_and_which_recipe(folder, monkeypatch):
    words = ["--reference", folder / "few", "--samples", folder / "few", "--fid"]
    tf, clean = (
        json.loads(call("evaluate", *words, fid, "--weights", folder / "weights.pth", "--json").out)["results"]
        for fid in ("tf", "clean")
    )
    digest = inception.sha256(folder / "weights.pth")
    assert tf[0]["metric"] == f"FD-inception-{digest[:8]}" and tf[0]["extractor_sha256"] == digest
    assert (tf[0]["resize"], clean[0]["resize"]) == ("tf1-bilinear-299", "pil-bicubic-float-299")
    assert tf[0]["n_ref"] == 4 and tf[0]["value"] == pytest.approx(0, abs=1e-4)  # the whole folder, nothing held out
    assert 0 < tf[0]["floor"] != clean[0]["floor"] and len(tf[0]["reference_sha256"]) == 64
    assert {row["metric"] for row in tf} == {tf[0]["metric"], "KID", "precision", "recall", "nearest"}
    assert not any(re.search("FID", json.dumps(row)) for row in tf + clean)


def test_the_backend_is_named_in_the_distance_alone(folder):
    pytest.importorskip("torchmetrics")
    fields = {"samples": folder / "other", "reference": str(folder / "real")}
    theirs, ours = run(**fields, backend="torchmetrics"), run(**fields)
    assert theirs["FD-random-conv"].backend.startswith("torchmetrics")
    assert {row.backend for name, row in theirs.items() if name != "FD-random-conv"} == {"own"}
    # Few images in many dimensions: theirs has no exact route.
    assert theirs["FD-random-conv"].value == pytest.approx(ours["FD-random-conv"].value, rel=1e-3)


class Reader:
    """A model that reads prompts: its image's grey level is how long its prompt is."""

    image_shape = (3, 8, 8)
    asked: list

    def __init__(self):
        self.asked = []
        codec = type("Codec", (), {"reads_text": True})()
        denoiser = type("Net", (), {"num_classes": None, "codec": codec})()
        self.model = type("Model", (), {"denoiser": denoiser})()

    def sample(self, *, num, first, prompts, seed, batch):
        self.asked += [(first + i, prompt) for i, prompt in enumerate(prompts)]
        return torch.stack([torch.full((3, 8, 8), len(prompt) / 32 - 1) for prompt in prompts])


@pytest.fixture
def reader(monkeypatch):
    model = Reader()
    monkeypatch.setattr(evaluation.api, "load", lambda path, device: model)
    return model


def test_prompts_come_in_their_order_again_and_again(folder, reader, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo words\nthree whole words\n")
    clip = save_clip(tmp_path / "clip")
    rows = run(model="reader", prompts=tmp_path / "prompts.txt", clip=clip, num=16, batch=5, extractor=None)
    prompts = ["one", "two words", "three whole words"]
    assert reader.asked == [(i, prompts[i % 3]) for i in range(16)]
    row = rows["CLIP score"]
    assert list(rows) == ["CLIP score"] and row.extractor == "clip" and row.n_gen == 16 and row.n_ref is None
    score = ClipScore(clip)
    asked = [prompts[i % 3] for i in range(16)]
    expected = score.update(torch.stack([torch.full((3, 8, 8), len(p) / 32 - 1) for p in asked]), asked).mean()
    assert row.value == pytest.approx(float(expected), rel=1e-4)


def test_a_model_that_reads_needs_prompts_and_another_has_no_use_for_them(folder, reader, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\n")
    assert "this model reads text; give --prompts" in mistake("reader", "--reference", folder / "real")
    monkeypatch.undo()
    words = ["--reference", folder / "real", "--prompts", tmp_path / "prompts.txt"]
    assert "--prompts: this model does not read text" in mistake(folder / "student", *words)
    assert "give --prompts FILE" in mistake(folder / "student", "--reference", folder / "real", "--clip", tmp_path)


def test_stable_diffusion_is_measured_from_prompts_to_pictures(folder, tmp_path):
    """The real thing, tiny: its own text encoder and VAE, kept pictures, features and CLIP score in one pass."""
    teacher = stable_diffusion(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a fox\ntwo apples\n")
    fields = {"model": str(teacher), "prompts": tmp_path / "prompts.txt", "steps": 1, "num": 5, "batch": 2}
    fields |= {"reference": str(write_images(tmp_path / "real", 80, side=16)), "samples": tmp_path / "kept"}
    rows = run(**fields, clip=save_clip(tmp_path / "clip"))
    assert {"FD-random-conv", "KID", "CLIP score"} <= rows.keys() and rows["CLIP score"].n_gen == 5
    kept = [Image.open(tmp_path / "kept" / f"{i:06d}.png") for i in range(5)]
    direct = api.load(teacher, device="cpu").sample(num=5, prompts=["a fox", "two apples"] * 2 + ["a fox"], steps=1)
    for image, expected in zip(kept, images.to_pil(direct), strict=True):
        assert image.size == (16, 16)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1  # batches of 2 and of 5
    told = mistake(teacher, "--prompts", tmp_path / "prompts.txt", "--reference", tmp_path / "real")
    assert inception.FILE in told  # without a word about it, a text model is seen by the Inception network


def test_coded_samples_are_told_and_oblong_ones_refused(folder, tmp_path):
    for name, size, ending in (("coded", (8, 8), "jpg"), ("oblong", (12, 8), "png")):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", size, (40 * i, 0, 255 - i)).save(tmp_path / name / f"{i}.{ending}")
    words = ["--samples", tmp_path / "coded", "--reference", folder / "real", "--extractor", "random-conv"]
    assert "coded: JPEG or WebP images" in call("evaluate", *words).err
    words = ["--samples", tmp_path / "oblong", "--reference", folder / "few", "--fid", "tf"]
    assert "images of 8x12 would be squashed; give --crop N" in mistake(*words)


def test_what_numbers_warn_of_is_said_once(folder):
    words = ["--samples", folder / "other", "--reference", folder / "real", "--extractor", "random-conv"]
    ended = call("evaluate", *words)
    assert ended.err.count("24 samples in 256 dimensions: rank-deficient") == 1 and "tally.py" not in ended.err


@pytest.fixture
def small_preset(monkeypatch, tmp_path):
    """The CIFAR protocol's shape at 16 images of side 8, with all its files but those a test leaves out."""
    small = presets.Preset(
        about="a small protocol",
        num=16,
        fid="tf",
        reference="small.npz",
        reference_source="https://example.org/small.npz",
        side=8,
    )
    monkeypatch.setitem(presets.PRESETS, "cifar10-50k", small)
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    return tmp_path


def test_a_preset_names_the_file_that_is_missing(folder, small_preset):
    told = mistake(folder / "student", "--preset", "cifar10-50k")
    assert told.startswith(f"small.npz: not here; fetch https://example.org/small.npz and put it into {small_preset}")
    np.savez(small_preset / "small.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    told = mistake(folder / "student", "--preset", "cifar10-50k")
    assert inception.FILE in told and "torch-fidelity/releases" in told and str(small_preset) in told


class Small(InceptionExtractor):
    """Three features in the place of 2048, whose distances take seconds."""

    dim = 3

    @classmethod
    def load(cls, weights, resize, channels, crop):
        return cls(torch.nn.Module(), "ab" * 32, resize, channels, crop)

    def __call__(self, images):
        return images.mean((2, 3))

    def probabilities(self, features):
        return features.softmax(1)


def test_a_preset_decides_number_recipe_labels_and_reference(folder, small_preset, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fastgen")
    monkeypatch.setattr(references, "InceptionExtractor", Small)
    np.savez(small_preset / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    labels = []
    original = samples.Made._labels
    monkeypatch.setattr(samples.Made, "_labels", lambda self, rows: labels.append(original(self, rows)) or labels[-1])
    rows = evaluate(Ask(model=str(folder / "student"), preset="cifar10-50k", device="cpu"))
    assert rows[0].metric == "FD-inception-abababab" and rows[0].interval is not None
    assert rows[0].n_gen == 16 and rows[0].resize == "tf1-bilinear-299" and rows[0].n_ref is None
    assert rows[0].reference_sha256 == inception.sha256(small_preset / "small.npz")
    assert f"sha256 {rows[0].reference_sha256}" in caplog.text
    drawn = torch.cat(labels)
    assert set(drawn.tolist()) == {0, 1, 2} and drawn.tolist() != [i % 3 for i in range(16)]
    for option in ({"fid": "clean"}, {"crop": 8}, {"extractor": "inception"}):
        with pytest.raises(UserError, match="--preset cifar10-50k decides that"):
            evaluate(Ask(model=str(folder / "student"), preset="cifar10-50k", **option))


def test_a_preset_refuses_other_files_under_its_names(folder, small_preset, monkeypatch):
    changed = dataclasses.replace(presets.PRESETS["cifar10-50k"], reference_sha256="ab" * 32)
    monkeypatch.setitem(presets.PRESETS, "cifar10-50k", changed)
    np.savez(small_preset / "small.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert "small.npz: not the published file" in mistake(folder / "student", "--preset", "cifar10-50k")


def test_a_preset_with_a_crop_brings_real_and_made_images_to_one_size(folder, tmp_path, monkeypatch):
    """Real images of many sizes, samples of another: both squared to 16."""
    small = presets.Preset(
        about="a small COCO",
        num=4,
        fid="clean",
        crop=16,
        reference="val",
        reference_source="https://example.org/val.zip",
        prompts="captions.json",
        prompts_source="https://example.org/captions.json",
    )
    monkeypatch.setitem(presets.PRESETS, "coco2017-5k", small)
    (tmp_path / "val").mkdir()
    for i, size in enumerate(((20, 30), (16, 16), (40, 24), (64, 20))):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"val/{i}.png")
    captions = [{"id": i, "image_id": i, "caption": f"image {i}"} for i in range(4)]
    told = {"images": [{"id": i} for i in range(4)], "annotations": captions}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    made = write_images(tmp_path / "made", 4, side=32)
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(references, "InceptionExtractor", Small)
    rows = evaluate(Ask(samples=made, preset="coco2017-5k", device="cpu"))
    assert rows[0].resize == "square-lanczos-16, pil-bicubic-float-299" and (rows[0].n_gen, rows[0].n_ref) == (4, 4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give a MODEL, or the images to measure as --samples"),
        (["{student}"], "give real images or their statistics as --reference, a --preset, or --clip alone"),
        (["{student}", "--preset", "cifar"], "did you mean 'cifar10-50k'?"),
        (["--samples", "{real}", "--reference", "{other}", "--steps", "2"], "nothing is generated without a MODEL"),
        (["--samples", "{real}", "--reference", "{other}", "--num", "99"], "80 images, and --num 99"),
        (["--samples", "nowhere", "--reference", "{other}"], "no such folder or .npz file"),
        (["{student}", "--reference", "{real}", "--fid", "tf"], "weights-inception-2015-12-05-6726825d.pth: not here"),
        (["{student}", "--reference", "{real}", "--fid", "pt", "--weights", "{weights}"], "--fid pt: no such recipe"),
        (["{student}", "--reference", "{real}", "--fid", "tf", "--extractor", "classifier"], "leave one out"),
        (["{student}", "--reference", "{real}", "--weights", "{weights}"], "give --fid tf or --fid clean"),
        (["{student}", "--reference", "{real}", "--crop", "8"], "--crop 8: for the Inception network"),
        (["{student}", "--reference", "{real}", "--extractor", "random-conv", "--backend", "fid"], "no such backend"),
        (["{student}", "--reference", "{real}", "--extractor", "random-conv", "--guidance", "2"], "has it built in"),
        (["{student}", "--reference", "{stats}"], "statistics belong to one extractor; name it"),
        (["{student}", "--reference", "{stats}", "--extractor", "random-conv"], "statistics of 4 features"),
        (["{student}", "--reference", "{large}", "--extractor", "random-conv"], "the model makes (3, 8, 8)"),
    ],
)
def test_mistakes_are_one_line(words, expected, folder, tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(4), sigma=np.eye(4))
    write_images(tmp_path / "large", 80, side=16)
    places = {name: folder / name for name in ("student", "real", "other")}
    places |= {"weights": folder / "weights.pth", "stats": tmp_path / "stats.npz", "large": tmp_path / "large"}
    assert expected in mistake(*(word.format(**places) for word in words))


def test_uneven_images_are_named(folder, tmp_path):
    mixed = write_images(tmp_path / "mixed", 3)
    Image.new("RGB", (9, 8)).save(mixed / "009.png")
    assert "009.png: 8x9 pixels" in mistake(
        "--samples", mixed, "--reference", folder / "real", "--extractor", "random-conv"
    )
    (mixed / "009.png").write_bytes(b"no image")
    assert "009.png: not a readable image" in mistake(
        "--samples", mixed, "--reference", folder / "real", "--extractor", "random-conv"
    )
    np.savez(tmp_path / "bad.npz", np.zeros((4, 8, 8, 3)))
    assert "arr_0 is float64" in mistake("--samples", tmp_path / "bad.npz", "--reference", folder / "real")
