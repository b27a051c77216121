"""CLIP score of a tiny CLIPModel against the cosines that transformers itself computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastgen.errors import UserError
from fastgen.eval import clip_score
from fastgen.eval.clip_score import ClipScore
from fastgen.files import sha256
from fastgen.images import to_pil
from tests.inception import as_samples, smooth_images
from tests.tiny import tokenizer

PROMPTS = ["a red fox", "two green apples on a table", "x", "the sea"]


def save_clip(folder: Path) -> Path:
    """A CLIPModel of real classes with random weights, whose scores differ between images and between words."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": 514, "max_position_embeddings": 24, "bos_token_id": 512, "eos_token_id": 513}
    config = CLIPConfig(
        text_config={**shape, **words, "pad_token_id": 513},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config)
    for name, p in model.named_parameters():
        if p.ndim > 1 and "embedding" not in name:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    tokenizer(folder.with_name("words")).save_pretrained(folder)
    picture = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    norms = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255}
    steps = {f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")}
    told = {"image_processor_type": "CLIPImageProcessor", **picture, **norms, **steps}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture
def images():
    return as_samples(smooth_images(4, side=48))


def direct(folder, images, prompts):
    """Cosines out of the model's own logits."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    pixels = processor.from_pretrained(folder)(images=to_pil(images), return_tensors="pt")["pixel_values"]
    words = transformers.CLIPTokenizer.from_pretrained(folder)(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(pixel_values=pixels, **words)
    return (out.logits_per_image / model.logit_scale.exp()).diagonal()


def test_scores_are_the_models_own_cosines(folder, images, monkeypatch):
    monkeypatch.setattr(clip_score, "BATCH", 3)
    expected = direct(folder, images, PROMPTS)
    score = ClipScore(folder)
    found = score.update(images, PROMPTS)
    torch.testing.assert_close(found, 100 * expected.clamp_min(0), rtol=1e-4, atol=1e-4)
    assert expected.min() < 0 < expected.max() and found.min() == 0  # both sides of the clamp are seen
    assert expected.std() > 0.05
    assert score.value == pytest.approx(float(found.double().mean())) and score.count == 4


def test_the_mean_runs_over_batches(folder, images):
    whole, parts = ClipScore(folder), ClipScore(folder)
    whole.update(images, PROMPTS)
    for i in (0, 1, 3):
        parts.update(images[i : {0: 1, 1: 3, 3: 4}[i]], PROMPTS[i : {0: 1, 1: 3, 3: 4}[i]])
    assert parts.value == pytest.approx(whole.value, rel=1e-5) and parts.count == 4
    with pytest.raises(ValueError, match="4 images and 3 prompts"):
        whole.update(images, PROMPTS[:3])
    with pytest.raises(ValueError, match="no images"):
        _ = ClipScore(folder).value


def test_it_names_its_model(folder):
    score = ClipScore(folder)
    assert score.name == "tiny-clip" and score.sha256 == sha256(folder / "model.safetensors")


def test_long_prompts_are_cut_and_counted(folder, images):
    long = "so many letters that the model has no places for them"
    score = ClipScore(folder)
    cut = score.update(images[:2], [long, "a fox"])
    assert score.cut == 1
    same = ClipScore(folder).update(images[:1], [long + " and yet more"])
    torch.testing.assert_close(cut[:1], same, rtol=1e-4, atol=1e-4)


def test_grey_images_are_seen_as_rgb(folder, images):
    grey = images[:1, :1]
    assert torch.equal(
        ClipScore(folder).update(grey, ["x"]), ClipScore(folder).update(grey.expand(-1, 3, -1, -1), ["x"])
    )


def test_what_is_no_clip_folder_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        ClipScore(tmp_path / "none")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        part = shutil.copytree(folder, tmp_path / f"without-{name}")
        (part / name).unlink()
        with pytest.raises(UserError, match=f"no {name} in it"):
            ClipScore(part)
    other = shutil.copytree(folder, tmp_path / "bert")
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="of type 'bert'"):
        ClipScore(other)


def test_weights_that_lack_a_tensor_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    part = shutil.copytree(folder, tmp_path / "part")
    tensors = load_file(part / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, part / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack visual_projection\.weight"):
        ClipScore(part)
    (part / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="not readable as a CLIP model"):
        ClipScore(part)
