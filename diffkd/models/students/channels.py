"""Students with fewer channels: a UNet2DModel rebuilt from the most important channels of a wider one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DModel

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import log
from diffkd.models.students.channel_groups import channel_groups
from diffkd.models.students.copies import unet_of, with_network
from diffkd.models.students.importance import Scores, norm_scores
from diffkd.models.unet import reinitialized_like


def narrow(teacher: Denoiser, channels: Iterable[int], scores: Scores | None = None) -> Denoiser:
    """The teacher with only `channels` at each resolution, those of the highest scores; by default norms.

    scores: as `importance.taylor_scores` gives them. With the teacher's own channels it is the teacher.
    Raises UserError for widths that are not multiples of the norm's groups or the attention heads.
    """
    return with_network(teacher, narrow_unet(unet_of(teacher), list(channels), scores))


def narrow_unet(network: UNet2DModel, channels: Sequence[int], scores: Scores | None = None) -> UNet2DModel:
    """A new network with `channels` at each resolution; arguments and errors as for `narrow`."""
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    widths = tuple(config["block_out_channels"])
    _check(config, widths, channels)
    config["block_out_channels"] = tuple(channels)
    if config.get("time_embedding_dim"):
        config["time_embedding_dim"] = config["time_embedding_dim"] * channels[0] // widths[0]
    smaller = reinitialized_like(network, **config)
    _check_shortcuts(network, smaller, widths, channels)
    groups = channel_groups(network, smaller)
    scores = norm_scores(network) if scores is None else scores
    old, weights = network.state_dict(), {}
    for name, value in smaller.state_dict().items():
        selected = old[name]
        for dim, parts in groups.get(name, {}).items():
            offsets = torch.tensor([0, *(group.width for group in parts)]).cumsum(0)
            index = [start + group.select(scores) for start, group in zip(offsets[:-1], parts, strict=True)]
            selected = selected.index_select(dim, torch.cat(index).to(selected.device))
        assert selected.shape == value.shape, f"{name}: {tuple(selected.shape)} for {tuple(value.shape)}"
        weights[name] = selected
    smaller.load_state_dict(weights)
    return smaller


def _check(config: Mapping[str, Any], widths: Sequence[int], channels: Sequence[int]) -> None:
    """Raises UserError for networks that are not supported and channels that do not fit the config."""
    if len(channels) != len(widths):
        raise UserError(
            f"student.channels has {len(channels)} entries and the network {len(widths)} resolutions "
            f"({', '.join(map(str, widths))}); give one for each"
        )
    if config["resnet_time_scale_shift"] != "default" or config["class_embed_type"] is not None:
        raise UserError(
            "narrow supports networks with resnet_time_scale_shift default and class labels as numbers; use "
            "drop_blocks or from_config"
        )
    if channels[0] % 2:
        raise UserError(
            f"student.channels {channels[0]} is odd; the first must be even, for sines and cosines of the "
            "time"
        )
    groups, head = config["norm_num_groups"], config["attention_head_dim"]
    kinds = [*config["down_block_types"], *reversed(config["up_block_types"])]
    supported = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")
    unsupported = [kind for kind in kinds if kind not in supported]
    if unsupported or "resnet" in (config["downsample_type"], config["upsample_type"]):
        raise UserError(
            f"narrow supports networks of {', '.join(supported)} with convolutions between them, and this "
            f"one has {unsupported[0] if unsupported else 'resnets'}; use drop_blocks or from_config"
        )
    for i, (wide, few) in enumerate(zip(widths, channels, strict=True)):
        if not 1 <= few <= wide:
            raise UserError(
                f"student.channels {few} is out of range; the teacher has {wide} there: use 1 to {wide}"
            )
        if few % groups:
            raise UserError(
                f"student.channels {few} is not a multiple of this network's norm_num_groups {groups}; use "
                f"one, such as {max(groups, few // groups * groups)}"
            )
        last = i == len(widths) - 1 and config["mid_block_type"] and config["add_attention"]
        norms = config["attn_norm_num_groups"]
        if last and norms and few % norms:
            raise UserError(
                f"student.channels {few} is not a multiple of this network's attn_norm_num_groups "
                f"{norms}; use one"
            )
        attends = last or any(kinds[k].startswith("Attn") for k in (i, len(widths) + i))
        if attends and head is not None and few % head:
            raise UserError(
                f"student.channels {few} is not a multiple of this network's attention_head_dim {head}; use "
                f"one, such as {max(head, few // head * head)}"
            )


def _check_shortcuts(
    network: UNet2DModel, smaller: UNet2DModel, widths: Sequence[int], channels: Sequence[int]
) -> None:
    """Resolutions of equal width are added directly, others through a learned shortcut, which cannot be made
    up: equal widths must stay equal. Raises UserError otherwise; warns where a shortcut is lost."""
    theirs, ours = (
        {n for n, _ in net.named_parameters() if "conv_shortcut" in n} for net in (network, smaller)
    )
    change = f"student.channels {', '.join(map(str, channels))} for {', '.join(map(str, widths))}"
    if ours - theirs:
        raise UserError(
            f"{change}: resolutions of equal width must stay equal; use one width for both, or from_config"
        )
    if theirs - ours:
        _warn_once(f"{change}: equal widths lose the learned shortcuts between them")


@cache
def _warn_once(text: str) -> None:
    """A run builds its student twice, to check it and to train it."""
    log.warning(text)
