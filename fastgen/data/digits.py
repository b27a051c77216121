"""The shipped digits: 1,797 grey images of 8 x 8 pixels, the data that every promise is first proved on.

"Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository (1998),
doi:10.24432/C50P49, licence CC BY 4.0. The part published as the test set, as scikit-learn ships it, its order shuffled
once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastgen.data.pixels import Memory
from fastgen.errors import UserError, suggestion

# The first 1,400 of the shuffled rows train; the other 397 are only ever measured against.
SPLITS = {"train": slice(0, 1400), "held_out": slice(1400, None), "all": slice(None)}


class Digits(Memory):
    """Samples [1, 8, 8] (pixel values 0 .. 16 become value / 8 - 1) with labels 0 .. 9."""

    def __init__(self, split: str = "train"):
        if split not in SPLITS:
            raise UserError(f"data.split={split}: the digits have no such split ({suggestion(split, SPLITS)})")
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
            images = torch.from_numpy(file["images"][SPLITS[split]])
            labels = torch.from_numpy(file["labels"][SPLITS[split]].astype(np.int64))
        super().__init__(f"digits/{split}", images[:, None], labels, num_classes=10, white=16)
