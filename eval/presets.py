"""Protocols behind published numbers, as data: what must agree before two of them are compared.

Facts from the public code that defines each; what is not known is None and is told as found when a run measures it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastgen.errors import UserError, suggestion
from fastgen.eval.inception import FOLDER
from fastgen.files import read_json


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One protocol.

    num        images to generate; of prompts and labels see below
    fid        how images reach the network: "tf" or "clean" (`eval.resize`)
    crop       None: images as they are; a number: centre square of the short side, then Lanczos to that size, for real
               and generated images alike
    reference  name of the file or folder of the real images, looked for in FASTGEN_WEIGHTS_DIR
    prompts    likewise; None: not a text protocol
    side       of the images that the model must make; None: any
    labels     "uniform": drawn at random for class-conditional models, as published (balanced ones score lower)
    *_sha256   of the published file where we know it
    """

    about: str
    num: int
    fid: str
    reference: str
    reference_source: str
    crop: int | None = None
    reference_sha256: str | None = None
    prompts: str | None = None
    prompts_source: str = ""
    prompts_sha256: str | None = None
    side: int | None = None
    labels: str = "uniform"
    notes: str = ""


PRESETS = {
    "coco2017-5k": Preset(
        about="zero-shot FID and CLIP score of text models on COCO 2017 val (InstaFlow, 2309.06380, and others)",
        num=5_000,
        fid="clean",
        crop=512,
        reference="val2017",
        reference_source="http://images.cocodataset.org/zips/val2017.zip "
        "(md5 442b8da7639aecaf257c1dceb8ba8c80), unpacked",
        prompts="captions_val2017.json",
        prompts_source="http://images.cocodataset.org/annotations/annotations_trainval2017.zip (md5 "
        "f4bbac642086de4f52a3fdda2de5fa2c), annotations/captions_val2017.json of it",
        notes="Published figures do not say crop, resize and which of an image's captions was taken; here: centre "
        "square, Lanczos to 512, clean resize, the caption with the lowest id. 5,000 images in 2,048 dimensions are "
        "biased upwards by several points: never compare with 30k.",
    ),
    "coco2014-30k": Preset(
        about="zero-shot FID of text models on COCO 2014 val, 30,000 captions (DMD2, 2405.14867)",
        num=30_000,
        fid="clean",
        crop=256,
        reference="val2014",
        reference_source="http://images.cocodataset.org/zips/val2014.zip "
        "(md5 a3d79f5ed8d289b7a7554ce06a5782b3), unpacked",
        prompts="captions_coco14_test.txt",
        prompts_source="https://github.com/tianweiy/DMD2, main/coco_eval/captions_coco14_test.txt",
        prompts_sha256="edabd2a556026cbf5d36a5fffa35ad43d7ba71b72f6d640b727c1edefb7f1945",
        notes="DMD2's coco_eval: centre square of the short side, Lanczos to 256, then clean-fid's resize. DMD2 cuts "
        "pixels to 8 bits, here they are rounded.",
    ),
    "cifar10-50k": Preset(
        about="FID on CIFAR-10 as EDM's fid.py measures it (2206.00364)",
        num=50_000,
        fid="tf",
        side=32,
        reference="cifar10-32x32.npz",
        reference_source="https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz",
        notes="EDM prints the smallest of three runs, seeds 0-49999, 50000-99999 and 100000-149999: give --seed 0, 1, "
        "2 and report smallest and mean.",
    ),
}


def find_preset(name: str) -> Preset:
    """The protocol of that name."""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: no such protocol; {suggestion(name, PRESETS)}")
    return PRESETS[name]


def find_file(given: str | Path | None, name: str, source: str, option: str) -> Path:
    """The file or folder given on the command line, else the published one in FASTGEN_WEIGHTS_DIR."""
    if given is not None:
        path = Path(given).expanduser()
        if not path.exists():
            raise UserError(f"{option} {given}: no such file or folder")
        return path
    folder = os.environ.get(FOLDER)
    if folder and (Path(folder).expanduser() / name).exists():
        return Path(folder).expanduser() / name
    where = f"into {folder} ({FOLDER})" if folder else f"into a folder and set {FOLDER} to it"
    raise UserError(f"{name}: not here; fetch {source} and put it {where}, or give its place as {option}")


def coco_captions(path: Path) -> list[str]:
    """One caption an image of a COCO captions file: that with the lowest id, images in the order of their ids."""
    data = read_json(path)
    try:
        images = sorted(int(image["id"]) for image in data["images"])
        rows = sorted((int(row["id"]), int(row["image_id"]), str(row["caption"])) for row in data["annotations"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a COCO captions file (images and annotations with id, caption)") from error
    first: dict[int, str] = {}
    for _, image, caption in rows:
        first.setdefault(image, " ".join(caption.split()))
    missing = [image for image in images if not first.get(image)]
    if missing or not images:
        raise UserError(f"{path}: no caption for image {missing[0] if missing else '(it has none)'}")
    return [first[image] for image in images]
