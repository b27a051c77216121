"""iCT's discretisation and ECT's mapping (kind `ict_schedule`)."""

from __future__ import annotations

import torch

from fastgen.trainers.engine import discretisation
from fastgen.trainers.engine.discretisation import GridConfig, TimesConfig
from tests.goldens.case import Case


def ict_schedule(case: Case) -> None:
    """N(k), levels, shares and weights of iCT's grids, c of its distance, and ECT's r(t)."""
    for told in case.data["discretisation"]:
        grid = GridConfig(s0=told["s0"], s1=told["s1"])
        assert grid.stage_length(told["K"]) == told["K_prime"]
        assert [grid.count(k, told["K"]) for k, _ in told["N"]] == [n for _, n in told["N"]], told
    for match in case.names(r"sigmas\.(N(\d+))"):
        name, n, grid = match[1], int(match[2]), GridConfig()
        sigmas = grid.levels(n, 0.002, 80.0)
        shares = grid.shares(sigmas)
        weight = discretisation.weights("inv_ds", sigmas[:-1], sigmas[1:], 0.5)
        case.close(sigmas, case[match[0]], match[0])
        case.close(shares, case[f"prob.{name}"], f"prob.{name}")
        case.close(weight, case[f"lambda.{name}"], f"lambda.{name}")
        found = {
            "argmax_i_1based": int(shares.argmax()) + 1,
            "p_first": shares[0],
            "p_last": shares[-1],
            "p_max": shares.max(),
            "entropy_nats": -(shares * shares.log()).sum(),
            "median_sigma_lower_edge": sigmas[int((shares.cumsum(0) < 0.5).sum())],
            "lambda_first": weight[0],
            "lambda_last": weight[-1],
        }
        for key, expected in case.data[name].items():
            case.close(found[key], expected, f"{name}.{key}")
    for size, c in case.data["pseudo_huber_c"].items():
        case.close(discretisation.huber_c(int(size)), c, f"c of {size} numbers")
    told = case.data["ect_mapping"]
    t = torch.tensor(told["t"], dtype=torch.float64)
    for entry in told["cases"]:
        times = TimesConfig(q=entry["q"], k=told["k"], b=told["b"], doubling=1)
        case.close(times.ratio(entry["stage"]), entry["ratio"], "ratio")
        case.close(times.pair(t, entry["ratio"])[0], torch.tensor(entry["r"], dtype=torch.float64), f"r of {entry}")
