"""`fastgen doctor` names what is wrong and never falls over it."""

from __future__ import annotations

import errno
import importlib
import sys
import tempfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastgen import doctor
from tests.test_packaging import PROJECT


def package(folder: Path, name: str, version: str, source: str) -> None:
    """An installed package of our own making."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install packages for one test; they and what they leave in sys.modules go with it."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def install(name: str, version: str, source: str = "") -> None:
        package(tmp_path, name, version, source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        names.append(name)

    yield install
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def few(monkeypatch):
    """No core or optional packages: a report of the machine alone, in milliseconds."""
    monkeypatch.setattr(doctor, "CORE", ())
    monkeypatch.setattr(doctor, "OPTIONAL", {})


def rows() -> dict[str, doctor.Row]:
    found = doctor.report()
    assert len({row.name for row in found}) == len(found)
    assert {row.status for row in found} <= {doctor.OK, doctor.NOTE, doctor.PROBLEM}
    assert all(row.detail and "\n" not in row.detail for row in found)
    return {row.name: row for row in found}


@pytest.mark.slow
def test_a_sound_machine_has_no_problem():
    found = rows()
    assert doctor.problems(found.values()) == []
    assert {"python", "torch", "devices", "torchvision", "bfloat16", "attention sdpa math", "diffusers"} <= set(found)


def test_the_machine_alone_has_no_problem(few):
    found = rows()
    assert doctor.problems(found.values()) == []
    assert found["attention sdpa math"].status == doctor.OK


def test_every_dependency_and_every_extra_is_looked_at():
    project = PROJECT["project"]
    core = {Requirement(text).name for text in project["dependencies"]}
    assert {"torch", *(name for name, _, _ in doctor.CORE)} == core
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in ("dev", "all", "all-cuda")}
    assert set(doctor.OPTIONAL) == set(extras)
    wanted = {Requirement(text).name for texts in extras.values() for text in texts}
    assert {name for packages in doctor.OPTIONAL.values() for name in packages} == wanted
    for extra, packages in doctor.OPTIONAL.items():
        assert set(packages) <= {Requirement(text).name for text in extras[extra]}


def test_a_cuda_torchvision_beside_a_cpu_torch_is_named_with_its_mend(installed, few, monkeypatch):
    monkeypatch.setattr(doctor, "_is_cpu_build", lambda: True)
    installed("torchvision", "0.28.0", "raise RuntimeError('operator torchvision::nms does not exist')")
    text = "torchvision 0.28.0 is a CUDA build beside a CPU torch; pip uninstall torchvision"
    assert doctor.torchvision_problem() == text
    assert rows()["torchvision"] == doctor.Row("torchvision", doctor.PROBLEM, text)


@pytest.mark.parametrize(("version", "cpu"), [("0.29.2", False), ("0.27.0+cpu", True)])
def test_another_torchvision_that_does_not_fit_is_told_with_its_error(version, cpu, installed, monkeypatch):
    monkeypatch.setattr(doctor, "_is_cpu_build", lambda: cpu)
    installed("torchvision", version, "raise ImportError('undefined symbol: _ZN5torch')")
    problem = doctor.torchvision_problem()
    assert problem is not None and problem.startswith(f"torchvision {version} does not fit torch ")
    assert problem.endswith("(undefined symbol: _ZN5torch); pip uninstall torchvision")


def test_a_torchvision_that_works_is_no_problem(installed, few):
    installed("torchvision", "0.28.0")
    assert doctor.torchvision_problem() is None
    assert rows()["torchvision"] == doctor.Row("torchvision", doctor.OK, "0.28.0")


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        ("raise RuntimeError('first line\\nsecond line')", "first line"),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("import ctypes; ctypes.CDLL('libnowhere.so.1')", "libnowhere.so.1: cannot open shared object file"),
        ("raise AssertionError", "AssertionError: "),
        ("", "module 'broken_one' has no attribute 'Thing'"),
    ],
)
def test_a_broken_package_is_a_row(source, detail, installed, few, monkeypatch):
    installed("broken_one", "1.0", source)
    monkeypatch.setattr(doctor, "CORE", (("broken-one", "broken_one", "Thing"),))
    row = rows()["broken-one"]
    assert row.status == doctor.PROBLEM
    assert detail in row.detail
    assert doctor.problems([row]) == [row]


def test_an_optional_package_is_a_version_a_reason_or_the_extra_that_brings_it(installed, few, monkeypatch):
    installed("broken_two", "1.0", "raise OSError('no driver')")
    installed("whole_two", "2.5")
    monkeypatch.setattr(
        doctor, "OPTIONAL", {"more": {"whole_two": "whole_two", "broken_two": "broken_two", "no-two": "no_two.x"}}
    )
    found = rows()
    assert found["whole_two"] == doctor.Row("whole_two", doctor.OK, "2.5")
    assert found["broken_two"] == doctor.Row("broken_two", doctor.NOTE, "no driver")
    absent = doctor.Row("no-two", doctor.NOTE, "not installed; pip install 'fastgen-distill[more]'")
    assert found["no-two"] == absent
    assert doctor.problems(found.values()) == []


def test_without_torch_there_is_still_a_report(few, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = rows()
    assert found["torch"].status == doctor.PROBLEM
    assert "output folder" in found


def test_a_folder_that_cannot_be_written_is_told_with_a_mend(few, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    row = rows()["output folder"]
    assert row.status == doctor.NOTE
    assert row.detail == f"{Path.cwd()} cannot be written (Read-only file system); give out=FOLDER"


@pytest.mark.cuda
def test_on_a_gpu_the_devices_row_names_it(few):
    found = rows()
    assert "GiB" in found["devices"].detail and found["devices"].status == doctor.OK
    assert found["attention sdpa flash"].detail == "ran on cuda"
