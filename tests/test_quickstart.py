"""The whole promise, as its user sees it: from nothing to a one-step student that passes the gate."""

from __future__ import annotations

import json

import pytest

from fastgen.errors import RunFailed
from fastgen.quickstart import QUICK, run, summary

REPORT = {
    "teacher": {"fd": {"1": 9.1, "2": 2.2, "25": 0.484}},
    "student": {"fd": {"1": 0.8, "2": 0.6}},
    "gap_closed": {"1": 0.964, "2": 0.986},
    "gate": {"gap_closed": {"value": 0.964, "bound": 0.95, "passed": True}},
    "gate_passed": True,
    "real_floor": 1.87,
    "n": 5000,
    "extractor": {"name": "digits-classifier"},
    "latency_ms": {"teacher": {"25": {"1": 30.0}}, "student": {"1": {"1": 1.0}}},
}


def test_summary_tells_the_verdict():
    text = "\n".join(summary(REPORT))
    for part in ("25 steps 0.484", "1 step 0.8", "96.4 % of the gap", "30 x", "real against real 1.87", "gate: passed"):
        assert part in text, part


def finished(tmp_path, passed):
    """An `execute` that leaves a finished run behind, and records what it was asked."""
    asked = []

    def execute(overrides):
        asked.extend(overrides)
        (tmp_path / "report").mkdir(exist_ok=True)
        (tmp_path / "report" / "report.json").write_text(json.dumps({**REPORT, "gate_passed": passed}))
        return tmp_path

    return execute, asked


def test_failed_gate_fails_the_full_run_and_not_the_quick_one(tmp_path):
    execute, asked = finished(tmp_path, passed=False)
    with pytest.raises(RunFailed, match="did not pass the gate"):
        run(execute, tmp_path, quick=False)
    assert asked == [f"out={json.dumps(str(tmp_path))}", "stages.report.command=fastgen quickstart"]
    run(execute, tmp_path, quick=True)
    assert set(QUICK) <= set(asked)


def test_quick_overrides_fit_the_shipped_config(tmp_path):
    from fastgen.listing import find_config
    from fastgen.stages.config import load_run

    _, stages = load_run(find_config("quickstart"), [f"out={tmp_path}", *QUICK])
    assert {stage.name: stage for stage in stages}["distil"].loop.steps == 150


@pytest.mark.slow
def test_quickstart_passes_its_gate(tmp_path, monkeypatch, capsys):
    import sys

    from fastgen import cli

    monkeypatch.setattr(sys, "argv", ["fastgen", "quickstart", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert report["gate_passed"] and len(report["gate"]) == 10
    assert set(report["teacher"]["fd"]) == {"1", "2", "4", "25"} and set(report["student"]["fd"]) == {"1", "2", "4"}
    assert set(report["seconds"]) == {"teacher", "pairs", "reflow", "distil", "evaluate", "total"}
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 10_000
