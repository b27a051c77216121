"""Statistics of real images: every format in and out, and everything that must not be taken for one."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.errors import UserError
from fastgen.eval.metrics import Moments, frechet
from fastgen.eval.statistics import is_statistics, merge, read_statistics, write_statistics
from fastgen.files import sha256

DIM = 6


class See:
    """An extractor as far as statistics know one."""

    name, dim, channels, sha256, input_spec, resize = "toy", DIM, 3, "ab" * 32, "", "tf1-bilinear-299"


@pytest.fixture
def features() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(50, DIM, generator=g) @ torch.randn(DIM, DIM, generator=g) + 3


def arrays(features) -> dict[str, np.ndarray]:
    return {"mu": features.double().mean(0).numpy(), "sigma": torch.cov(features.T.double()).numpy()}


@pytest.mark.parametrize("kind", ["edm", "adm", "clean-fid", "pytorch-fid"])
def test_published_formats_are_read(kind, features, tmp_path):
    known = arrays(features)
    extra = {
        "adm": {"mu_s": np.zeros(4), "sigma_s": np.eye(4), "arr_0": np.zeros((2, 4, 4, 3), np.uint8)},
        "pytorch-fid": {"sigma": known["sigma"].astype(np.float32), "mu": known["mu"].astype(np.float32)},
    }.get(kind, {})
    save = np.savez_compressed if kind == "clean-fid" else np.savez
    save(tmp_path / "ref.npz", **{**known, **extra})
    found = read_statistics(tmp_path / "ref.npz", See())
    assert found.count is None and found.features is None and found.sha256 == sha256(tmp_path / "ref.npz")
    loose = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found.moments.mean, torch.from_numpy(known["mu"]), **loose)
    torch.testing.assert_close(found.moments.cov, torch.from_numpy(known["sigma"]), **loose)
    assert found.moments.mean.dtype == torch.float64
    # The count is not known, so no sample may be added and no size is small.
    assert frechet(features, found.moments) == pytest.approx(0, abs=1e-4)


def test_clean_fids_features_are_read_as_features(features, tmp_path):
    np.savez(tmp_path / "kid.npz", feats=features.numpy())
    found = read_statistics(tmp_path / "kid.npz", See())
    assert found.count == 50 and torch.equal(found.features, features)
    torch.testing.assert_close(found.moments.cov, Moments.of(features).cov)


def test_own_files_keep_sums_and_say_what_made_them(features, tmp_path):
    write_statistics(tmp_path / "own.safetensors", Moments.of(features), See(), {"data": "toys", "images": "50"})
    tensors = load_file(tmp_path / "own.safetensors")
    x = features.double()
    torch.testing.assert_close(tensors["sum"], x.sum(0))
    torch.testing.assert_close(tensors["outer"], x.T @ x)
    assert float(tensors["count"]) == 50 and all(t.dtype == torch.float64 for t in tensors.values())
    found = read_statistics(tmp_path / "own.safetensors", See())
    torch.testing.assert_close(found.moments.mean, x.mean(0))
    torch.testing.assert_close(found.moments.cov, torch.cov(x.T))
    assert found.count == 50 and found.facts["data"] == "toys" and found.facts["extractor_sha256"] == See.sha256


def test_shards_make_the_whole(features, tmp_path):
    parts = []
    for i, part in enumerate(features.split(17)):
        write_statistics(tmp_path / f"{i}.safetensors", Moments.of(part), See(), {})
        parts.append(read_statistics(tmp_path / f"{i}.safetensors", See()))
    whole = merge(parts)
    assert whole.count == 50
    torch.testing.assert_close(whole.mean, features.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.cov, torch.cov(features.T.double()), rtol=1e-10, atol=1e-10)


def test_npz_for_others_are_read_by_their_keys(features, tmp_path):
    write_statistics(tmp_path / "out.npz", Moments.of(features), See(), {"data": "toys"})
    with np.load(tmp_path / "out.npz") as file:
        assert sorted(file) == ["mu", "sigma"] and file["mu"].dtype == file["sigma"].dtype == np.float64
        assert np.allclose(file["sigma"], np.cov(features.double().numpy(), rowvar=False))
    again = read_statistics(tmp_path / "out.npz", See()).moments
    with pytest.raises(UserError, match="no count"):
        write_statistics(tmp_path / "own.safetensors", again, See(), {})
    with pytest.raises(UserError, match=r"give a \.safetensors"):
        write_statistics(tmp_path / "own.pt", again, See(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img512.pkl").write_bytes(pickle.dumps({"fid": Bomb()}))
    assert is_statistics("img512.pkl")
    with pytest.raises(UserError, match=r"convert it once: python -c .*numpy\.savez\('img512\.npz'"):
        read_statistics("img512.pkl", See())
    np.savez(tmp_path / "objects.npz", mu=np.array([Bomb()], object), sigma=np.eye(1))
    with pytest.raises(UserError, match="not readable as plain arrays"):
        read_statistics("objects.npz", See())
    assert not (tmp_path / "exploded").exists()


def test_what_was_made_by_another_network_is_refused(features, tmp_path):
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="statistics of 2048 features, the extractor toy has 6"):
        read_statistics(tmp_path / "wide.npz", See())
    write_statistics(tmp_path / "own.safetensors", Moments.of(features), See(), {})
    for change in ({"sha256": "cd" * 32}, {"resize": "pil-bicubic-float-299"}, {"name": "other"}):
        other = type("Other", (See,), change)()
        with pytest.raises(UserError, match=re.escape(f"this measurement has {next(iter(change.values()))[:40]}")):
            read_statistics(tmp_path / "own.safetensors", other)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"mu": np.zeros(DIM)}, "neither mu and sigma nor feats"),
        ({"mu": np.zeros(DIM), "sigma": np.eye(5)}, "no mean and covariance"),
        ({"mu": np.zeros(DIM), "sigma": np.full((DIM, DIM), np.nan)}, "not finite"),
        ({"mu": np.zeros(DIM), "sigma": np.triu(np.ones((DIM, DIM)))}, "not symmetric"),
    ],
)
def test_damaged_statistics_are_refused(content, words, tmp_path):
    np.savez(tmp_path / "ref.npz", **content)
    with pytest.raises(UserError, match=words):
        read_statistics(tmp_path / "ref.npz", See())


def test_files_of_other_kinds_are_refused(features, tmp_path):
    (tmp_path / "half.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UserError, match=r"not a whole \.npz"):
        read_statistics(tmp_path / "half.npz", See())
    save_file({"mu": torch.zeros(DIM)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not statistics written by fastgen; it lacks sigma"):
        read_statistics(tmp_path / "other.safetensors", See())
    with pytest.raises(UserError, match="no such file"):
        read_statistics(tmp_path / "none.npz", See())


def test_statistics_are_told_from_images(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "adm.npz", np.zeros((2, 4, 4, 3), np.uint8), mu=np.zeros(2), sigma=np.eye(2))
    assert not is_statistics(tmp_path / "images.npz") and is_statistics(tmp_path / "adm.npz")
    assert not is_statistics(tmp_path) and not is_statistics("digits")
