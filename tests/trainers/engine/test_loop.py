"""The contract between a method and the loop, proved on three throw-away methods."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from fastgen.errors import RunFailed, Stopped, UserError
from fastgen.trainers.engine.averages import AverageConfig
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.optim import OptimConfig, ScheduleConfig
from tests.toys import Base, ManyBackwards, Points, SlowTarget, TwoNetworks, toy

METHODS = (ManyBackwards, TwoNetworks, SlowTarget)


def make(method, out, **options):
    config = LoopConfig(**{"steps": 12, "batch": 8, "save_every": 5, "log_every": 2, **options})
    return Loop(method, Points(), config, out, seed=3)


def weights(loop):
    modules = {**loop.method.networks, **loop.slow, **loop.ema}
    return {f"{name}.{key}": v.clone() for name, m in modules.items() for key, v in m.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", METHODS)
def test_training_moves_every_network_and_lowers_the_loss(kind, tmp_path):
    loop = make(kind(toy()), tmp_path, steps=200, batch=64, optim=OptimConfig(lr=1e-2), log_every=1)
    before = weights(loop)
    loop.run()
    after = weights(loop)
    for name in loop.method.networks:
        assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(name)), name
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line[key] for line in lines for key in line if key.startswith("loss/student")]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(kind, dropout, tmp_path):
    options = {"micro": 2, "ema": [AverageConfig(decay=0.9)], "schedule": ScheduleConfig(warmup=3, decay="cosine")}
    whole = make(kind(toy(dropout=dropout)), tmp_path / "whole", **options)
    whole.run()
    cut = make(kind(toy(dropout=dropout)), tmp_path / "cut", **options)
    cut.run(until=7)  # two steps beyond the checkpoint of step 5, lost with the process
    again = make(kind(toy(seed=9, dropout=dropout)), tmp_path / "cut", **options)
    assert again.resume() and again.step == 5
    again.run()
    assert_equal(weights(whole), weights(again))
    assert whole.drawn == again.drawn
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "the lost steps were logged twice"


def test_parts_of_a_loss_add_up_to_one_optimiser_step(tmp_path):
    loop = make(ManyBackwards(toy()), tmp_path, steps=1, clip=None)
    student, gradient = loop.method.student, {}
    loop.optimizers["student"].register_step_pre_hook(
        lambda *_: gradient.update({n: p.grad.clone() for n, p in student.named_parameters()})
    )
    twin = toy()
    method = ManyBackwards(twin)
    batch = loop.batch_of(torch.arange(8), Points().get(torch.arange(8)))
    sum(value for value, _ in method.loss(batch)).backward()
    loop.run()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-6, atol=1e-7)


def test_accumulation_equals_one_big_batch(tmp_path):
    big = make(ManyBackwards(toy()), tmp_path / "a", steps=5)
    small = make(ManyBackwards(toy()), tmp_path / "b", steps=5, micro=2)
    big.run()
    small.run()
    for a, b in zip(big.method.student.parameters(), small.method.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_turns_come_when_due_and_leave_other_networks_alone(tmp_path):
    method = TwoNetworks(toy())
    loop = make(method, tmp_path, steps=4)
    seen = []
    for name, optimizer in loop.optimizers.items():
        optimizer.register_step_post_hook(
            lambda *_, name=name: seen.append(
                (loop.step, name, method.student.training, method.networks["critic"].training)
            )
        )
    loop.run()
    # The shared turn steps the critic once a step; its own turn twice on steps 1 and 3.
    assert [s for s, name, *_ in seen if name == "critic"] == [0, 1, 1, 1, 2, 3, 3, 3]
    assert [s for s, name, *_ in seen if name == "weight"] == [0, 1, 2, 3]
    assert all(student != critic for _, _, student, critic in seen), "train mode belongs to the networks of the turn"
    assert loop.drawn == 8 * (4 + 2 * 2), "a shared turn draws no rows, a repeated one draws fresh rows each time"


def test_slow_copy_follows_the_declared_decay(tmp_path):
    loop = make(SlowTarget(toy()), tmp_path, steps=3)
    expected = {n: p.clone() for n, p in loop.slow["target"].named_parameters()}
    history = []
    loop.optimizers["student"].register_step_post_hook(
        lambda *_: history.append({n: p.detach().clone() for n, p in loop.method.student.named_parameters()})
    )
    loop.run()
    for step, fast in enumerate(history):
        decay = min(0.9, step / 10)
        expected = {n: decay * expected[n] + (1 - decay) * fast[n] for n in expected}
    for name, parameter in loop.slow["target"].named_parameters():
        torch.testing.assert_close(parameter, expected[name])
        assert not parameter.requires_grad


def test_exported_student_is_the_first_average(tmp_path):
    assert make(ManyBackwards(toy()), tmp_path).student is not None
    loop = make(ManyBackwards(toy()), tmp_path, ema=[AverageConfig(decay=0.5), AverageConfig(decay=0.9)])
    assert loop.student is loop.ema["ema-constant-0.5"]
    raw = make(ManyBackwards(toy()), tmp_path)
    assert raw.student is raw.method.student


class Poison(Base):
    """A loss that becomes NaN from a step on."""

    def __init__(self, student, start):
        super().__init__(student)
        self.start = start

    @property
    def turns(self):
        return (ManyBackwards.turns.fget(self)[0],)

    def loss(self, batch):
        loss = self.error(self.student, batch).mean()
        return loss * math.nan if batch.step >= self.start else loss


def test_nan_is_skipped_then_stops_with_step_network_and_checkpoint(tmp_path):
    loop = make(Poison(toy(), start=6), tmp_path, steps=50, bad_limit=4)
    with pytest.raises(RunFailed, match=r"step 9: .*'student' was not finite 4 time.*step-00000005"):
        loop.run()
    assert all(torch.isfinite(p).all() for p in loop.method.student.parameters())


def test_nan_before_any_checkpoint_says_so(tmp_path):
    with pytest.raises(RunFailed, match="no checkpoint was saved yet"):
        make(Poison(toy(), start=0), tmp_path, bad_limit=1).run()


class Detached(Poison):
    def loss(self, batch):
        return super().loss(batch) * 0


def test_network_that_does_not_move_stops_the_run(tmp_path):
    with pytest.raises(RunFailed, match="have not moved"):
        make(Detached(toy(), start=999), tmp_path, steps=100, log_every=1).run()


def test_checkpoints_are_told_of_where_there_are_some(tmp_path):
    loop = make(ManyBackwards(toy()), tmp_path, steps=2, save_every=2)
    assert loop.kept() == ""
    loop.run()
    assert loop.kept() == f"; the checkpoints are in {tmp_path / 'checkpoints'}"


def test_interrupt_saves_and_resumes(tmp_path):
    loop = make(SlowTarget(toy()), tmp_path)
    loop.interrupt = lambda: loop.step == 4
    with pytest.raises(Stopped, match="step 4"):
        loop.run()
    again = make(SlowTarget(toy()), tmp_path)
    assert again.resume() and again.step == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 9, "micro": 2}, "loop.batch=9 is not a multiple of loop.micro=2"),
        ({"networks": {"studnet": OptimConfig()}}, "did you mean 'student'"),
    ],
)
def test_bad_settings_are_refused_at_the_start(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make(ManyBackwards(toy()), tmp_path, **options)


def test_frozen_network_in_train_mode_and_missing_data_are_refused(tmp_path):
    method = ManyBackwards(toy())
    method.frozen = {"critic": nn.Linear(2, 2).train()}
    with pytest.raises(UserError, match="'critic' is in train mode"):
        make(method, tmp_path)
    method = ManyBackwards(toy())
    method.needs = frozenset({"x0", "eps"})
    with pytest.raises(UserError, match=r"needs \['eps'\]"):
        make(method, tmp_path)
    with pytest.raises(UserError, match="was given no data"):
        Loop(method, None, LoopConfig(), tmp_path)


def test_resume_refuses_another_seed_and_another_network(tmp_path):
    make(ManyBackwards(toy()), tmp_path).run()
    other = Loop(ManyBackwards(toy()), Points(), LoopConfig(steps=12, batch=8), tmp_path, seed=4)
    with pytest.raises(UserError, match="seed"):
        other.resume()
    with pytest.raises(UserError, match="does not fit this config"):
        make(TwoNetworks(toy()), tmp_path).resume()


def test_damaged_checkpoint_is_named_with_the_way_back(tmp_path):
    loop = make(ManyBackwards(toy()), tmp_path)
    loop.run()
    path = loop.checkpoints.path(12) / "state.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"damaged .*delete .*step-00000012"):
        make(ManyBackwards(toy()), tmp_path).resume()


def test_checkpoints_keep_the_last_and_every_mth(tmp_path):
    loop = make(ManyBackwards(toy()), tmp_path, steps=20, save_every=2, keep=2, keep_every=8)
    loop.run()
    assert loop.checkpoints.steps() == [8, 16, 18, 20]


def test_bf16_trains_float32_masters(tmp_path):
    loop = make(
        ManyBackwards(toy()), tmp_path, steps=100, batch=64, precision="bf16", optim=OptimConfig(lr=1e-2), log_every=1
    )
    loop.run()
    assert all(p.dtype == torch.float32 for p in loop.method.student.parameters())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss/student"] < lines[0]["loss/student"]


def test_radam_and_per_network_settings_reach_the_optimisers(tmp_path):
    networks = {"critic": OptimConfig(name="radam", lr=0.5, betas=(0.1, 0.2), eps=1e-3)}
    loop = make(TwoNetworks(toy()), tmp_path, networks=networks)
    group = loop.optimizers["critic"].param_groups[0]
    assert isinstance(loop.optimizers["critic"], torch.optim.RAdam)
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.1, 0.2), 1e-3)
    assert isinstance(loop.optimizers["student"], torch.optim.AdamW)


def test_norms_and_biases_are_not_decayed(tmp_path):
    loop = make(ManyBackwards(toy()), tmp_path, optim=OptimConfig(weight_decay=0.3))
    for group in loop.optimizers["student"].param_groups:
        assert group["weight_decay"] == (0.3 if group["params"][0].ndim > 1 else 0.0)


def test_a_method_is_shown_a_few_rows_before_the_first_step_of_every_start(tmp_path):
    class Looks(SlowTarget):
        def __init__(self, student):
            super().__init__(student)
            self.seen = []

        def begin(self, batch):
            assert "target" in self.slow and not self.student.training
            self.seen.append((batch.step, len(batch), batch.x0.shape))

    first = make(Looks(toy()), tmp_path)
    first.run(until=5)
    assert first.method.seen == [(0, 2, (2, 2))]
    again = make(Looks(toy()), tmp_path)
    again.resume()
    again.run()
    assert again.method.seen == [(5, 2, (2, 2))]
    again.run()
    assert len(again.method.seen) == 1, "nothing is left to do"
