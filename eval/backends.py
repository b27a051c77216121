"""Whose network and whose arithmetic a Frechet distance is made with: our own, clean-fid's, or torchmetrics'.

The others are for checking ours, or for a number that a paper made with them; each is an optional package. Nothing is
downloaded: clean-fid's network is read from a local file.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import RunFailed, UserError, first_line, require, suggestion
from fastgen.eval import metrics
from fastgen.eval.extractors import Extractor
from fastgen.eval.inception import FEATURES, FOLDER, SIZE, InceptionExtractor
from fastgen.eval.metrics import Moments
from fastgen.eval.resize import centre_squares, recipe_name
from fastgen.files import sha256
from fastgen.images import to_uint8

NAMES = ("own", "clean-fid", "torchmetrics")
SCRIPT = "inception-2015-12-05.pt"
SCRIPT_SOURCE = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/" + SCRIPT
SCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
BATCH = 32


@dataclass(frozen=True)
class Backend:
    """`name` with its version, the extractor it sees through, and its distance between two sets of moments."""

    name: str
    extractor: Extractor
    frechet: Callable[[Moments, Moments], float]


def open_backend(
    name: str,
    extractor: Callable[[], Extractor],
    *,
    resize: str,
    crop: int | None,
    weights: str | Path | None,
    channels: int,
) -> Backend:
    """`extractor` makes the one that was asked for; clean-fid brings its own, for which the rest is."""
    if name == "own":
        return Backend("own", extractor(), metrics.frechet)
    if name == "torchmetrics":
        return _torchmetrics(extractor)
    if name == "clean-fid":
        return _clean_fid(lambda: CleanFidExtractor(find_script(weights), resize, channels, crop))
    raise UserError(f"--backend {name}: no such backend; {suggestion(name, NAMES)}")


def _imported(module: str, extra: str, purpose: str) -> ModuleType:
    """An optional package; one that cannot live with this torch (torchvision's CUDA build) is told in a line too."""
    try:
        return require(module, extra=extra, purpose=purpose)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"{purpose}: '{module}' does not import here ({reason}); see `fastgen doctor`") from error


def _version(distribution: str) -> str:
    return f"{distribution} {importlib.metadata.version(distribution)}"


class _Given(torch.nn.Module):
    """torchmetrics asks for a network: the features are there already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _torchmetrics(extractor: Callable[[], Extractor]) -> Backend:
    """FrechetInceptionDistance over our features: its own network is the same one, and needs torch-fidelity."""
    module = _imported("torchmetrics.image.fid", "metrics", "--backend torchmetrics")

    def frechet(a: Moments, b: Moments) -> float:
        metric = module.FrechetInceptionDistance(feature=_Given(len(a.mean)))
        for side, moments in (("real", b), ("fake", a)):
            # Its states are sums; of statistics without a count any count gives the same mean and covariance back.
            count = 10_000 if math.isinf(moments.count) else int(moments.count)
            mean, cov = moments.mean.cpu(), moments.cov.cpu()
            setattr(metric, f"{side}_features_sum", mean * count)
            setattr(metric, f"{side}_features_cov_sum", cov * (count - 1) + count * torch.outer(mean, mean))
            setattr(metric, f"{side}_features_num_samples", torch.tensor(count))
        metric.orig_dtype = torch.float64
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nothing was added by `update`
            return float(metric.compute())

    return Backend(f"{_version('torchmetrics')} on own features", extractor(), frechet)


def _clean_fid(extractor: Callable[[], Extractor]) -> Backend:
    module = _imported("cleanfid.fid", "fid", "--backend clean-fid")

    def frechet(a: Moments, b: Moments) -> float:
        sides = [part.cpu().numpy() for part in (a.mean, a.cov, b.mean, b.cov)]
        try:
            return float(module.frechet_distance(*sides))
        except TypeError as error:  # clean-fid calls sqrtm(disp=), which scipy 1.18 took away
            raise UserError(
                "--backend clean-fid: its square root needs scipy<1.18; pip install 'scipy<1.18'"
            ) from error
        except ValueError as error:
            raise RunFailed(
                f"--backend clean-fid: its square root failed ({error}); --backend own has another"
            ) from error

    return Backend(_version("clean-fid"), extractor(), frechet)


def find_script(weights: str | Path | None) -> Path:
    """clean-fid's network, a TorchScript file; only the published bytes are run."""
    folders = [Path(folder).expanduser() for folder in (os.environ.get(FOLDER), tempfile.gettempdir()) if folder]
    places = [Path(weights).expanduser()] if weights is not None else [folder / SCRIPT for folder in folders]
    for path in places:
        if path.is_file():
            if sha256(path) != SCRIPT_SHA256:
                raise UserError(f"{path}: not the published {SCRIPT} (its sha256 is {SCRIPT_SHA256}); it is not run")
            return path
    raise UserError(
        f"{SCRIPT}: not here; --backend clean-fid needs {SCRIPT_SOURCE} in the folder {FOLDER} names, or as --weights"
    )


class CleanFidExtractor:
    """Features by clean-fid: its resize ("clean"), or its network's own resize inside ("tf")."""

    dim = FEATURES
    name = "inception"
    public = True

    def __init__(self, script: Path, resize: str, channels: int, crop: int | None = None) -> None:
        purpose = "--backend clean-fid"
        network: Any = _imported("cleanfid.inception_torchscript", "fid", purpose)
        self._resizer = _imported("cleanfid.resize", "fid", purpose).make_resizer("PIL", False, "bicubic", (SIZE, SIZE))
        self._inside = resize == "tf"
        # Named by its folder; the class only looks for the published name.
        self._net = network.InceptionV3W(str(script.parent), download=False, resize_inside=self._inside)
        self._net.eval()
        self.sha256, self.channels, self.crop = sha256(script), channels, crop
        self.resize = recipe_name(resize, SIZE, crop)
        self.input_spec = f"{channels} channels, rounded to 8 bits, {self.resize}"

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in [-1, 1] -> [N, 2048]."""
        self._net.to(images.device)
        rows = torch.empty(len(images), FEATURES, device=images.device)
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                x = to_uint8(images[start : start + BATCH]).expand(-1, 3, -1, -1)
                x = x if self.crop is None else centre_squares(x, self.crop)
                if not self._inside:
                    planes = x.permute(0, 2, 3, 1).cpu().numpy()
                    resized = [torch.from_numpy(self._resizer(image)).permute(2, 0, 1) for image in planes]
                    x = torch.stack(resized).to(images.device)
                rows[start : start + BATCH] = self._net(x)
        return rows


def metric_name(kind: str, extractor: Extractor) -> str:
    """ "FID" and "IS" only where the network is the one of 2015, by its hash; else the space's name and hash."""
    if isinstance(extractor, InceptionExtractor | CleanFidExtractor):
        known = {"FD": "FID", "FD-infinity": "FID-infinity"}.get(kind, kind)
        return known if extractor.public else f"{kind}-inception-{extractor.sha256[:8]}"
    return f"{kind}-{extractor.name}"
