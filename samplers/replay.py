"""Which stock scheduler of diffusers runs which student: a table, and the search of a student's row in it.

A scheduler's config holds no list of times. So constructor arguments are looked for with which `num_inference_steps=n`
alone visits the times that an n-step student was trained at; where none do, the student is refused, at the start of its
training already (`refuse_unreplayable`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import VP, Path, RectifiedFlow
from fastgen.samplers import cm, scm
from fastgen.samplers.fold import NOTE, alone, constant_gap
from fastgen.schedulers import KINDS
from fastgen.student import SamplerSpec

STOCK_NAMES = {ours: theirs for theirs, ours in KINDS.items()} | {"flow": "flow_prediction"}
# A time this near a whole index is that index: times of another path come back with a rounding error.
NEAR = 1e-3
Arguments = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A stock scheduler that visits a student's times.

    scheduler     class of diffusers, made by `config`
    output_scale  what the network's last layer is multiplied by, in weight and bias
    guarded       whether a call with more steps than the student was made for raises, instead of making a bad image
    whole         the arguments of the whole table of levels, where `config` holds the first of its betas as a list
    gap           how far every step goes, of a network that is told it: what it adds to the embedding of the time is
                  then a constant, and becomes part of a bias (`Denoiser.extra`, `nets.scalar.fold`)
    """

    scheduler: str
    config: Arguments
    steps: tuple[int, ...]
    output_scale: float = 1.0
    guarded: bool = False
    whole: Arguments | None = None
    gap: float | None = None
    notes: str = ""

    @property
    def most(self) -> int | None:
        """The largest number of steps that the scheduler accepts; None: any."""
        return self.config.get("original_inference_steps")

    def make(self) -> Any:
        """The scheduler itself."""
        import diffusers

        return getattr(diffusers, self.scheduler)(**self.config)

    def code(self) -> str:
        """The same as an expression of Python, short enough for a card: betas are cut from the whole table."""
        words = {name: repr(value) for name, value in self.config.items()}
        if self.whole is not None:
            table = ", ".join(f"{name}={value!r}" for name, value in self.whole.items())
            words["trained_betas"] = f"{self.scheduler}({table}).betas[:{len(self.config['trained_betas'])}].tolist()"
        return f"{self.scheduler}({', '.join(f'{name}={value}' for name, value in words.items())})"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A student's sampling on its network's own path.

    times  {n: whole numbers, as the network is told them}
    first  the first state over unit noise
    gap    see `Replay`
    """

    path: Path
    kind: str
    scale: int
    times: dict[int, tuple[int, ...]]
    renoise: bool
    first: Literal["unit", "sigma"]
    gap: float | None

    @property
    def length(self) -> int:
        """How many entries of the table of levels are used: all runs start at the last of them."""
        return self.times[min(self.times)][0] + 1

    @property
    def shortest(self) -> bool:
        """Whether one step is all that the student can."""
        return set(self.times) == {1}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: the students, their scheduler, its constant arguments, and those to be tried.

    one_step      serves students of one step alone, for whom renoise means nothing
    zero_snr      serves tables whose last level is pure noise
    scales_input  the scheduler scales what the network is fed, which pipelines of pixel networks leave out
    """

    students: str
    scheduler: str
    path: type[Path]
    kinds: tuple[str, ...]
    renoise: bool
    first: Literal["unit", "sigma"]
    visits: str
    constants: Arguments
    candidates: Callable[[Asked], Iterator[Arguments]] = field(repr=False)
    one_step: bool = False
    zero_snr: bool = True
    guarded: bool = False
    scales_input: bool = False
    notes: str = ""

    def serves(self, asked: Asked, *, pixels: bool) -> bool:
        """Whether the row is of this kind of student, its times left aside."""
        return (
            type(asked.path) is self.path
            and asked.kind in self.kinds
            and asked.first == self.first
            and (self.renoise == asked.renoise or asked.shortest)
            and (asked.shortest or not self.one_step)
            and (self.zero_snr or not getattr(asked.path, "zero_snr", False))
            and not (self.scales_input and pixels)
        )


def _named(path: VP) -> Arguments:
    """A whole table of levels as arguments of any discrete scheduler."""
    named = {"num_train_timesteps": path.n, "beta_start": path.beta_start, "beta_end": path.beta_end}
    return named | {"beta_schedule": path.schedule, "rescale_betas_zero_snr": path.zero_snr}


def _table_of(asked: Asked) -> Arguments:
    """The levels up to the student's first, and what the network predicts."""
    path = asked.path
    assert isinstance(path, VP)
    kind = {"prediction_type": STOCK_NAMES[asked.kind]}
    if asked.length == path.n:
        return _named(path) | kind
    bar = path.table()[0][: asked.length].square()
    betas = 1 - bar / torch.cat([torch.ones(1, dtype=bar.dtype), bar[:-1]])
    return {"num_train_timesteps": asked.length, "trained_betas": betas.tolist()} | kind


def _whole_table(asked: Asked) -> Iterator[Arguments]:
    yield _table_of(asked)


def _even(asked: Asked) -> Iterator[Arguments]:
    """DDIM steps from index t to t - N // n, which is where it is evaluated next only where n divides N."""
    if all(asked.length % n == 0 for n in asked.times):
        yield _table_of(asked)


def _consistency(asked: Asked) -> Iterator[Arguments]:
    """LCM picks n of its m original times, k m - 1 .. k - 1 in steps of k = N / m; the fewest original times first, so
    that a call with more steps than that raises."""
    table = _table_of(asked)
    for m in range(max(asked.times), asked.length + 1):
        if asked.length % m == 0:
            yield table | {"original_inference_steps": m}


def _flow(asked: Asked) -> Iterator[Arguments]:
    """With N = scale + 1 levels the sigmas are scale / N (1 - i / n), the times N sigma: whole where n divides scale.

    The steps in sigma are short by the factor scale / N, which the network's last layer makes good (`output_scale`):
    each step is then Euler's, x - v / n, at the times 1 - i / n.
    """
    if asked.path == RectifiedFlow() and all(asked.scale % n == 0 for n in asked.times):
        yield {"num_train_timesteps": asked.scale + 1}


# Stable Diffusion's pipelines warn of an offset other than 1, and set it; only "leading" times are moved by it.
_OFFSET: Arguments = {"steps_offset": 1}
# So large a scaling leaves nothing of the state beside x0 in LCM's boundary condition.
_LCM: Arguments = _OFFSET | {"timestep_scaling": 1e4, "clip_sample": False}
_TRAILING: Arguments = _OFFSET | {"timestep_spacing": "trailing"}
_FIRST_ORDER: Arguments = {"solver_order": 1, "final_sigmas_type": "zero"}
# The shift by a hair: the scheduler cuts its times to whole numbers, and 499.9999999 would become 499.
_FLOW: Arguments = _OFFSET | {"use_flow_sigmas": True, "flow_shift": 1 + 1e-8, "prediction_type": "flow_prediction"}
TABLE = (
    Row(
        students="one step from any index: SIM, SiD, Diff-Instruct, one-step reflow",
        scheduler="LCMScheduler",
        path=VP,
        kinds=("eps", "v", "x0"),
        renoise=False,
        first="unit",
        one_step=True,
        visits="any one index",
        constants=_LCM | {"original_inference_steps": 1},
        candidates=_whole_table,
        guarded=True,
    ),
    Row(
        students="fresh noise between the steps: consistency models, LCM, DMD2",
        scheduler="LCMScheduler",
        path=VP,
        kinds=("eps", "v", "x0"),
        renoise=True,
        first="unit",
        visits="n of m even steps down from one index, m a divisor of that index + 1",
        constants=_LCM,
        candidates=_consistency,
        guarded=True,
    ),
    Row(
        students="own noise between the steps: reflow, consistency models by ODE",
        scheduler="DDIMScheduler",
        path=VP,
        kinds=("eps", "v", "x0"),
        renoise=False,
        first="unit",
        visits="n even steps down from one index, n a divisor of that index + 1",
        constants=_TRAILING | {"clip_sample": False, "set_alpha_to_one": True},
        candidates=_even,
    ),
    Row(
        students="own noise between uneven steps",
        scheduler="DPMSolverMultistepScheduler",
        path=VP,
        kinds=("eps", "v", "x0"),
        renoise=False,
        first="unit",
        zero_snr=False,
        visits="n steps down from one index, rounded",
        constants=_TRAILING | _FIRST_ORDER,
        candidates=_whole_table,
    ),
    Row(
        students="first state sigma times noise: one-step students published as denoisers of sigma z",
        scheduler="EulerDiscreteScheduler",
        path=VP,
        kinds=("eps", "v"),
        renoise=False,
        first="sigma",
        zero_snr=False,
        visits="n steps down from one index, rounded",
        constants=_TRAILING,
        candidates=_whole_table,
        scales_input=True,
    ),
    Row(
        students="a velocity network on rectified-flow times",
        scheduler="DPMSolverMultistepScheduler",
        path=RectifiedFlow,
        kinds=("flow",),
        renoise=False,
        first="unit",
        visits="1 - i / n, n a divisor of the network's time scale",
        constants=_FIRST_ORDER | _FLOW,
        candidates=_flow,
        notes="the network's last layer is scaled to make good the scheduler's short steps",
    ),
)


def pipeline_of(denoiser: Denoiser, *, told: bool = False) -> str | None:
    """The stock pipeline of a network ("pixels": DDIM's, DDPM's or that of consistency models, by the scheduler), None
    where there is none: only the last passes a label to a U-Net, or scales its input as EDM's needs.

    told: the network is given its guidance weight. LCM's own pipeline has such a student's weight (8.5) and number of
    steps (4) for its defaults; of XL there is only the usual one, which has not.
    """
    if denoiser.family == "stable_diffusion":
        usual = "LatentConsistencyModelPipeline" if told else "StableDiffusionPipeline"
        return "StableDiffusionXLPipeline" if denoiser.xl else usual
    if denoiser.family == "sana":
        return scm.PIPELINE
    plain = denoiser.family == "unet" and denoiser.num_classes is None and not denoiser.log_time
    return "pixels" if plain or cm.plays(denoiser) else None


def refuse_unreplayable(denoiser: Denoiser, spec: SamplerSpec) -> None:
    """At the start of a training run: a UserError for a student that a stock pipeline could run, but never at its
    times. Networks without a stock pipeline run in fastgen alone and are let through. A network that is told how far it
    steps needs a folder for each number of steps."""
    if pipeline_of(denoiser) is not None:
        for n in sorted(spec.times) if spec.two_time else [None]:
            replay(denoiser, alone(spec, n))


def replay(denoiser: Denoiser, spec: SamplerSpec) -> Replay:
    """The stock scheduler that samples this network as `few_step.sample` does; a UserError says why there is none."""
    pipeline = pipeline_of(denoiser)
    if pipeline is None:
        raise UserError(f"no stock pipeline runs this {denoiser.family} network; use it with `fastgen generate`")
    if pipeline == scm.PIPELINE:
        scm.refuse_other(denoiser, spec)
        return Replay(scheduler="SCMScheduler", config=dict(scm.CONFIG), steps=tuple(sorted(spec.times)))
    if cm.plays(denoiser):
        arguments, steps = cm.config(denoiser, spec), tuple(sorted(spec.times))
        return Replay(scheduler=cm.SCHEDULER, config=arguments, steps=steps, guarded=True, notes=cm.NOTE)
    asked = ask(denoiser, spec)
    rows = [row for row in TABLE if row.serves(asked, pixels=pipeline == "pixels")]
    for row in rows:
        for arguments in row.candidates(asked):
            found = _entry(row, arguments, asked)
            if all(visited(found, n) == times for n, times in asked.times.items()):
                return found
    raise UserError(f"sampler: no stock scheduler runs {_words(asked)}{_near(rows)}")


def _entry(row: Row, arguments: Arguments, asked: Asked) -> Replay:
    scale = (asked.scale + 1) / asked.scale if isinstance(asked.path, RectifiedFlow) else 1.0
    return Replay(
        scheduler=row.scheduler,
        config=row.constants | arguments,
        steps=tuple(sorted(asked.times)),
        output_scale=scale,
        guarded=row.guarded,
        whole=_named(asked.path) if "trained_betas" in arguments and isinstance(asked.path, VP) else None,
        gap=asked.gap,
        notes="; ".join(note for note in (row.notes, _folded(asked)) if note),
    )


def _folded(asked: Asked) -> str:
    return "" if asked.gap is None else NOTE.format(steps=min(asked.times))


def visited(entry: Replay, steps: int) -> tuple[int, ...]:
    """The times at which a stock pipeline calls the network when told `steps` and nothing else; () if it refuses."""
    scheduler = entry.make()
    try:
        scheduler.set_timesteps(steps)
    except ValueError:
        return ()
    return tuple(int(t) if float(t).is_integer() else -1 for t in scheduler.timesteps)


def ask(denoiser: Denoiser, spec: SamplerSpec) -> Asked:
    """A student's sampling as a stock scheduler would have to do it; a UserError for what none of them can."""
    gap = constant_gap(denoiser, spec) if spec.two_time else None
    scale = denoiser.time_scale
    if denoiser.log_time or scale != int(scale) or (isinstance(denoiser.path, VP) and scale != 1):
        raise UserError(f"sampler: no stock scheduler counts time as this network does (scale {scale})")
    times = {n: tuple(_told(denoiser, spec, t) for t in run) for n, run in spec.times.items()}
    if len({run[0] for run in times.values()}) > 1:
        raise UserError(f"sampler: {_runs(times)} begin at different times; a stock scheduler has one first time")
    return Asked(
        path=denoiser.path,
        kind=denoiser.prediction.kind,
        scale=int(scale),
        times=times,
        renoise=spec.renoise,
        first=_first(spec),
        gap=gap,
    )


def _told(denoiser: Denoiser, spec: SamplerSpec, t: float) -> int:
    """The time argument for time t of the sampler's path: a whole number, or a UserError."""
    there = spec.path.levels(torch.tensor(t, dtype=torch.float64))
    own = denoiser.path.time(*there)
    here = denoiser.path.levels(own)
    if abs(float(here[0] * there[1] - here[1] * there[0])) > 1e-6 * float(torch.hypot(*there) * torch.hypot(*here)):
        raise UserError(
            f"sampler: time {t:g} lies beyond the network's last noise level; start at {float(own):g} of it"
        )
    told = float(denoiser.time_scale * own)
    if abs(told - round(told)) > NEAR:
        raise UserError(
            f"sampler: time {t:g} is {told:.4g} to the network; stock schedulers visit whole numbers, {round(told)} say"
        )
    return round(told)


def _first(spec: SamplerSpec) -> Literal["unit", "sigma"]:
    """What the first state is on a path of the network's own, whose norm of levels is 1 there."""
    steps = min(spec.times)
    alpha, sigma = spec.path.levels(torch.tensor(spec.times[steps][0], dtype=torch.float64))
    pure = float(alpha) <= 1e-6 * float(sigma)
    return "unit" if spec.init == "unit" or pure else "sigma"


def _runs(times: dict[int, tuple[int, ...]]) -> str:
    return " · ".join(str(list(times[n])) for n in sorted(times))


def _words(asked: Asked) -> str:
    noise = "fresh noise" if asked.renoise else "the network's own noise"
    path = type(asked.path).__name__
    return f"a {asked.kind} network on {path} at {_runs(asked.times)} with {noise} between steps"


def _near(rows: list[Row]) -> str:
    if not rows:
        return "; it runs in fastgen alone"
    return "; nearest: " + " or ".join(f"{row.scheduler} visits {row.visits}" for row in rows)
