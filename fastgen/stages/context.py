"""What a stage may ask of its run: folders, models, data and hashes, by reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastgen import sources
from fastgen.config import config_hash
from fastgen.errors import UserError, suggestion
from fastgen.stages import records
from fastgen.stages.config import Run
from fastgen.stages.records import RECORD

if TYPE_CHECKING:
    from fastgen.denoiser import Denoiser
    from fastgen.teacher import Teacher


PICKLED = ".pt"


class Look(NamedTuple):
    """What is to be known of a model before it is used."""

    kind: str  # "student" or "teacher"
    shape: tuple[int, ...]
    data_shape: tuple[int, ...]  # what data must be: images, for a latent network
    reads_text: bool


@dataclass
class Context:
    """What a stage may ask of its run. `names` are the run's stages in order; `execute` fills them in."""

    config: Run
    out: Path
    device: str
    interrupt: Callable[[], bool] = lambda: False
    names: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    _hashes: dict[Path, str] = field(default_factory=dict)
    _looks: dict[tuple[str, str | None], Look] = field(default_factory=dict)

    def folder(self, reference: str) -> Path:
        """The folder of a stage."""
        return self.out / reference

    def done(self, name: str) -> bool:
        """Whether a stage of this run is finished."""
        return name in self.names and (self.out / name / RECORD).exists()

    def artefact(self, reference: str) -> Path | dict[str, Any]:
        """What a reference means: a stage's output, the run's teacher, or a path; nothing is a UserError.

        A .pt file stands for itself: what cannot read one refuses it.
        """
        if reference in self.names:
            if not self.done(reference):
                raise UserError(f"stage '{reference}' is not done yet; `fastgen distill` makes it")
            return self.out / reference / records.read(self.out / reference / RECORD)["output"]
        given = self.config.teacher if reference == "teacher" else reference
        if given is None:
            raise UserError("teacher is not set: add teacher=PATH (a checkpoint folder) to the command or the config")
        if isinstance(given, dict):
            return given
        if not given or not sources.exists(given):
            if reference == "teacher":
                raise UserError(f"teacher={given}: no such file or folder")
            hint = suggestion(given, {*self.names, "teacher"})
            raise UserError(f"'{given}': neither a stage of this run nor an existing path ({hint})")
        path = Path(given).expanduser()
        if path.is_dir() or (path.is_file() and path.suffix == PICKLED):
            return path
        return sources.locate(given, config=self.config.teacher_config)

    def path(self, reference: str) -> Path:
        """Like `artefact`, where only a folder will do; a closed-form teacher is a UserError."""
        artefact = self.artefact(reference)
        if isinstance(artefact, dict):
            raise UserError(
                f"'{reference}' is a closed-form teacher, which has no weights; "
                "put a stage with method imitate first and name that"
            )
        return artefact

    def look(self, reference: str | None, part: str | None = None) -> Look | None:
        """A model that comes from outside the run, read once to see that it can be; None for what a stage makes.

        part, here and below: which flow of a TRELLIS folder; see `read_denoiser`.
        """
        from fastgen.api import open_teacher
        from fastgen.teacher import read_denoiser

        if reference is None or reference in self.names:
            return None
        key = (reference, part)
        if key not in self._looks:
            source = self.artefact(reference)
            if isinstance(source, dict):
                shape = open_teacher(source, part=part).shape
                self._looks[key] = Look("teacher", shape, shape, False)
            else:
                denoiser, data = read_denoiser(source, part)
                if denoiser.needs_embeddings:
                    raise UserError(
                        f"{reference}={source}: {denoiser.family} networks are read without text encoders and VAE so "
                        "far, and a run has nothing to feed them with; use them from Python (docs/teachers.md)"
                    )
                codec, shape = self.fitted(denoiser).codec, denoiser.shape
                data_shape = shape if codec is None else codec.image_shape
                kind = "student" if denoiser.distilled else data.get("kind", "teacher")
                self._looks[key] = Look(kind, shape, data_shape, codec is not None)
        return self._looks[key]

    def open_teacher(self, reference: str, part: str | None = None) -> Teacher:
        """A reference as a teacher on the run's device, guided and sized as the run says."""
        from fastgen.api import open_teacher

        head = self.config
        teacher = open_teacher(
            self.artefact(reference),
            device=self.device,
            guidance=head.guidance,
            guidance_interval=head.guidance_interval,
            part=part,
        )
        self.fitted(teacher.denoiser)
        return teacher

    def open_denoiser(self, reference: str, part: str | None = None) -> Denoiser:
        """The network of a teacher or a student, sized as the run says."""
        from fastgen.teacher import read_denoiser

        return self.fitted(read_denoiser(self.path(reference), part)[0])

    def fitted(self, denoiser: Denoiser) -> Denoiser:
        """The same network at the run's size in pixels, where its size is free."""
        side = self.config.size
        if side is None and denoiser.codec is not None and self.config.data is not None:
            side = self.config.data.size
        return denoiser if side is None else denoiser.resized(side, side)

    @property
    def cache(self) -> Path:
        """Where embeddings and latents are kept."""
        return sources.cache_folder() if self.config.cache is None else Path(self.config.cache).expanduser()

    def sha256(self, reference: str) -> str:
        """The hash of an input, from the record of the stage that made it or from the files themselves."""
        from fastgen.teacher import weights_sha256

        artefact = self.artefact(reference)
        if reference in self.names:
            return records.read(self.out / reference / RECORD)["sha256"]
        if isinstance(artefact, dict):
            return config_hash(artefact)
        if artefact not in self._hashes:
            self._hashes[artefact] = weights_sha256(artefact)
        return self._hashes[artefact]
