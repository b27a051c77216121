"""MDT on real classes: TRELLIS's two flows, dense and on voxels, and an SD3 transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.data.synthetic_shapes import SyntheticShapes
from fastgen.errors import UserError
from fastgen.layout import mean_all
from fastgen.teacher import Teacher, read_denoiser
from fastgen.teachers.trellis.flows import FlowDenoiser, LatentDenoiser, StructureDenoiser
from fastgen.teachers.trellis.models import make
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.method import Batch, parts_of
from fastgen.trainers.engine.optim import ClipConfig, OptimConfig
from fastgen.trainers.engine.times import TimesConfig
from fastgen.trainers.mdt import MDT
from tests import tiny

ARGS: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "model_channels": 24, "cond_channels": 8, "num_heads": 2}
ARGS |= {"num_blocks": 1, "qk_rms_norm": True}
PARTS: dict[str, tuple[type[FlowDenoiser], str, dict[str, Any]]] = {
    "structure": (StructureDenoiser, "SparseStructureFlowModel", {"resolution": 4, "patch_size": 1}),
    "latent": (LatentDenoiser, "SLatFlowModel", {"resolution": 8, "io_block_channels": [8]}),
}


def flow(part: str, seed: int = 0, **changes: Any) -> FlowDenoiser:
    """One with weights everywhere: fresh ones end in zeros."""
    kind, name, more = PARTS[part]
    torch.manual_seed(seed)
    net = make(name, ARGS | more | changes, "test")
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return kind(net, condition="image")


def rows(part: str, model: FlowDenoiser, n: int = 6) -> SyntheticShapes:
    return SyntheticShapes(part, model.shape, model.net.args.resolution, "image", 8, n)


def drawn(part: str, model: FlowDenoiser, n: int = 2) -> Batch:
    return Batch(rows(part, model).get(torch.arange(n)), torch.arange(n), seed=0, step=0, steps=1)


def gradient(method: MDT, batch: Batch) -> tuple[Tensor, Tensor]:
    total = sum(part[0] for part in parts_of(method.loss(batch)))
    parameters = [p for p in method.student.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return total.detach(), torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("part", PARTS)
def test_the_exact_derivative_agrees_with_differences(part):
    student, teacher = flow(part).double(), flow(part, 1).double()
    options = {"cfg_vm": 2.0, "cfg_vd": 1.0, "d_norm": False}
    losses, gradients = [], []
    for more in ({"distill_type": "continuous"}, {"distill_interval": 2e-5}):
        method = MDT(MDT.Config(**options, **more, t_schedule=TimesConfig(kind="uniform")), student, Teacher(teacher))
        batch = drawn(part, student)
        # The same t for both: discrete ones leave room for their difference.
        method.times = lambda batch: torch.tensor([0.3, 0.8], dtype=torch.float64)
        loss, found = gradient(method, batch)
        losses.append(loss)
        gradients.append(found)
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-3, atol=0)
    assert (gradients[0] - gradients[1]).norm() < 5e-3 * gradients[0].norm()


@pytest.mark.parametrize("part", PARTS)
def test_guidance_is_against_zeros_in_the_form_of_the_pictures(part):
    student = flow(part)
    method = MDT(MDT.Config(cfg_vm=3.0, cfg_vd=0), student, Teacher(flow(part, 1)))
    batch = drawn(part, student)
    z, t = batch.normal_like("noise", batch.x0), torch.tensor([0.4, 0.9])
    point = method.point(batch, "cfg_vm", batch.x0, z, t, method.condition(batch))
    cond, null = batch.cond, {"image": torch.zeros_like(batch.cond["image"])}
    told, plain = (method.velocity_of(method.teacher.denoiser(point.x, t, c, on=method.view)) for c in (cond, null))
    expected = told * 4 - plain * 3
    assert mean_all((point.v - expected).square()).sqrt() < 1e-5 * mean_all(expected.square()).sqrt()


def test_micro_batches_are_cut_by_voxels_and_weigh_by_their_rows(tmp_path):
    """Pieces of 6 shapes: the same loss as all at once, up to the share that large shapes have of a mean."""
    model = flow("latent")
    source = rows("latent", model)
    sizes = source.tokens(torch.arange(6))
    assert len(set(sizes)) > 1
    seen: list[int] = []

    class Counted(MDT):
        def loss(self, batch):
            seen.append(sum(batch.x0.sites.sizes))
            return super().loss(batch)

    options = {"steps": 1, "batch": 6, "micro_tokens": max(sizes) + min(sizes), "save_every": 1, "log_every": 1}
    method = Counted(MDT.Config(cfg_vm=0, cfg_vd=0), model, Teacher(flow("latent", 1)))
    Loop(method, source, LoopConfig(**options), tmp_path).run()
    assert sum(seen) == sum(sizes) and 1 < len(seen) < 6 and max(seen) <= options["micro_tokens"]
    with pytest.raises(UserError, match=r"loop\.micro_tokens=3: row 0 alone has \d+ voxels; raise it"):
        Loop(method, source, LoopConfig(**{**options, "micro_tokens": 3}), tmp_path / "small").run()


def test_a_student_of_another_config_is_refused():
    with pytest.raises(UserError, match="different configs: model_channels is 24 and 48; init the student from"):
        MDT(MDT.Config(cfg_vm=0, cfg_vd=0), flow("latent", model_channels=48), Teacher(flow("latent")))


@pytest.mark.parametrize("part", PARTS)
def test_a_run_is_resumed_bit_for_bit(part, tmp_path):
    """With the limit of the gradient norm that follows the run, whose norms are part of the state."""

    def loop(out):
        student = flow(part)
        method = MDT(MDT.Config(cfg_vm=1.0, cfg_vd=1.0), student, Teacher(flow(part, 1)))
        clip = ClipConfig(most=10.0, percentile=50, window=4)
        config = LoopConfig(steps=8, batch=2, save_every=3, log_every=1, clip=clip, optim=OptimConfig(lr=1e-3))
        return Loop(method, rows(part, student), config, out)

    whole = loop(tmp_path / "whole")
    whole.run()
    assert whole.limits["student"].value < 10
    cut = loop(tmp_path / "cut")
    cut.run(until=7)
    again = loop(tmp_path / "cut")
    assert again.resume() and again.step == 6 and len(again.limits["student"].norms) == 4
    again.run()
    for (name, a), b in zip(whole.student.named_parameters(), again.student.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_sd3_teachers_one_step_is_learned(tmp_path):
    """The stock module's class, tiny and random: one step of the student nears 25 of the teacher."""
    tiny.sd3(tmp_path / "sd3", num_layers=1)
    denoiser, _ = read_denoiser(tmp_path / "sd3")
    student, _ = read_denoiser(tmp_path / "sd3")
    student.load_state_dict(denoiser.state_dict())
    student.requires_grad_(True)
    g = torch.Generator().manual_seed(1)
    cond = {"cond.text": torch.randn(4, 5, tiny.TEXT, generator=g), "cond.pooled": torch.randn(4, 12, generator=g)}

    class Latents:
        def get(self, index):
            told = {name: value[index % 4] for name, value in cond.items()}
            noise = torch.Generator().manual_seed(int(index[0]))
            return {"x0": torch.randn(len(index), *denoiser.shape, generator=noise), **told}

    options = {"cfg_vm": 0, "lambda_vd": 0, "d_norm": False, "distill_interval": 0.02}
    method = MDT(MDT.Config(**options, cfg_vd=0, t_schedule=TimesConfig(kind="uniform")), student, Teacher(denoiser))
    config = LoopConfig(steps=60, batch=8, optim=OptimConfig(lr=3e-4), log_every=60, save_every=60)
    loop = Loop(method, Latents(), config, tmp_path / "run")
    batch = loop.batch_of(torch.arange(8), Latents().get(torch.arange(8)))
    before = method.diagnose(student, batch)["teacher_gap"]
    loop.run()
    assert method.diagnose(student.eval(), batch)["teacher_gap"] < 0.8 * before
