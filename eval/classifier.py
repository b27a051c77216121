"""A small classifier whose penultimate layer is a feature space, and the command that trains the shipped one.

    python -m fastgen.eval.classifier    train on the digits' train split, write weights/digits-classifier.safetensors

Numbers measured in its features compare only within one hash: training again, here or elsewhere, makes another space.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from fastgen.data import DataSet
from fastgen.errors import RunFailed, UserError
from fastgen.files import load_tensors, write_atomic

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights" / "digits-classifier.safetensors"
FEATURES = 128
BATCH = 128
DROPOUT = 0.3
# Below this the shipped features would not tell the classes apart well enough for the gate's label checks.
LEAST_ACCURACY = 0.97


class ConvNet(nn.Module):
    """Images [N, C, H, W] in [-1, 1], sides of 8 to 64, to 128 features and to class logits.

    No normalisation layer: a sample's features depend on nothing but the sample and the weights. About 90 k parameters.
    Dropout keeps all 128 features alive and spreads what they see: without it the per-class Gaussian fake and digits
    lacking a class come half as far from the data, measured against the images' class means.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.penultimate = nn.Linear(64 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, num_classes)
        self.drop_channels, self.drop = nn.Dropout2d(DROPOUT), nn.Dropout(DROPOUT)
        for p in self.parameters():  # He's start: torch's default left some of the 128 features dead
            nn.init.kaiming_normal_(p, nonlinearity="relu") if p.ndim > 1 else nn.init.zeros_(p)

    def features(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 128]."""
        x = F.relu(self.conv1(x))
        if min(x.shape[-2:]) > 8:  # 8 x 8 images have no resolution to spare this early
            x = F.avg_pool2d(x, 2)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 2)
        x = F.adaptive_avg_pool2d(self.drop_channels(F.relu(self.conv3(x))), 2)
        return self.drop(F.relu(self.penultimate(self.drop(x.flatten(1)))))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, num_classes]."""
        return self.head(self.features(x))


def augment(x: Tensor, noise: float = 0.05) -> Tensor:
    """Each image [N, C, H, W] moved by -1, 0 or 1 pixel both ways (border repeated), plus Gaussian noise.

    Small on purpose: features that shrug off noise could not show that a student's samples are noisy.
    """
    n, channels, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    shift = torch.randint(0, 3, (2, n))
    rows = (shift[0, :, None] + torch.arange(height))[:, None, :, None]
    columns = (shift[1, :, None] + torch.arange(width))[:, None, None, :]
    moved = padded[torch.arange(n)[:, None, None, None], torch.arange(channels)[None, :, None, None], rows, columns]
    return moved + noise * torch.randn(x.shape)


def train_classifier(data: DataSet, seed: int = 0, steps: int = 1000) -> ConvNet:
    """Train on a labelled data set, on the CPU; the same seed on the same machine gives the same weights.

    AdamW, cosine from 2e-3, batches of 128 drawn with replacement.
    """
    if data.num_classes is None:
        raise UserError(f"data set '{data.name}' has no labels, so no classifier can be trained on it")
    # Dropout knows only the global generator, so that one is seeded, and put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ConvNet(data.shape[0], data.num_classes)
        optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for step in range(1, steps + 1):
            batch = data.get(torch.randint(0, len(data), (BATCH,)))
            loss = F.cross_entropy(net(augment(batch["x0"])), batch["label"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if step % 100 == 0:
                log.info("classifier on %s: step %d of %d, loss %.4f", data.name, step, steps, loss.item())
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(net: ConvNet, data: DataSet) -> float:
    """Share of a data set that is classified rightly."""
    parts = [data.get(index) for index in torch.arange(len(data)).split(500)]
    return sum(int((net(p["x0"]).argmax(1) == p["label"]).sum()) for p in parts) / len(data)


def load_classifier(path: str | Path) -> ConvNet:
    """A classifier from its safetensors file; a file that is not one is a UserError."""
    state = load_tensors(path)
    try:
        net = ConvNet(state["conv1.weight"].shape[1], len(state["head.bias"]))
        net.load_state_dict(state)
    except (KeyError, RuntimeError, IndexError) as error:
        raise UserError(f"{path}: not a classifier of fastgen.eval.classifier ({error})") from error
    return net.eval().requires_grad_(False)


def data_sha256(data: DataSet) -> str:
    """Hash of a data set's images (float32 bytes) and labels (int64 bytes), in order."""
    all_of_it = data.get(torch.arange(len(data)))
    return hashlib.sha256(b"".join(all_of_it[key].numpy().tobytes() for key in ("x0", "label"))).hexdigest()


def main() -> None:
    """Train the shipped digits classifier and write its weights with their provenance."""
    from fastgen.data.digits import Digits

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train, held_out, seed, steps = Digits(split="train"), Digits(split="held_out"), 0, 1500
    net = train_classifier(train, seed, steps)
    score = accuracy(net, held_out)
    if score < LEAST_ACCURACY:
        raise RunFailed(f"held-out accuracy {score:.4f} is below {LEAST_ACCURACY}; {WEIGHTS} was left as it is")
    facts: dict[str, Any] = {
        "data": train.name,
        "split": f"{len(train)} train, {len(held_out)} held out",
        "train_sha256": data_sha256(train),
        "train_accuracy": round(accuracy(net, train), 4),
        "held_out_accuracy": round(score, 4),
        "seed": seed,
        "steps": steps,
        "torch": torch.__version__,
    }
    # One metadata key: safetensors writes several in no fixed order, and the file's hash would change with it.
    blob = save(net.state_dict(), metadata={"fastgen": json.dumps(facts)})
    write_atomic(WEIGHTS, blob)
    print(json.dumps({"file": str(WEIGHTS), "bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest(), **facts}))


if __name__ == "__main__":
    main()
