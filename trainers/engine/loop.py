"""The training loop: it owns optimisers, precision, accumulation, averages, noise, checkpoints and ranks."""

from __future__ import annotations

import contextlib
import functools
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor

from fastgen.config import Model
from fastgen.errors import RunFailed, Stopped, UserError, suggestion
from fastgen.trainers.engine import averages
from fastgen.trainers.engine.averages import AverageConfig, Follower
from fastgen.trainers.engine.checkpoint import Checkpoints, PartlyFrozen, frozen_names
from fastgen.trainers.engine.logs import Log
from fastgen.trainers.engine.method import Batch, Method, Turn, parts_of
from fastgen.trainers.engine.monitors import UpdateMonitor
from fastgen.trainers.engine.optim import (
    ClipConfig,
    ClipLimit,
    OptimConfig,
    Precision,
    ScheduleConfig,
    make_optimizer,
)
from fastgen.trainers.engine.optim import check as check_optim
from fastgen.trainers.engine.parallel import Ranks

FIRST_LOOK = 2  # rows that a method is shown before the first step
REPLACED = 1e5  # in place of an infinite gradient: SiD's (2404.04057), times the sign


class LoopConfig(Model):
    """How a method is trained. Budgets are steps and samples; `batch` is what one optimiser step sees on all ranks."""

    steps: int = Field(default=1000, ge=1)
    batch: int = Field(default=64, ge=1)
    micro: int | None = Field(default=None, ge=1)  # rows per forward pass; None: the whole batch
    micro_tokens: int | None = Field(default=None, ge=1)  # and of rows of unequal sizes, voxels per forward pass
    optim: OptimConfig = OptimConfig()
    networks: dict[str, OptimConfig] = Field(default_factory=dict)  # instead of `optim`, for single networks by name
    schedule: ScheduleConfig = ScheduleConfig()
    clip: Annotated[float, Field(gt=0)] | ClipConfig | None = 1.0
    replace_nan: bool = False  # in gradients: nan by 0, infinities by 1e5 and -1e5; `bad_limit` holds for these too
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: tuple[AverageConfig, ...] = ()  # evaluation averages of the student; the first one is exported
    save_every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    log_every: int = Field(default=50, ge=1)
    preview_every: int = Field(default=1000, ge=1)
    bad_limit: int = Field(default=20, ge=1)  # updates in a row that are not finite, before the run stops
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


def check(config: LoopConfig, method: type[Method]) -> None:
    """Refuse what this method or this machine cannot do; nothing needs to be loaded for it."""
    if config.precision not in method.precisions:
        known = ", ".join(method.precisions)
        raise UserError(f"loop.precision={config.precision}: {method.__module__.split('.')[-1]} is trained in {known}")
    if config.replace_nan and config.precision == "fp16":
        raise UserError("loop.replace_nan: fp16's loss scaling needs to see infinities; use precision=bf16 or fp32")
    for optim in (config.optim, *config.networks.values()):
        check_optim(optim)


class Rows(Protocol):
    """Where data come from: named tensors for global row numbers, int64 [B]."""

    def get(self, rows: Tensor) -> Mapping[str, Tensor]: ...

    def tokens(self, rows: Tensor) -> list[int]:
        """How much of a forward pass each row is; asked for where `loop.micro_tokens` limits it."""
        ...


class Loop:
    """Trains a method. State is two integers (step, drawn), weights, moments and averages: see `state`.

    Of each network the parameters are trained that ask for gradients now. The others (the base under adapters) stay
    frozen, are shared by slow copies, and are in no optimiser and no checkpoint.

    source     rows of data, or None for a method that needs none
    preview    called with the loop every `preview_every` steps; returns values to log
    interrupt  asked after every step; True saves and raises `Stopped`
    """

    def __init__(
        self,
        method: Method,
        source: Rows | None,
        config: LoopConfig,
        out: Path,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
        preview: Callable[[Loop], Mapping[str, float]] | None = None,
        interrupt: Callable[[], bool] = lambda: False,
    ) -> None:
        self.method, self.source, self.config, self.out, self.seed = method, source, config, out, seed
        self.device, self.ranks = torch.device(device), ranks or Ranks()
        self.preview, self.interrupt = preview, interrupt
        self.step = self.drawn = self.bad = self.replaced = 0
        self.trained = {n: [p for p in net.parameters() if p.requires_grad] for n, net in method.networks.items()}
        self._check()
        for module in (*method.networks.values(), *method.frozen.values()):
            module.to(self.device)
        names = method.networks
        self._frozen = {name: frozen_names(net) for name, net in names.items()}
        optim = {name: config.networks.get(name, config.optim) for name in names}
        self.optimizers = {name: make_optimizer(self.trained[name], optim[name]) for name in names}
        self.limits = {name: ClipLimit(config.clip) for name in names}
        self._base_lr = {name: opt.param_groups[0]["lr"] for name, opt in self.optimizers.items()}
        self.slow = {name: averages.slow_copy(names[a.of]) for name, a in method.averages.items()}
        self.method.slow = self.slow
        self.ema = {a.name: averages.slow_copy(names["student"]) for a in config.ema}
        self._followers = list(self._follow())
        self.precision = Precision(config.precision, self.device)
        self.checkpoints = Checkpoints(out / "checkpoints", config.keep, config.keep_every)
        self.log = Log(out, config.steps, config.trackers, shown=self.ranks.main)
        self.monitor = UpdateMonitor(self.trained)
        self._turn_of: tuple[str, ...] | None = None

    def _check(self) -> None:
        config, method = self.config, self.method
        check(config, type(method))
        micro = config.micro or config.batch
        if config.batch % (micro * self.ranks.world):
            raise UserError(
                f"loop.batch={config.batch} is not a multiple of loop.micro={micro} x {self.ranks.world} process(es)"
            )
        for name in config.networks:
            if name not in method.networks:
                raise UserError(f"loop.networks.{name}: no such network ({suggestion(name, method.networks)})")
        for name, parameters in self.trained.items():
            if not parameters:
                raise UserError(f"method {method.config.name}: every weight of '{name}' is frozen: nothing to train")
        if method.needs and self.source is None:
            raise UserError(f"method {method.config.name} reads {sorted(method.needs)} and was given no data")
        if self.source is not None:
            given = set(self.source.get(torch.arange(1)))
            if missing := method.needs - given:
                raise UserError(f"method {method.config.name} needs {sorted(missing)}, the data give {sorted(given)}")
        if config.micro_tokens is not None:
            if self.source is None:
                raise UserError(f"loop.micro_tokens: method {method.config.name} was given no data; leave it off")
            self.source.tokens(torch.arange(1))
        for name, module in method.frozen.items():
            if module.training:
                raise UserError(f"the frozen network '{name}' is in train mode; call eval() on it")

    @property
    def student(self) -> Any:
        """The network that previews, evaluation and export see: the first evaluation average, else the raw weights."""
        return next(iter(self.ema.values()), self.method.networks["student"])

    def kept(self) -> str:
        """Where the checkpoints are, for the end of a message; nothing where none was written."""
        return f"; the checkpoints are in {self.checkpoints.folder}" if self.checkpoints.folder.is_dir() else ""

    def run(self, until: int | None = None) -> None:
        """Train to the last step (or to `until`), saving as configured; raises RunFailed or Stopped."""
        end = self.config.steps if until is None else min(until, self.config.steps)
        if self.step < end:
            self._begin()
        with self.log:
            while self.step < end:
                self._train_step()
                at_end = self.step == self.config.steps
                if self.preview and (at_end or self.step % self.config.preview_every == 0):
                    self.log.write(self.step, self.preview(self))
                # Not while updates are skipped: the checkpoints that are kept would all be of weights that diverged.
                if not self.bad and (at_end or self.step % self.config.save_every == 0):
                    self.save()
                if self.ranks.any(self.interrupt()):
                    self.save()
                    raise Stopped(f"saved at step {self.step} in {self.checkpoints.folder}")

    def _begin(self) -> None:
        """Show the method its first rows, all networks in eval mode."""
        for network in self.method.networks.values():
            network.eval()
        self._turn_of = None
        rows = torch.arange(min(FIRST_LOOK, self.config.micro or self.config.batch))
        self.method.begin(self.batch_of(rows, {} if self.source is None else self.source.get(rows)))

    def _train_step(self) -> None:
        began, logs = time.perf_counter(), {}
        measured = (self.step + 1) % self.config.log_every == 0 or self.step == 0
        batches: list[Batch] = []
        for turn in self.method.turns:
            if not turn.due(self.step):
                continue
            for _ in range(turn.repeat):
                if not turn.same_batch:
                    batches = self._draw()
                elif not batches:
                    raise UserError(
                        f"the turn of {turn.trains} shares a batch, but no turn came before it in this step"
                    )
                logs.update(self._update(turn, batches, measured))
        self._average()
        self.step += 1
        logs["seconds"] = time.perf_counter() - began
        self.log.step(self.step, logs, write=measured)

    def _draw(self) -> list[Batch]:
        """The next rows of the run, as micro-batches on the device."""
        rows = self.ranks.rows(torch.arange(self.drawn, self.drawn + self.config.batch))
        self.drawn += self.config.batch
        parts = rows.split(self.config.micro or len(rows))
        if self.config.micro_tokens is not None:
            sizes = [cast(Rows, self.source).tokens(part) for part in parts]
            most = self.config.micro_tokens
            parts = [piece for part, own in zip(parts, sizes, strict=True) for piece in by_tokens(part, own, most)]
        return [self.batch_of(part, {} if self.source is None else self.source.get(part)) for part in parts]

    def batch_of(self, rows: Tensor, data: Mapping[str, Tensor]) -> Batch:
        """Rows and their data as a batch on the device."""
        data = {name: value.to(self.device, non_blocking=True) for name, value in data.items()}
        return Batch(data, rows.to(self.device), seed=self.seed, step=self.step, steps=self.config.steps)

    def _update(self, turn: Turn, batches: list[Batch], measured: bool) -> dict[str, float | Tensor]:
        """One optimiser step of the turn's networks over the micro-batches."""
        names = ",".join(turn.trains)
        self._give_turn(turn.trains)
        total, logs = torch.zeros((), device=self.device), {}
        count = sum(map(len, batches))
        for batch in batches:
            self._seed_dropout(zlib.crc32(f"{self.seed} {self.step} {int(batch.rows[0])}".encode()))
            with self.precision.autocast():
                losses = turn.loss(batch)
                for loss in parts_of(losses):
                    value, extra = loss if isinstance(loss, tuple) else (loss, {})
                    value = value * (len(batch) / count)
                    self.precision.scaler.scale(value).backward()
                    total += value.detach().float()
                    logs.update({key: v.detach() if isinstance(v, Tensor) else v for key, v in extra.items()})
        logs[f"loss/{names}"] = total
        return {**logs, **self._apply(turn.trains, total, measured)}

    def _seed_dropout(self, seed: int) -> None:
        """Dropout is the only user of torch's generators. `torch.manual_seed` would, without a CUDA device in use, note
        the whole call stack for later at every call."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _apply(self, names: tuple[str, ...], loss: Tensor, measured: bool) -> dict[str, float]:
        """Step the optimisers of these networks if the loss and every gradient are finite, else skip the update."""
        mended = [name for name in names if self._mend(name)]
        norms = {name: self._clip(name) for name in names}
        for name in names:
            self.limits[name].see(float(norms[name]))
        finite = bool(torch.isfinite(torch.stack([loss, *norms.values()])).all())
        good = not self.ranks.any(not finite)
        self.bad = 0 if good else self.bad + 1
        self.replaced = self.replaced + 1 if mended else 0
        factor, logs = self.config.schedule.factor(self.step, self.config.steps), {}
        for name in names:
            optimizer, lr = self.optimizers[name], self._base_lr[name] * factor
            for group in optimizer.param_groups:
                group["lr"] = lr
            if good:
                with self.monitor.measure(name, lr, self.step) if measured else contextlib.nullcontext():
                    self.precision.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
            logs.update({f"grad_norm/{name}": float(norms[name]), f"lr/{name}": lr, **self.monitor.values(name)})
        if self.precision.scaler.is_enabled():
            self.precision.scaler.update()
        if max(self.bad, self.replaced) >= self.config.bad_limit:
            raise RunFailed(self._not_finite(names))
        return logs

    def _mend(self, name: str) -> bool:
        """Average the network's gradients over ranks; whether some had to be replaced (`replace_nan`)."""
        gradients = [p.grad for p in self.trained[name] if p.grad is not None]
        self.ranks.mean_gradients(self.trained[name])
        if not self.config.replace_nan or bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            return False
        for gradient in gradients:
            gradient.nan_to_num_(nan=0.0, posinf=REPLACED, neginf=-REPLACED)
        return True

    def _clip(self, name: str) -> Tensor:
        """The network's gradient norm before clipping, unscaled."""
        if self.precision.scaler.is_enabled():
            self.precision.scaler.unscale_(self.optimizers[name])
        return torch.nn.utils.clip_grad_norm_(self.trained[name], self.limits[name].value, foreach=True)

    def _not_finite(self, names: tuple[str, ...]) -> str:
        saved = self.checkpoints.steps()
        kept = (
            f"the last good checkpoint is {self.checkpoints.path(saved[-1])}"
            if saved
            else "no checkpoint was saved yet"
        )
        return (
            f"step {self.step}: loss or gradient of '{', '.join(names)}' was not finite "
            f"{max(self.bad, self.replaced)} time(s) in a row; {kept}; lower loop.optim.lr or set loop.clip"
        )

    def _give_turn(self, trains: tuple[str, ...]) -> None:
        """Train mode and gradients for the networks of this turn, eval mode and none for the others."""
        if trains != self._turn_of or not all(self.method.networks[name].training for name in trains):
            for name, network in self.method.networks.items():
                network.train(name in trains)
                for parameter in self.trained[name]:
                    parameter.requires_grad_(name in trains)
            self._turn_of = trains

    def _average(self) -> None:
        for follower, decay_at in self._followers:
            follower.update(decay_at(self.step))

    def _follow(self) -> Iterator[tuple[Follower, Callable[[int], float]]]:
        """Every slow copy with the network it follows, and its decay by step."""
        networks, batch = self.method.networks, self.config.batch
        for name, average in self.method.averages.items():
            yield Follower(self.slow[name], networks[average.of]), average.decay_at
        for config in self.config.ema:
            follower = Follower(self.ema[config.name], networks["student"])
            yield follower, functools.partial(config.decay_at, batch=batch)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs: noise is a function of (seed, rows), dropout of (seed, step, rows)."""
        return {
            "step": self.step,
            "drawn": self.drawn,
            "bad": self.bad,
            "replaced": self.replaced,
            "seed": self.seed,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.precision.scaler.state_dict(),
            "norms": {name: list(limit.norms) for name, limit in self.limits.items()},
            **{kept: {name: m.state() for name, m in modules.items()} for kept, modules in self._modules().items()},
        }

    def _modules(self) -> dict[str, dict[str, PartlyFrozen]]:
        """All that a checkpoint holds the tensors of; a slow copy is frozen where what it follows is."""
        frozen, declared = self._frozen, self.method.averages
        return {
            "networks": {name: PartlyFrozen(net, frozen[name]) for name, net in self.method.networks.items()},
            "slow": {name: PartlyFrozen(slow, frozen[declared[name].of]) for name, slow in self.slow.items()},
            "ema": {name: PartlyFrozen(slow, frozen["student"]) for name, slow in self.ema.items()},
        }

    def save(self) -> None:
        """Write a checkpoint of this step, whole or not at all."""
        if self.ranks.main:
            self.checkpoints.save(self.step, self.state())

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint; False if there is none."""
        steps = self.checkpoints.steps()
        if not steps:
            return False
        state = self.checkpoints.load(steps[-1])
        self.checkpoints.prune()
        if state["seed"] != self.seed:
            raise UserError(f"{self.out}: begun with seed {state['seed']}, resumed with {self.seed}; use the same seed")
        try:
            for kept, modules in self._modules().items():
                if set(state[kept]) != set(modules):
                    raise KeyError(f"{kept} {sorted(state[kept])} became {sorted(modules)}")
                for name, module in modules.items():
                    module.load(state[kept][name])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            for name, limit in self.limits.items():
                limit.norms.extend(state["norms"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            detail = str(error).split("\n")[-1].strip()
            raise UserError(
                f"{self.out}: the checkpoint does not fit this config ({detail}); use another out="
            ) from error
        self.precision.scaler.load_state_dict(state["scaler"])
        self.step, self.drawn = state["step"], state["drawn"]
        self.bad, self.replaced = state["bad"], state["replaced"]
        self.log.rewind(self.step)
        return True


def by_tokens(rows: Tensor, sizes: Sequence[int], most: int) -> Iterator[Tensor]:
    """Rows one after the other, in each part as many as have at most so many tokens together; one that alone has more
    is a UserError."""
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if size > most:
            raise UserError(f"loop.micro_tokens={most}: row {int(rows[i])} alone has {size} voxels; raise it")
        if total + size > most:
            yield rows[first:i]
            first, total = i, 0
        total += size
    yield rows[first:]
