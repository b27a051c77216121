"""The adversary and LADD: heads and their norms, losses of both sides, where gradients go, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import TrigFlow
from fastgen.samplers import few_step
from fastgen.teacher import Teacher
from fastgen.teachers import mlp
from fastgen.trainers.engine import adversary as module
from fastgen.trainers.engine.adversary import (
    Adversary,
    AdversaryConfig,
    Head,
    LocalBatchNorm,
    groups,
    make_heads,
    tokens,
    verdict,
    width,
)
from fastgen.trainers.engine.loop import Loop, LoopConfig
from fastgen.trainers.engine.optim import OptimConfig
from fastgen.trainers.ladd import Ladd
from tests.trainers.truth import batch, gaussian, mixture

EXACT = {"rtol": 1e-9, "atol": 1e-12}
N = 8


def network(num_classes: int | None = None, seed: int = 0) -> Denoiser:
    """A network of a few weights that has learnt something."""
    torch.manual_seed(seed)
    made = mlp.build(mlp.MLPConfig(width=8, depth=2), (2,), num_classes).double()
    for p in made.parameters():
        nn.init.normal_(p, std=0.4)
    return made


def opponent(num_classes: int | None = None, **config) -> Adversary:
    """Heads in float64 on the features of a teacher with weights."""
    teacher = Teacher(network(num_classes, seed=1))
    made = Adversary(AdversaryConfig(kernel=1, **config), teacher, network(num_classes), TrigFlow(sd=0.5), 0.5)
    made.heads.double().eval()
    return made


def ladd(**config) -> Ladd:
    method = Ladd(Ladd.Config(adversary=AdversaryConfig(kernel=1), **config), network(), Teacher(network(seed=1)))
    method.adversary.heads.double().eval()
    return method


def rows(n: int = N, **data: Tensor):
    return batch({"x0": gaussian(n, (2,)), **data}, n)


# Heads


@pytest.mark.parametrize(("n", "parts"), [(1, 1), (4, 1), (8, 1), (9, 1), (10, 2), (12, 2), (16, 2), (17, 1), (32, 4)])
def test_every_count_of_rows_has_its_groups(n, parts):
    assert groups(n) == parts  # 8 samples a group where they divide, as published


def test_the_local_batch_norm_norms_each_group_over_samples_and_tokens():
    norm, x = LocalBatchNorm(3).double(), gaussian(16, (3, 5)) * 3 + 1
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for part, found in zip(x.split(8), norm(x).split(8), strict=True):
        centred = part - part.mean(dim=(0, 2), keepdim=True)
        by_hand = centred / (centred.square().mean(dim=(0, 2), keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(found, by_hand * norm.weight[:, None] + norm.bias[:, None], **EXACT)
    assert torch.equal(norm.train()(x), norm.eval()(x))


@pytest.mark.parametrize(("shape", "count"), [((6, 4, 3), 12), ((7, 6), 7), ((6,), 1)])
def test_features_of_every_layout_are_judged_token_by_token(shape, count):
    feature = tokens(gaussian(N, shape))
    assert feature.shape == (N, 6, count)
    assert Head(6, 9).double()(feature).shape == (N, count)


@pytest.mark.parametrize("count", [3, 12])
def test_tokens_stand_in_a_ring(count):
    """A turn of the ring turns the logits; nine places wrap around three tokens as often as they must."""
    torch.manual_seed(0)
    head, x = Head(4, 9).double().eval(), gaussian(N, (4, count))
    torch.testing.assert_close(head(x.roll(1, 2)), head(x).roll(1, 1), **EXACT)
    alone = head(x[:, :, :1].expand_as(x))
    assert float((head(x) - alone)[:, 0].detach().abs().max()) > 1e-3


def test_the_inner_layer_stands_beside_a_way_around_it():
    torch.manual_seed(0)
    head, x = Head(4, 3).double().eval(), gaussian(N, (4, 5))
    h = head.first(x)
    torch.testing.assert_close(head(x), head.last((head.inner(h) + h) / math.sqrt(2)).squeeze(1), **EXACT)
    nn.init.zeros_(head.inner.norm.weight)
    torch.testing.assert_close(head(x), head.last(h / math.sqrt(2)).squeeze(1), **EXACT)


def test_a_joint_blocks_second_part_is_looked_at():
    text, image = gaussian(N, (3, 4)), gaussian(N, (5, 4))
    assert torch.equal(tokens((text, image)), image.transpose(1, 2))


def test_weights_are_held_to_a_spectral_norm_of_one_and_only_in_training_is_it_followed():
    head = make_heads([6], 9).heads[0].double()
    head.inner.conv.parametrizations.weight.original.data *= 7
    x = gaussian(N, (6, 5))
    before = head.inner.conv.weight.detach().clone()
    head.eval()
    head(x)
    assert torch.equal(head.inner.conv.weight, before)
    head.train()
    for _ in range(50):
        head(x)
    assert float(torch.linalg.matrix_norm(head.eval().inner.conv.weight.flatten(1), 2)) == pytest.approx(1, abs=1e-3)


def test_heads_are_the_same_for_every_run_and_draw_nothing_from_it():
    torch.manual_seed(3)
    first = make_heads([6, 4], 9).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(value, first[key]) for key, value in make_heads([6, 4], 9).state_dict().items())


# Losses


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_verdicts_by_hand(kind):
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.25], [0.0, -1.0]])
    if kind == "hinge":
        assert float(verdict(kind, real, fake)) == pytest.approx(0.5 * (0.5 / 2 + (0 + 1.25 + 1 + 0) / 4))
    else:
        soft = [math.log1p(math.exp(v)) for v in (-2, -0.5)], [math.log1p(math.exp(v)) for v in (-3, 0.25, 0, -1)]
        assert float(verdict(kind, real, fake)) == pytest.approx(sum(soft[0]) / 2 + sum(soft[1]) / 4, rel=1e-6)


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_the_two_sides_pull_against_each_other(kind):
    """The heads lower what they say of fakes, the student raises it: a sign error on either side fails."""
    made, real, fake = opponent(loss=kind), gaussian(N, (2,), 1), gaussian(N, (2,), 2)
    last = [head.last.bias for head in made.heads.heads]  # added to every logit of its head
    for loss in (
        verdict(kind, gaussian(N, (1,)), made.logits(fake, gaussian(N, (2,), 3), torch.full((N,), 0.7).double(), None)),
    ):
        assert all(float(g) > 0 for g in torch.autograd.grad(loss, last))
    on_real = verdict(
        kind, made.logits(real, gaussian(N, (2,), 3), torch.full((N,), 0.7).double(), None), gaussian(N, (1,))
    )
    assert all(float(g) < 0 for g in torch.autograd.grad(on_real, last))
    student, _ = made.student_loss(rows(), fake, None)
    assert all(float(g) < 0 for g in torch.autograd.grad(student, last))


def test_the_students_loss_by_hand_and_its_way_through_the_frozen_features():
    made, fake = opponent(), gaussian(N, (2,), 2).requires_grad_()
    loss, _ = made.student_loss(rows(), fake, None)
    t, noise = made.level(rows()), rows().normal("adversary/student", (2,))
    noisy = t.cos()[:, None] * fake + 0.5 * t.sin()[:, None] * noise
    seen = []
    handles = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in made.network.blocks]
    made.network(noisy, t, None, on=TrigFlow(sd=0.5))
    for handle in handles:
        handle.remove()
    logits = torch.cat([head(out[:, :, None]) for head, out in zip(made.heads.heads, seen, strict=True)], dim=1)
    torch.testing.assert_close(loss, -logits.mean(), **EXACT)
    found, by_hand = (torch.autograd.grad(value, fake, retain_graph=True)[0] for value in (loss, -logits.mean()))
    torch.testing.assert_close(found, by_hand, **EXACT)
    assert float(found.abs().min()) > 0
    assert all(p.grad is None and not p.requires_grad for p in made.network.parameters())


def test_a_planted_detachment_of_the_features_leaves_the_student_without_gradient(monkeypatch):
    method = ladd()
    gradients = torch.autograd.grad(method.loss(rows())[0], list(method.student.parameters()), allow_unused=True)
    assert any(g is not None and float(g.abs().max()) > 0 for g in gradients)
    monkeypatch.setattr(module, "tokens", lambda out: tokens(out).detach())
    loss = method.loss(rows())[0]
    found = torch.autograd.grad(loss, list(method.student.parameters()), allow_unused=True)
    assert all(g is None for g in found)


def test_levels_follow_their_law_and_are_shared_by_both_sides():
    made = opponent()
    tau = (0.5 * made.level(rows(4000)).tan()).log()
    assert abs(float(tau.mean()) + 0.6) < 0.05 and abs(float(tau.std()) - 1) < 0.05
    asked = []
    made.logits = lambda x0, noise, t, cond, f=made.logits: asked.append((noise, t)) or f(x0, noise, t, cond)
    made.heads_loss(rows(), gaussian(N, (2,), 1), gaussian(N, (2,), 2), None)
    (noise, t), (other_noise, other_t) = asked
    assert torch.equal(t, other_t) and not torch.equal(noise, other_noise)


def test_misaligned_real_data_count_as_fake():
    data = rows(label=torch.arange(N) % 3)
    cond, real, fake = {"label": data["label"]}, gaussian(N, (2,), 1), gaussian(N, (2,), 2)
    made, asked = opponent(3, misaligned=True), []
    made.logits = lambda x0, noise, t, cond, f=made.logits: asked.append((x0, t, cond)) or f(x0, noise, t, cond)
    loss, _ = made.heads_loss(data, real, fake, cond)
    (_, t, _), (fakes, times, both) = asked
    assert torch.equal(fakes, torch.cat([fake, real.roll(1, 0)])) and torch.equal(times, torch.cat([t, t.roll(1, 0)]))
    assert torch.equal(both["label"], data["label"].repeat(2))
    plain = opponent(3).heads_loss(data, real, fake, cond)[0]
    assert abs(float(loss - plain)) > 1e-4
    with pytest.raises(UserError, match="misaligned: these samples have no condition"):
        opponent(misaligned=True).heads_loss(rows(), real, fake, None)


def test_approximate_r1_by_hand():
    real, fake = gaussian(N, (2,), 1), gaussian(N, (2,), 2)
    plain, penalised = opponent(), opponent(r1=3.0)
    off = rows().normal("adversary/shake", (2,))
    t, noise = plain.level(rows()), rows().normal("adversary/real", (2,))
    apart = plain.logits(real, noise, t, None) - plain.logits(real + 0.1 * off, noise, t, None)
    expected = plain.heads_loss(rows(), real, fake, None)[0] + 3 * apart.square().mean()
    torch.testing.assert_close(penalised.heads_loss(rows(), real, fake, None)[0], expected, **EXACT)


# What is looked at


@pytest.mark.parametrize(
    ("count", "taps"), [(20, [4, 9, 14, 19]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [1, 2, 4, 5])]
)
def test_about_four_blocks_are_tapped_and_the_last_is_among_them(count, taps):
    assert module._taps(None, count) == taps


def test_taps_by_name():
    assert module._taps((2, -1), 20) == [2, 19]
    for wrong in ((20,), (1, 1), (19, -1)):
        with pytest.raises(UserError, match=r"the network has the blocks 0 \.\. 19; name each at most once"):
            module._taps(wrong, 20)


@pytest.mark.slow
def test_widths_are_those_of_the_features():
    from diffusers import UNet2DModel

    from fastgen.teachers.unet import unet_features

    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )
    blocks = unet_features(net)
    with module.recorded(blocks) as seen:
        net(torch.randn(2, 3, 8, 8), torch.zeros(2))
    assert [width(block) for block in blocks] == [tokens(seen[block]).shape[1] for block in blocks]


def test_a_head_of_another_width_than_its_features_is_refused_at_the_start(monkeypatch):
    monkeypatch.setattr(module, "width", lambda block: 5)
    with pytest.raises(UserError, match=r"taps: a block of this mlp network returns 8 channels, its last matrix 5"):
        ladd().begin(rows(2))
    monkeypatch.undo()
    ladd().begin(rows(2))


def test_too_few_rows_are_refused():
    for few in (1, 3):
        with pytest.raises(
            UserError, match=rf"compares at least 4 samples at once, and got {few}: raise loop.batch or"
        ):
            ladd().loss(rows(few))
        with pytest.raises(UserError, match="at least 4 samples"):
            ladd().heads_loss(rows(few))
    ladd().loss(rows(4))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(UserError, match="set teacher=PATH"):
        Ladd(Ladd.Config(), network())
    with pytest.raises(UserError, match="a closed-form teacher has none; set features=student"):
        Ladd(Ladd.Config(), network(), Teacher(mixture()))
    guided = Teacher(network(3), guidance=2.0)
    with pytest.raises(UserError, match=r"guidance=2.0: method ladd only looks at features; leave it off"):
        Ladd(Ladd.Config(), network(3), guided)
    frozen = network()
    next(frozen.parameters()).requires_grad_(False)
    with pytest.raises(UserError, match=r"features=student: under student\.lora"):
        Ladd(Ladd.Config(adversary=AdversaryConfig(features="student")), frozen, Teacher(mixture()))


# LADD alone


def test_samples_begin_at_the_students_own_step_times():
    method, data = ladd(steps=(1, 2)), rows(300)
    asked = []
    method.student.forward = lambda x, t, cond=None, *, on=None, f=method.student.forward: (
        asked.append((x, t)) or f(x, t, on=on)
    )
    made = method.generate(data)
    ((x, t),) = asked
    assert sorted(round(float(v), 6) for v in t.unique()) == [1.1, round(math.pi / 2, 6)]
    first, z = t > 1.2, data.normal("eps", (2,))
    assert 0.4 < float(first.double().mean()) < 0.6
    torch.testing.assert_close(made[first], few_step.sample(method.student, method.sampler(), z, 1)[first], **EXACT)
    mixed = math.cos(1.1) * data.x0 + 0.5 * math.sin(1.1) * z
    torch.testing.assert_close(x[~first], mixed[~first], **EXACT)


class Endless:
    def get(self, index: Tensor) -> dict[str, Tensor]:
        return {"x0": gaussian(64, (2,)).float()[index % 64]}


def test_turns_come_in_their_rhythm_and_train_their_own_networks(tmp_path):
    torch.manual_seed(0)
    student, teacher = network().float(), Teacher(network(seed=1).float())
    method = Ladd(Ladd.Config(adversary=AdversaryConfig(kernel=1), every=2), student, teacher)
    config = LoopConfig(steps=4, batch=8, optim=OptimConfig(lr=1e-2), save_every=10, log_every=10)
    loop, moved = Loop(method, Endless(), config, tmp_path), []
    for step in range(1, 5):
        before = {n: [p.detach().clone() for p in net.parameters()] for n, net in method.networks.items()}
        loop.run(until=step)
        pairs = {n: zip(before[n], net.parameters(), strict=True) for n, net in method.networks.items()}
        moved.append({n: any(not torch.equal(a, b) for a, b in both) for n, both in pairs.items()})
    assert [one["student"] for one in moved] == [True, False, True, False]
    assert all(one["heads"] for one in moved)


def test_heads_learn_to_tell_the_students_samples_from_data():
    """A sign error of the heads' loss lets them call the fakes real."""
    torch.manual_seed(0)
    student, teacher = network(), Teacher(network(seed=1))
    method = Ladd(Ladd.Config(adversary=AdversaryConfig(kernel=1), every=100), student, teacher)
    method.adversary.heads.double()
    data = batch({"x0": mixture().sample(0, "x", torch.arange(64)).double() + 4}, 64)
    optimizer = torch.optim.Adam(method.networks["heads"].parameters(), lr=1e-2)
    for _ in range(50):
        loss, logs = method.heads_loss(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.95  # 1 at first, where the logits are about 0
    assert float(logs["adversary/real_right"] + logs["adversary/fake_right"]) > 1.1
