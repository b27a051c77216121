"""LCM on U-Nets of the real classes: the guidance input, the target network, LoRA, half precision, times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen.nets.lora import LoraConfig, add_lora, lora_tensors, share
from fastgen.paths import VP, Prediction
from fastgen.samplers.replay import replay, visited
from fastgen.teacher import Teacher
from fastgen.teachers.stable_diffusion import StableDiffusionDenoiser
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.method import Batch
from fastgen.trainers.engine.optim import OptimConfig, Precision
from fastgen.trainers.lcm import Lcm, ddim_points
from tests import tiny


def text_unet(kind: Any = "eps", **changes: Any) -> StableDiffusionDenoiser:
    torch.manual_seed(0)
    return StableDiffusionDenoiser(
        tiny.unet(**changes), VP(), Prediction(kind=kind), shape=(4, tiny.LATENT, tiny.LATENT), codec=Empty()
    )


class Empty:
    """In a codec's place: the empty prompt."""

    reads_text = True

    def __deepcopy__(self, memo: Any) -> Empty:
        return self

    def null(self) -> dict[str, Tensor]:
        return {"text": torch.zeros(1, 5, tiny.TEXT)}


def unet_rows(n: int = 2):
    torch.manual_seed(1)
    data = {"x0": torch.randn(n, 4, tiny.LATENT, tiny.LATENT), "cond.text": torch.randn(n, 5, tiny.TEXT)}
    return Batch(data, torch.arange(n), seed=0, step=0, steps=1)


def test_a_new_guidance_input_changes_nothing_until_it_is_trained():
    plain, told = text_unet(), text_unet()
    told.add_guidance()
    assert told.takes_guidance and told.distilled and not plain.takes_guidance
    assert told.net.config.time_cond_proj_dim == 256
    given = unet_rows()
    t, x = torch.tensor([999.0, 19.0]), given.x0
    expected = plain(x, t, given.cond)
    for w in (1.0, 8.5):
        pair = told(x, t, {**given.cond, "guidance": torch.full((2,), w)})
        assert torch.equal(pair.x0, expected.x0)
    nn.init.normal_(told.net.time_embedding.cond_proj.weight)
    one, other = (told(x, t, {**given.cond, "guidance": torch.full((2,), w)}).x0 for w in (6.0, 8.5))
    assert not torch.allclose(one, other)
    assert torch.equal(told(x, t, given.cond).x0, expected.x0)  # nothing is added where no weight is given


def test_zeros_in_a_guidance_input_that_was_read_are_a_switch_and_no_input():
    """What an export writes so that stock pipelines leave guidance off."""
    zero = tiny.unet(time_cond_proj_dim=16)
    nn.init.zeros_(zero.time_embedding.cond_proj.weight)
    options = {"shape": (4, 8, 8)}
    assert not StableDiffusionDenoiser(zero, VP(), Prediction(kind="eps"), **options).takes_guidance
    real = tiny.unet(time_cond_proj_dim=16)
    assert StableDiffusionDenoiser(real, VP(), Prediction(kind="eps"), **options).takes_guidance


def loop_of(path: Any, *, lora: bool = False, steps: int = 4, **options: Any) -> Loop:
    teacher = Teacher(text_unet())
    if lora:
        student: Any = add_lora(share(teacher.denoiser), LoraConfig(rank=2), seed=0)
    else:
        student = text_unet().requires_grad_(True)
    method = Lcm(Lcm.Config(), student, teacher)
    config = LoopConfig(steps=steps, batch=4, save_every=2, optim=OptimConfig(lr=1e-3), **options)

    class Rows:
        def get(self, rows: Tensor) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(int(rows[0]))
            shapes = {"x0": (4, tiny.LATENT, tiny.LATENT), "cond.text": (5, tiny.TEXT)}
            return {name: torch.randn(len(rows), *shape, generator=generator) for name, shape in shapes.items()}

    return Loop(method, Rows(), config, path, seed=1)


def test_the_target_is_the_declared_average_and_survives_a_resumption(tmp_path):
    whole = loop_of(tmp_path / "a")
    expected = {name: p.detach().clone() for name, p in whole.slow["target"].named_parameters()}
    for step in range(1, 5):
        whole.run(until=step)
        for name, p in whole.method.student.named_parameters():
            expected[name].lerp_(p.detach(), 0.05)
    name = "net.time_embedding.cond_proj.weight"
    assert torch.equal(dict(whole.slow["target"].named_parameters())[name], expected[name]) and expected[name].any()
    loop_of(tmp_path / "b").run(until=2)
    parts = loop_of(tmp_path / "b")
    assert parts.resume() and parts.step == 2
    parts.run()
    for one, other in ((whole.method.student, parts.method.student), (whole.slow["target"], parts.slow["target"])):
        theirs = other.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items())


def test_the_student_learns_to_listen_to_its_weight(tmp_path):
    loop = loop_of(tmp_path, steps=3)
    given = unet_rows()
    at_first = loop.method.diagnose(loop.method.student, given)
    loop.run()
    later = loop.method.diagnose(loop.method.student, given)
    assert at_first["guidance_effect"] == 0 < later["guidance_effect"]
    assert later["teacher_gap"] != at_first["teacher_gap"] > 0


def test_lora_has_no_target_network_and_no_guidance_input(tmp_path):
    loop = loop_of(tmp_path, lora=True, steps=2)
    assert not loop.slow and not loop.method.student.takes_guidance
    before = {name: t.clone() for name, t in lora_tensors(loop.method.student).items()}
    loop.run()
    moved = lora_tensors(loop.method.student)
    assert all(not torch.equal(before[name], moved[name]) for name in moved)
    assert set(loop.method.diagnose(loop.method.student, unet_rows())) == {"teacher_gap"}


def test_half_precision_leaves_the_adapters_their_gradients(tmp_path):
    """Autocast keeps casts of weights, and these are first made for the target, where nothing asks for gradients."""
    loop, given = loop_of(tmp_path, lora=True), unet_rows()
    student = loop.method.student
    for tensor in lora_tensors(student).values():
        tensor.add_(0.05 * torch.randn_like(tensor))
    trained = [p for p in student.parameters() if p.requires_grad]
    exact = torch.autograd.grad(loop.method.loss(given)[0], trained)
    with Precision("bf16", torch.device("cpu")).autocast():
        rough = torch.autograd.grad(loop.method.loss(given)[0], trained, allow_unused=True)
    assert all(g is not None for g in rough)
    one, other = (torch.cat([g.flatten() for g in gs]) for gs in (exact, rough))
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.9


def test_times_are_those_that_a_stock_scheduler_visits(tmp_path):
    spec = loop_of(tmp_path).method.sampler()
    assert spec.times[4] == (999, 759, 499, 259) and spec.times[8] == (999, 879, 759, 639, 499, 379, 259, 139)
    assert spec.renoise and spec.init == "unit"
    entry = replay(text_unet(), spec)
    assert (entry.scheduler, entry.most) == ("LCMScheduler", 50)
    assert all(visited(entry, n) == times for n, times in spec.times.items())
    points = set(ddim_points(VP(), 50)[0].tolist())
    assert all(set(times) <= points for times in spec.times.values())
