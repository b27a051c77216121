"""iCT's loss of a tiny network (entry `ict` of `tiny_losses`), by the whole method on fixed intervals."""

from __future__ import annotations

from typing import Any

from fastgen.paths import Prediction
from fastgen.trainers.consistency import Consistency
from fastgen.trainers.engine.discretisation import weights
from tests.goldens.case import Case
from tests.goldens.tiny_cm import Given, Tiny, gradients


def check(case: Case, name: str, entry: dict[str, Any]) -> None:
    """Levels of the case's intervals, both answers, losses and gradients; the target at s_min is x_lo itself."""
    student = Tiny(case, "net", Prediction(kind="cm", sigma_min=entry["sigma_min"]))
    n = entry["N"]
    config = Consistency.Config(kind="ict", grid={"s0": n - 1, "s1": n - 1}, s_min=entry["sigma_min"])
    method = Consistency(config, student)
    case.close(method.c, entry["c"], f"{name}: c")
    assert config.grid is not None
    shares = config.grid.shares(config.grid.levels(n, method.low, method.high))
    middle = (shares.cumsum(0) - shares / 2)[case[f"{name}.index0"]]
    batch = Given(case, middle)
    lo, hi = method.levels(batch, batch.uniform("level"))
    case.close(lo, case[f"{name}.sigma_lo"], f"{name}.sigma_lo")
    case.close(hi, case[f"{name}.sigma_hi"], f"{name}.sigma_hi")
    low, high = (case["x0"] + s[:, None, None, None] * case["noise"] for s in (lo, hi))
    target = method.target(student, low, lo, batch.cond)
    case.close(target.flatten(1), case[f"{name}.target"], f"{name}.target")
    case.close(student(high, hi, batch.cond).x0.flatten(1), case[f"{name}.student"], f"{name}.student")
    first = case[f"{name}.index0"] == 0
    assert (target[first] == low[first]).all()
    distance, _ = method.distances(student, batch, lo, hi)
    loss = weights(config.weighting, lo, hi, student.prediction.sd) * distance
    case.close(loss, case[f"{name}.loss"], f"{name}.loss")
    gradients(case, name, entry, method, batch)
