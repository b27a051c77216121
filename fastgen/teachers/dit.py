"""DiT: diffusers' `DiTTransformer2DModel` on latents, conditioned on class labels; its VAE is not read yet, so that
samples stay latents.

Read are pipeline folders (transformer/, scheduler/, model_index.json) and bare ones (config.json, weights, and a
scheduler_config.json beside them or in scheduler/).
"""

from __future__ import annotations

import logging
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor, nn

from fastgen.cond import Cond
from fastgen.denoiser import Denoiser, conventions
from fastgen.errors import UserError
from fastgen.nets import transformer
from fastgen.nets.scalar import added
from fastgen.schedulers import find_scheduler, read_scheduler, write_scheduler

logger = logging.getLogger("fastgen")
KIND, PIPELINE = "DiTTransformer2DModel", "DiTPipeline"


class DiTDenoiser(Denoiser):
    """cond["label"] int64 [B]: a class, or `num_classes` for none. Latents [B, C, h, w], of one size only.

    Every block embeds time and label for itself. Stock blocks in train mode also drop a tenth of the labels, each block
    others: that is off here, since the condition of a batch is the data's affair and has to be one.
    """

    family = "dit"
    net: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for block in self.net.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def raw(self, x: Tensor, time: Tensor, cond: Cond, extra: Tensor | None) -> Tensor:
        if extra is not None and self.net.gradient_checkpointing:
            raise UserError(
                "student.gradient_checkpointing: the blocks of a DiT embed its time themselves and would forget a "
                "second time or a guidance weight when computed again; leave it off"
            )
        label = self.label(cond, len(x))
        with added([block.norm1.emb.timestep_embedder for block in self.net.transformer_blocks], extra):
            return self.net(x.to(self.net.dtype), time, class_labels=label, return_dict=False)[0]

    @property
    def embedding_width(self) -> int:
        return self.net.transformer_blocks[0].norm1.emb.timestep_embedder.linear_2.out_features

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.net.transformer_blocks)

    @property
    def usual_guidance(self) -> float | None:
        return 4.0 if self.has_null else None

    def write(self, folder: FilePath) -> None:
        """transformer/ and scheduler/. No model_index.json: a stock pipeline wants a VAE."""
        self.net.save_pretrained(folder / transformer.PART)
        write_scheduler(self, folder / "scheduler")


def recognises(folder: FilePath) -> bool:
    """A pipeline whose transformer, or a bare config whose class, is a `DiTTransformer2DModel`, by either name."""
    return transformer.class_of(folder) == KIND


def read(folder: FilePath, data: dict[str, Any] | None) -> DiTDenoiser:
    """Read a folder written here (`data` from its fastgen.json) or a stranger's, which states its own conventions."""
    if data is None:
        transformer.refuse_other_pipelines(folder, PIPELINE)
    where = transformer.part(folder)
    net = transformer.read_net(folder, KIND)
    wanted, made = net.config.in_channels, net.config.out_channels or net.config.in_channels
    if made == 2 * wanted:
        logger.info("%s: the second half of the output, learned variances, is cut off", where)
        cut(net, wanted)
    elif made != wanted:
        raise UserError(
            f"{where / 'config.json'}: {made} channels out for {wanted} in; a denoiser has as many, or twice"
        )
    if data is not None:
        return DiTDenoiser(net, **conventions(data))
    logger.warning("%s: a DiT is read without its VAE: samples are latents, which pairs are made of too", folder)
    return DiTDenoiser(
        net,
        **vars(read_scheduler(find_scheduler(folder, where))),
        shape=(wanted, *transformer.square(net.config, where / "config.json")),
        num_classes=net.config.num_embeds_ada_norm,
    )


def cut(net: Any, channels: int) -> None:
    """Keep the first output channels only (improved DDPM's mean; 2102.09672), in the weights and in the config.

    The rows of the last layer are the pixels of a patch, each with all its channels: [p, p, C].
    """
    last, patch = net.proj_out_2, net.config.patch_size
    layer = nn.Linear(last.in_features, patch * patch * channels)
    kept = {
        name: tensor.reshape(patch * patch, net.out_channels, *tensor.shape[1:])[:, :channels].flatten(0, 1).clone()
        for name, tensor in last.state_dict().items()
    }
    layer.load_state_dict(kept, assign=True)  # a network of shapes alone has nothing to copy
    net.proj_out_2, net.out_channels = layer, channels
    net.register_to_config(out_channels=channels)
