"""Scheduler configs read as conventions: what diffusers makes of a network's output is what our pair says."""

from __future__ import annotations

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch

from fastgen.errors import UserError
from fastgen.paths import EDM, VP, Prediction, RectifiedFlow
from fastgen.schedulers import BETAS, Convention, read_scheduler, write_scheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stated(tmp_path, **config) -> Convention:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    return read_scheduler(tmp_path / "scheduler_config.json")


def saved(tmp_path, scheduler) -> Convention:
    scheduler.save_pretrained(tmp_path)
    return read_scheduler(tmp_path / "scheduler_config.json")


@pytest.mark.parametrize("name", BETAS)
def test_the_defaults_are_those_of_the_class(name):
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    if "beta_start" not in parameters:
        pytest.skip(f"{name} is not whole in this installation of diffusers")
    assert BETAS[name] == tuple(parameters[key].default for key in ("beta_start", "beta_end", "beta_schedule"))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_table_of_betas_is_the_schedulers(tmp_path, schedule, zero_snr):
    stock = diffusers.DDIMScheduler(
        num_train_timesteps=500, beta_schedule=schedule, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"
    )
    found = saved(tmp_path, stock)
    assert found.path == VP(beta_start=1e-4, beta_end=0.02, n=500, schedule=schedule, zero_snr=zero_snr)
    alpha, _ = found.path.table()
    torch.testing.assert_close(alpha**2, stock.alphas_cumprod.double(), atol=2e-6, rtol=0)


def test_an_old_config_is_read_with_its_classes_defaults(tmp_path):
    """google/ddpm-cifar10-32's, word for word."""
    config = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    expected = Convention(path=VP(beta_start=1e-4, beta_end=0.02, schedule="linear"), prediction=Prediction(kind="eps"))
    assert stated(tmp_path, **config) == expected
    assert stated(tmp_path, _class_name="DDPMScheduler") == expected
    assert stated(tmp_path, _class_name="LCMScheduler").path == VP()


@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_the_pair_is_the_schedulers(tmp_path, name, theirs, ours):
    stock = getattr(diffusers, name)(**SD, prediction_type=theirs)
    found = saved(tmp_path, stock)
    assert found == Convention(path=VP(), prediction=Prediction(kind=ours))
    ddim = diffusers.DDIMScheduler(**SD, prediction_type=theirs, clip_sample=False)
    ddim.set_timesteps(10)
    x, y = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    for t in (901, 401, 1):
        levels = found.path.levels(torch.full((3,), float(t)))
        pair = found.prediction.to_pair(y, x, *levels)
        torch.testing.assert_close(pair.x0, ddim.step(y, t, x).pred_original_sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_preconditioning_is_the_schedulers(tmp_path, prediction):
    stock = diffusers.EDMEulerScheduler(sigma_max=20.0, sigma_min=0.01, sigma_data=0.7, prediction_type=prediction)
    found = saved(tmp_path, stock)
    assert found.path == EDM(start=20.0, end=0.01) and found.log_time and found.time_scale == 1
    stock.set_timesteps(5)
    x, y = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    for t, sigma in zip(stock.timesteps, stock.sigmas, strict=False):
        levels = found.path.levels(sigma.expand(3))
        torch.testing.assert_close(t, sigma.log() / 4)
        scale = found.prediction.input_scale(*levels)
        torch.testing.assert_close(x * scale.reshape(3, 1, 1, 1), stock.precondition_inputs(x, sigma))
        pair = found.prediction.to_pair(y, x, *levels)
        torch.testing.assert_close(pair.x0, stock.precondition_outputs(x, y, sigma), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "stock",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_flow_matching(tmp_path, stock):
    found = saved(tmp_path, stock)
    assert found == Convention(path=RectifiedFlow(), prediction=Prediction(kind="flow"), time_scale=1000.0)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_table_given_as_numbers_is_recognised(tmp_path, kind):
    whole = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=kind)
    betas = whole.betas.tolist() if kind == "squaredcos_cap_v2" else whole.betas[:626].tolist()
    found = stated(tmp_path, _class_name="DDIMScheduler", trained_betas=betas)
    assert found.path.n == len(betas) and found.path.schedule == kind
    given = np.cumprod(1 - np.array(betas))
    np.testing.assert_allclose(found.path.table()[0].numpy() ** 2, given, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "scheduler ScoreSdeVeScheduler says nothing"),
        ({}, "scheduler None says nothing"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "unknown beta schedule 'sigmoid'"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "noise"}, "prediction_type noise is not supported"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "needs a v or sample prediction"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.5, 0.2]}, "trained_betas follow none of"),
        ({"_class_name": "DDIMScheduler", "trained_betas": "x"}, "could not convert"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 1}, "n >= 2"),
        ({"_class_name": "DDIMScheduler", "beta_start": None}, "float"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type continuous"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "epsilon"},
            "prediction_type epsilon on flow-matching levels",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, "not supported"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "prediction_type sample of an EDM"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, config, message):
    with pytest.raises(UserError, match=message) as error:
        stated(tmp_path, **config)
    assert str(tmp_path / "scheduler_config.json") in str(error.value)


@pytest.mark.parametrize(
    "convention",
    [
        Convention(path=VP(), prediction=Prediction(kind="eps")),
        Convention(path=VP(zero_snr=True, n=100, schedule="linear"), prediction=Prediction(kind="v")),
        Convention(path=VP(), prediction=Prediction(kind="x0")),
        Convention(path=RectifiedFlow(), prediction=Prediction(kind="flow"), time_scale=1000.0),
        Convention(path=EDM(start=20.0, rho=5.0), prediction=Prediction(kind="edm", sd=0.7), log_time=True),
        Convention(path=EDM(), prediction=Prediction(kind="edm", sd=-1.0), log_time=True),
    ],
    ids=lambda c: f"{type(c.path).__name__} {c.prediction.kind}",
)
def test_writing_and_reading_agree(tmp_path, convention):
    name = write_scheduler(convention, tmp_path)
    assert read_scheduler(tmp_path / "scheduler_config.json") == convention
    stock = getattr(diffusers, name).from_pretrained(tmp_path)
    stock.set_timesteps(4)
    times = torch.tensor(convention.path.grid(4))
    if isinstance(convention.path, RectifiedFlow):
        assert stock.timesteps[0] == 1000
    else:
        times = times.log() / 4 if convention.log_time else times
        torch.testing.assert_close(stock.timesteps.float(), times, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "convention",
    [
        Convention(path=VP(), prediction=Prediction(kind="eps"), time_scale=1 / 999),
        Convention(path=RectifiedFlow(sigma_min=1e-5), prediction=Prediction(kind="flow"), time_scale=1000.0),
        Convention(path=RectifiedFlow(), prediction=Prediction(kind="x0"), time_scale=1000.0),
        Convention(path=EDM(), prediction=Prediction(kind="x0"), log_time=True),
    ],
)
def test_what_no_stock_scheduler_says_is_not_written(tmp_path, convention):
    with pytest.raises(ValueError, match="no stock scheduler"):
        write_scheduler(convention, tmp_path / "scheduler")
    assert not (tmp_path / "scheduler").exists()
