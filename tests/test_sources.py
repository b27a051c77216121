"""Where checkpoints come from: folders, single files and hub ids."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from fastgen import sources
from fastgen.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    assert sources.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FASTGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.cache_folder() == tmp_path / "xdg/fastgen"


def test_a_folder_is_itself_and_a_pickle_is_refused(tmp_path):
    assert sources.locate(tmp_path) == tmp_path
    (tmp_path / "model.ckpt").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"model\.ckpt: a file, and no \.safetensors; pickled checkpoints are not read"):
        sources.locate(tmp_path / "model.ckpt")


@pytest.mark.parametrize("name", ["owner/model", "owner/model@main", "stable-diffusion-v1-5/sd@refs/pr/1"])
def test_a_hub_id_offline_says_which_files_to_put_where(name):
    assert sources.exists(name)
    with pytest.raises(UserError, match=r"neither a path here nor to be had from the hub") as caught:
        sources.locate(name)
    assert "its .json, .txt and .safetensors files" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model", "/nowhere/model", "a/b/c", "../x/y", "./model"])
def test_what_is_no_hub_id_is_a_path_that_is_missing(name):
    assert not sources.exists(name)
    with pytest.raises(UserError, match="no such folder"):
        sources.locate(name)


def test_a_path_of_this_folder_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not sources.exists("runs/teacher")


def test_a_hub_fetch_asks_for_no_pickles_and_no_doubles(monkeypatch, tmp_path):
    listed = [
        "unet/m.safetensors",
        "unet/m.fp16.safetensors",
        "unet/m.bin",
        "v1-5.safetensors",
        "vae/only.fp16.safetensors",
    ]
    asked = {}
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name, revision: listed)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.update(name=name, **options) or tmp_path
    )
    assert sources.locate("owner/model@abc") == tmp_path
    assert asked["name"] == "owner/model" and asked["revision"] == "abc"
    assert sorted(asked["ignore_patterns"]) == ["unet/m.fp16.safetensors", "v1-5.safetensors"]
    assert not any("bin" in pattern or "ckpt" in pattern for pattern in asked["allow_patterns"])


def test_a_file_that_is_no_checkpoint_is_told(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"short")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        sources.locate(file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(
        UserError, match=r"no single-file Stable Diffusion checkpoint \(no tensor model\.diffusion_model"
    ):
        sources.locate(file)


def test_a_single_file_is_converted_once_with_the_configs_it_is_given(tmp_path, monkeypatch, cache):
    file = tmp_path / "sd.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(1)}, file)
    calls = []

    class Pipeline:
        def save_pretrained(self, folder):
            (folder / "unet").mkdir()

    def read(path, **options):
        calls.append((path, options))
        if "config" not in options:
            raise OSError("offline")
        return Pipeline()

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", read)
    with pytest.raises(UserError, match=r"offline, name a diffusers folder of the same family.*--config"):
        sources.locate(file)
    folder = sources.locate(file, config="configs")
    assert folder.parent == cache / "checkpoints" and (folder / "unet").is_dir()
    assert calls[-1][1]["config"] == "configs" and calls[-1][1]["local_files_only"]
    assert sources.locate(file) == folder and len(calls) == 2
    assert sources.origin(folder)["base_model"] == "sd.safetensors"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (
            "---\nlicense: creativeml-openrail-m\nlicense_link: https://x\ntags: [a]\n---\n# T\n",
            {"license": "creativeml-openrail-m", "license_link": "https://x"},
        ),
        ("# no head\n", {}),
        ("---\n: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
    ],
)
def test_the_licence_is_read_from_the_card(tmp_path, text, facts):
    (tmp_path / "README.md").write_text(text)
    assert sources.origin(tmp_path) == facts


def test_a_fetched_checkpoint_knows_its_name(tmp_path):
    folder = tmp_path / "models--owner--a-name/snapshots/0123"
    folder.mkdir(parents=True)
    assert sources.origin(folder) == {"base_model": "owner/a-name"}


def test_a_folder_whose_replacement_was_interrupted_is_put_back(tmp_path):
    old = tmp_path / ".tmp-old-student"
    old.mkdir()
    (old / "COMPLETE").touch()
    assert sources.locate(tmp_path / "student") == tmp_path / "student" and not old.exists()
