"""An adversary in a teacher's features: LADD (2403.12015) as SANA-Sprint builds it (2503.09641, section 3.3).

    t_D = atan(exp(N(-0.6, 1)) / sd),   D_k = head_k(features_k(teacher; cos t_D x0 + sin t_D z, t_D, c))
    L_G = -E D(fake),   L_D = (E max(0, 1 - D(real)) + E max(0, 1 + D(fake))) / 2            hinge
    L_G = E s(-D(fake)),   L_D = E s(-D(real)) + E s(D(fake)),   s = softplus                NVlabs/FastGen

The teacher's weights are frozen, its activations are not: the student's gradient goes through them. The heads are
StyleGAN-T's (2301.09515): small, spectrally normed convolutions over tokens, one head for each tap.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from fastgen import cond as conditions
from fastgen.cond import Cond
from fastgen.config import Model
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.layout import wide
from fastgen.paths import TrigFlow
from fastgen.teacher import Teacher
from fastgen.trainers.engine.method import Batch, Logs
from fastgen.trainers.engine.trig import angles, draw_angle

TAPS = 4  # heads where none are named: SANA-Sprint taps four of its blocks
GROUP = 8  # samples that are normed together, as far as the batch divides (2301.09515)
FEWEST = 4  # rows of a forward pass: of one or two the heads learn noise (NVlabs/Sana, issue 300)
SHAKE = 0.1  # deviation of the noise on real data of the approximate R1 (NVlabs/FastGen)


class AdversaryConfig(Model):
    """The heads' part in a run; their optimiser is `loop.networks.heads`.

    features    whose features: the teacher's, or those of the student as it is before its first step (for a closed-form
                teacher, which has none)
    taps        numbers of the blocks that are looked at, negative ones from the end; None: about four, evenly spread
    kernel      width over tokens of a head's inner convolution; more than the tokens wraps around
    p_mean ...  of the noise under which real and fake are compared
    misaligned  real data with another row's condition count as fake
    r1          weight of the approximate R1, |D(real) - D(real + 0.1 n)|^2
    """

    features: Literal["teacher", "student"] = "teacher"
    taps: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    kernel: int = Field(default=9, ge=1)
    loss: Literal["hinge", "softplus"] = "hinge"
    p_mean: float = -0.6
    p_std: float = Field(default=1.0, gt=0)
    misaligned: bool = False
    r1: float = Field(default=0.0, ge=0)


class Adversary:
    """`heads` on features of a frozen `network`, both to be listed by the method, and the losses of both sides."""

    def __init__(
        self, config: AdversaryConfig, teacher: Teacher | None, student: Denoiser, view: TrigFlow, sd: float
    ) -> None:
        self.config, self.view, self.sd = config, view, sd
        self.network = _features_of(config, teacher, student)
        blocks = self.network.blocks
        self.taps = [blocks[i] for i in _taps(config.taps, len(blocks))]
        self.heads = make_heads([width(block) for block in self.taps], config.kernel)
        self.within = angles(view, self.network.path)

    @property
    def frozen(self) -> dict[str, nn.Module]:
        """What the method has to list beside its teacher."""
        return {"features": self.network} if self.config.features == "student" else {}

    def student_loss(self, batch: Batch, fake: Tensor, cond: Cond) -> tuple[Tensor, Logs]:
        """What the student minimises: the heads are to take its samples, [B, ...] with gradient, for real."""
        _refuse_few(len(fake))
        t, noise = self.level(batch), batch.normal("adversary/student", fake.shape[1:])
        logits = self.logits(fake, noise, t, cond)
        loss = -logits.mean() if self.config.loss == "hinge" else functional.softplus(-logits).mean()
        return loss, {"adversary/student": loss}

    def heads_loss(self, batch: Batch, real: Tensor, fake: Tensor, cond: Cond) -> tuple[Tensor, Logs]:
        """What the heads minimise, of real data and samples without gradient, [B, ...], at the same levels."""
        _refuse_few(len(fake))
        t, shape = self.level(batch), fake.shape[1:]
        noise = {name: batch.normal(f"adversary/{name}", shape) for name in ("real", "fake")}
        on_real = self.logits(real, noise["real"], t, cond)
        fakes, noises, times, both = fake.detach(), noise["fake"], t, cond
        if self.config.misaligned:
            if cond is None:
                raise UserError("misaligned: these samples have no condition that could be another row's; set it false")
            fakes = torch.cat([fakes, real.roll(1, 0)])
            noises = torch.cat([noises, batch.normal("adversary/misaligned", shape)])
            times, both = torch.cat([t, t.roll(1, 0)]), conditions.concat(cond, cond)
        on_fake = self.logits(fakes, noises, times, both)
        loss, logs = verdict(self.config.loss, on_real, on_fake), _shares(on_real, on_fake)
        if self.config.r1:
            shaken = real + SHAKE * batch.normal("adversary/shake", shape)
            off = (on_real - self.logits(shaken, noise["real"], t, cond)).square().mean()
            loss, logs = loss + self.config.r1 * off, {**logs, "adversary/r1": off}
        return loss, logs

    def level(self, batch: Batch) -> Tensor:
        """t_D, [B]."""
        return draw_angle(batch, "adversary/t", (self.config.p_mean, self.config.p_std, self.sd), self.within)

    def logits(self, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """All heads' answers on x0 noised to t, [B, heads x tokens]."""
        return self.heads(self.features(self.view.mix(x0, noise, t), t, cond))

    def features(self, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """Outputs of the tapped blocks at x [B, ...], t [B], each [B, C, tokens], differentiable in x."""
        with recorded(self.taps) as seen:
            self.network(x, t, cond, on=self.view)
        return [tokens(seen[tap]) for tap in self.taps]

    def look(self, batch: Batch, real: Tensor, cond: Cond) -> None:
        """Try the features of a few rows: a head of another width than its features would fail at the first step."""
        with torch.no_grad():
            found = self.features(real, self.level(batch), cond)
        for head, feature in zip(self.heads.heads, found, strict=True):
            if feature.shape[1] != head.width:
                told = f"{feature.shape[1]} channels, its last matrix {head.width}"
                raise UserError(
                    f"taps: a block of this {self.network.family} network returns {told}; name other blocks"
                )


def verdict(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The heads' loss of logits on real data and on fakes; the two counts may differ."""
    if kind == "hinge":
        return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


class Heads(nn.Module):
    """One head for each tap: features, each [B, C, tokens] -> logits [B, heads x tokens]."""

    def __init__(self, widths: Sequence[int], kernel: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width, kernel) for width in widths)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1)


class Head(nn.Module):
    """Features [B, C, N] -> logits [B, N] (2301.09515, figure 3, without its conditions)."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.width = width
        self.first, self.inner = Layer(width, 1), Layer(width, kernel)
        self.last = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last((self.inner(h) + h) / math.sqrt(2)).squeeze(1)


class Layer(nn.Module):
    """A convolution around the ring of tokens, a local batch norm, a leaky rectifier: [B, C, N] to [B, C, N]."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = spectral_norm(nn.Conv1d(width, width, kernel))
        self.norm = LocalBatchNorm(width)
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel > 1:
            before = (self.kernel - 1) // 2
            ring = torch.arange(-before, x.shape[2] + self.kernel - 1 - before, device=x.device) % x.shape[2]
            x = x[:, :, ring]
        return functional.leaky_relu(self.norm(self.conv(x)), 0.2)


class LocalBatchNorm(nn.Module):
    """Each channel is normed over the tokens of about `GROUP` samples together, at training and at use alike.

    No batch is refused for its size, as it would be by groups of exactly that many.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        count, shape = groups(len(x)), x.shape
        x = wide(x).view(count, len(x) // count, *shape[1:])
        variance, mean = torch.var_mean(x, dim=(1, 3), keepdim=True, correction=0)
        normed = ((x - mean) * (variance + 1e-5).rsqrt()).view(shape)
        return normed * self.weight[:, None] + self.bias[:, None]


def groups(rows: int) -> int:
    """Into how many parts a batch is cut: rows / GROUP, rounded up, or the next smaller number that divides it."""
    return max(n for n in range(1, math.ceil(rows / GROUP) + 1) if rows % n == 0)


def make_heads(widths: Sequence[int], kernel: int) -> Heads:
    """Fresh heads, the same for every run, rank and resumption: their numbers come from a generator of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Heads(widths, kernel)


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """The outputs of modules in the forward pass that runs meanwhile, by module.

    The hooks are gone before the backward pass, where gradient checkpointing would call them a second time.
    """
    seen: dict[nn.Module, Any] = {}
    handles = [m.register_forward_hook(lambda module, _args, out: seen.__setitem__(module, out)) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tokens(out: Any) -> Tensor:
    """A block's output as [B, C, tokens]: maps [B, C, H, W], sequences [B, tokens, C], vectors [B, C]; of a tuple (text
    and image of a joint block) the last."""
    out = wide(out[-1] if isinstance(out, tuple) else out)
    if out.ndim == 2:
        return out[:, :, None]
    return out.transpose(1, 2) if out.ndim == 3 else out.flatten(2)


def width(block: nn.Module) -> int:
    """Channels of a block's output: every block ends on a projection to them, or has one of that many rows last."""
    matrices = [p for p in block.parameters() if p.ndim > 1]
    if not matrices:
        raise UserError(f"taps: {type(block).__name__} has no weights to tell the channels of its features from")
    return matrices[-1].shape[0]


def _taps(named: tuple[int, ...] | None, count: int) -> list[int]:
    """The numbers of the tapped blocks, each once."""
    if named is None:
        heads = min(TAPS, count)
        return [math.ceil((i + 1) * count / heads) - 1 for i in range(heads)]
    if any(not -count <= i < count for i in named) or len({i % count for i in named}) != len(named):
        raise UserError(f"taps={list(named)}: the network has the blocks 0 .. {count - 1}; name each at most once")
    return [i % count for i in named]


def _features_of(config: AdversaryConfig, teacher: Teacher | None, student: Denoiser) -> Denoiser:
    if config.features == "student":
        if any(not p.requires_grad for p in student.parameters()):
            raise UserError("features=student: under student.lora the student is its teacher at first; leave it off")
        return copy.deepcopy(student).requires_grad_(False).eval()
    if teacher is None:
        raise UserError("an adversary looks at a teacher's features: set teacher=PATH")
    if not any(True for _ in teacher.parameters()):
        raise UserError("features=teacher: a closed-form teacher has none; set features=student")
    return teacher.denoiser


def _refuse_few(rows: int) -> None:
    if rows < FEWEST:
        raise UserError(
            f"an adversary compares at least {FEWEST} samples at once, and got {rows}: raise loop.batch or loop.micro"
        )


def _shares(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """How sure the heads are: both shares at 1 for long means that the student learns nothing from them any more."""
    right = {"adversary/real_right": (real > 0).float().mean(), "adversary/fake_right": (fake < 0).float().mean()}
    return {key: value.detach() for key, value in right.items()}
