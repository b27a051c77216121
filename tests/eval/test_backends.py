"""Other packages' arithmetic against ours, and what is said where they cannot be had."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from fastgen.errors import UserError
from fastgen.eval import backends
from fastgen.eval.backends import find_script, metric_name, open_backend
from fastgen.eval.metrics import Moments, frechet

OPTIONS = {"resize": "tf", "crop": None, "weights": None, "channels": 3}


class See:
    name, dim, channels, sha256, input_spec = "toy", 5, 3, "ab" * 32, ""


def draw(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g) @ torch.randn(5, 5, generator=g) + seed


def test_own_is_ours():
    backend = open_backend("own", See, **OPTIONS)
    assert backend.name == "own" and isinstance(backend.extractor, See)
    a, b = Moments.of(draw(40, 0)), Moments.of(draw(60, 1))
    assert backend.frechet(a, b) == frechet(a, b)


def test_torchmetrics_agrees_with_ours_on_sets_and_on_bare_statistics():
    pytest.importorskip("torchmetrics")
    backend = open_backend("torchmetrics", See, **OPTIONS)
    assert backend.name.startswith("torchmetrics ") and backend.name.endswith("on own features")
    a, b = Moments.of(draw(40, 0)), Moments.of(draw(60, 1))
    assert backend.frechet(a, b) == pytest.approx(frechet(a, b), rel=1e-8)
    bare = Moments.exact(b.mean, b.cov)
    assert backend.frechet(a, bare) == pytest.approx(frechet(a, b), rel=1e-8)


def test_torchmetrics_own_bookkeeping_gives_the_same():
    """The states are set from moments here; filled by its own update from features they are the same."""
    image = pytest.importorskip("torchmetrics.image.fid")
    metric = image.FrechetInceptionDistance(feature=backends._Given(5))
    x, y = draw(40, 0).double(), draw(60, 1).double()
    metric.update(y, real=True)
    metric.update(x, real=False)
    backend = open_backend("torchmetrics", See, **OPTIONS)
    assert backend.frechet(Moments.of(x), Moments.of(y)) == pytest.approx(float(metric.compute()), rel=1e-9)


@pytest.fixture
def cleanfid(monkeypatch, tmp_path):
    """A stand-in of clean-fid's modules: a linear network, and its published formula by another route."""
    script = tmp_path / backends.SCRIPT
    script.write_bytes(b"a network")
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(backends, "SCRIPT_SHA256", backends.sha256(script))
    monkeypatch.setattr(backends.importlib.metadata, "version", lambda name: "0.1.35")

    class Network(torch.nn.Module):
        def __init__(self, path, download, resize_inside):
            super().__init__()
            assert path == str(tmp_path) and not download
            self.inside = resize_inside

        def forward(self, x):
            assert x.shape[1:] == ((3, 8, 8) if self.inside else (3, 299, 299))
            return x.float().mean((2, 3)).repeat(1, 683)[:, :2048]

    def by_eigenvalues(mu1, sigma1, mu2, sigma2):
        root = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(complex)).real.sum()
        return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root

    def make_resizer(library, quantize_after, filter, output_size):
        assert (library, quantize_after, filter) == ("PIL", False, "bicubic")
        return lambda image: np.tile(image.mean((0, 1), dtype=np.float32), (*output_size, 1))

    contents = {
        "cleanfid": {},
        "cleanfid.fid": {"frechet_distance": by_eigenvalues},
        "cleanfid.resize": {"make_resizer": make_resizer},
        "cleanfid.inception_torchscript": {"InceptionV3W": Network},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["cleanfid.fid"]


@pytest.mark.parametrize("resize", ["tf", "clean"])
def test_clean_fid_brings_its_network_and_its_formula(cleanfid, resize):
    backend = open_backend("clean-fid", See, **{**OPTIONS, "resize": resize})
    see = backend.extractor
    assert backend.name == "clean-fid 0.1.35" and see.sha256 == backends.SCRIPT_SHA256
    assert metric_name("FD", see) == "FID" and see.resize.startswith("tf1" if resize == "tf" else "pil")
    x = torch.rand(33, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = ((x + 1) * 127.5).round().mean((2, 3)).repeat(1, 683)[:, :2048]
    torch.testing.assert_close(see(x), expected, rtol=1e-5, atol=1e-3)
    a, b = Moments.of(draw(40, 0)), Moments.of(draw(60, 1))
    assert backend.frechet(a, b) == pytest.approx(frechet(a, b), rel=1e-8)


def test_a_scipy_without_disp_is_told(cleanfid):
    def gone(*sides):
        raise TypeError("sqrtm() got an unexpected keyword argument 'disp'")

    cleanfid.frechet_distance = gone
    backend = open_backend("clean-fid", See, **OPTIONS)
    with pytest.raises(UserError, match="needs scipy<1"):
        backend.frechet(Moments.of(draw(9, 0)), Moments.of(draw(9, 1)))


def test_a_package_that_is_not_there_or_breaks_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    monkeypatch.setitem(sys.modules, "cleanfid.fid", None)
    with pytest.raises(UserError, match=r"needs the package 'cleanfid.fid': pip install 'fastgen-distill\[fid\]'"):
        open_backend("clean-fid", See, **OPTIONS)

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nand more")

    monkeypatch.setattr("fastgen.errors.importlib.import_module", broken)
    with pytest.raises(UserError, match=r"torchvision::nms does not exist\); see `fastgen doctor`"):
        open_backend("torchmetrics", See, **OPTIONS)
    with pytest.raises(UserError, match="did you mean 'clean-fid'"):
        open_backend("cleanfid", See, **OPTIONS)


def test_only_the_published_script_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(backends.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt: not here; .*https://nvlabs"):
        find_script(None)
    (tmp_path / backends.SCRIPT).write_bytes(b"something else")
    with pytest.raises(UserError, match="not the published"):
        find_script(None)
    with pytest.raises(UserError, match="not the published"):
        find_script(tmp_path / backends.SCRIPT)
