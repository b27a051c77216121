"""The page is whole, tells the numbers it was given, loads nothing from anywhere, and survives what is missing."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import torch

from fastgen.eval.charts import bars, curve, lines, short
from fastgen.eval.report import render, write_report
from fastgen.images import grid_png

VOID = {"meta", "br", "img", "circle", "line", "rect", "polyline", "link", "input"}
REPORT = {
    "data": "digits/train",
    "n": 5000,
    "n_ref": 1400,
    "seed": 0,
    "teacher": {"fd": {"1": 9.1, "2": 2.24, "4": 0.615, "25": 0.484}},
    "student": {"fd": {"1": 0.861, "2": 0.636, "4": 0.571}},
    "gap_closed": {"1": 0.9563, "2": 0.98, "4": 0.99},
    "gate": {
        "gap_closed": {"value": 0.9563, "bound": 0.95, "passed": True},
        "class_shares_null": {"value": 0.0412, "bound": 0.03, "passed": False},
    },
    "gate_passed": False,
    "real_floor": 1.87,
    "latency_ms": {"teacher": {"25": {"1": 28.8, "64": 203.0}}, "student": {"1": {"1": 0.94, "64": 8.4}}},
    "seconds": {"teacher": 70.0, "total": 200.5},
    "extractor": {"name": "digits-classifier", "sha256": "92908ccf"},
    "hardware": {"cpu": "some <b>CPU</b>", "gpu": None},
    "command": "fastgen quickstart",
}
CURVES = {"distil": [{"step": s, "loss/student": 1.0 / s, "teacher_gap": 0.1} for s in range(1, 9)]}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def grids():
    return {name: grid_png(torch.zeros(4, 1, 8, 8)) for name in ("teacher@25", "teacher@1", "student@1")}


def test_page_is_well_formed_and_loads_nothing(grids):
    text = render(REPORT, grids=grids, curves=CURVES)
    page = Page(text)
    assert not page.open
    sources = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg")


def test_page_tells_the_numbers(grids):
    page = Page(render(REPORT, grids=grids, curves=CURVES))
    told = (
        "95.6 %",
        "31 ×",
        "0.861",
        "0.484",
        "9.10",
        "1.87",
        "0.0412",
        "28.8 ms",
        "203 ms",
        "digits-classifier",
        "5000",
    )
    for number in told:
        assert number in page.text, number
    assert page.text.count("✓") == 1 and page.text.count("✗") == 1
    assert "not passed" in page.text


def test_strings_are_escaped():
    hostile = {**REPORT, "data": "<script>alert(1)</script>", "command": "<img src=x>"}
    text = render(hostile, grids={}, curves={"<i>": CURVES["distil"]})
    assert "<script>" not in text and "<img src=x>" not in text and "<b>CPU" not in text and "<i>" not in text


def test_missing_parts_leave_their_sections_out():
    page = Page(render({}, grids={}, curves={}))
    assert not page.open
    assert "not measured" in page.text and "n/a" in page.text
    for section in ("Latency", "The gate", "Distance", "Training"):
        assert section not in page.text


def test_nan_and_none_are_said_not_drawn():
    broken = {**REPORT, "student": {"fd": {"1": float("nan"), "2": None}}, "gap_closed": {"1": float("nan")}}
    curves = {"distil": [{"step": s, "loss/student": None if s % 2 else 0.5} for s in range(9)]}
    text = render(broken, grids={}, curves=curves)
    assert "nan" not in Page(text).text.lower() and 'points="nan' not in text
    assert "n/a" in text


def test_files_are_written(tmp_path, grids):
    write_report(tmp_path, REPORT, grids, CURVES)
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_numbers_have_three_figures():
    cases = {0.0: "0", 0.48412: "0.484", 9.1: "9.10", 28.83: "28.8", 203.2: "203", 4321.0: "4,321", 2e-5: "2.00e-05"}
    assert {value: short(value) for value in cases} == cases
    assert short(None) == short(float("inf")) == "n/a"


def test_charts_of_nothing_are_nothing():
    assert lines({"teacher": []}, label="", x_label="") == ""
    assert curve([(1, 2.0)], label="") == "" and bars([], label="", unit="") == ""


def test_points_lie_where_their_values_say():
    chart = lines({"teacher": [(1, 100.0), (10, 10.0), (100, 1.0)]}, label="", x_label="", ticks=(1, 10, 100))
    points = [tuple(map(float, p.split(","))) for p in chart.split('points="')[1].split('"')[0].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y0 < y2, "larger values stand higher"
