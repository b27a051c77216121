"""TRELLIS's two flows as denoisers: rectified flows with sigma_min = 1e-5, told 1000 t, that predict a velocity."""

from __future__ import annotations

import copy
from pathlib import Path as FilePath
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgen.cond import Cond
from fastgen.denoiser import Denoiser
from fastgen.errors import UserError
from fastgen.paths import Prediction, RectifiedFlow
from fastgen.teachers.trellis.models import write_stem

SIGMA_MIN = 1e-5
TIME_SCALE = 1000.0
IMAGE, TEXT = "image", "text"
GUIDANCE_USUAL = {IMAGE: 6.0, TEXT: 8.5}  # 1 + the official cfg_strength
STEM, EMPTY = "flow", "empty.safetensors"  # of a flow's own folder
Normalization = tuple[tuple[float, ...], tuple[float, ...]]


class FlowDenoiser(Denoiser):
    """What both stages share. cond: "image" [B, L, cond_channels] or "text" [B, 77, cond_channels].

    condition   which of the two
    empty       the encoding of the empty text, [1, 77, cond_channels]: without it a text flow has no null condition.
                An image flow's is zeros in the shape of the condition
    """

    family = "trellis"
    part: ClassVar[str]
    net: Any

    def __init__(
        self,
        net: nn.Module,
        *,
        condition: str = IMAGE,
        empty: Tensor | None = None,
        sigma_min: float = SIGMA_MIN,
        **conventions: Any,
    ) -> None:
        """conventions: arguments of `Denoiser`, of a network that was trained to others than the official ones."""
        official = {
            "path": RectifiedFlow(sigma_min=sigma_min),
            "prediction": Prediction(kind="flow", sigma_min=sigma_min),
            "shape": self._shape(net),
            "time_scale": TIME_SCALE,
        }
        super().__init__(net, **{**official, **conventions})
        self.condition, self.empty = condition, empty

    @staticmethod
    def _shape(net: Any) -> tuple[int, ...]:
        raise NotImplementedError

    def raw(self, x: Any, time: Tensor, cond: Cond, extra: Tensor | None) -> Any:
        return self.net(x, time, self._told(cond, time), extra)

    def _told(self, cond: Cond, time: Tensor) -> Tensor:
        """The condition of a batch, [B, L, cond_channels]; one that does not fit is a UserError."""
        told, width = (self.null if cond is None else cond) or {}, self.net.args.cond_channels
        if self.condition not in told:
            raise UserError(
                f"this TRELLIS flow needs the condition '{self.condition}', and was given "
                f"{', '.join(told) or 'none'}; use the folder for that kind of condition"
            )
        found = told[self.condition].to(time.device)
        if found.ndim != 3 or found.shape[-1] != width:
            raise UserError(
                f"this TRELLIS flow takes the condition '{self.condition}' as [B, L, {width}], and was given "
                f"{list(found.shape)}; it comes from another encoder"
            )
        return found.expand(len(time), -1, -1)

    @property
    def embedding_width(self) -> int:
        return self.net.args.model_channels

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.net.blocks)

    @property
    def usual_guidance(self) -> float | None:
        return GUIDANCE_USUAL[self.condition] if self.has_null else None

    def store_in(self, dtype: torch.dtype) -> None:
        self.net.to_torso(dtype)

    @property
    def reads(self) -> str | None:
        return self.condition

    @property
    def has_null(self) -> bool:
        return self.condition == IMAGE or self.empty is not None

    @property
    def no_null(self) -> str:
        return "no encoding of the empty text"

    @property
    def null(self) -> Cond:
        """One row: zeros (a single token: attention to equal tokens does not see how many there are), or the empty
        text's; None where that is not known."""
        if self.condition == IMAGE:
            return {IMAGE: torch.zeros(1, 1, self.net.args.cond_channels, device=self.device)}
        return None if self.empty is None else {TEXT: self.empty.to(self.device)}

    def unconditional(self, cond: Cond) -> Cond:
        """The null condition in the shape of a condition."""
        assert cond is not None
        told = cond[self.condition]
        if self.condition == IMAGE:
            return {IMAGE: torch.zeros_like(told)}
        if self.empty is None:
            raise UserError("the empty text's encoding is not known: this network came without a text encoder")
        return {TEXT: self.empty.to(told).expand_as(told)}

    def describe(self) -> dict[str, Any]:
        told = {"part": self.part, "condition": self.condition, "empty": self.empty is not None}
        return {**super().describe(), **told, "normalization": None}

    def write(self, folder: FilePath) -> None:
        """flow.json and flow.safetensors, as a stem of an official folder, in float32; and the empty text's encoding
        where it is known."""
        whole = all(value.dtype == torch.float32 for value in self.net.state_dict().values())
        write_stem(self.net if whole else copy.deepcopy(self.net).float(), folder / STEM)
        if self.empty is not None:
            save_file({TEXT: self.empty.detach().cpu().contiguous()}, folder / EMPTY)


class StructureDenoiser(FlowDenoiser):
    """The first stage: latents [B, C, R, R, R] of a dense occupancy grid."""

    part = "structure"

    @staticmethod
    def _shape(net: Any) -> tuple[int, ...]:
        return (net.args.in_channels, *(net.args.resolution,) * 3)


class LatentDenoiser(FlowDenoiser):
    """The second stage: `Voxels` with features [N, C], whose coordinates the first stage has found.

    shape          (C,), of one voxel, since objects have as many as they have
    normalization  mean and std [C] of the latents that it was trained on, which are (z - mean) / std; None: unknown
    """

    part = "latent"

    def __init__(self, net: nn.Module, *, normalization: Normalization | None = None, **options: Any) -> None:
        super().__init__(net, **options)
        self.normalization = normalization

    def describe(self) -> dict[str, Any]:
        told = self.normalization
        return {**super().describe(), "normalization": None if told is None else [list(values) for values in told]}

    @staticmethod
    def _shape(net: Any) -> tuple[int, ...]:
        return (net.args.in_channels,)
