"""`fastgen evaluate MODEL --reference DATA`: one model's samples against real images."""

from __future__ import annotations

from pathlib import Path

import torch

from fastgen import api
from fastgen.data import DataConfig, detect
from fastgen.data.part import real_images
from fastgen.errors import UserError
from fastgen.eval import metrics
from fastgen.eval.extractors import Classifier, load_extractor
from fastgen.eval.metrics import Result
from fastgen.eval.protocol import whole


def _reference(name: str, shape: tuple[int, ...]) -> DataConfig:
    """The shipped digits, or a path; files that can be read as grey or as RGB are read as the model makes them."""
    if name == "digits":
        return DataConfig(kind="digits")
    either = Path(name).exists() and detect(Path(name)) in ("folder", "parquet")
    return DataConfig(path=name, channels=1 if either and shape[0] == 1 else 3)


def evaluate(
    model: Path,
    reference: str,
    *,
    num: int,
    steps: int | None,
    seed: int,
    extractor: str,
    device: str,
    hold_out: int = 5,
) -> list[Result]:
    """FD, KID, precision, recall and nearest image against the reference's training part; with a classifier also the
    share of labels obeyed and the largest class share. The floor beside FD and KID is that of the held-out part."""
    loaded = api.load(model, device=device)
    config = _reference(reference, loaded.model.denoiser.shape)
    train, held_out = real_images(config, hold_out)
    if loaded.model.denoiser.shape != tuple(train.shape):
        raise UserError(
            f"--reference {reference}: images of shape {tuple(train.shape)}, "
            f"the model makes {loaded.model.denoiser.shape}"
        )
    see = load_extractor(extractor, train)
    if see.channels != train.shape[0]:
        raise UserError(f"--extractor {extractor}: sees {see.channels} channel(s), the images have {train.shape[0]}")
    classes = loaded.model.denoiser.num_classes
    labels = None if classes is None else torch.arange(num) % classes
    images = loaded.sample(num=num, labels=labels, steps=steps, seed=seed, batch=500)
    real, held = whole(train)["x0"], whole(held_out)["x0"]
    gen_f, real_f, held_f = see(images), see(real), see(held)

    def result(metric: str, value: float, floor: float | None = None) -> Result:
        return Result(
            metric=metric,
            value=value,
            n_gen=num,
            n_ref=len(real),
            extractor=see.name,
            extractor_sha256=see.sha256,
            floor=floor,
            seed=seed,
        )

    precision, recall = metrics.precision_recall(real_f, gen_f)
    floor_precision, floor_recall = metrics.precision_recall(real_f, held_f)
    flat = real.flatten(1)
    rows = [
        result(f"FD-{see.name}", metrics.frechet(gen_f, real_f), metrics.frechet(held_f, real_f)),
        result("KID", metrics.kid(gen_f, real_f)[0], metrics.kid(held_f, real_f)[0]),
        result("precision", precision, floor_precision),
        result("recall", recall, floor_recall),
        result(
            "nearest",
            metrics.nearest_distance(images.flatten(1), flat),
            metrics.nearest_distance(held.flatten(1), flat),
        ),
    ]
    if isinstance(see, Classifier):
        found = see.classify(images).argmax(-1)
        rows.append(result("largest_class_share", float(metrics.class_shares(found, see.num_classes).max())))
        if labels is not None:
            rows.append(result("label_agreement", metrics.label_agreement(labels, found)))
    return rows
