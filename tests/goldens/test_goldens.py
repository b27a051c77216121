"""The golden runner: cases computed outside this project, each checked by the function named after its kind.

    FASTGEN_GOLDENS=FOLDER pytest -m golden         every FOLDER/<group>/<name>.json but index.json
    pytest tests/goldens                            our own small cases in `own/`, made by `make_own.py`, as well

`tests/goldens/<group>.py` holds one function per kind. A new case needs no new code, a new kind one function; a kind
that is in neither place nor in NOT_BUILT fails by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.goldens.case import Case

OWN = Path(__file__).parent / "own"

# Take a line out when its function is written.
NOT_BUILT = {
    "consistency": [
        "mfrae_losses",
        "ddt",
        "rae_decoder",
    ],
    "methods": ["sign_ign", "lit_attention", "dpo"],
    "prd": [
        "generator",
        "attn_self",
        "attn_cross",
        "locon",
        "triplane_query",
        "neus_alpha",
        "camera",
        "asd",
        "adan",
        "mv_unet",
        "schedule_values",
    ],
}
LEFT = sum(len(kinds) for kinds in NOT_BUILT.values())


def cases(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*.json") if path.name != "index.json")


def check_of(group: str, kind: str) -> Callable[[Case], None] | None:
    """The function of a kind, or None where there is none yet."""
    module = f"tests.goldens.{group}"
    if not (group.isidentifier() and importlib.util.find_spec(module)):
        return None
    return getattr(importlib.import_module(module), kind, None)


def run(file: Path) -> None:
    """Check one case: every tensor and every result in it must have been asked for."""
    head = json.loads(file.read_text())
    group, kind = head["group"], head["kind_of_case"]
    if kind in NOT_BUILT.get(group, ()):
        pytest.skip(f"not built yet: {group}/{kind} (one of {LEFT} kinds)")
    check = check_of(group, kind)
    if check is None:
        pytest.fail(f"{file}: unknown kind {group}/{kind}: no function '{kind}' in tests/goldens/{group}.py")
    case = Case(file)
    check(case)
    assert not case.unread(), f"{file}: never compared: {', '.join(case.unread())}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        folder = os.environ.get("FASTGEN_GOLDENS")
        files = cases(Path(folder)) if folder else []
        reason = (
            f"no cases in {folder}" if folder else "FASTGEN_GOLDENS is not set: it names the folder of golden cases"
        )
        names = [f"{file.parent.name}/{file.stem}" for file in files]
        metafunc.parametrize("golden", files or [reason], ids=names or ["none"])


@pytest.mark.golden
def test_golden(golden: Path | str) -> None:
    if isinstance(golden, str):
        (pytest.fail if os.environ.get("FASTGEN_GOLDENS") else pytest.skip)(golden)
    run(golden)


@pytest.mark.parametrize("file", cases(OWN), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_own(file: Path) -> None:
    run(file)


def test_own_cases_are_what_their_script_makes() -> None:
    from tests.goldens import make_own

    made = {(group, data["name"]): (data, tensors) for group, data, tensors in make_own.make()}
    assert {(file.parent.name, file.stem) for file in cases(OWN)} == made.keys()
    for (group, name), (data, tensors) in made.items():
        case = Case(OWN / group / f"{name}.json")
        assert case.data.keys() == data.keys() and case.tensors.keys() == tensors.keys()
        for tensor, value in tensors.items():
            case.close(case[tensor], value, tensor, atol=1e-12, rtol=1e-10)


def test_no_kind_is_both_built_and_not() -> None:
    assert not [(g, k) for g, kinds in NOT_BUILT.items() for k in kinds if check_of(g, k)]


def test_the_runner_refuses_what_it_cannot_judge(tmp_path: Path) -> None:
    """An unknown kind, a tensor nobody compares, a value that is wrong in its last digits."""
    from safetensors.torch import load_file, save_file

    (source,) = (file for file in cases(OWN) if "schedules" in file.name)
    (tmp_path / "views").mkdir()
    file = tmp_path / "views" / source.name
    data, tensors = json.loads(source.read_text()), load_file(source.with_suffix(".safetensors"))

    def write(data: dict, tensors: dict) -> None:
        file.write_text(json.dumps(data))
        save_file(tensors, file.with_suffix(".safetensors"))

    write(data, tensors)
    run(file)
    write(data | {"kind_of_case": "convrt"}, tensors)
    with pytest.raises(pytest.fail.Exception, match="unknown kind views/convrt"):
        run(file)
    write(data | {"group": "wiews"}, tensors)
    with pytest.raises(pytest.fail.Exception, match="unknown kind wiews/schedules"):
        run(file)
    write(data | {"group": "prd", "kind_of_case": "generator"}, tensors)
    with pytest.raises(pytest.skip.Exception, match="not built yet: prd/generator"):
        run(file)
    write(data | {"kind_of_case": "schedules", "extra_result": 3.0}, tensors)
    with pytest.raises(AssertionError, match="never compared: extra_result"):
        run(file)
    for name in tensors:
        write(data, tensors | {name: tensors[name] * (1 + 1e-6)})
        with pytest.raises(AssertionError):
            run(file)
