"""What a network trained from nothing is told besides its size: the path it lives on and what it predicts there."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from fastgen.config import Model
from fastgen.paths import PATHS, Path, Prediction

# The first of each is the default. eps is VP's classic; v says as much at every level, so it comes first.
PREDICTIONS = {"RectifiedFlow": ("flow",), "TrigFlow": ("trig",), "EDM": ("edm", "cm"), "VP": ("v", "eps", "x0")}


class FreshNet(Model):
    """The base of every family's `NetConfig`: a path with its default parameters, and a prediction that suits it."""

    family: str
    path: Literal["RectifiedFlow", "TrigFlow", "EDM", "VP"] = "RectifiedFlow"
    prediction: Literal["flow", "trig", "edm", "cm", "v", "eps", "x0"] | None = (
        None  # None: the path's first in PREDICTIONS
    )

    @model_validator(mode="after")
    def _suits(self) -> FreshNet:
        if self.prediction is not None and self.prediction not in PREDICTIONS[self.path]:
            known = ", ".join(PREDICTIONS[self.path])
            raise ValueError(f"prediction={self.prediction} does not suit path={self.path} (which takes {known})")
        return self

    def target(self) -> tuple[Path, Prediction]:
        """The path and the prediction as objects."""
        path, kind = PATHS[self.path](), self.prediction or PREDICTIONS[self.path][0]
        sigma_min = path.end if kind == "cm" else 0.0
        return path, Prediction(kind=kind, sd=getattr(path, "sd", 0.5), sigma_min=sigma_min)  # type: ignore[arg-type]
