"""Students around another network: a copy of the teacher, new random weights, a new architecture."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DModel
from torch import nn

from diffkd.core import adapters
from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import derived_seed
from diffkd.errors import UserError
from diffkd.io.text import a_or_an
from diffkd.models.students import lora
from diffkd.models.students.transformers import renewed, stock_name
from diffkd.models.unet import UNet, UNet2D, reinitialized_like


def with_network(denoiser: Denoiser, network: nn.Module, prediction: str | None = None) -> Denoiser:
    """The same denoiser around another network, guided plainly; prediction: its type, by default that of the
    denoiser."""
    changed = Denoiser(
        network,
        denoiser.schedule,
        prediction or denoiser.prediction,
        shape=denoiser.shape,
        num_classes=denoiser.num_classes,
        null_label=denoiser.null_label,
        clip=denoiser.clip,
        steps=denoiser.steps,
        sampler=denoiser.sampler,
        guidance_baked_in=denoiser.guidance_baked_in,
        guidance_range=denoiser.guidance_range,
        guidance_by_default=denoiser.guidance_by_default,
        schedule_of=denoiser.schedule_of,
        call=denoiser.call,
        guide=denoiser.guide,
        example=denoiser.example,
        codec=denoiser.codec,
        conditioner=denoiser.conditioner,
    )
    changed.set_null(denoiser.null)
    changed.label_dropout = denoiser.label_dropout
    changed.taught_kind, changed.adapter = denoiser.taught_kind, denoiser.adapter
    return changed.train(network.training)


def copy_of(denoiser: Denoiser, seed: int = 0) -> Denoiser:
    """A denoiser of the same architecture and weights that shares none that learn: in a run of adapters it
    shares their base, and has an adapter of its own. seed: of the random weights of a new one."""
    if denoiser.adapter is not None:
        return with_network(denoiser, lora.copied(denoiser.network, denoiser.adapter, seed))
    return with_network(denoiser, copy.deepcopy(denoiser.network))


def merged(denoiser: Denoiser) -> Denoiser:
    """A denoiser that draws the same without an adapter; the same one where it has none."""
    if not adapters.own(denoiser.network):
        return denoiser
    made = with_network(denoiser, lora.merged(denoiser.network))
    made.adapter, made.name = None, denoiser.name
    return made


def reinitialized(student: Denoiser, seed: int) -> Denoiser:
    """The same architecture with new random weights."""
    network = student.network
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed))
        made = renewed(network) if stock_name(network) else reinitialized_like(unet_of(student))
        return with_network(student, made)


def from_config(teacher: Denoiser, model: UNet2D, seed: int = 0) -> Denoiser:
    """A freshly initialised network of another architecture, with the teacher's schedule and prediction."""
    if kind := stock_name(teacher.network):
        raise UserError(
            f"student.kind from_config makes a UNet2DModel, and this teacher is {a_or_an(kind)}; use "
            "drop_blocks"
        )
    network = unet_of(teacher)
    if not isinstance(network, UNet2DModel):
        raise UserError(
            "student.kind from_config makes a UNet2DModel, which takes no prompts, and this teacher is a "
            "UNet2DConditionModel; use drop_blocks or narrow"
        )
    channels, height, width = teacher.example_inputs()[0].shape[1:]
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed))
        made = model.build((channels, height, width), network.config.num_class_embeds)
    return with_network(teacher, made.train(network.training))


def unet_of(teacher: Denoiser) -> UNet:
    """The teacher's UNet. Raises UserError for a network that smaller students cannot be made of."""
    if not isinstance(teacher.network, UNet):
        raise UserError(
            f"smaller students of {a_or_an(type(teacher.network).__name__)} are not supported; use kind: copy"
        )
    return teacher.network
