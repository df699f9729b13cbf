"""A UNet2DModel with fewer channels, from the most important channels of a wider one.

Channels that meet in a sum are one `Space`: all that writes into a residual stream, or reads from it, keeps
the same of its channels. Spaces are found by walking through the network as its forward pass does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.io.text import log
from diffkd.models.families.unet2d import reinitialized_like
from diffkd.models.students.unet2d_channels import Walk


def narrow(
    network: UNet2DModel, channels: Sequence[int], scores: Mapping[str, Tensor] | None = None
) -> UNet2DModel:
    """A new network of `channels` for each resolution; of as many as it has, the same network.

    scores: importance of every parameter's rows, (rows,) by name; default `norm_scores`. Raises UserError for
    widths that its group norm or its attention heads do not divide.
    """
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    widths = tuple(config["block_out_channels"])
    _check(config, widths, channels)
    config["block_out_channels"] = tuple(channels)
    if config.get("time_embedding_dim"):
        config["time_embedding_dim"] = config["time_embedding_dim"] * channels[0] // widths[0]
    smaller = reinitialized_like(network, **config)
    _check_shortcuts(network, smaller, widths, channels)
    plan = Walk(network, smaller).plan
    scores = norm_scores(network) if scores is None else scores
    old, found = network.state_dict(), {}
    for name, value in smaller.state_dict().items():
        taken = old[name]
        for dim, spaces in plan.get(name, {}).items():
            begins = torch.tensor([0, *(space.width for space in spaces)]).cumsum(0)
            index = [b + space.choose(scores) for b, space in zip(begins[:-1], spaces, strict=True)]
            taken = taken.index_select(dim, torch.cat(index).to(taken.device))
        assert taken.shape == value.shape, f"{name}: {tuple(taken.shape)} for {tuple(value.shape)}"
        found[name] = taken
    smaller.load_state_dict(found)
    return smaller


def norm_scores(network: nn.Module) -> dict[str, Tensor]:
    """Squared norm of each row of every parameter (Li et al. 2017, section 3.1, with the 2-norm)."""
    return {
        name: p.detach().double().cpu().reshape(len(p), -1).square().sum(1)
        for name, p in network.named_parameters()
    }


def taylor_scores(network: nn.Module) -> dict[str, Tensor]:
    """(sum of w dL/dw)^2 over each row of every parameter, from the gradients that they hold: what the loss
    would change by without it, to first order (Molchanov et al. 2019, equation 8)."""
    found = {}
    for name, p in network.named_parameters():
        product = torch.zeros_like(p) if p.grad is None else p.detach() * p.grad
        found[name] = product.double().cpu().reshape(len(p), -1).sum(1).square()
    return found


def _check(config: Mapping[str, Any], widths: Sequence[int], channels: Sequence[int]) -> None:
    if len(channels) != len(widths):
        raise UserError(
            f"student.channels has {len(channels)} entries and the network {len(widths)} resolutions "
            f"({', '.join(map(str, widths))}); give one for each"
        )
    if config["resnet_time_scale_shift"] != "default" or config["class_embed_type"] is not None:
        raise UserError(
            "narrow knows networks with resnet_time_scale_shift default and class labels as numbers; use "
            "drop_blocks or from_config"
        )
    if channels[0] % 2:
        raise UserError(
            f"student.channels {channels[0]} is odd; the first is of sines and cosines of the time"
        )
    groups, head = config["norm_num_groups"], config["attention_head_dim"]
    kinds = [*config["down_block_types"], *reversed(config["up_block_types"])]
    known = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")
    strange = [kind for kind in kinds if kind not in known]
    if strange or "resnet" in (config["downsample_type"], config["upsample_type"]):
        raise UserError(
            f"narrow knows networks of {', '.join(known)} with convolutions between them, and this one has "
            f"{strange[0] if strange else 'resnets'}; use drop_blocks or from_config"
        )
    for i, (wide, few) in enumerate(zip(widths, channels, strict=True)):
        if not 1 <= few <= wide:
            raise UserError(
                f"student.channels {few} is out of range; the teacher has {wide} there: use 1 to {wide}"
            )
        if few % groups:
            raise UserError(
                f"student.channels {few} is not divided by norm_num_groups {groups} of this network; use a "
                f"multiple, such as {max(groups, few // groups * groups)}"
            )
        last = i == len(widths) - 1 and config["mid_block_type"] and config["add_attention"]
        norms = config["attn_norm_num_groups"]
        if last and norms and few % norms:
            raise UserError(
                f"student.channels {few} is not divided by attn_norm_num_groups {norms} of this network; "
                "use a multiple"
            )
        attends = last or any(kinds[k].startswith("Attn") for k in (i, len(widths) + i))
        if attends and head is not None and few % head:
            raise UserError(
                f"student.channels {few} is not divided by attention_head_dim {head} of this network; use a "
                f"multiple, such as {max(head, few // head * head)}"
            )


def _check_shortcuts(
    network: UNet2DModel, smaller: UNet2DModel, widths: Sequence[int], channels: Sequence[int]
) -> None:
    """Resolutions of one width add their channels to each other's, those of different ones through a learned
    shortcut. What was one width can only become one."""
    theirs, ours = (
        {n for n, _ in net.named_parameters() if "conv_shortcut" in n} for net in (network, smaller)
    )
    told = f"student.channels {', '.join(map(str, channels))} for {', '.join(map(str, widths))}"
    if ours - theirs:
        raise UserError(
            f"{told}: resolutions of one width have to stay so; use one width for both, or from_config"
        )
    if theirs - ours:
        _warn_once(f"{told}: one width where there were two, without the learned shortcuts between them")


@cache
def _warn_once(text: str) -> None:
    """A run makes its student twice, to check it and to train it."""
    log.warning(text)
