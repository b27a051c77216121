from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen import noise
from fastgen.data.solids import solids
from fastgen.errors import UserError
from fastgen.eval.solid_models import FAR, LATENTS, OFF, ONE, STRUCTURES, TWO, UNDISTILLED, Models, Row, Tally, compare
from fastgen.eval.solid_models import figures as figures_of
from fastgen.eval.solids import Judge, Verdict
from fastgen.samplers import flow_euler
from fastgen.samplers.flow_euler import FlowEuler
from fastgen.teachers.trellis.folder import FLOWS, STRUCTURE_DECODER, TrellisFolder
from tests import solid_worlds

WANTED = solids(torch.arange(1000, 1003), seed=0)
TEACHERS = {row.name: {"chamfer": float(row.steps)} for row in (FAR, UNDISTILLED)}


@pytest.fixture(scope="module")
def folder(text_folder, tmp_path_factory) -> TrellisFolder:
    return TrellisFolder.read(solid_worlds.write(text_folder, tmp_path_factory.mktemp("solids") / "world"))


def changed(source: Path, target: Path, role: str) -> TrellisFolder:
    """A copy with other weights in one role."""
    shutil.copytree(source, target)
    file = TrellisFolder.read(target).files(role)[1]
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    return TrellisFolder.read(target)


def judged(models: Models, wanted=WANTED, first=1000, rows=()) -> Tally:
    return compare(models, wanted, first=first, seed=3, judge=Judge(points=200, marks=50), rows=rows, keep=(0,))


def test_a_student_that_is_its_teacher_is_the_teacher_at_one_step(folder):
    models = Models(folder, folder, cfg_strength=0.0)
    found = figures_of(judged(models), TEACHERS)
    for measure in (OFF, STRUCTURES, LATENTS):
        told = found["paired"][measure]
        assert told[FAR.name] == {"value": 0, "gap_closed": 1}
        assert told[ONE.name] == told[UNDISTILLED.name] and told[ONE.name]["gap_closed"] == 0
        assert told[ONE.name]["value"] > 0


def test_another_student_is_seen_in_the_part_that_differs(folder, tmp_path):
    other = changed(folder.path, tmp_path / "other", FLOWS["latent"])
    same, off = (
        figures_of(judged(Models(folder, student, cfg_strength=0.0)), TEACHERS)["paired"] for student in (folder, other)
    )
    assert same[OFF] == off[OFF] and same[STRUCTURES] == off[STRUCTURES]
    assert off[LATENTS][UNDISTILLED.name] == same[LATENTS][UNDISTILLED.name]
    assert off[LATENTS][ONE.name]["value"] > 1.1 * same[LATENTS][ONE.name]["value"]


def test_a_sample_is_a_function_of_its_row(folder):
    models = Models(folder, folder)
    rows = torch.arange(1000, 1003)
    cond = models.conditions([solid.text for solid in WANTED])
    few = models.conditions([WANTED[2].text])
    for row in (UNDISTILLED, TWO[1]):
        whole, alone = (models.structures(row, *told, seed=3) for told in ((cond, rows), (few, rows[2:3])))
        torch.testing.assert_close(alone[0], whole[2], rtol=1e-4, atol=1e-5)
        filled = models.filled(whole)
        latents, one = (
            models.latents(row, *told, seed=3) for told in ((filled, cond, rows), (filled[2:3], few, rows[2:3]))
        )
        torch.testing.assert_close(one.feats, latents[2].feats, rtol=1e-4, atol=1e-5)


def test_rows_have_noises_of_their_own(folder):
    models = Models(folder, folder)
    cond, rows = models.conditions(["a large box"] * 2), torch.tensor([5, 6])
    for row in (UNDISTILLED, TWO[1]):
        made = models.structures(row, cond, rows, seed=3)
        assert (made[0] - made[1]).abs().max() > 0.1
        one = models.filled(made)[:1].expand(2, -1, -1, -1)
        first, second = models.latents(row, one, cond, rows, seed=3).parts()
        assert (first - second).abs().max() > 0.1
    again = models.structures(UNDISTILLED, cond, rows, seed=4)
    assert (again - models.structures(UNDISTILLED, cond, rows, seed=3)).abs().max() > 0.1


def test_rows_are_sampled_as_they_say(folder):
    models = Models(folder, folder, cfg_strength=2.0)
    assert models.settings(FAR, "structure") == FlowEuler(steps=25, rescale_t=3.0, cfg_strength=2.0)
    assert models.settings(TWO[1], "latent") == FlowEuler(steps=2, rescale_t=3.0)
    own = Models(folder, folder).settings(Row("teacher", 2), "latent")
    assert (own.steps, own.cfg_strength, own.cfg_interval) == (2, 7.5, (0.5, 0.95))
    assert [row.name for row in TWO] == [
        "student@2 euler r=3",
        "student@2 renoise r=3",
    ]
    cond, rows = models.conditions(["a small box"]), torch.tensor([5])
    made = {row: models.structures(row, cond, rows, seed=0) for row in (FAR, ONE, *TWO)}
    assert len({float(latents.sum()) for latents in made.values()}) == len(made)
    z = noise.normal(0, "solid/structure", rows, models.flows["student", "structure"].shape)
    by_hand = flow_euler.sample(models.flows["student", "structure"], z, FlowEuler(steps=1), cond)
    assert torch.equal(made[ONE], by_hand)


def test_empty_structures_count_as_failures_and_are_no_latents_to_compare(folder):
    models = Models(folder, folder)
    plain = models.filled
    models.filled = lambda latents: plain(latents) & (torch.arange(len(latents)) != 1)[:, None, None, None]
    tally = judged(models, rows=(UNDISTILLED,))
    verdicts = tally.verdicts[UNDISTILLED.name]
    assert verdicts[1] == Verdict((WANTED[1].kind, WANTED[1].size), 1.0, None)
    assert all(verdict.looks is not None for verdict in (verdicts[0], *verdicts[2:]))
    assert len(tally.paired[LATENTS][ONE.name]) == 2 and len(tally.paired[OFF][ONE.name]) == 3
    assert list(tally.kept[UNDISTILLED.name]) == [0]


def test_gaps_are_shares_of_the_teachers_own():
    tally = Tally(
        verdicts={ONE.name: [Verdict(("box", "small"), 0.2, None)]},
        paired={
            OFF: {FAR.name: [0.0, 0.0], UNDISTILLED.name: [0.5, 0.7], ONE.name: [0.1, 0.2]},
            LATENTS: {FAR.name: [0.0], UNDISTILLED.name: [4.0], ONE.name: [1.0]},
        },
    )
    known = {FAR.name: {"chamfer": 0.1}, UNDISTILLED.name: {"chamfer": 0.3}, "floor": {"chamfer": 0.05}}
    found = figures_of(tally, known)
    assert found["paired"][OFF][ONE.name] == {"value": pytest.approx(0.15), "gap_closed": pytest.approx(0.75)}
    assert found["paired"][LATENTS][ONE.name] == {"value": 1.0, "gap_closed": 0.5}
    assert found["unpaired"][ONE.name]["gap_closed"] == pytest.approx(0.5)
    assert found["unpaired"]["floor"]["gap_closed"] == pytest.approx(1.25)
    assert found["unpaired"][UNDISTILLED.name]["gap_closed"] == 0 and "gap_closed" not in known[FAR.name]


def test_strangers_are_refused(folder, image_folder, tmp_path):
    with pytest.raises(UserError, match="told by texts"):
        Models(folder, TrellisFolder.read(image_folder))
    with pytest.raises(UserError, match="normalised otherwise"):
        Models(folder, replace(folder, mean=(0.5, *folder.mean[1:])))
    other = changed(folder.path, tmp_path / "other", STRUCTURE_DECODER)
    with pytest.raises(UserError, match="sparse_structure_decoder is another"):
        Models(folder, other)
