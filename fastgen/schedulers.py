"""diffusers' scheduler configs as our conventions (path, prediction, time argument), and back.

Read as data, without importing diffusers. How a scheduler samples (spacing, clipping, Karras levels) is no property of
the network and is not read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from fastgen.errors import UserError
from fastgen.files import read_json
from fastgen.paths import EDM, VP, Path, Prediction, RectifiedFlow

# Constructor defaults, which old configs leave out: (beta_start, beta_end, beta_schedule).
_DDPM, _SD, _SD_LINEAR = (1e-4, 0.02, "linear"), (0.00085, 0.012, "scaled_linear"), (0.00085, 0.012, "linear")
BETAS = {
    "DDIMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDPMScheduler": _DDPM,
    "DEISMultistepScheduler": _DDPM,
    "DPMSolverMultistepScheduler": _DDPM,
    "DPMSolverSDEScheduler": _SD_LINEAR,
    "DPMSolverSinglestepScheduler": _DDPM,
    "EulerAncestralDiscreteScheduler": _DDPM,
    "EulerDiscreteScheduler": _DDPM,
    "HeunDiscreteScheduler": _SD_LINEAR,
    "KDPM2AncestralDiscreteScheduler": _SD_LINEAR,
    "KDPM2DiscreteScheduler": _SD_LINEAR,
    "LCMScheduler": _SD,
    "LMSDiscreteScheduler": _DDPM,
    "PNDMScheduler": _DDPM,
    "SASolverScheduler": _DDPM,
    "TCDScheduler": _SD,
    "UniPCMultistepScheduler": _DDPM,
}
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
KARRAS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True, kw_only=True)
class Convention:
    """What a network's input, time and output mean: the arguments of `Denoiser` of the same names."""

    path: Path
    prediction: Prediction
    time_scale: float = 1.0
    log_time: bool = False


def find_scheduler(folder: FilePath, where: FilePath) -> FilePath:
    """The scheduler's config of a pipeline's folder, or of a bare network that lies in `where`."""
    for candidate in (folder / "scheduler", where, folder):
        if (candidate / "scheduler_config.json").exists():
            return candidate / "scheduler_config.json"
    raise UserError(
        f"{folder}: no scheduler/scheduler_config.json; put the config of the scheduler it was trained with there"
    )


def read_scheduler(file: FilePath) -> Convention:
    """The convention that a `scheduler_config.json` states; one that we cannot express is a UserError."""
    config = read_json(file)
    name = config.get("_class_name") if isinstance(config, dict) else None
    try:
        if name in FLOW:
            return _flow(config)
        if name in KARRAS:
            return _karras(config)
        if name in BETAS:
            return _flow(config) if config.get("use_flow_sigmas") else _discrete(name, config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from error
    known = ", ".join([*BETAS, *FLOW, *KARRAS])
    raise UserError(f"{file}: scheduler {name} says nothing we know of the network's noise levels; known: {known}")


def _flow(config: dict[str, Any]) -> Convention:
    if config.get("invert_sigmas"):
        raise ValueError("invert_sigmas (time running from data to noise) is not supported")
    kind = config.get("prediction_type", "flow_prediction")
    if kind != "flow_prediction":
        raise ValueError(f"prediction_type {kind} on flow-matching levels is not supported")
    scale = float(config.get("num_train_timesteps", 1000))
    return Convention(path=RectifiedFlow(), prediction=Prediction(kind="flow"), time_scale=scale)


def _karras(config: dict[str, Any]) -> Convention:
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {kind} of an EDM scheduler is not known")
    # "v_prediction" (CosXL) is the same target with the opposite sign, which is the sign of sd in its formula.
    sd = float(config.get("sigma_data", 0.5)) * (-1 if kind == "v_prediction" else 1)
    levels = {
        "start": config.get("sigma_max", 80.0),
        "end": config.get("sigma_min", 0.002),
        "rho": config.get("rho", 7.0),
    }
    path = EDM(**{key: float(value) for key, value in levels.items()})
    return Convention(path=path, prediction=Prediction(kind="edm", sd=sd), log_time=True)


def _discrete(name: str, config: dict[str, Any]) -> Convention:
    kind = config.get("prediction_type", "epsilon")
    if kind not in KINDS:
        raise ValueError(f"prediction_type {kind} is not supported; known: {', '.join(KINDS)}")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError("timestep_type continuous is not supported")
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if kind == "epsilon" and zero_snr:
        raise ValueError(
            "rescale_betas_zero_snr needs a v or sample prediction: eps says nothing of x0 at the last level"
        )
    betas = config.get("trained_betas")
    if betas is not None:
        path = _recognised(np.asarray(betas, dtype=np.float64), zero_snr)
    else:
        start, end, schedule = BETAS[name]
        path = VP(
            beta_start=float(config.get("beta_start", start)),
            beta_end=float(config.get("beta_end", end)),
            n=int(config.get("num_train_timesteps", 1000)),
            schedule=config.get("beta_schedule", schedule),
            zero_snr=zero_snr,
        )
    return Convention(path=path, prediction=Prediction(kind=KINDS[kind]))  # type: ignore[arg-type]


def _recognised(betas: np.ndarray, zero_snr: bool) -> VP:
    """The schedule that a table of betas follows (a truncated linear or scaled_linear one is one too)."""
    ends: dict[str, Any] = {
        "beta_start": float(betas[0]),
        "beta_end": float(betas[-1]),
        "n": len(betas),
        "zero_snr": zero_snr,
    }
    if np.allclose(betas, np.linspace(betas[0], betas[-1], len(betas)), rtol=1e-4):
        return VP(schedule="linear", **ends)
    if np.allclose(betas, np.linspace(betas[0] ** 0.5, betas[-1] ** 0.5, len(betas)) ** 2, rtol=1e-4):
        return VP(schedule="scaled_linear", **ends)
    cosine = VP(schedule="squaredcos_cap_v2", n=len(betas))
    if np.allclose(np.cumprod(1 - betas), cosine.table()[0].numpy() ** 2, atol=1e-6):
        return replace(cosine, zero_snr=zero_snr)
    raise ValueError("trained_betas follow none of linear, scaled_linear and squaredcos_cap_v2; no other is supported")


def write_scheduler(convention: Any, folder: FilePath) -> str:
    """Save the stock scheduler that samples a network of this convention (a `Denoiser`, say); returns its class name.

    DDIM with trailing spacing for VP and Euler for EDM visit the times of `path.grid`; Euler for rectified flows
    spreads its n times from 1 to 1 / 1000 instead. What no stock scheduler expresses is a ValueError.
    """
    import diffusers

    path, prediction, scale = convention.path, convention.prediction, convention.time_scale
    names = {ours: theirs for theirs, ours in KINDS.items()}
    scheduler: Any
    match path:
        case VP() if prediction.kind in names and scale == 1 and not convention.log_time:
            scheduler = diffusers.DDIMScheduler(
                num_train_timesteps=path.n,
                beta_start=path.beta_start,
                beta_end=path.beta_end,
                beta_schedule=path.schedule,
                rescale_betas_zero_snr=path.zero_snr,
                prediction_type=names[prediction.kind],
                timestep_spacing="trailing",
                set_alpha_to_one=True,
                steps_offset=1,  # without a meaning here; latent pipelines warn of any other
                clip_sample=False,
            )
        case RectifiedFlow(sigma_min=0) if (
            prediction.kind == "flow" and scale == int(scale) and not convention.log_time
        ):
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(scale))
        case EDM() if prediction.kind == "cm" and scale == 1000 and convention.log_time:
            scheduler = diffusers.CMStochasticIterativeScheduler(
                sigma_min=path.end, sigma_max=path.start, sigma_data=prediction.sd, rho=path.rho, clip_denoised=False
            )
        case EDM() if prediction.kind == "edm" and scale == 1 and convention.log_time:
            scheduler = diffusers.EDMEulerScheduler(
                sigma_min=path.end,
                sigma_max=path.start,
                sigma_data=abs(prediction.sd),
                rho=path.rho,
                prediction_type="v_prediction" if prediction.sd < 0 else "epsilon",
            )
        case _:
            raise ValueError(
                f"no stock scheduler samples a {prediction.kind} network with time scale {scale} on {path}"
            )
    scheduler.save_pretrained(folder)
    return type(scheduler).__name__
