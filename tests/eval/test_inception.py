"""The Inception network of 2015 without its weights: names, arithmetic, files, and what may be called FID."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastgen.data.digits import Digits
from fastgen.errors import UserError
from fastgen.eval import inception
from fastgen.eval.backends import metric_name
from fastgen.eval.extractors import Extractor, load_extractor
from fastgen.eval.inception import FILE, SHA256, InceptionExtractor, find_weights, inception_score, read_inception
from fastgen.eval.resize import tf1_bilinear
from fastgen.files import sha256
from tests.inception import as_samples, save_pth, smooth_images


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_pth(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def net(weights):
    return read_inception(weights).eval()


def test_names_and_sizes_are_those_of_the_public_file():
    state = inception.Inception().state_dict()
    assert len(state) == 566
    assert sum(p.numel() for p in inception.Inception().parameters()) == 23_850_960
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6c.branch7x7dbl_5.conv.weight": (192, 160, 1, 7),
        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.bn.bias": (192,),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def conv(state, name, x, stride=1, padding=(0, 0)):
    """Convolution, batch normalisation with epsilon 1e-3, ReLU, from the state dict in float64."""
    y = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
    mean, var, gain, shift = (state[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    column = (None, slice(None), None, None)
    return ((y - mean[column]) / (var[column] + 1e-3).sqrt() * gain[column] + shift[column]).relu()


def unfolded_mean(x):
    """3 x 3 averages over the pixels that exist, by sums and counts."""
    ones = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype)
    count = F.conv2d(torch.ones_like(x), ones, padding=1, groups=x.shape[1])
    return F.conv2d(x, ones, padding=1, groups=x.shape[1]) / count


def test_blocks_are_those_of_the_graph_in_float64(net):
    """A, C, D and both E blocks written out once more; average pools leave the padding out, the last pool is a max."""
    s = {name: tensor.double() for name, tensor in net.state_dict().items()}
    draw = lambda *shape: torch.rand(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # noqa: E731

    def a(x, b="Mixed_5c."):
        five = conv(s, b + "branch5x5_2", conv(s, b + "branch5x5_1", x), padding=(2, 2))
        three = conv(s, b + "branch3x3dbl_2", conv(s, b + "branch3x3dbl_1", x), padding=(1, 1))
        three = conv(s, b + "branch3x3dbl_3", three, padding=(1, 1))
        pool = conv(s, b + "branch_pool", unfolded_mean(x))
        return torch.cat([conv(s, b + "branch1x1", x), five, three, pool], 1)

    def c(x, b="Mixed_6c."):
        seven = conv(s, b + "branch7x7_2", conv(s, b + "branch7x7_1", x), padding=(0, 3))
        seven = conv(s, b + "branch7x7_3", seven, padding=(3, 0))
        double = conv(s, b + "branch7x7dbl_1", x)
        for i, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            double = conv(s, f"{b}branch7x7dbl_{i}", double, padding=padding)
        pool = conv(s, b + "branch_pool", unfolded_mean(x))
        return torch.cat([conv(s, b + "branch1x1", x), seven, double, pool], 1)

    def d(x, b="Mixed_7a."):
        three = conv(s, b + "branch3x3_2", conv(s, b + "branch3x3_1", x), stride=2)
        seven = conv(s, b + "branch7x7x3_2", conv(s, b + "branch7x7x3_1", x), padding=(0, 3))
        seven = conv(s, b + "branch7x7x3_4", conv(s, b + "branch7x7x3_3", seven, padding=(3, 0)), stride=2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def e(x, b, pooled):
        three = conv(s, b + "branch3x3_1", x)
        double = conv(s, b + "branch3x3dbl_2", conv(s, b + "branch3x3dbl_1", x), padding=(1, 1))
        parts = [conv(s, b + "branch1x1", x)]
        parts += [
            conv(s, b + "branch3x3_2a", three, padding=(0, 1)),
            conv(s, b + "branch3x3_2b", three, padding=(1, 0)),
        ]
        parts.append(conv(s, b + "branch3x3dbl_3a", double, padding=(0, 1)))
        parts.append(conv(s, b + "branch3x3dbl_3b", double, padding=(1, 0)))
        return torch.cat([*parts, conv(s, b + "branch_pool", pooled)], 1)

    x = draw(2048, 4, 4)
    widest = F.unfold(F.pad(x, (1, 1, 1, 1), value=-1), 3).reshape(2, 2048, 9, 16).amax(2).reshape(x.shape)
    for block, inputs, expected in (
        (net.Mixed_5c, draw(256, 6, 6), a),
        (net.Mixed_6c, draw(768, 8, 8), c),
        (net.Mixed_7a, draw(768, 8, 8), d),
        (net.Mixed_7b, draw(1280, 4, 4), lambda x: e(x, "Mixed_7b.", unfolded_mean(x))),
        (net.Mixed_7c, x, lambda x: e(x, "Mixed_7c.", widest)),
    ):
        torch.testing.assert_close(block(inputs.float()).double(), expected(inputs), rtol=1e-4, atol=1e-4)


def test_features_are_the_mean_of_the_last_block_and_logits_have_no_bias(net):
    seen = {}
    hooks = [
        getattr(net, name).register_forward_hook(lambda m, i, out, name=name: seen.setdefault(name, out))
        for name in ("Conv2d_1a_3x3", "Conv2d_4a_3x3", "Mixed_5b", "Mixed_6e", "Mixed_7c")
    ]
    x = tf1_bilinear(smooth_images(1).float(), 299)
    with torch.no_grad():
        features = net(x)
        first = net.Conv2d_1a_3x3.bn(net.Conv2d_1a_3x3.conv((x - 128) / 128)).relu()
        logits = net.logits(features)
    for hook in hooks:
        hook.remove()
    sizes = {name: tuple(out.shape[1:]) for name, out in seen.items()}
    assert sizes == {
        "Conv2d_1a_3x3": (32, 149, 149),
        "Conv2d_4a_3x3": (192, 71, 71),
        "Mixed_5b": (256, 35, 35),
        "Mixed_6e": (768, 17, 17),
        "Mixed_7c": (2048, 8, 8),
    }
    torch.testing.assert_close(seen["Conv2d_1a_3x3"], first)
    torch.testing.assert_close(features, seen["Mixed_7c"].mean((2, 3)))
    torch.testing.assert_close(logits, F.linear(features, net.fc.weight))


def test_a_row_depends_on_its_image_alone_and_on_its_8_bits(net, monkeypatch):
    monkeypatch.setattr(inception, "BATCH", 2)
    see = InceptionExtractor(net, "0" * 64)
    assert isinstance(see, Extractor)
    x = as_samples(smooth_images(3))
    rows = see(x)
    assert rows.shape == (3, 2048) and rows.dtype == torch.float32 and not rows.is_inference()
    assert rows.std(0).mean() > 0.01  # the weights are alive
    torch.testing.assert_close(see(x[1:2]), rows[1:2], rtol=1e-5, atol=1e-5)
    assert torch.equal(see(x[:1] + 0.3 / 127.5), see(x[:1]))  # a third of a grey level


def test_recipes_give_other_features_and_are_named(net):
    x = as_samples(smooth_images(1))
    tf, clean = (InceptionExtractor(net, "0" * 64, resize) for resize in ("tf", "clean"))
    assert (tf.resize, clean.resize) == ("tf1-bilinear-299", "pil-bicubic-float-299")
    assert (tf(x) - clean(x)).abs().max() > 1e-3
    with pytest.raises(UserError, match="did you mean 'clean'"):
        InceptionExtractor(net, "0" * 64, "cleen")


def test_grey_images_are_repeated_and_other_shapes_refused(net):
    see = InceptionExtractor(net, "0" * 64, channels=1)
    grey = as_samples(smooth_images(1))[:, :1]
    assert torch.equal(see(grey), InceptionExtractor(see.net, "0" * 64)(grey.expand(-1, 3, -1, -1)))
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8)):
        with pytest.raises(ValueError, match="images must be float"):
            see(images)


def test_a_crop_is_a_step_before_the_recipe(net):
    see = InceptionExtractor(net, "0" * 64, "clean", crop=16)
    wide = as_samples(smooth_images(1, side=24))[:, :, 4:20]
    assert see.resize == "square-lanczos-16, pil-bicubic-float-299"
    plain = InceptionExtractor(see.net, see.sha256, "clean")
    assert torch.equal(see(wide), plain(wide[:, :, :, 4:20]))


def test_fid_is_the_name_of_one_file_alone(weights, net):
    public, other = (InceptionExtractor(net, digest) for digest in (SHA256, "6726825d" + "0" * 56))
    assert SHA256[:8] in FILE
    assert metric_name("FD", public) == "FID" and metric_name("FD-infinity", public) == "FID-infinity"
    assert metric_name("IS", public) == "IS"
    assert metric_name("FD", other) == "FD-inception-6726825d"
    assert metric_name("IS", other) == "IS-inception-6726825d"
    assert metric_name("FD", load_extractor("random-conv", Digits())) == "FD-random-conv"
    read = InceptionExtractor.load(weights)
    assert read.sha256 == sha256(weights) and not read.public


def test_the_weights_are_looked_for_in_two_places_and_never_fetched(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTGEN_WEIGHTS_DIR", raising=False)
    with pytest.raises(UserError) as told:
        find_weights()
    for word in (FILE, "https://github.com/toshas/torch-fidelity/releases", "FASTGEN_WEIGHTS_DIR", "--weights"):
        assert word in str(told.value)
    assert "\n" not in str(told.value)
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        find_weights()
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").touch()
    assert find_weights().name.startswith("pt_")
    (tmp_path / FILE).touch()
    assert find_weights() == tmp_path / FILE
    (tmp_path / "mine.pth").touch()
    assert find_weights(tmp_path / "mine.pth") == tmp_path / "mine.pth"
    with pytest.raises(UserError, match=r"no\.pth: no such file; the public one is https"):
        find_weights("no.pth")


def test_files_of_other_things_are_refused(tmp_path, net, monkeypatch):
    state = dict(net.state_dict())
    monkeypatch.setattr(inception, "Inception", lambda: copy.deepcopy(net))  # quicker than fresh random numbers
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    save_file({k: v for k, v in state.items() if k not in counters}, tmp_path / "good.safetensors")
    read = read_inception(tmp_path / "good.safetensors")
    assert torch.equal(read.Mixed_7c.branch_pool.bn.running_var, net.Mixed_7c.branch_pool.bn.running_var)
    for change in ({"fc.weight": None}, {"more": torch.ones(1)}, {"fc.weight": torch.ones(1000, 2048)}):
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, tmp_path / "odd.pth")
        with pytest.raises(UserError, match=f"1 tensors .*{next(iter(change))}.*the right file is https"):
            read_inception(tmp_path / "odd.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="not a state dict"):
        read_inception(tmp_path / "list.pth")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_with_code_in_it_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (lambda file: torch.save(Bomb(), file), lambda file: file.write_bytes(pickle.dumps(Bomb()))):
        write(tmp_path / "bomb.pth")
        with pytest.raises(UserError, match="and reading it could run code; the right file is"):
            read_inception(tmp_path / "bomb.pth")
    assert not (tmp_path / "exploded").exists()


def test_the_inception_score_by_hand():
    assert inception_score(torch.full((40, 8), 1 / 8)) == (pytest.approx(1.0), pytest.approx(0.0))
    onehot = torch.eye(10).repeat(6, 1)
    assert inception_score(onehot, splits=1)[0] == pytest.approx(10.0, abs=1e-12)
    # Sorted by class, each split would hold one class and score 1: the shuffle mixes them.
    assert inception_score(onehot.repeat_interleave(50, 0), splits=10)[0] > 9
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    kl = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert inception_score(p, splits=1)[0] == pytest.approx(float(kl.exp()))
    with pytest.raises(ValueError, match="splits 3"):
        inception_score(p, splits=3)


def test_probabilities_come_from_the_features(net):
    see = InceptionExtractor(net, "0" * 64)
    features = torch.rand(3, 2048, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(see.probabilities(features).float(), net.logits(features).softmax(1))


def test_features_are_bit_for_bit_torch_fidelitys(weights):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)
    theirs = module.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights))
    pixels = smooth_images(3)
    features, logits = theirs(pixels)
    see = InceptionExtractor.load(weights)
    assert torch.equal(see(as_samples(pixels)), features)
    torch.testing.assert_close(see.net.logits(features), logits, rtol=1e-6, atol=1e-6)


def test_the_extractor_is_found_by_its_name(weights, monkeypatch):
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(weights.parent))
    (weights.parent / FILE).hardlink_to(weights)
    found = load_extractor("inception", Digits())
    assert isinstance(found, InceptionExtractor) and (found.channels, found.recipe) == (1, "tf")
