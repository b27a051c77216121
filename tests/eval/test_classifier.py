"""The shipped classifier is what its file says, sees the gate's fakes, and can be made again."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastgen.data.digits import Digits
from fastgen.errors import RunFailed, UserError
from fastgen.eval import classifier
from fastgen.eval.classifier import ConvNet, accuracy, augment, load_classifier, train_classifier
from fastgen.eval.extractors import Classifier
from fastgen.eval.metrics import frechet, label_agreement


@pytest.fixture(scope="module")
def train() -> tuple[torch.Tensor, torch.Tensor]:
    batch = Digits(split="train").get(torch.arange(1400))
    return batch["x0"], batch["label"]


def facts() -> dict:
    with safe_open(classifier.WEIGHTS, "pt") as file:
        return json.loads(file.metadata()["fastgen"])


def test_the_shipped_weights_classify_held_out_digits():
    net = load_classifier(classifier.WEIGHTS)
    measured = accuracy(net, Digits(split="held_out"))
    assert measured >= 0.97
    assert facts()["held_out_accuracy"] == pytest.approx(measured, abs=5e-5)
    assert facts()["train_accuracy"] == pytest.approx(accuracy(net, Digits(split="train")), abs=5e-5)


def test_the_shipped_file_is_the_one_that_figures_were_measured_with():
    blob = classifier.WEIGHTS.read_bytes()
    digest = "92908ccfacfe11730d876f8f7687e8e21afe692405e1957638aec42f537b0688"
    assert hashlib.sha256(blob).hexdigest() == digest == Classifier.load(classifier.WEIGHTS).sha256
    assert len(blob) < 400_000
    assert {value.dtype for value in load_file(classifier.WEIGHTS).values()} == {torch.float32}
    assert facts()["train_sha256"] == classifier.data_sha256(Digits(split="train"))
    assert facts()["train_sha256"] != classifier.data_sha256(Digits(split="held_out"))


def test_the_features_see_what_pixels_do_not(train):
    """A Gaussian per class and a missing class are far from the data next to another draw of the data themselves."""
    x, label = train
    see, generator = Classifier.load(classifier.WEIGHTS), torch.Generator().manual_seed(0)
    pick = lambda images: images[torch.randint(0, len(images), (2000,), generator=generator)]  # noqa: E731
    asked = torch.arange(2000) % 10
    gaussian = torch.empty(2000, 64)
    for c in range(10):
        own = x[label == c].flatten(1)
        # A factor of the covariance: its rows, mixed by normal numbers, have that covariance.
        factor = (own - own.mean(0)) / (len(own) - 1) ** 0.5
        gaussian[asked == c] = own.mean(0) + torch.randn(200, len(own), generator=generator) @ factor
    gaussian = gaussian.reshape(-1, 1, 8, 8)
    real = see(x)
    copies = frechet(see(pick(x)), real)
    assert frechet(see(gaussian), real) > 5 * copies
    assert frechet(see(pick(x[label != 8])), real) > 5 * copies
    assert label_agreement(asked, see.classify(gaussian).argmax(1)) > 0.9


def test_training_learns():
    """Chance is 0.1; the full 1,500 steps reach 0.99."""
    net = train_classifier(Digits(split="train"), steps=60)
    assert accuracy(net, Digits(split="held_out")) > 0.7
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_training_repeats_and_leaves_the_global_generator_alone():
    data, state = Digits(split="train"), torch.get_rng_state()
    first, again, other = (train_classifier(data, seed=seed, steps=4) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_data_without_labels_are_refused():
    data = Digits(split="train")
    data.num_classes = None
    with pytest.raises(UserError, match="'digits/train' has no labels"):
        train_classifier(data)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 9), (1, 28, 28), (3, 16, 24), (3, 64, 64)])
def test_every_size_gives_128_features(shape):
    net = ConvNet(shape[0], 7).eval()
    x = torch.randn(2, *shape)
    assert net.features(x).shape == (2, 128)
    assert net(x).shape == (2, 7)


def test_augmentation_moves_by_one_pixel_at_most():
    torch.manual_seed(0)
    x = torch.randn(300, 2, 5, 6)
    moved = augment(x, noise=0)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    shifts = torch.stack([padded[:, :, i : i + 5, j : j + 6] for i in range(3) for j in range(3)])
    same = (shifts == moved).flatten(2).all(2)
    assert same.sum(0).eq(1).all(), "each image is one of its nine neighbours"
    assert (same.sum(1) > 10).all(), "and all nine occur"
    torch.testing.assert_close(
        (augment(x[:1].expand(300, -1, -1, -1) * 0, 0.05)).std(), torch.tensor(0.05), rtol=0.1, atol=0
    )


def test_a_file_that_is_no_classifier_is_a_user_error(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not a classifier"):
        load_classifier(path)
    state = load_file(classifier.WEIGHTS)
    save_file({**state, "conv2.weight": torch.zeros(64, 32, 5, 5)}, path)
    with pytest.raises(UserError, match="not a classifier"):
        load_classifier(path)
    with pytest.raises(UserError, match="no such file"):
        load_classifier(tmp_path / "missing.safetensors")


def test_the_command_writes_weights_that_load(tmp_path, monkeypatch, capsys):
    shipped, goal = load_classifier(classifier.WEIGHTS), tmp_path / "digits.safetensors"
    monkeypatch.setattr(classifier, "WEIGHTS", goal)
    monkeypatch.setattr(classifier, "train_classifier", lambda data, seed, steps: shipped)
    classifier.main()
    told = json.loads(capsys.readouterr().out)
    assert told["sha256"] == hashlib.sha256(goal.read_bytes()).hexdigest() == Classifier.load(goal).sha256
    assert accuracy(load_classifier(goal), Digits(split="held_out")) == pytest.approx(
        told["held_out_accuracy"], abs=5e-5
    )


def test_the_command_keeps_the_old_file_when_training_went_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "WEIGHTS", tmp_path / "digits.safetensors")
    monkeypatch.setattr(classifier, "train_classifier", lambda data, seed, steps: ConvNet(1, 10).eval())
    with pytest.raises(RunFailed, match=r"below 0\.97"):
        classifier.main()
    assert list(tmp_path.iterdir()) == []
