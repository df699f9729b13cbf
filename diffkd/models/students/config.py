"""What a config says of a student: how it is made from its teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator

from diffkd.core.adapters import Adapter
from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import derived_seed
from diffkd.errors import UserError
from diffkd.io.config import Positive, Strict
from diffkd.io.text import a_or_an
from diffkd.models import saving
from diffkd.models.students import bk_sdm, lora
from diffkd.models.students.blocks import drop_blocks, keep_spread
from diffkd.models.students.channels import narrow
from diffkd.models.students.copies import copy_of, from_config, reinitialized, unet_of
from diffkd.models.students.hidden import narrow_hidden
from diffkd.models.students.importance import Batch, taylor_scores
from diffkd.models.students.transformers import stock_name
from diffkd.models.unet import UNet2D

Weights = Literal["teacher", "random"]


class Copy(Strict):
    """The teacher's own architecture and weights."""

    kind: Literal["copy"] = "copy"

    def build(self, teacher: Denoiser, seed: int, batches: Iterable[Batch] | None = None) -> Denoiser:
        """The student. seed: of its random weights, if any. batches: of data, for importance by gradients."""
        return copy_of(teacher)


class Lora(Strict):
    """The teacher's own weights, shared, with an adapter beside them, which alone learns and is saved."""

    kind: Literal["lora"]
    rank: Positive = Field(32, description="of the change of each weight, and its alpha")
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="layers that have an adapter: names, or what they end in; default the family's",
    )

    def build(self, teacher: Denoiser, seed: int, batches: Iterable[Batch] | None = None) -> Denoiser:
        """The student, which changes nothing yet. All copies of the teacher share its weights from now on."""
        self.mark(teacher)
        return copy_of(teacher, seed)

    def mark(self, teacher: Denoiser) -> None:
        """Says to a teacher, in place, that its copies are adapters. Raises UserError where none can be."""
        lora.check_installed()
        if teacher.fused:
            raise UserError(
                f"teacher {teacher.name} is an adapter itself, and another on top of it has no base to be "
                "loaded into; run diffkd fuse on it, and give the pipeline that this makes"
            )
        targets = self.targets or getattr(saving.family_saving(teacher), "LORA_TARGETS", None)
        if targets is None:
            raise UserError(
                f"{a_or_an(type(teacher.network).__name__)} has no layers that get an adapter by default; "
                "name student.targets"
            )
        if self.targets is None:  # not every network of a family has all of them
            targets = lora.matching(teacher.network, targets)
        lora.check_rank(lora.layers(teacher.network, targets), self.rank)
        variant = teacher.opened_with.get("variant")
        teacher.adapter = Adapter(self.rank, tuple(targets), teacher.name, variant, teacher.folded)


class DropBlocks(Strict):
    """Fewer layers, with the weights of those that stay."""

    kind: Literal["drop_blocks"]
    blocks: Annotated[list[str], Field(min_length=1)] | str | None = Field(
        None,
        description="such as mid_block, down_blocks.*.resnets.1, up_blocks.0.attentions, of a transformer "
        "transformer_blocks.3; or base, small or tiny for what BK-SDM leaves out of a UNet",
    )
    keep: float | None = Field(
        None, gt=0, le=1, description="share of a transformer's blocks that stays, spread evenly"
    )
    weights: Weights = Field("teacher", description="random: the same architecture from scratch")

    @field_validator("blocks")
    @classmethod
    def _check_name(cls, given: list[str] | str | None) -> list[str] | str | None:
        if isinstance(given, str):
            bk_sdm.check_name(given)
        return given

    @model_validator(mode="after")
    def _check_one_given(self) -> DropBlocks:
        if (self.blocks is None) == (self.keep is None):
            raise ValueError(
                "student of kind drop_blocks needs either blocks (a list of those that go) or keep (the "
                "share of a transformer's that stays)"
            )
        return self

    def build(self, teacher: Denoiser, seed: int, batches: Iterable[Batch] | None = None) -> Denoiser:
        if self.keep is not None:
            student = keep_spread(teacher, self.keep)
        else:
            assert self.blocks is not None
            student = drop_blocks(teacher, self.blocks)
        return student if self.weights == "teacher" else reinitialized(student, seed)


class Narrow(Strict):
    """Fewer channels: the most important ones of the teacher."""

    kind: Literal["narrow"]
    channels: list[Positive] | None = Field(None, description="at each resolution")
    ratio: float | None = Field(
        None, gt=0, le=1, description="share of them, or of a transformer's hidden channels, that stays"
    )
    importance: Literal["norm", "taylor"] = Field(
        "norm", description="of a channel: the norm of its weights, or the change of the loss without it"
    )
    weights: Weights = Field("teacher", description="random: the same architecture from scratch")

    @model_validator(mode="after")
    def _check_one_given(self) -> Narrow:
        if (self.channels is None) == (self.ratio is None):
            raise ValueError(
                "student of kind narrow needs either channels (a list) or ratio (a share of them)"
            )
        return self

    def build(self, teacher: Denoiser, seed: int, batches: Iterable[Batch] | None = None) -> Denoiser:
        kind = stock_name(teacher.network)
        if kind and self.ratio is None:
            raise UserError(
                f"student.channels are of a UNet's resolutions, and this teacher is {a_or_an(kind)}; give "
                "ratio, of the hidden channels of its feed-forward layers"
            )
        channels = [] if kind else self._channels(teacher)
        scores = None
        if self.importance == "taylor" and self.weights == "teacher" and batches is not None:
            scores = taylor_scores(teacher, batches, torch.Generator().manual_seed(derived_seed(seed)))
        if kind and self.ratio is not None:
            student = narrow_hidden(teacher, self.ratio, scores)
        else:
            student = narrow(teacher, channels, scores)
        return student if self.weights == "teacher" else reinitialized(student, seed)

    def _channels(self, teacher: Denoiser) -> list[int]:
        """At each resolution of a UNet."""
        if self.channels is not None:
            return self.channels
        assert self.ratio is not None
        return [_share(width, self.ratio) for width in unet_of(teacher).config.block_out_channels]


def _share(width: int, ratio: float) -> int:
    if abs(width * ratio - round(width * ratio)) > 1e-6:
        raise UserError(
            f"student.ratio {ratio} of {width} channels is {width * ratio:g}, which is not an integer; "
            "use another ratio, or give channels"
        )
    return round(width * ratio)


class FromConfig(Strict):
    """Another architecture, with random weights."""

    kind: Literal["from_config"]
    model: UNet2D = Field(description="as for a teacher that is trained")

    def build(self, teacher: Denoiser, seed: int, batches: Iterable[Batch] | None = None) -> Denoiser:
        return from_config(teacher, self.model, seed)


Student = Annotated[Copy | Lora | DropBlocks | Narrow | FromConfig, Field(discriminator="kind")]
