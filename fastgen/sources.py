"""Where checkpoints come from: a folder, a single .safetensors file, a hub id, or `zoo:NAME`; each becomes a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from fastgen import files
from fastgen.errors import UserError

HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Pickles can run code when read, and are never fetched.
HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "README.md")
ORIGIN = "origin.json"
ZOO = "zoo:"


def cache_folder() -> Path:
    """FASTGEN_CACHE, or fastgen/ in the user's cache: converted checkpoints, embeddings and latents."""
    given = os.environ.get("FASTGEN_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgen"


def locate(source: str | Path, *, config: str | Path | None = None) -> Path:
    """The folder of a checkpoint.

    A .safetensors file is converted once, with the configs and tokenizers of the diffusers folder `config` (or what
    diffusers fetches by itself); a hub id `owner/name@revision` is fetched; zoo:NAME is a tiny network with random
    weights (`fastgen.zoo.tiny`). Anything else is a UserError.
    """
    if str(source).startswith(ZOO):
        from fastgen.zoo.tiny import folder_of

        return folder_of(str(source).removeprefix(ZOO), cache_folder())
    path = Path(source).expanduser()
    files.is_complete(path)  # puts back a folder whose replacement was interrupted
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: a file, and no .safetensors; pickled checkpoints are not read, convert it first")
        return _converted(path, config)
    if _hub_id(source):
        return _fetched(str(source))
    raise UserError(f"{source}: no such folder; give a checkpoint's folder, a .safetensors file or a hub id owner/name")


def exists(source: str | Path) -> bool:
    """Whether `locate` has something to look for: a path that is there, or the form of a hub id."""
    return str(source).startswith(ZOO) or Path(source).expanduser().exists() or _hub_id(source)


def origin(folder: Path) -> dict[str, Any]:
    """Licence and base model as far as the checkpoint's README, its place or its conversion tell."""
    facts = files.peek_json(folder / ORIGIN)
    if folder.parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/commit
        facts["base_model"] = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return {**_front_matter(folder / "README.md"), **facts}


def _hub_id(source: str | Path) -> bool:
    # Like `runs/teacher`, which may not be made yet: what begins like a path of this folder is none.
    match = HUB_ID.fullmatch(str(source))
    return match is not None and not Path(match["name"]).parent.exists() and not match["name"].startswith(".")


def _front_matter(readme: Path) -> dict[str, Any]:
    try:
        _, head, _ = readme.read_text(encoding="utf-8").split("---", 2)
        told = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(told, dict):
        return {}
    return {key: told[key] for key in ("license", "license_name", "license_link") if isinstance(told.get(key), str)}


def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download

    match = HUB_ID.fullmatch(source)
    assert match is not None
    name, revision = match["name"], match["revision"]
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=_doubles(name, revision)
        )
    except Exception as error:  # offline, unknown, gated: no common base
        reason = " ".join(str(error).split())[:160]
        at = f"@{revision}" if revision else ""
        raise UserError(
            f"{source}: neither a path here nor to be had from the hub ({type(error).__name__}: {reason}); offline, "
            f"fetch {name}{at} elsewhere (its .json, .txt and .safetensors files) and give the folder"
        ) from error
    return Path(folder)


def hub_file(repository: str, name: str) -> Path:
    """One file of a hub repository owner/name, from the local cache or fetched; a UserError where neither can be."""
    from huggingface_hub import hf_hub_download

    if not name.endswith((".json", ".safetensors")):
        raise ValueError(f"{name}: only .json and .safetensors files are fetched")
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # offline, unknown, gated: no common base
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{repository}/{name}: neither a path here nor to be had from the hub ({type(error).__name__}: {reason}); "
            f"offline, fetch {name} of {repository} elsewhere and put it under that path"
        ) from error


def _doubles(name: str, revision: str | None) -> list[str]:
    """What not to fetch: half-precision variants beside full ones, and single files beside the folders."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        listed = HfApi().list_repo_files(name, revision=revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return []  # offline: the snapshot that is there is taken as it is
    full = {file for file in listed if file.endswith(".safetensors") and ".fp16." not in file and "/" in file}
    halves = [file for file in listed if file.replace(".fp16.", ".") in full and ".fp16." in file]
    return [*halves, *(file for file in listed if file.endswith(".safetensors") and "/" not in file and full)]


def _converted(file: Path, config: str | Path | None) -> Path:
    """The diffusers folder of a single file, in the cache under its hash."""
    digest = files.sha256(file)
    folder = cache_folder() / "checkpoints" / f"{file.stem}-{digest[:12]}"
    if files.is_complete(folder):
        return folder
    pipeline = _from_single_file(file, config)
    files.make_folder(folder.parent)
    with files.atomic_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        files.write_json(temporary / ORIGIN, {"base_model": file.name, "base_sha256": digest})
    return folder


def _from_single_file(file: Path, config: str | Path | None) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stream:
            names = set(stream.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); fetch or make it again") from error
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise UserError(f"{file}: no single-file Stable Diffusion checkpoint (no tensor model.diffusion_model.*)")
    kind: Any = StableDiffusionPipeline
    if any(name.startswith("conditioner.embedders.1.") for name in names):
        kind = StableDiffusionXLPipeline
    options: dict[str, Any] = {} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    if config is not None:
        options |= {"config": str(config), "local_files_only": True}
    try:
        return kind.from_single_file(str(file), torch_dtype=torch.float32, **options)
    except Exception as error:  # offline, configs that do not fit: no common base
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{file}: diffusers cannot read it ({type(error).__name__}: {reason}); offline, name a diffusers folder "
            "of the same family, for its configs and tokenizers, with --config (in a run: teacher_config=FOLDER)"
        ) from error
