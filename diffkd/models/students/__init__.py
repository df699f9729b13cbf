"""A student made from its teacher: a copy, fewer layers, fewer channels, or another architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import torch
from diffusers import UNet2DModel
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import squared_error, weight, weighting_for
from diffkd.core.noise import add_noise, derived_seed, grid_times
from diffkd.errors import UserError
from diffkd.io.config import Positive, Strict
from diffkd.models.families.unet2d import UNet2D, reinitialized_like
from diffkd.models.students import unet2d_drop, unet2d_narrow

Weights = Literal["teacher", "random"]
Batch = tuple[Tensor, Mapping[str, Tensor]]  # x0 and conditioning, as `method.Batch` has them


def read_as(denoiser: Denoiser, prediction: str | None = None) -> Denoiser:
    """The same network, its output read as another prediction type where given (weights shared)."""
    return with_network(denoiser, denoiser.network, prediction)


def with_network(denoiser: Denoiser, network: nn.Module, prediction: str | None = None) -> Denoiser:
    """Another network in place of this one, read as it is."""
    found = Denoiser(
        network,
        denoiser.schedule,
        prediction or denoiser.prediction,
        shape=denoiser.shape,
        num_classes=denoiser.num_classes,
        null_label=denoiser.null_label,
        clip=denoiser.clip,
        steps=denoiser.steps,
        sampler=denoiser.sampler,
    )
    return found.train(network.training)


def copy_of(denoiser: Denoiser, prediction: str | None = None) -> Denoiser:
    """A student of the teacher's own architecture and weights, with a copy of its own to change."""
    return copy.deepcopy(read_as(denoiser, prediction))


def drop_blocks(teacher: Denoiser, blocks: Iterable[str]) -> Denoiser:
    """Without these layers or blocks (named as `unet2d_drop.droppable` does), the others as they are.

    Raises UserError for a name that the network has not, listing those it has, and for what does not fit.
    """
    return with_network(teacher, unet2d_drop.drop(_unet(teacher), list(blocks)))


def narrow(
    teacher: Denoiser, channels: Iterable[int], scores: Mapping[str, Tensor] | None = None
) -> Denoiser:
    """With so many channels at each resolution, those of the highest scores; default by their norm.

    scores: of every parameter's rows, as `taylor_scores` gives them. With the teacher's own channels it is
    the teacher. Raises UserError for widths that group norm or attention heads do not divide.
    """
    return with_network(teacher, unet2d_narrow.narrow(_unet(teacher), list(channels), scores))


def from_config(teacher: Denoiser, model: UNet2D, seed: int = 0) -> Denoiser:
    """A new network of another architecture, freshly initialised, read as the teacher is."""
    shape = teacher.example_inputs()[0].shape[1:]
    total = _unet(teacher).config.num_class_embeds
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed))
        network = model.build((shape[0], shape[1], shape[2]), total)
    return with_network(teacher, network.train(teacher.network.training))


def reinitialized(student: Denoiser, seed: int) -> Denoiser:
    """The same architecture with new random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed))
        return with_network(student, reinitialized_like(_unet(student)))


def taylor_scores(teacher: Denoiser, batches: Iterable[Batch], rng: torch.Generator) -> dict[str, Tensor]:
    """Importance of every parameter's rows for the teacher's denoising loss, the sum over batches.

    Molchanov et al. 2019, equation 8. rng: of times and noise.
    """
    probe = copy_of(teacher).requires_grad_(True)
    total: dict[str, Tensor] = {}
    for x0, cond in batches:
        x0 = x0.to(probe.device)
        t, _ = grid_times(len(x0), probe.schedule.num_train_timesteps, rng, probe.device)
        x_t = add_noise(probe.schedule, x0, t, rng)
        denoised = probe(x_t, t, **{key: value.to(probe.device) for key, value in cond.items()})
        w = weight(weighting_for(probe.prediction), probe.schedule.snr(t)).float()
        (w * squared_error(denoised, x0)).mean().backward()
        for name, score in unet2d_narrow.taylor_scores(probe.network).items():
            total[name] = total[name] + score if name in total else score
        probe.zero_grad()
    return total


def _unet(teacher: Denoiser) -> UNet2DModel:
    if not isinstance(teacher.network, UNet2DModel):
        raise UserError(
            f"a smaller student of a {type(teacher.network).__name__} is not known; use kind: copy"
        )
    return teacher.network


# what a config says of it


class Copy(Strict):
    """The teacher's own architecture and weights."""

    kind: Literal["copy"] = "copy"

    def build(self, teacher: Denoiser, seed: int, batches: Iterable[Batch] | None = None) -> Denoiser:
        """seed: of what is random in it. batches: of the data, for importance by gradients."""
        return copy_of(teacher)


class DropBlocks(Strict):
    """Fewer layers: the weights of those that stay."""

    kind: Literal["drop_blocks"]
    blocks: list[str] = Field(
        min_length=1,
        description="such as mid_block, down_blocks.*.resnets.1, up_blocks.0.attentions",
    )
    weights: Weights = Field("teacher", description="random: the same architecture from scratch")

    def build(self, teacher: Denoiser, seed: int, batches: Iterable[Batch] | None = None) -> Denoiser:
        student = drop_blocks(teacher, self.blocks)
        return student if self.weights == "teacher" else reinitialized(student, seed)


class Narrow(Strict):
    """Fewer channels: the most important ones of the teacher's."""

    kind: Literal["narrow"]
    channels: list[Positive] | None = Field(None, description="of each resolution")
    ratio: float | None = Field(
        None, gt=0, le=1, description="of every resolution's channels, in their place"
    )
    importance: Literal["norm", "taylor"] = Field(
        "norm", description="of a channel: by its weights, or by what the loss would change without it"
    )
    weights: Weights = Field("teacher", description="random: the same architecture from scratch")

    @model_validator(mode="after")
    def _one(self) -> Narrow:
        if (self.channels is None) == (self.ratio is None):
            raise ValueError(
                "student of kind narrow needs either channels (a list) or ratio (a share of them)"
            )
        return self

    def build(self, teacher: Denoiser, seed: int, batches: Iterable[Batch] | None = None) -> Denoiser:
        channels = self.channels
        if channels is None:
            assert self.ratio is not None
            channels = [_part(width, self.ratio) for width in _unet(teacher).config.block_out_channels]
        scores = None
        if self.importance == "taylor" and self.weights == "teacher" and batches is not None:
            scores = taylor_scores(teacher, batches, torch.Generator().manual_seed(derived_seed(seed)))
        student = narrow(teacher, channels, scores)
        return student if self.weights == "teacher" else reinitialized(student, seed)


def _part(width: int, ratio: float) -> int:
    if abs(width * ratio - round(width * ratio)) > 1e-6:
        raise UserError(
            f"student.ratio {ratio} of {width} channels is {width * ratio:g}, no whole number; use another, "
            "or give channels"
        )
    return round(width * ratio)


class FromConfig(Strict):
    """Another architecture, from random weights."""

    kind: Literal["from_config"]
    model: UNet2D = Field(description="as of a teacher that is trained")

    def build(self, teacher: Denoiser, seed: int, batches: Iterable[Batch] | None = None) -> Denoiser:
        return from_config(teacher, self.model, seed)


Student = Annotated[Copy | DropBlocks | Narrow | FromConfig, Field(discriminator="kind")]
