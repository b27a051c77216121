"""From a YAML file and a command's words to typed stages: overrides, blocks, one-stage configs, --smoke."""

from __future__ import annotations

import pytest
import yaml

from fastgen.errors import UserError
from fastgen.stages.config import load_run
from tests.commands import IMAGES, LOOP, MIXTURE, NET, PAIRS

TRAIN = {"stage": "train", "method": "imitate", "teacher": "teacher", "net": NET}
ROUNDS = {
    "teacher": MIXTURE,
    "stages": [
        {"name": "imitate", **TRAIN},
        {
            "name": "rounds",
            "repeat": 3,
            "stages": [
                {"name": "pairs", "stage": "pairs", "teacher": "reflow|teacher", "pairs": PAIRS},
                {"name": "reflow", "stage": "train", "method": "reflow", "init": "reflow|imitate", "pairs": "pairs"},
            ],
        },
        {"name": "after", "stage": "train", "method": "reflow", "init": "imitate", "pairs": "pairs"},
    ],
}


def load(tmp_path, tree, *overrides, smoke=False):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_run(path, list(overrides), smoke=smoke)


def refuse(tmp_path, tree, *overrides, smoke=False):
    with pytest.raises(UserError) as caught:
        load(tmp_path, tree, *overrides, smoke=smoke)
    return str(caught.value)


def test_blocks_are_written_out_and_references_follow_the_rounds(tmp_path):
    _, stages = load(tmp_path, ROUNDS)
    assert [(stage.name, *stage.inputs().values()) for stage in stages] == [
        ("imitate", "teacher"),
        ("pairs", "teacher"),
        ("reflow", "imitate", "pairs"),
        ("pairs-2", "reflow"),
        ("reflow-2", "reflow", "pairs-2"),
        ("pairs-3", "reflow-2"),
        ("reflow-3", "reflow-2", "pairs-3"),
        ("after", "imitate", "pairs-3"),
    ]


def test_overrides_reach_named_stages_blocks_and_what_lies_in_them(tmp_path):
    run, stages = load(
        tmp_path,
        ROUNDS,
        "stages.rounds.repeat=1",
        "stages.rounds.stages.pairs.pairs.num=7",
        "stages.imitate.loop.optim.lr=1e-4",
        "seed=5",
    )
    assert [stage.name for stage in stages] == ["imitate", "pairs", "reflow", "after"]
    assert stages[1].pairs.num == 7 and run.seed == 5
    assert stages[0].loop.optim.lr == 1e-4  # YAML itself reads 1e-4 as a text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.rounds.repeat=0"], "stages.rounds: 'repeat': input should be greater than or equal to 1"),
        (["stages.rounds.repeat=often"], "stages.rounds: 'repeat': input should be a valid integer"),
        (["stages.rounds.repeats=2"], "stages.rounds: unknown key 'repeats' (did you mean 'repeat'?)"),
        (["stages.rounds.stages=[]"], "stages.rounds: 'stages': list should have at least 1 item"),
        (["stages.round.repeat=2"], "nothing here is named 'round' (did you mean 'rounds'?)"),
        (["stages.after.name=imitate"], "two stages are named 'imitate'"),
        (["stages.after.name=../x"], "'name': string should match pattern"),
        (["stages.after.stage=trian"], "stages.after: no kind of stage 'trian' (did you mean 'train'?)"),
        (["stages.after.stage="], "stages.after: no kind of stage 'None' (known: assemble, evaluate, "),
        (["stages.after.lop=1"], "stages.after: unknown key 'lop' (did you mean 'loop'?)"),
        (["stages.after.method=reflo"], "no method 'reflo' (did you mean 'reflow'?)"),
        (["stages.after.method={name: reflow, los: l2}"], "unknown key 'los' (did you mean 'loss'?)"),
        (["stages.imitate.net.family=mpl"], "no teacher family 'mpl' (did you mean 'mlp'?)"),
        (["stages.rounds.stages.pairs.pairs.solver=hein"], "'pairs.solver': input should be 'euler', 'heun'"),
        (["loop.steps=3"], "'loop' belongs to a stage: stages.NAME.loop (NAME: imitate, rounds, after)"),
        (["sed=3"], "unknown key 'sed' (did you mean 'seed'?)"),
        (["guidance_interval=[5,1]"], "'guidance_interval': [5, 1] holds no noise level"),
        (["stages=3"], "'stages': input should be a valid list"),
        (["stages=[3]"], "'stages.0': input should be a valid dictionary"),
        (["stages=[]"], "'stages': a run needs at least one stage"),
        (["seed=-1"], "'seed': input should be greater than or equal to 0"),
        (["seed=4294967296"], "'seed': input should be less than or equal to 4294967295"),
        (["threads=0"], "'threads': input should be greater than or equal to 1"),
        (["out="], "'out': input should be a valid string"),
        (["out=''"], "'out': string should have at least 1 character"),
        (["smoke=5"], "'smoke': input should be a valid tuple"),
        (["device"], "an override has the form key=value"),
    ],
)
def test_mistakes_are_named(tmp_path, overrides, expected):
    message = refuse(tmp_path, ROUNDS, *overrides)
    assert expected in message and "\n" not in message
    assert expected in refuse(tmp_path, ROUNDS, *overrides, smoke=True)


def test_a_stage_without_a_name_is_told(tmp_path):
    assert "'name' is missing" in refuse(tmp_path, {"stages": [TRAIN]})


def test_a_config_without_stages_is_one_training_stage(tmp_path):
    tree = {"teacher": MIXTURE, "seed": 3, "method": "imitate", "net": NET}
    run, (stage,) = load(tmp_path, tree, "loop.steps=5")
    assert (run.seed, stage.name, stage.stage, stage.teacher, stage.loop.steps) == (3, "train", "train", "teacher", 5)
    _, (stage,) = load(tmp_path, {**tree, "teacher": None})
    assert stage.teacher is None
    assert "unknown key 'sed' (did you mean 'seed'?)" in refuse(tmp_path, tree, "sed=1")
    assert "unknown key 'initt' (did you mean 'init'?)" in refuse(tmp_path, tree, "initt=1")
    assert "unknown key 'loop.step' (did you mean 'steps'?)" in refuse(tmp_path, tree, "loop.step=1")


SMOKE = {
    **IMAGES,
    "data": {"kind": "idx", "path": "data/mnist"},
    "smoke": ["data={kind: synthetic, size: 8, classes: 2}", "stages.teacher.net.width=16"],
}


def test_smoke_shrinks_budgets_and_makes_data_up(tmp_path):
    run, stages = load(tmp_path, SMOKE, smoke=True)
    teacher, pairs, _ = stages
    assert run.data.kind == "synthetic" and run.device == "cpu" and teacher.net.width == 16
    assert teacher.loop.steps < 10 and pairs.pairs.num < 100
    run, (teacher, *_) = load(tmp_path, SMOKE)
    assert run.data.kind == "idx" and teacher.net.width == 8 and teacher.loop.steps == LOOP["steps"]


@pytest.mark.parametrize("own", [["data.path=other"], ["data={kind: idx, path: other}"], ["data.path=other", "seed=1"]])
def test_the_users_own_data_win_over_the_made_up_ones(tmp_path, own):
    run, (teacher, *_) = load(tmp_path, SMOKE, *own, smoke=True)
    assert (run.data.kind, run.data.path) == ("idx", "other")
    assert teacher.net.width == 16  # the other smoke overrides hold


def test_overrides_win_over_smoke(tmp_path):
    run, (teacher, *_) = load(tmp_path, SMOKE, "stages.teacher.net.width=24", "device=cuda", smoke=True)
    assert teacher.net.width == 24 and run.device == "cuda"


def test_a_stand_in_is_trained_where_smoke_has_no_teacher(tmp_path):
    tree = {
        "smoke_teacher": NET,
        "stages": [{"name": "pairs", "stage": "pairs", "teacher": "teacher"}],
    }
    assert [stage.name for stage in load(tmp_path, tree, smoke=True)[1]] == ["teacher", "pairs"]
    assert [stage.name for stage in load(tmp_path, tree, "teacher=PATH", smoke=True)[1]] == ["pairs"]
    assert [stage.name for stage in load(tmp_path, tree)[1]] == ["pairs"]


def test_stages_say_which_settings_of_the_run_they_read(tmp_path):
    _, stages = load(tmp_path, IMAGES)
    asked = {"seed", "guidance", "guidance_interval", "size"}
    assert [set(stage.settings()) for stage in stages] == [{*asked, "data", "hold_out"}, {*asked, "data"}, asked]
    _, (_, _, _, evaluate) = load(
        tmp_path, {**IMAGES, "stages": [*IMAGES["stages"], {"name": "e", "stage": "evaluate", "student": "reflow"}]}
    )
    assert set(evaluate.settings()) == {"seed", "guidance", "data", "hold_out"}
