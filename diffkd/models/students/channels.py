"""Students with fewer channels: a UNet rebuilt from the most important channels of a wider one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import log
from diffkd.models.students.channel_groups import channel_groups
from diffkd.models.students.copies import unet_of, with_network
from diffkd.models.students.importance import Scores, norm_scores
from diffkd.models.students.resolutions import of_each
from diffkd.models.unet import UNet, config_of, reinitialized_like

SUPPORTED = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")
SUPPORTED_PROMPTED = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")


def narrow(teacher: Denoiser, channels: Iterable[int], scores: Scores | None = None) -> Denoiser:
    """The teacher with only `channels` at each resolution, those of the highest scores; by default norms.

    scores: as `importance.taylor_scores` gives them. With the teacher's own channels it is the teacher.
    Raises UserError for widths that are not multiples of the norm's groups or the attention heads.
    """
    return with_network(teacher, narrow_unet(unet_of(teacher), list(channels), scores))


def narrow_unet(network: UNet, channels: Sequence[int], scores: Scores | None = None) -> UNet:
    """A new network with `channels` at each resolution; arguments and errors as for `narrow`.

    A transformer keeps whole heads, and reads all of a prompt's embedding.
    """
    config = config_of(network)
    widths = tuple(config["block_out_channels"])
    _check(network, config, widths, channels)
    config["block_out_channels"] = tuple(channels)
    if config.get("time_embedding_dim"):
        config["time_embedding_dim"] = config["time_embedding_dim"] * channels[0] // widths[0]
    if isinstance(network, UNet2DConditionModel):
        config["attention_head_dim"] = _heads(config["attention_head_dim"], widths, channels)
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


def _heads(given: Any, widths: Sequence[int], channels: Sequence[int]) -> Any:
    """attention_head_dim, by which a UNet2DConditionModel means the number of heads: fewer, as wide as they
    were."""
    each = zip(of_each(given, len(widths)), widths, channels, strict=True)
    heads = [max(1, count * few // wide) for count, wide, few in each]
    if isinstance(given, int):
        return heads[0] if len({*heads}) == 1 else heads
    return type(given)(heads)


def _check(network: UNet, config: Mapping[str, Any], widths: Sequence[int], channels: Sequence[int]) -> None:
    """Raises UserError for networks that are not supported and channels that do not fit the config."""
    if len(channels) != len(widths):
        raise UserError(
            f"student.channels has {len(channels)} entries and the network {len(widths)} resolutions "
            f"({', '.join(map(str, widths))}); give one for each"
        )
    if config["resnet_time_scale_shift"] != "default" or config["class_embed_type"] is not None:
        raise UserError(
            "narrow supports networks with resnet_time_scale_shift default and class labels as numbers; use "
            "drop_blocks"
        )
    supported = SUPPORTED_PROMPTED if isinstance(network, UNet2DConditionModel) else SUPPORTED
    unsupported = {*config["down_block_types"], *config["up_block_types"]} - {*supported}
    if unsupported or "resnet" in (config.get("downsample_type"), config.get("upsample_type")):
        raise UserError(
            f"narrow supports networks of {', '.join(supported)} with convolutions between them, and this "
            f"one has {min(unsupported, default='resnets')}; use drop_blocks"
        )
    if channels[0] % 2:
        raise UserError(
            f"student.channels {channels[0]} is odd; the first must be even, for sines and cosines of the "
            "time"
        )
    for i, (wide, few) in enumerate(zip(widths, channels, strict=True)):
        if not 1 <= few <= wide:
            raise UserError(
                f"student.channels {few} is out of range; the teacher has {wide} there: use 1 to {wide}"
            )
        units = _units(network, i)
        step = math.lcm(*units.values())
        if few % step:
            raise UserError(
                f"student.channels {few} is not a multiple of {step} (this network has "
                f"{' and '.join(units)}); use one, such as {max(step, few // step * step)}"
            )


def _units(network: UNet, i: int) -> dict[str, int]:
    """What the channels of resolution i must be a multiple of, and why. Raises UserError for heads that are
    not as wide as these together."""
    config, blocks = network.config, [network.down_blocks[i], network.up_blocks[-1 - i]]
    middle = network.mid_block if i == len(network.down_blocks) - 1 else None
    if middle is not None:
        blocks.append(middle)
    units = {f"norm_num_groups {config.norm_num_groups}": config.norm_num_groups}
    attentions = [one for block in blocks for one in block.modules() if isinstance(one, Attention)]
    if attentions and config.attention_head_dim is not None:  # None: a single head of any width
        heads, inner, wide = attentions[0].heads, attentions[0].inner_dim, config.block_out_channels[i]
        if inner != wide:
            raise UserError(
                f"narrow needs attention as wide as the channels, and this network has {inner} in {heads} "
                f"heads where it has {wide} channels; use drop_blocks"
            )
        head = inner // heads
        units[f"attention heads of {head} channels"] = head
    norms = config.get("attn_norm_num_groups")
    if norms and middle is not None and config.add_attention:
        units[f"attn_norm_num_groups {norms}"] = norms
    return units


def _check_shortcuts(network: UNet, smaller: UNet, widths: Sequence[int], channels: Sequence[int]) -> None:
    """Resolutions of equal width are added directly, others through a learned shortcut, which cannot be made
    up: equal widths must stay equal. Raises UserError otherwise; warns where a shortcut is lost."""
    theirs, ours = (
        {n for n, _ in net.named_parameters() if "conv_shortcut" in n} for net in (network, smaller)
    )
    change = f"student.channels {', '.join(map(str, channels))} for {', '.join(map(str, widths))}"
    if ours - theirs:
        raise UserError(f"{change}: resolutions of equal width must stay equal; use one width for both")
    if theirs - ours:
        _warn_once(f"{change}: equal widths lose the learned shortcuts between them")


@cache
def _warn_once(text: str) -> None:
    """A run builds its student twice, to check it and to train it."""
    log.warning(text)
