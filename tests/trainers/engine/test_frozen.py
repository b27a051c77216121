"""Networks that are frozen in part: what is trained, measured, averaged and saved is what asked for gradients."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from fastgen.errors import RunFailed, UserError
from fastgen.nets.lora import LoraConfig, add_lora, lora_tensors, merged, share
from fastgen.trainers.engine import optim
from fastgen.trainers.engine.averages import AverageConfig
from fastgen.trainers.engine.checkpoint import Checkpoints
from fastgen.trainers.engine.loop import Loop, LoopConfig, check
from fastgen.trainers.engine.method import Average, Turn
from fastgen.trainers.engine.optim import OptimConfig, ScheduleConfig
from tests.toys import RF, Base, ManyBackwards, Points, toy

LORA = LoraConfig(rank=2, targets=("0", "3"))
OPTIONS = {"steps": 12, "batch": 8, "save_every": 5, "log_every": 2, "micro": 2, "ema": [AverageConfig(decay=0.9)]}


class Pair(Base):
    """A student and a fake as adapters on one teacher, turn by turn, and a slow copy of the fake."""

    def __init__(self, teacher, dropout=0.0):
        config = LORA.model_copy(update={"dropout": dropout})
        student, fake = (add_lora(share(teacher), config, seed) for seed in (0, 1))
        super().__init__(student)
        self.networks["fake"], self.frozen["teacher"] = fake, teacher.requires_grad_(False).eval()
        self.averages = {"slow": Average(of="fake", decay=0.8)}

    @property
    def turns(self):
        return Turn(trains=("fake",), loss=self.fake_loss, repeat=2), Turn(trains=("student",), loss=self.student_loss)

    def fake_loss(self, batch):
        return self.error(self.networks["fake"], batch, "fake").mean()

    def student_loss(self, batch):
        t, eps = batch.uniform("t"), batch.normal("eps", (2,))
        x = RF.mix(batch.x0, eps, t)
        target = self.networks["fake"](x, t).velocity + self.slow["slow"](x, t).velocity
        return (self.student(x, t).velocity - target).square().mean() + self.error(self.student, batch).mean()


def make(out, dropout=0.0, **options):
    config = LoopConfig(**{**OPTIONS, "optim": OptimConfig(lr=1e-2), **options})
    return Loop(Pair(toy(), dropout), Points(), config, out, seed=3)


def tensors(loop):
    modules = {**loop.method.networks, **loop.slow, **loop.ema}
    return {f"{name}.{key}": v.clone() for name, m in modules.items() for key, v in m.state_dict().items()}


def test_adapters_move_and_the_shared_base_does_not(tmp_path):
    loop = make(tmp_path)
    before = tensors(loop)
    loop.run()
    base = {id(p) for p in loop.method.frozen["teacher"].parameters()}
    for name, value in tensors(loop).items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name
    for network in (*loop.method.networks.values(), *loop.slow.values(), *loop.ema.values()):
        assert base == {id(p) for name, p in network.named_parameters() if "lora_" not in name}
        assert not any(p.requires_grad for name, p in network.named_parameters() if "lora_" not in name)
    for name, optimizer in loop.optimizers.items():
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for key, p in loop.method.networks[name].named_parameters() if "lora_" in key}


def test_only_the_networks_of_a_turn_ask_for_gradients(tmp_path):
    loop, asked = make(tmp_path), []

    def watch(name, loss):
        def watched(batch):
            found = {n for n, net in loop.method.networks.items() if any(p.requires_grad for p in net.parameters())}
            asked.append((name, found))
            return loss(batch)

        setattr(loop.method, name, watched)

    watch("fake_loss", loop.method.fake_loss)
    watch("student_loss", loop.method.student_loss)
    loop.run(until=2)
    assert {(name, *found) for name, found in asked} == {("fake_loss", "fake"), ("student_loss", "student")}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, dropout):
    options = {"dropout": dropout, "schedule": ScheduleConfig(warmup=3, decay="cosine")}
    whole = make(tmp_path / "whole", **options)
    whole.run()
    make(tmp_path / "cut", **options).run(until=7)
    again = make(tmp_path / "cut", **options)
    assert again.resume() and again.step == 5
    again.run()
    expected, found = tensors(whole), tensors(again)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_a_checkpoint_holds_the_adapters_alone(tmp_path):
    loop = make(tmp_path)
    loop.run()
    state = Checkpoints(tmp_path / "checkpoints").load(12)
    for kept, modules in (("networks", loop.method.networks), ("slow", loop.slow), ("ema", loop.ema)):
        for name, module in modules.items():
            adapters = {key for key, _ in module.named_parameters() if "lora_" in key}
            assert set(state[kept][name]) == adapters and len(adapters) == 4


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    make(tmp_path).run()
    method = Pair(toy())
    method.networks["fake"] = add_lora(share(method.frozen["teacher"]), LORA.model_copy(update={"rank": 3}), 0)
    other = Loop(method, Points(), LoopConfig(**OPTIONS), tmp_path, seed=3)
    with pytest.raises(UserError, match="does not fit this config"):
        other.resume()
    method = Pair(toy())
    method.networks["fake"] = toy()
    with pytest.raises(UserError, match="does not fit this config"):
        Loop(method, Points(), LoopConfig(**OPTIONS), tmp_path, seed=3).resume()


def test_a_frozen_network_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="every weight of 'student' is frozen"):
        Loop(ManyBackwards(toy().requires_grad_(False)), Points(), LoopConfig(), tmp_path)


def test_the_update_ratio_is_that_of_what_is_trained(tmp_path):
    loop = make(tmp_path, steps=1, ema=[], log_every=1)
    before = torch.cat([v.flatten() for v in lora_tensors(loop.method.student).values()])
    loop.run()
    after = torch.cat([v.flatten() for v in lora_tensors(loop.method.student).values()])
    expected = float((after - before).norm() / before.norm())
    assert loop.monitor.values("student")["update_ratio/student"] == pytest.approx(expected, rel=1e-5)


def test_the_merged_average_is_what_the_average_computes(tmp_path):
    loop = make(tmp_path)
    loop.run()
    x, t = torch.tensor([[0.5, -1.0]]), torch.tensor([0.4])
    with torch.no_grad():
        torch.testing.assert_close(merged(loop.student)(x, t).x0, loop.student(x, t).x0, atol=1e-6, rtol=1e-5)


class Overflowing(ManyBackwards):
    """One weight's gradient is an infinity, another's is no number, in the steps named."""

    def __init__(self, student, when):
        super().__init__(student)
        self.when = when

    def loss(self, batch):
        yield self.error(self.student, batch).mean(), {}
        if batch.step in self.when:
            first, last = self.student.net[0].weight, self.student.net[3].bias
            first.register_hook(lambda g: torch.full_like(g, -torch.inf))
            last.register_hook(lambda g: torch.full_like(g, torch.nan))
            yield 0 * (first.sum() + last.sum()), {}


def overflowing(out, when=(2,), **options):
    return Loop(Overflowing(toy(), when), Points(), LoopConfig(**{"steps": 50, "batch": 8, **options}), out)


def test_broken_gradients_are_replaced_where_asked_for(tmp_path):
    loop, seen = overflowing(tmp_path, replace_nan=True, clip=None), []
    net = loop.method.student.net
    loop.optimizers["student"].register_step_pre_hook(
        lambda *_: seen.append((net[0].weight.grad.clone(), net[3].bias.grad.clone()))
    )
    loop.run(until=3)
    assert len(seen) == 3
    assert (seen[2][0] == -1e5).all() and (seen[2][1] == 0).all()
    assert (loop.replaced, loop.bad) == (1, 0)
    skipped = overflowing(tmp_path / "skipped")
    skipped.run(until=3)
    assert (skipped.replaced, skipped.bad) == (0, 1)


def test_gradients_that_are_always_replaced_stop_the_run(tmp_path):
    loop = overflowing(tmp_path, when=range(100), replace_nan=True, bad_limit=4)
    with pytest.raises(RunFailed, match=r"step 3: .* not finite 4 time\(s\) in a row"):
        loop.run()


class Careful(ManyBackwards):
    precisions = ("fp32", "bf16")


def test_a_precision_the_method_does_not_stand_is_refused(tmp_path):
    config = LoopConfig(precision="fp16")
    with pytest.raises(UserError, match=r"loop\.precision=fp16: .* fp32, bf16"):
        Loop(Careful(toy()), Points(), config, tmp_path)
    check(LoopConfig(precision="bf16"), Careful)
    check(config, ManyBackwards)
    with pytest.raises(UserError, match=r"loop\.replace_nan"):
        check(LoopConfig(precision="fp16", replace_nan=True), ManyBackwards)


@pytest.mark.parametrize("where", ["optim", "networks"])
def test_a_missing_optimiser_is_told_before_anything_is_loaded(where, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    small = OptimConfig(name="adamw8bit")
    config = LoopConfig(optim=small) if where == "optim" else LoopConfig(networks={"critic": small})
    with pytest.raises(UserError, match=r"adamw8bit needs the package 'bitsandbytes': pip install .*\[8bit\]"):
        check(config, ManyBackwards)


def test_8_bit_moments_resume_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")

    def run(out, until=None):
        torch.manual_seed(0)
        student = toy()
        student.net = nn.Sequential(nn.Linear(3, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 2))
        config = LoopConfig(steps=8, batch=8, save_every=4, optim=OptimConfig(name="adamw8bit"))
        loop = Loop(ManyBackwards(student), Points(), config, out)
        resumed = loop.resume()
        loop.run(until)
        return loop, resumed

    whole, _ = run(tmp_path / "whole")
    states = [s["state1"].dtype for s in whole.optimizers["student"].state.values()]
    assert torch.uint8 in states and torch.float32 in states  # small tensors keep 32 bits
    run(tmp_path / "cut", until=6)
    again, resumed = run(tmp_path / "cut")
    assert resumed
    for name, value in whole.method.student.state_dict().items():
        assert torch.equal(value, again.method.student.state_dict()[name]), name


def test_8_bit_adam_is_given_the_settings(monkeypatch):
    package = type("package", (), {"optim": type("optim", (), {"AdamW8bit": lambda *args, **kw: (args, kw)})})
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    parameters = list(nn.Linear(2, 2).parameters())
    made = optim.make_optimizer(parameters, OptimConfig(name="adamw8bit", lr=0.1, betas=(0.0, 0.5), weight_decay=0.3))
    (groups,), settings = made
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert settings == {"lr": 0.1, "betas": (0.0, 0.5), "eps": 1e-8}
