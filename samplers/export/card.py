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
    more = "more raise an error" if told.entry.guarded else "the scheduler accepts more, which were not trained"
    if told.kind == "diffusers":
        yield f"Steps: {steps}; {more}. The folder carries its scheduler."
        if told.text:
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


def _elsewhere(told: Told) -> list[str]:
    ours = f"| diffusers (replayed) | `num_inference_steps` {told.entry.steps[0]} | {told.entry.scheduler}, as above"
    rows = ["| program | steps | sampler | no guidance is |", "|---|---|---|---|", f"{ours} | `guidance_scale=1.0` |"]
    if told.entry.whole is None and told.entry.output_scale == 1:
        comfy, web = ELSEWHERE[told.entry.scheduler]
        steps = told.entry.steps[0]
        rows += [
            f"| ComfyUI (not tried here) | `steps` {steps} | `{comfy}`, scheduler `sgm_uniform` | `cfg` 1.0 |",
            f"| A1111 (not tried here) | Sampling steps {steps} | {web}, Schedule type SGM Uniform | CFG Scale 1 |",
        ]
        return [*rows, ""]
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
