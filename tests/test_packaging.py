"""The wheel holds the tree; a module has one name however it is imported; nothing optional is needed to import it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastgen

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("fastgen", *fastgen.ROOT_FOLDERS)
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft"}
# Everything that an extra brings, and torchvision, which comes with some of them.
OPTIONAL = ["torchvision", "xformers", "cleanfid", "torch_fidelity", "torchmetrics", "trimesh", "skimage", "scipy"]
OPTIONAL += ["xatlas", "pyarrow", "tensorboard", "wandb", "trackio", "pynvml", "gradio", "bitsandbytes", "flash_attn"]
OPTIONAL += ["jvp_flash_attention"]


def installed_name(path: Path) -> str:
    """Where a file of the checkout lies in the wheel."""
    relative = path.relative_to(ROOT).as_posix()
    return relative if relative.startswith("fastgen/") else f"fastgen/{relative}"


def tree() -> set[str]:
    """Every file of the package, as the wheel should hold it."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    return {installed_name(p) for p in files if "__pycache__" not in p.parts and not p.name.startswith(".")}


def modules() -> list[str]:
    names = sorted(name.removesuffix(".py").removesuffix("/__init__") for name in tree() if name.endswith(".py"))
    return [name.replace("/", ".") for name in names]


def python(code: str, *, cwd: Path, path: Path | None = None, argv: tuple[str, ...] = ()) -> str:
    """Standard output of a fresh interpreter; only `path` is put before the installed packages."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build inside the checkout leaves a build/ whose stale files the next wheel would hold."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory) -> Path:
    """A folder of packages into which pip put the wheel."""
    folder = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


def test_the_list_of_packages_is_the_tree():
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(
        {name.rpartition("/")[0].replace("/", ".") for name in tree() if ".py" in name[-3:]}
    )
    assert sorted(listed) == sorted(
        name[: -len("/__init__.py")].replace("/", ".") for name in tree() if "__init__" in name
    )


def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = f"fastgen_distill-{fastgen.__version__}.dist-info"
    assert {name for name in names if not name.startswith(f"{metadata}/")} == tree()
    assert {f"{metadata}/licenses/LICENSE", f"{metadata}/entry_points.txt"} <= names
    assert "fastgen/py.typed" in names and "fastgen/data/digits.npz" in names


def test_the_wheel_works_from_another_folder(target, tmp_path):
    code = """
import importlib, importlib.resources, json, sys
names = ["fastgen", *(f"fastgen.{n}" for n in ("trainers", "trainers.engine", "samplers", "eval", "configs", "errors"))]
files = [importlib.import_module(name).__file__ for name in names]
found, todo = [], [(importlib.resources.files("fastgen.configs"), "")]
while todo:
    folder, prefix = todo.pop()
    for entry in folder.iterdir():
        if entry.is_dir():
            todo.append((entry, f"{prefix}{entry.name}/"))
        elif entry.name.endswith(".yaml") and entry.read_text():
            found.append(f"fastgen/configs/{prefix}{entry.name}")
print(json.dumps([files, found, [n for n in ("trainers", "samplers", "eval", "configs") if n in sys.modules]]))
"""
    files, configs, top = json.loads(python(code, cwd=tmp_path, path=target))
    assert all(Path(file).is_relative_to(target) for file in files), files
    assert sorted(configs) == sorted(name for name in tree() if name.endswith(".yaml"))
    assert top == []


def test_the_checkout_works_without_an_install_and_adds_four_names_only(tmp_path):
    code = """
import importlib, json, sys
files = [importlib.import_module(f"fastgen.{name}").__file__ for name in ("trainers", "samplers", "eval", "configs")]
strangers = []
for name in ("tests", "docs", "benchmarks", "build", "trainers.nothing"):
    try:
        importlib.import_module(f"fastgen.{name}")
    except ModuleNotFoundError:
        strangers.append(name)
print(json.dumps([files, strangers]))
"""
    files, strangers = json.loads(python(code, cwd=tmp_path, path=ROOT))
    assert files == [str(ROOT / folder / "__init__.py") for folder in ("trainers", "samplers", "eval", "configs")]
    assert strangers == ["tests", "docs", "benchmarks", "build", "trainers.nothing"]


def test_every_module_imports_without_the_optional_packages_and_under_one_name(tmp_path):
    """None in sys.modules makes both `import x` and `find_spec(x)` say that x is not installed."""
    code = """
import importlib, json, sys
names, absent = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sys.modules.update(dict.fromkeys(absent))
broken = {}
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        broken[name] = repr(error)
print(json.dumps([broken, [n for n in ("trainers", "samplers", "eval", "configs", "tests") if n in sys.modules]]))
"""
    names = [name for name in modules() if not name.endswith("__main__")]
    assert len(names) > 10
    broken, top = json.loads(python(code, cwd=tmp_path, path=ROOT, argv=(json.dumps(names), json.dumps(OPTIONAL))))
    assert broken == {}
    assert top == []


def test_importing_fastgen_loads_no_library(tmp_path):
    code = "import json, sys, fastgen; dir(fastgen); fastgen.__version__; print(json.dumps(list(sys.modules)))"
    assert HEAVY.isdisjoint(json.loads(python(code, cwd=tmp_path, path=ROOT)))


@pytest.mark.parametrize("words", ["--help", "list methods", "list teachers", "list samplers", "list configs"])
def test_help_and_list_load_no_library(words, tmp_path):
    code = """
import json, sys
from fastgen.cli import main
sys.argv = ["fastgen", *sys.argv[1:]]
code = 0
try:
    code = main()
except SystemExit as end:
    code = end.code
print()
print(json.dumps([code, list(sys.modules)]))
"""
    code, loaded = json.loads(python(code, cwd=tmp_path, path=ROOT, argv=tuple(words.split())).splitlines()[-1])
    assert code in (0, None)
    assert HEAVY.isdisjoint(loaded)


def test_the_lazy_names_are_those_of_the_api():
    from fastgen import api

    assert [fastgen.load, fastgen.load_student, fastgen.load_teacher] == [api.load, api.load_student, api.load_teacher]


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'lode'"):
        fastgen.lode  # noqa: B018
    assert {"load", "load_student", "load_teacher"} <= set(dir(fastgen))


def requirements(texts: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in texts}


def test_torchvision_and_what_needs_it_stay_out_of_the_safe_extras():
    extras = PROJECT["project"]["optional-dependencies"]
    safe = requirements([*PROJECT["project"]["dependencies"], *(t for e in extras if e != "fid" for t in extras[e])])
    assert {"torchvision", "clean-fid", "torch-fidelity", "hpsv2"}.isdisjoint(safe)
    parts = {"metrics", "3d", "data", "log", "bench", "web"}
    assert requirements(extras["all"])["fastgen-distill"].extras == parts
    assert requirements(extras["all-cuda"])["fastgen-distill"].extras == {"all", "xformers", "fid", "8bit"}


def test_the_pins_meet_every_lower_bound_of_what_the_tests_install():
    lines = [line for line in (ROOT / "constraints-cpu.txt").read_text().splitlines() if not line.startswith("#")]
    pins = requirements(lines)
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = requirements(
        [*PROJECT["project"]["dependencies"], *(t for e in ("dev", "metrics", "data", "3d") for t in extras[e])]
    )
    for name, need in wanted.items():
        if need.marker is not None or name == "setuptools":
            continue
        assert name in pins, f"{name} has no pin"
        version = str(pins[name].specifier).removeprefix("==")
        assert "+" not in version, f"{name}: a local version is offered by no index"
        assert need.specifier.contains(version), f"{name}: {need.specifier} refuses the pin {version}"
