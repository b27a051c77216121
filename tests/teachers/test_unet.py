"""The U-Net family: strangers' folders mean to us what they mean to diffusers, and ours run without us."""

from __future__ import annotations

import json
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from fastgen.errors import UserError
from fastgen.paths import EDM, VP, RectifiedFlow
from fastgen.samplers import ode
from fastgen.student import save_teacher
from fastgen.teacher import Teacher, family, read_denoiser
from fastgen.teachers import unet

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stock_net(**options) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
    }
    return UNet2DModel(**(blocks | sizes | {"norm_num_groups": 4, "attention_head_dim": 8} | options)).eval()


def pipeline(folder, scheduler, **options) -> UNet2DModel:
    """A stranger's pipeline folder, written by diffusers; returns its network."""
    net = stock_net(**options)
    DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained(folder)
    return net


def fresh(path: str = "RectifiedFlow", num_classes: int | None = None, **options) -> unet.UNetDenoiser:
    """A small network whose zero output has been given weights."""
    torch.manual_seed(0)
    config = unet.UNetConfig(path=path, block_out_channels=(16, 32), layers_per_block=1, **options)
    denoiser = unet.build(config, (3, 8, 8), num_classes)
    torch.nn.init.normal_(denoiser.net.conv_out.weight, std=0.2)
    return denoiser.eval()


def edit(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_pair_of_a_discrete_teacher_is_the_stock_schedulers(tmp_path, kind, zero_snr):
    if kind == "epsilon" and zero_snr:
        pytest.skip("says nothing of x0 at the last level; refused")
    stock = DDPMScheduler(**SD, prediction_type=kind, clip_sample=False, rescale_betas_zero_snr=zero_snr)
    net = pipeline(tmp_path / "model", stock)
    denoiser, facts = read_denoiser(tmp_path / "model")
    assert facts == {} and denoiser.shape == (3, 8, 8) and denoiser.num_classes is None and denoiser.null is None
    x = torch.randn(2, 3, 8, 8)
    for t in (999, 500, 0):
        with torch.no_grad():
            y = net(x, t).sample
            pair = denoiser(x, torch.full((2,), float(t)))
        expected = stock.step(y, t, x).pred_original_sample
        torch.testing.assert_close(pair.x0, expected, atol=1e-3, rtol=1e-4)
        alpha, sigma = denoiser.path.table()
        closed = alpha[t].item() * pair.x0 + sigma[t].item() * pair.eps
        torch.testing.assert_close(closed, x, atol=1e-4, rtol=1e-4)


def test_a_flow_matching_teacher_steps_like_the_stock_pipeline(tmp_path):
    stock = diffusers.FlowMatchEulerDiscreteScheduler()
    net = pipeline(tmp_path / "model", stock)
    denoiser, _ = read_denoiser(tmp_path / "model")
    assert denoiser.path == RectifiedFlow() and denoiser.time_scale == 1000
    stock.set_timesteps(4)
    x = torch.randn(2, 3, 8, 8)
    ours = ode.solve(denoiser, x, times=stock.sigmas[:-1].tolist(), solver="euler")
    for t in stock.timesteps:
        with torch.no_grad():
            x = stock.step(net(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_an_edm_teacher_steps_like_the_stock_scheduler(tmp_path, kind):
    stock = diffusers.EDMEulerScheduler(sigma_max=10.0, prediction_type=kind)
    net = pipeline(tmp_path / "model", stock)
    denoiser, _ = read_denoiser(tmp_path / "model")
    assert denoiser.path == EDM(start=10.0) and denoiser.log_time
    stock.set_timesteps(5)
    z = torch.randn(2, 3, 8, 8)
    ours = ode.solve(denoiser, z, steps=5, solver="euler")
    x = 10 * z
    for t in stock.timesteps:
        with torch.no_grad():
            y = net(stock.scale_model_input(x, t), t).sample
        x = stock.step(y, t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["beside", "subfolder"])
def test_a_bare_folder_is_read(tmp_path, layout):
    net = stock_net(sample_size=(8, 4))
    net.save_pretrained(tmp_path)
    DDPMScheduler(**SD).save_pretrained(tmp_path if layout == "beside" else tmp_path / "scheduler")
    denoiser, _ = read_denoiser(tmp_path)
    assert denoiser.shape == (3, 8, 4) and denoiser.path == VP()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), denoiser.net.parameters(), strict=True))


def test_half_precision_weights_are_widened_and_said(tmp_path, caplog):
    net = stock_net()
    net.half().save_pretrained(tmp_path, variant="fp16")
    DDPMScheduler().save_pretrained(tmp_path)
    denoiser, _ = read_denoiser(tmp_path)
    assert denoiser.net.dtype == torch.float32
    assert "float16" in caplog.text and "diffusion_pytorch_model.fp16.safetensors" in caplog.text


def test_old_names_of_attention_layers_are_understood(tmp_path):
    net = stock_net()
    net.save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = load_file(file)
    for new, name in names.items():
        old = {key.replace(f".{new}.", f".{name}."): value for key, value in old.items()}
    assert any(".proj_attn.weight" in key for key in old)
    save_file(old, file)
    denoiser, _ = read_denoiser(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), denoiser.net.parameters(), strict=True))


def test_learned_variances_are_cut_off(tmp_path, caplog):
    caplog.set_level("INFO")
    net = pipeline(tmp_path / "model", DDPMScheduler(variance_type="learned_range"), out_channels=6)
    denoiser, _ = read_denoiser(tmp_path / "model")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 700.0])
    with torch.no_grad():
        torch.testing.assert_close(denoiser.raw(x, t, None, None), net(x, t).sample[:, :3])
    assert "learned variances" in caplog.text
    save_teacher(denoiser, tmp_path / "again", {})
    assert UNet2DModel.from_pretrained(tmp_path / "again" / "unet").config.out_channels == 3


def test_a_strangers_classes_have_no_null_label_unless_said(tmp_path):
    net = pipeline(tmp_path / "model", DDPMScheduler(**SD), num_class_embeds=5)
    denoiser, _ = read_denoiser(tmp_path / "model")
    assert denoiser.num_classes == 5 and denoiser.null is None
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 700.0]), torch.tensor([4, 0])
    with torch.no_grad():
        torch.testing.assert_close(denoiser.raw(x, t, {"label": label}, None), net(x, t, label).sample)
    with pytest.raises(ValueError, match="needs a label"):
        denoiser(x, t)
    with pytest.raises(UserError, match="no null condition"):
        Teacher(denoiser, guidance=2.0)
    with pytest.raises(UserError, match="no null condition"):
        Teacher(denoiser)(x, t, {"label": label}, guidance=2.0)
    said = unet.read(tmp_path / "model", None, null_label=True)
    assert said.num_classes == 4 and said.null["label"].tolist() == [4]
    guided = Teacher(said, guidance=2.0)(x, t, {"label": torch.tensor([1, 0])})
    null, one = (denoiser(x, t, {"label": torch.tensor(k)}) for k in ([4, 4], [1, 0]))
    torch.testing.assert_close(guided.x0, null.lerp(one, 2.0).x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", ["RectifiedFlow", "EDM", "VP"])
@pytest.mark.parametrize("num_classes", [None, 4])
def test_our_folder_brings_back_the_same_network(tmp_path, path, num_classes):
    denoiser = fresh(path, num_classes)
    save_teacher(denoiser, tmp_path / "model", {})
    again, _ = read_denoiser(tmp_path / "model")
    assert again.describe() == denoiser.describe()
    x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 0.3 * denoiser.path.start)
    cond = None if num_classes is None else {"label": torch.tensor([0, 4])}
    with torch.no_grad():
        assert torch.equal(again(x, t, cond).x0, denoiser(x, t, cond).x0)
    assert (tmp_path / "model" / "model_index.json").exists() == (num_classes is None and path != "EDM")


@pytest.mark.parametrize("path", ["RectifiedFlow", "EDM", "VP"])
def test_our_folder_means_the_same_without_its_fastgen_json(tmp_path, path):
    denoiser = fresh(path)
    denoiser.write(tmp_path)
    if path == "EDM":
        (tmp_path / "unet" / "scheduler_config.json").write_bytes(
            (tmp_path / "scheduler" / "scheduler_config.json").read_bytes()
        )
        assert unet.read(tmp_path / "unet", None).describe() == denoiser.describe()
    else:
        assert unet.recognises(tmp_path) and read_denoiser(tmp_path)[0].describe() == denoiser.describe()


STOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fastgen":
            raise ImportError("fastgen is blocked")
sys.meta_path.insert(0, Blocked())
import torch
from diffusers import DDIMPipeline, DDPMPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
images = {}
for pipeline in (DDIMPipeline, DDPMPipeline):
    pipe = pipeline.from_pretrained(sys.argv[1])
    pipe.set_progress_bar_config(disable=True)
    made = pipe(batch_size=2, generator=torch.manual_seed(3), num_inference_steps=4, output_type="np").images
    images[pipeline.__name__] = torch.from_numpy(made).contiguous()
assert "fastgen" not in sys.modules
save_file(images, sys.argv[2])
"""


def images(denoiser: unet.UNetDenoiser, times: list[float]) -> torch.Tensor:
    """What a stock pipeline should make of generator seed 3: by our Euler, in [0, 1], channels last."""
    z = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(3))
    x0 = ode.solve(denoiser, z, times=times, solver="euler", init="unit")
    expected = (x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert expected.std() > 0.05  # not all clamped
    return expected


@pytest.mark.slow  # importing a diffusers pipeline in a new process takes most of it
def test_a_written_folder_runs_in_stock_pipelines_without_us(tmp_path):
    denoiser = fresh("VP", prediction="eps")
    save_teacher(denoiser, tmp_path / "model", {})
    command = [sys.executable, "-c", STOCK, tmp_path / "model", tmp_path / "images.safetensors"]
    subprocess.run(command, check=True, cwd=tmp_path)
    made = load_file(tmp_path / "images.safetensors")
    assert set(made) == {"DDIMPipeline", "DDPMPipeline"}
    for one in made.values():
        torch.testing.assert_close(one, images(denoiser, list(VP().grid(4))), atol=2e-4, rtol=0)


@pytest.mark.parametrize("options", [{"path": "RectifiedFlow"}, {"path": "VP"}, {"path": "VP", "prediction": "eps"}])
def test_the_index_names_a_pipeline_that_makes_the_same_images(tmp_path, options):
    denoiser = fresh(**options)
    denoiser.write(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe) is (DDPMPipeline if options["path"] == "RectifiedFlow" else DDIMPipeline)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(batch_size=2, generator=torch.manual_seed(3), num_inference_steps=4, output_type="np").images
    times = (pipe.scheduler.timesteps.float() / denoiser.time_scale).tolist()
    torch.testing.assert_close(torch.from_numpy(made), images(denoiser, times), atol=2e-4, rtol=0)


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "diffusion_pytorch_model.safetensors: no such file"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "not a whole safetensors file"),
        (lambda f: (f / WEIGHTS).rename(f / "unet/diffusion_pytorch_model.bin"), "pytorch_model.bin: a pickle"),
        (lambda f: torch.save({}, f / WEIGHTS), "safetensors: a pickle"),
        (lambda f: save_file({"x": torch.zeros(1)}, f / WEIGHTS), "no tensor '"),
        (lambda f: edit(f / "unet/config.json", block_out_channels=[8, 32]), "config and weights do not match"),
        (lambda f: edit(f / "unet/config.json", layers_per_block=2), "no tensor '"),
        (lambda f: edit(f / "unet/config.json", up_block_types=["UpBlock2D"]), "no UNet2DModel can be made of it"),
        (
            lambda f: edit(f / "unet/config.json", down_block_types=["Odd", "DownBlock2D"]),
            "no UNet2DModel can be made of it",
        ),
        (lambda f: edit(f / "unet/config.json", _class_name="UNet2DConditionModel"), "not the config of a UNet2DModel"),
        (lambda f: edit(f / "unet/config.json", time_embedding_type="fourier"), "time_embedding_type fourier"),
        (lambda f: edit(f / "unet/config.json", class_embed_type="timestep"), "class_embed_type timestep"),
        (lambda f: edit(f / "unet/config.json", sample_size=None), "no sample_size"),
        (lambda f: (f / "unet/config.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "unet/config.json").unlink(), "unet/config.json: no such file"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "no scheduler/scheduler_config.json"),
        (
            lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="VQDiffusionScheduler"),
            "VQDiffusionScheduler",
        ),
        (lambda f: edit(f / "model_index.json", vqvae=["diffusers", "VQModel"]), "the pipeline also has vqvae"),
    ],
)
def test_a_bad_folder_is_refused_naming_the_file(tmp_path, damage, message):
    folder = tmp_path / "model"
    pipeline(folder, DDPMScheduler())
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        read_denoiser(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_other_networks_are_not_recognised(tmp_path):
    assert not unet.recognises(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert not unet.recognises(tmp_path)
    (tmp_path / "model_index.json").write_text("[1]")
    assert not unet.recognises(tmp_path)


def test_a_fresh_network_predicts_zero_and_has_attention_where_asked():
    config = unet.UNetConfig(block_out_channels=(16, 32), layers_per_block=1, attention=(0,))
    denoiser = unet.build(config, (1, 8, 4), 3)
    assert denoiser.net.config.down_block_types == ("AttnDownBlock2D", "DownBlock2D")
    assert denoiser.net.config.up_block_types == ("UpBlock2D", "AttnUpBlock2D")
    assert denoiser.null["label"].tolist() == [3] and denoiser.net.config.num_class_embeds == 4
    x = torch.randn(2, 1, 8, 4)
    assert torch.equal(denoiser(x, torch.rand(2)).velocity, torch.zeros_like(x))
    plain = unet.build(unet.UNetConfig(block_out_channels=(8,), attention=()), (1, 3, 3), None)
    assert not any("attentions" in name for name, _ in plain.net.named_parameters())


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"block_out_channels": (8, 8, 8)}, (1, 6, 8), "3 levels halve an image 2 times"),
        ({"block_out_channels": (8,)}, (2,), "halve an image"),
        ({"block_out_channels": (8, 8), "attention": (2,)}, (1, 8, 8), "levels 0 .. 1"),
    ],
)
def test_networks_that_do_not_fit_the_data_are_refused(options, shape, message):
    with pytest.raises(UserError, match=message):
        unet.build(unet.UNetConfig(**options), shape, None)


@pytest.mark.parametrize(
    "options", [{"block_out_channels": (12,)}, {"block_out_channels": ()}, {"path": "TrigFlow"}, {"prediction": "eps"}]
)
def test_configs_that_make_no_network_are_refused(options):
    with pytest.raises(ValidationError):
        unet.UNetConfig(**options)


def test_a_second_time_is_refused():
    with pytest.raises(ValueError, match="one time"):
        fresh()(torch.randn(1, 3, 8, 8), torch.rand(1), r=torch.rand(1))


def test_it_is_a_family():
    assert family("unet") is unet and unet.NetConfig is unet.UNetConfig
