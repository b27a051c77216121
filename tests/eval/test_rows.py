"""Rows of a benchmark: which may be compared, how repeated ones are brought together, and what the table says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastgen.eval.rows import NotComparable, Row, compared, markdown, speed_up, table, together

ROW = Row(
    model="student",
    role="model",
    scope="e2e",
    variant="bf16",
    batch=1,
    steps=1,
    nfe=1,
    res="512x512",
    device="card",
    dtype="bfloat16",
    attention="torch's choice",
    compile="none",
    p50_ms=20.0,
    images_per_s=50.0,
)
TEACHER = replace(ROW, model="teacher", role="vs", steps=25, nfe=25, guidance=7.5, p50_ms=500.0)


def test_speed_up_is_the_others_median_over_ones_own():
    assert speed_up(ROW, TEACHER) == 25.0
    assert speed_up(TEACHER, ROW) == 1 / 25


@pytest.mark.parametrize(
    "change",
    [
        {"scope": "net"},
        {"dtype": "float32"},
        {"attention": "xformers"},
        {"compile": "compile-full"},
        {"batch": 4},
        {"res": "1024x1024"},
        {"device": "other card"},
        {"variant": "bf16+channels_last"},
    ],
)
def test_rows_of_other_conditions_are_not_compared(change):
    (name,) = change
    with pytest.raises(NotComparable, match=name):
        speed_up(ROW, replace(TEACHER, **change))


def test_a_row_without_a_figure_is_not_compared():
    with pytest.raises(NotComparable, match="teacher was not measured: out of memory"):
        speed_up(ROW, replace(TEACHER, p50_ms=None, unavailable="out of memory"))


def test_a_row_finds_its_counterpart_by_scope_and_batch():
    others = [replace(TEACHER, batch=4, p50_ms=100.0), replace(TEACHER, scope="net", p50_ms=200.0), TEACHER]
    assert compared(ROW, others).speed_up == 25.0
    assert compared(replace(ROW, batch=4), others).speed_up == 5.0
    assert compared(replace(ROW, batch=2), others).speed_up is None


def test_among_several_step_counts_the_same_one_is_the_counterpart():
    others = [replace(TEACHER, steps=n, p50_ms=100.0 * n) for n in (1, 2)]
    assert compared(replace(ROW, steps=2), others).speed_up == 10.0
    assert compared(replace(ROW, steps=4), others).speed_up is None


def test_why_there_is_no_ratio_is_told():
    told = compared(ROW, [replace(TEACHER, dtype="float32")])
    assert told.speed_up is None and told.notes == ("not compared: dtype bfloat16 against float32",)


def test_repeats_give_the_median_of_medians_and_their_spread():
    rows = [replace(ROW, p50_ms=ms, speed_up=100 / ms, peak_alloc_mib=7.0) for ms in (20.0, 20.4, 20.1)]
    one = together(rows)
    assert (one.p50_ms, one.repeats, one.peak_alloc_mib) == (20.1, 3, 7.0)
    assert one.spread == pytest.approx(0.4 / 20.1)
    assert one.speed_up == pytest.approx(100 / 20.1) and one.notes == ()
    assert isinstance(one.steps, int) and isinstance(one.batch, int)


def test_unsteady_repeats_say_so():
    one = together([replace(ROW, p50_ms=ms) for ms in (20.0, 21.0, 20.1)])
    assert "spread by 5.0%" in one.notes[0]


def test_repeats_of_something_unavailable_stay_unavailable():
    one = together([ROW, replace(ROW, p50_ms=None, unavailable="no kernel"), ROW])
    assert one.unavailable == "no kernel" and one.p50_ms is None and one.repeats == 3


def test_a_row_survives_json():
    row = replace(ROW, notes=("a", "b"), stages_ms={"net": 1.5}, sw={"torch": "2"})
    assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_the_json_has_the_names_of_the_protocol():
    names = "scope device sw variant batch res nfe p50_ms p90_ms p99_ms mean_ms std_ms images_per_s peak_alloc_mib"
    names += " peak_reserved_mib energy_j_per_img gflop mfu repeats"
    assert set(names.split()) <= ROW.to_dict().keys()


def test_tables_show_figures_and_reasons():
    rows = [replace(TEACHER, notes=("launch bound: 30%",)), replace(ROW, p50_ms=None, unavailable="needs a CUDA GPU")]
    plain = table(rows).splitlines()
    assert plain[1].split()[:7] == ["teacher", "bf16", "e2e", "1", "25,", "w=7.5", "500"]
    assert plain[2].endswith("not measured: needs a CUDA GPU")
    assert plain[3] == "teacher bf16 e2e batch 1: launch bound: 30%"
    marked = markdown(rows).splitlines()
    assert marked[1].startswith("| --- |") and {line.count("|") for line in marked} == {14}
