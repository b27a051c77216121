"""What this machine has, found by trying it and not by asking pip: the rows of `fastgen doctor`.

A package counts as there when the piece of it that fastgen uses can be imported: a torchvision that does not fit its
torch passes `import diffusers` and `pip check`, and still breaks every diffusers pipeline. Nothing here may raise, so
every trial catches every Exception and turns it into a row.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

OK, NOTE, PROBLEM = "ok", "note", "problem"


class Row(NamedTuple):
    """One thing looked at. `note`: something optional is not here; `problem`: to be mended before fastgen can work."""

    name: str
    status: str
    detail: str


# Distribution, module and the name fastgen takes from it.
CORE = (
    ("diffusers", "diffusers", "UNet2DModel"),
    ("transformers", "transformers", "CLIPTextModel"),
    ("accelerate", "accelerate", "init_empty_weights"),
    ("peft", "peft", "LoraConfig"),
    ("safetensors", "safetensors.torch", "load_file"),
    ("numpy", "numpy", "ndarray"),
    ("pillow", "PIL.Image", "open"),
    ("pydantic", "pydantic", "BaseModel"),
    ("pyyaml", "yaml", "safe_load"),
    ("typer", "typer", "Typer"),
    ("rich", "rich.console", "Console"),
)

# Extra of pyproject.toml -> its distributions and their modules.
OPTIONAL = {
    "xformers": {"xformers": "xformers.ops"},
    "fid": {"clean-fid": "cleanfid.fid", "torch-fidelity": "torch_fidelity"},
    "metrics": {"torchmetrics": "torchmetrics"},
    "3d": {
        "trimesh": "trimesh",
        "scikit-image": "skimage.measure",
        "scipy": "scipy.spatial",
        "xatlas": "xatlas",
        "fast-simplification": "fast_simplification",
    },
    "jvp": {"jvp_flash_attention": "jvp_flash_attention.jvp_attention"},
    "data": {"pyarrow": "pyarrow.parquet"},
    "log": {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"},
    "8bit": {"bitsandbytes": "bitsandbytes"},
    "bench": {"nvidia-ml-py": "pynvml"},
    "web": {"gradio": "gradio"},
}


def report() -> list[Row]:
    """Every row, in the order in which they are printed. Takes seconds: it imports everything there is."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = [Row("python", OK, f"{platform.python_version()} on {platform.platform()}"), *_torch()]
            rows += [_core(*package) for package in CORE]
            rows += [_optional(extra, *package) for extra in OPTIONAL for package in OPTIONAL[extra].items()]
            return [*rows, *_folders()]
    finally:
        logging.disable(level)


def problems(rows: Iterable[Row]) -> list[Row]:
    """The rows for which `fastgen doctor` ends with exit code 1. Notes are none: every extra may be absent."""
    return [row for row in rows if row.status == PROBLEM]


def torchvision_problem() -> str | None:
    """How torchvision will make transformers and diffusers fail, and the mend; None where it is sound or absent."""
    if _absent("torchvision"):
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        version = _version("torchvision")
        if _is_cpu_build() and "+cpu" not in version:
            return f"torchvision {version} is a CUDA build beside a CPU torch; pip uninstall torchvision"
        return (
            f"torchvision {version} does not fit torch {_version('torch')} ({_line(error)}); pip uninstall torchvision"
        )
    return None


def _absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except (ImportError, ValueError):  # half removed: a name without a spec
        return True


def _is_cpu_build() -> bool:
    import torch

    return torch.version.cuda is None and getattr(torch.version, "hip", None) is None


def _line(error: BaseException) -> str:
    """The first sentence of an error's text: some packages print pages."""
    text = str(error).strip()
    if not text or not isinstance(error, ImportError | OSError | RuntimeError):
        text = f"{type(error).__name__}: {text}"
    return text.splitlines()[0].split(". ")[0][:160]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"


def _trial(name: str, trial: Callable[[], str], otherwise: str) -> Row:
    try:
        return Row(name, OK, trial())
    except Exception as error:
        return Row(name, otherwise, _line(error))


def _core(distribution: str, module: str, name: str) -> Row:
    def trial() -> str:
        getattr(importlib.import_module(module), name)
        return _version(distribution)

    return _trial(distribution, trial, PROBLEM)


def _optional(extra: str, distribution: str, module: str) -> Row:
    """One optional package: its version, the extra that brings it, or why it does not work."""

    def trial() -> str:
        importlib.import_module(module)
        return _version(distribution)

    if _absent(module.partition(".")[0]):
        return Row(distribution, NOTE, f"not installed; pip install 'fastgen-distill[{extra}]'")
    return _trial(distribution, trial, NOTE)


def _torch() -> list[Row]:
    """The build of torch, what it runs on, and what it can do there."""
    try:
        import torch

        version = f"{torch.__version__} ({_build(torch)})"
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:
        return [Row("torch", PROBLEM, _line(error))]
    return [
        Row("torch", OK, version),
        _devices(torch),
        _trial("torchvision", _torchvision, PROBLEM),
        _trial("bfloat16", partial(_bf16, torch, device), NOTE),
        *_attention(torch, device),
    ]


def _torchvision() -> str:
    found = torchvision_problem()
    if found:
        raise RuntimeError(found)
    return "not installed, and not needed" if _absent("torchvision") else _version("torchvision")


def _build(torch: Any) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda} build"
    return f"ROCm {torch.version.hip} build" if getattr(torch.version, "hip", None) else "CPU build"


def _devices(torch: Any) -> Row:
    """The accelerators; a driver that torch cannot use is a problem when torch was built for it."""
    driver = shutil.which("nvidia-smi") is not None
    try:
        if torch.cuda.is_available():
            cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            return Row("devices", OK, ", ".join(f"{c.name} ({c.total_memory / 2**30:.0f} GiB)" for c in cards))
        if torch.backends.mps.is_available():
            return Row("devices", OK, "Apple GPU (mps)")
        if driver and torch.version.cuda:
            torch.cuda.init()
    except Exception as error:
        return Row("devices", PROBLEM, f"a CUDA build of torch, but its driver does not answer: {_line(error)}")
    if driver and _is_cpu_build():
        return Row("devices", NOTE, "CPU only, though this machine has an NVIDIA driver: torch is a CPU build")
    return Row("devices", OK, f"CPU only, {os.cpu_count()} cores")


def _bf16(torch: Any, device: Any) -> str:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RuntimeError("this GPU only emulates it: take fp16 or fp32")
    x = torch.ones(2, 2, device=device, dtype=torch.bfloat16)
    if (x @ x).float().sum().item() != 8.0:
        raise RuntimeError("a 2x2 product of ones came out wrong")
    return f"multiplied on {device.type}"


def _attention(torch: Any, device: Any) -> list[Row]:
    """Each attention back end, by one call on a tiny tensor; only torch's math kernel must work."""

    def tokens() -> Any:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return torch.ones(1, 8, 2, 64, device=device, dtype=dtype)  # [batch, tokens, heads, channels]

    def sdpa(kernel: str) -> str:
        attention = importlib.import_module("torch.nn.attention")
        with attention.sdpa_kernel(getattr(attention.SDPBackend, kernel)):
            torch.nn.functional.scaled_dot_product_attention(*[tokens().transpose(1, 2)] * 3).sum().item()
        return f"ran on {device.type}"

    def package(module: str, function: str) -> str:
        if device.type != "cuda":  # their kernels exist for CUDA alone, whatever they import on
            raise RuntimeError("needs a CUDA device")
        getattr(importlib.import_module(module), function)(*[tokens()] * 3).sum().item()
        return f"ran on {device.type}"

    rows = [_trial("attention sdpa math", partial(sdpa, "MATH"), PROBLEM)]
    for kernel in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        rows.append(_trial(f"attention sdpa {kernel.partition('_')[0].lower()}", partial(sdpa, kernel), NOTE))
    for module, function in (("xformers.ops", "memory_efficient_attention"), ("flash_attn", "flash_attn_func")):
        name = module.partition(".")[0]
        if not _absent(name):
            rows.append(_trial(f"attention {name}", partial(package, module, function), NOTE))
    return rows


def _folders() -> list[Row]:
    """Where things are written: the model cache of the Hugging Face libraries, and the folder runs go to."""

    def cache() -> str:
        folder = importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE
        return _writable(Path(folder), "set HF_HOME to another folder")

    def here() -> str:
        return _writable(Path.cwd(), "give out=FOLDER")

    return [_trial("model cache", cache, NOTE), _trial("output folder", here, NOTE)]


def _writable(folder: Path, mend: str) -> str:
    """The folder and its free space; a folder that is not there yet is tried at its nearest parent."""
    parent = next(place for place in [folder, *folder.parents] if place.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            return f"{folder}, {shutil.disk_usage(parent).free / 2**30:.1f} GiB free"
    except OSError as error:
        raise RuntimeError(f"{folder} cannot be written ({error.strerror}); {mend}") from error
