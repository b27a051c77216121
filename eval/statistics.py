"""Reference statistics: what is kept of a set of real images when only distances to it are wanted.

Published files hold a mean `mu` [D] and a covariance `sigma` [D, D], and say neither what network made them nor of how
many images: EDM, ADM (with its spatial twins mu_s and sigma_s, and images in arr_0), pytorch-fid and clean-fid, whose
files for KID hold the features themselves (`feats`). Ours is a safetensors file that says both, with sums beside the
moments, so that the shards of a set can be joined.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastgen.errors import UserError
from fastgen.eval.extractors import Extractor
from fastgen.eval.metrics import Moments
from fastgen.files import load_tensors, sha256, write_atomic

ENDINGS = (".npz", ".safetensors", ".pkl")
KIND = "fastgen-statistics"
NEEDED = ("mu", "sigma", "sum", "outer", "count")


@dataclass(frozen=True)
class Statistics:
    """Moments of features, the features themselves where the file has them, and the file's hash.

    count is None where the file does not say; facts are what an own file says of its making.
    """

    moments: Moments
    sha256: str | None
    count: int | None = None
    features: Tensor | None = None
    facts: dict[str, str] | None = None

    @property
    def dim(self) -> int:
        return len(self.moments.mean)


def is_statistics(path: str | Path) -> bool:
    """Whether a reference is a file of statistics (or a pickle, which is refused with words) rather than images."""
    path = Path(path)
    return path.is_file() and path.suffix in ENDINGS and not (path.suffix == ".npz" and set(_keys(path)) == {"arr_0"})


def read_statistics(path: str | Path, extractor: Extractor) -> Statistics:
    """Statistics made in the features of `extractor`.

    Own files must name its weights and its resize; of foreign ones only the width can be checked. Whatever else is
    wrong is a UserError, and a pickle is never opened.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".pkl":
        raise UserError(
            f'{path}: a pickle, which can run code when read; where you trust it, convert it once: python -c "import '
            f"pickle, numpy; d = pickle.load(open('{path.name}', 'rb'))['fid']; "
            f"numpy.savez('{path.stem}.npz', mu=d['mu'], sigma=d['sigma'])\""
        )
    found = _read_own(path) if path.suffix == ".safetensors" else _read_npz(path)
    if found.dim != extractor.dim:
        raise UserError(
            f"{path}: statistics of {found.dim} features, the extractor {extractor.name} has {extractor.dim}; give the "
            f"file that was made with it"
        )
    for key, value in (found.facts or {}).items():
        own = facts_of(extractor).get(key)
        if own is not None and value != own:
            raise UserError(f"{path}: made with {key} {value[:40]}, this measurement has {own[:40]}; make it again")
    return found


def facts_of(extractor: Extractor) -> dict[str, str]:
    """What two sets of features must agree in to be compared."""
    told = {"extractor": extractor.name, "extractor_sha256": extractor.sha256}
    return {**told, "resize": getattr(extractor, "resize", "none")}


def write_statistics(path: str | Path, moments: Moments, extractor: Extractor, facts: dict[str, str]) -> None:
    """Write a .safetensors file of our own, or a .npz of mu and sigma that EDM, clean-fid and pytorch-fid read."""
    path = Path(path)
    if path.suffix == ".npz":
        stream = io.BytesIO()
        np.savez(stream, mu=moments.mean.cpu().numpy(), sigma=moments.cov.cpu().numpy())
        write_atomic(path, stream.getvalue())
        return
    if path.suffix != ".safetensors":
        raise UserError(f"--save-reference {path}: give a .safetensors file, or a .npz for other programs")
    if math.isinf(moments.count):
        raise UserError(f"--save-reference {path}: statistics read from a foreign file have no count of images to keep")
    mean, count = moments.mean.cpu(), moments.count
    scatter = moments.cov.cpu() * (count - 1)
    tensors = {
        "count": torch.tensor(count, dtype=torch.float64),
        "sum": mean * count,
        "outer": scatter + count * torch.outer(mean, mean),
        "mu": mean,
        "sigma": scatter / (count - 1),
    }
    write_atomic(path, save(tensors, {"kind": KIND, **facts, **facts_of(extractor)}))


def merge(parts: Sequence[Statistics]) -> Moments:
    """The moments of a set from those of its shards; a part without a count cannot be weighed."""
    whole = Moments()
    for part in parts:
        whole.merge(part.moments)
    return whole


def _read_own(path: Path) -> Statistics:
    tensors = load_tensors(path)
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    missing = [name for name in NEEDED if name not in tensors]
    if facts.get("kind") != KIND or missing:
        raise UserError(f"{path}: not statistics written by fastgen; it lacks {', '.join(missing) or 'their mark'}")
    mu, sigma = _checked(path, tensors["mu"], tensors["sigma"])
    count = int(tensors["count"])
    if count < 2:
        raise UserError(f"{path}: statistics of {count} images; a covariance needs two")
    return Statistics(Moments.known(mu, sigma, count), sha256(path), count, facts=facts)


def _read_npz(path: Path) -> Statistics:
    keys = _keys(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" in keys and "sigma" in keys:
                mu, sigma = _checked(path, torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"]))
                return Statistics(Moments.exact(mu, sigma), sha256(path))
            if "feats" in keys:
                features = torch.from_numpy(np.asarray(file["feats"], np.float32))
                return Statistics(Moments.of(features), sha256(path), len(features), features)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise UserError(f"{path}: not readable as plain arrays ({error}); fetch it again") from error
    raise UserError(
        f"{path}: neither mu and sigma nor feats in it; it holds {', '.join(sorted(keys)[:6]) or 'nothing'}"
    )


def _keys(path: Path) -> list[str]:
    """Names of the arrays, read from the archive's index alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: not a whole .npz file ({error}); fetch it again") from error


def _checked(path: Path, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] in float64, which must be finite and symmetric."""
    mu, sigma = mu.double(), sigma.double()
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"{path}: mu {list(mu.shape)} and sigma {list(sigma.shape)} are no mean and covariance")
    if not (torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
        raise UserError(f"{path}: holds numbers that are not finite; fetch or make it again")
    scale = float(sigma.abs().max())
    if float((sigma - sigma.T).abs().max()) > 1e-6 * scale:
        raise UserError(f"{path}: sigma is not symmetric, so it is no covariance")
    return mu, (sigma + sigma.T) / 2
