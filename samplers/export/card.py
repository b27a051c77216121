"""The model card of an exported student: how to run it here and elsewhere, its origin, and under which terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from fastgen.samplers.export.snippet import HERE, Snippet, placed
from fastgen.samplers.replay import Replay

# The same steps elsewhere: (ComfyUI's sampler, A1111's sampler); their scheduler is sgm_uniform / SGM Uniform.
ELSEWHERE = {
    "LCMScheduler": ("lcm", "LCM"),
    "DDIMScheduler": ("euler", "Euler"),
    "DPMSolverMultistepScheduler": ("euler", "Euler"),
    "EulerDiscreteScheduler": ("euler", "Euler"),
}
KINDS = {"diffusers": "a diffusers pipeline", "lora": "a LoRA file", "single-file": "a single file"}


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a card is made of. error: the largest difference of a pixel in [0, 1] that the replay found."""

    kind: str
    facts: dict[str, Any]
    entry: Replay
    snippet: Snippet
    dtype: str
    error: float
    text: bool
    base: str
    guidance: float | None = None  # the weight of a network that is told it


def card(told: Told) -> str:
    """README.md with the hub's head."""
    steps, method = ", ".join(str(n) for n in told.entry.steps), told.facts.get("method", "distillation")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_head(told), sort_keys=False) + "---",
            f"# A {steps}-step student by {method}, as {KINDS[told.kind]}",
            "",
            "```python",
            placed(told.snippet.text(), HERE, told.base),
            "```",
            "",
            *_paragraphs(told),
            "",
            *(_elsewhere(told) if told.text else []),
            "| fact | value |",
            "|---|---|",
            *(f"| {name} | {_cell(value)} |" for name, value in _rows(told)),
            "",
        ]
    )


def _head(told: Told) -> dict[str, Any]:
    facts = told.facts
    head: dict[str, Any] = {"library_name": "diffusers", "license": facts.get("license") or "other"}
    head |= {key: facts[key] for key in ("license_name", "license_link", "base_model") if facts.get(key)}
    head["pipeline_tag"] = "text-to-image" if told.text else "unconditional-image-generation"
    return head | {"tags": ["few-step", *(["lora"] if told.kind == "lora" else [])]}


def _paragraphs(told: Told) -> Iterator[str]:
    steps = ", ".join(str(n) for n in told.entry.steps)
    more = _beyond(told.entry)
    if told.kind == "diffusers":
        yield f"Steps: {steps}; {more}. The folder carries its scheduler."
        if told.guidance is not None:
            entrance = "guidance_embeds" if told.entry.scheduler == "SCMScheduler" else "time_cond_proj_dim"
            yield (
                f"Guidance is an input of the network (`{entrance}`): `guidance_scale` is {told.guidance:g} "
                f"above{_trained(told.facts)}. It costs nothing: the network is called once a step."
            )
            if told.entry.scheduler == "SCMScheduler":
                yield (
                    "The pipeline's own call makes two steps. For any other number it must be told "
                    "`intermediate_timesteps=None`, else it raises an error."
                )
        elif told.text:
            yield (
                "Guidance is part of the weights and off in the network (`time_cond_proj_dim`): whatever "
                "`guidance_scale` a diffusers pipeline is called with, it calls the network once a step."
            )
    else:
        yield (
            f"Steps: {steps}; {more}. This file cannot carry the scheduler, nor that guidance is off: set both as "
            "above, else the image is another one."
        )
    if told.entry.notes:
        yield f"In this export {told.entry.notes}."
    if not told.facts.get("license"):
        yield "Licence: none is known of the teacher; its terms apply."


def _beyond(entry: Replay) -> str:
    """What happens at other numbers of steps."""
    if not entry.guarded:
        return "the scheduler accepts more, which were not trained"
    most = entry.most
    others = f"others up to {most} run at times of the training, and were not tried; " if _sparse(entry) else ""
    return f"{others}more raise an error"


def _sparse(entry: Replay) -> bool:
    """Whether the scheduler accepts numbers of steps that the student's list leaves out."""
    return entry.most is not None and entry.most > max(entry.steps)


def _trained(facts: dict[str, Any]) -> str:
    """The weights that the network was told in training, as the usual ones."""
    config = facts.get("method_config")
    if isinstance(config, dict) and isinstance(config.get("guidance"), list | tuple):  # sCM
        return f", {', '.join(f'{weight:g}' for weight in config['guidance'])} were trained"
    low, high = (config.get(name) if isinstance(config, dict) else None for name in ("w_min", "w_max"))
    return "" if low is None or high is None else f", {1 + low:g} .. {1 + high:g} were trained"


def _elsewhere(told: Told) -> list[str]:
    if told.guidance is not None:
        return [
            "ComfyUI, A1111 (not tried here): no layout of theirs that we know has a place for the guidance input.",
            "",
        ]
    ours = f"| diffusers (replayed) | `num_inference_steps` {told.entry.steps[0]} | {told.entry.scheduler}, as above"
    rows = ["| program | steps | sampler | no guidance is |", "|---|---|---|---|", f"{ours} | `guidance_scale=1.0` |"]
    if told.entry.whole is None and told.entry.output_scale == 1:
        comfy, web = ELSEWHERE[told.entry.scheduler]
        steps = told.entry.steps[0]
        rows += [
            f"| ComfyUI (not tried here) | `steps` {steps} | `{comfy}`, scheduler `sgm_uniform` | `cfg` 1.0 |",
            f"| A1111 (not tried here) | Sampling steps {steps} | {web}, Schedule type SGM Uniform | CFG Scale 1 |",
        ]
        near = ["", "Beyond one step their times, evenly spaced, are only near those of the training."]
        return [*rows, *(near if _sparse(told.entry) else []), ""]
    first = "none of theirs begins at its noise level" if told.entry.whole is not None else "none of theirs is its own"
    return [*rows, f"| ComfyUI, A1111 (not tried here) | - | {first} | `cfg` 1.0, CFG Scale 1 |", ""]


def _rows(told: Told) -> Iterator[tuple[str, Any]]:
    """Plain facts, measured figures (a mapping of names to numbers) spelt out."""
    yield "precision", told.dtype
    yield "largest difference from the student's own image", f"{told.error:.1e} of 1"
    for name, value in told.facts.items():
        if isinstance(value, dict) and name != "method_config":
            yield from ((f"{name}: {key}", one) for key, one in value.items() if isinstance(one, str | int | float))
        elif isinstance(value, str | int | float):
            yield name, value


def _cell(value: Any) -> str:
    """A value that cannot break out of its row of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")
