"""Teachers: frozen denoisers with guidance. Each file of `fastgen.teachers` knows and reads one family of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import cond as conditions
from fastgen import files
from fastgen.cond import Cond
from fastgen.denoiser import GAP, GUIDANCE, Denoiser, View
from fastgen.errors import UserError, suggestion
from fastgen.files import is_complete, peek_json, read_json
from fastgen.layout import halves, twice, wide
from fastgen.nets.weights import load_weights
from fastgen.paths import Pair, Path
from fastgen.sources import locate, origin
from fastgen.teachers import trellis

FACTS = "fastgen.json"
EXTRA = "extra.safetensors"  # weights of `Denoiser.extra`, beside the network's own files
FORMAT = 1  # of that file; raised when an older fastgen could no longer read it


class Teacher(nn.Module):
    """A frozen denoiser; `guidance` is the default weight w of classifier-free guidance (None: conditional only).

    guided = null + w (conditional - null), so w = 1 is the conditional prediction and w = 0 the null one. With
    `guidance_interval` (low, high), only where low < sigma / alpha <= high is it guided, conditional elsewhere
    (2404.07724).
    `sha256` identifies its weights, and is worked out when first asked for where it is a function; `facts` carries
    licence and origin into the students made from it.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        sha256: str | Callable[[], str] = "",
        facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if guidance is not None and not denoiser.has_null:
            told = f"this {denoiser.family} teacher has {denoiser.no_null}"
            raise UserError(f"guidance={guidance}: {told}; leave it off")
        self.denoiser, self.guidance, self.guidance_interval = denoiser, guidance, guidance_interval
        self._sha256 = sha256
        self.facts = facts or {}
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in eval mode, whatever its owner does."""
        return self

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, *, guidance: float | Tensor | None = None, on: Path | None = None
    ) -> Pair:
        """The guided pair at x [B, ...], t [B]; guidance is one number or one per sample [B], else the default."""
        w = self.guidance if guidance is None else guidance
        if cond is None or w is None or (not isinstance(w, Tensor) and w == 1):
            return self.denoiser(x, t, cond, on=on)
        if not self.denoiser.has_null:
            told = f"this {self.denoiser.family} teacher has {self.denoiser.no_null}"
            raise UserError(f"guidance: {told}; leave it off")
        if self.guidance_interval is not None:
            inside = self._inside(t, on)
            if not inside.any():
                return self.denoiser(x, t, cond, on=on)
            w = torch.where(inside, torch.as_tensor(w, dtype=wide(x).dtype, device=x.device), 1.0)
        null = self.denoiser.unconditional(cond)
        both = self.denoiser(twice(x), twice(t), conditions.concat(null, cond), on=on)
        (x0_null, x0), (eps_null, eps) = halves(both.x0, x), halves(both.eps, x)
        return Pair(x0_null, eps_null).lerp(Pair(x0, eps), w)

    def _inside(self, t: Tensor, on: Path | None) -> Tensor:
        """Which samples lie in the guidance interval, bool [B]."""
        assert self.guidance_interval is not None
        low, high = self.guidance_interval
        alpha, sigma = (on or self.path).levels(wide(t))
        return (sigma > low * alpha) & (sigma <= high * alpha)

    @cached_property
    def sha256(self) -> str:
        return self._sha256() if callable(self._sha256) else self._sha256

    def on(self, path: Path) -> View:
        """The same teacher, called with x and t of another path."""
        return View(self, path)

    @property
    def path(self) -> Path:
        return self.denoiser.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.denoiser.shape

    @property
    def num_classes(self) -> int | None:
        return self.denoiser.num_classes


def families() -> list[str]:
    """The families of networks: the files of `fastgen.teachers`, and those of its packages that can read a folder."""
    import fastgen.teachers

    found = pkgutil.iter_modules(fastgen.teachers.__path__)
    return sorted(module.name for module in found if not module.ispkg or _reads(module.name))


def _reads(package: str) -> bool:
    return hasattr(importlib.import_module(f"fastgen.teachers.{package}"), "recognises")


def family(name: str) -> ModuleType:
    """The module of a family; unknown names are UserErrors with the nearest one."""
    if name not in families():
        raise UserError(f"no teacher family '{name}' ({suggestion(name, families())})")
    return importlib.import_module(f"fastgen.teachers.{name}")


def read_denoiser(folder: str | FilePath, part: str | None = None) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser of a checkpoint (see `sources.locate`) and its facts.

    Folders are our own (`fastgen.json`), or of a layout that a family recognises. part: which flow of a TRELLIS
    folder, "structure" or "latent"; of other checkpoints a UserError, but for the folder of that flow alone.
    """
    complete = is_complete(folder)  # asked first: it puts back a folder whose replacement was interrupted
    folder = locate(folder)
    if trellis.recognises(folder):
        return trellis.read_part(folder, part)
    if part is not None:
        refuse_other_part(folder, part)
    if (folder / FACTS).exists():
        return _read_own(folder, complete)
    for name in families():
        module = family(name)
        if module.recognises(folder):
            facts = origin(folder)
            return module.read(folder, None), {"facts": facts} if facts else {}
    known = ", ".join(families())
    raise UserError(f"{folder}: not a checkpoint that any family knows ({known}); see `fastgen list teachers`")


def refuse_other_part(folder: FilePath, part: str) -> None:
    """Any folder but that of this flow alone is a UserError."""
    told = peek_json(folder / FACTS).get("denoiser")
    own = told.get("part") if isinstance(told, dict) else None
    if own is None:
        raise UserError(f"{folder}: part={part}: only TRELLIS folders have parts, and this is none; leave it off")
    if own != part:
        raise UserError(f"{folder}: part={part}: this folder is the {own} flow alone")


def weights_sha256(folder: FilePath, part: str | None = None) -> str:
    """What identifies a checkpoint's folder, or one flow of a TRELLIS folder."""
    if not trellis.recognises(folder):
        return files.sha256(folder)
    from fastgen.teachers.trellis.folder import TrellisFolder

    return TrellisFolder.read(folder).sha256(part)


def facts_of(folder: FilePath) -> dict[str, Any]:
    """What a checkpoint's folder tells of its origin, its weights left alone."""
    return peek_json(folder / FACTS).get("facts") or origin(folder)


def _read_own(folder: FilePath, complete: bool) -> tuple[Denoiser, dict[str, Any]]:
    facts = read_json(folder / FACTS)
    if not isinstance(facts, dict) or "denoiser" not in facts:
        raise UserError(f"{folder / FACTS}: no 'denoiser' entry; this folder was not written by fastgen")
    if facts.get("format") != FORMAT:
        raise UserError(f"{folder / FACTS}: format {facts.get('format')}, this fastgen reads {FORMAT}; upgrade fastgen")
    if not complete:
        raise UserError(f"{folder}: not complete (no COMPLETE file); make it again")
    with damage_explained(folder / FACTS):
        denoiser = family(facts["denoiser"]["family"]).read(folder, facts["denoiser"])
        for name in facts["denoiser"].get("extra", []):
            {GAP: denoiser.add_gap, GUIDANCE: denoiser.add_guidance}[name]()
    if denoiser.extra:
        load_weights(denoiser.extra, folder / EXTRA)
    return denoiser, facts


@contextmanager
def damage_explained(file: FilePath) -> Iterator[None]:
    """Turn what goes wrong while a description is read (entries missing or of a wrong kind) into a UserError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}: {' '.join(str(error).split())})") from error
