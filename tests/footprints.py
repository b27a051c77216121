"""Footprints that are worked out once: a step on shapes alone takes seconds, and tests ask for the same again."""

from __future__ import annotations

from fastgen import plan


def remember_footprints(patch):
    """From now on `plan.footprint` counts a stage of a run once."""
    known, count = {}, plan.footprint

    def footprint(stage, run):
        key = (run.config.model_dump_json(), stage.model_dump_json())
        return known[key] if key in known else known.setdefault(key, count(stage, run))

    patch.setattr(plan, "footprint", footprint)
