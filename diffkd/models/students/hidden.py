"""Students with fewer hidden channels in the feed-forward layers of a transformer, where its config counts
them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import a_or_an
from diffkd.models.students.channel_groups import ChannelGroup
from diffkd.models.students.copies import with_network
from diffkd.models.students.importance import Scores, norm_scores
from diffkd.models.students.transformers import made_like, stock_name


class FeedForward(NamedTuple):
    """How a stock class calls a feed-forward layer and its parameters.

    writers: whose rows are the hidden channels, or their values and then their gates. reader: whose columns
    are.
    """

    name: str
    writers: tuple[str, ...]
    reader: str


LAYERS = {
    "Lumina2Transformer2DModel": FeedForward(
        "feed_forward", ("linear_1.weight", "linear_3.weight"), "linear_2.weight"
    ),
    "SanaTransformer2DModel": FeedForward(
        "ff", ("conv_inverted.weight", "conv_inverted.bias", "conv_depth.weight", "conv_depth.bias"),
        "conv_point.weight",
    ),
}  # fmt: skip


def narrow_hidden(teacher: Denoiser, ratio: float, scores: Scores | None = None) -> Denoiser:
    """The teacher with this share of the hidden channels of every feed-forward layer, those of the highest
    scores; by default norms.

    scores: as `importance.taylor_scores` gives them. At a ratio of 1 it is the teacher. Raises UserError for
    a transformer whose config does not count them, and where the share is no number that it can say.
    """
    network: Any = teacher.network
    kind = stock_name(network)
    if kind not in LAYERS:
        raise UserError(
            f"narrow does not support {a_or_an(kind)}, whose config has one width for attention and "
            "feed-forward layers; use drop_blocks, such as keep: 0.5"
        )
    layer = LAYERS[kind]
    found = {name for name, _ in network.named_modules() if name.rpartition(".")[2] == layer.name}
    (width,) = {network.get_submodule(name).get_parameter(layer.reader).shape[1] for name in found}
    smaller = made_like(network, **_changes(network, width, _share(network, width, ratio)))
    scores = norm_scores(network) if scores is None else scores
    old = network.state_dict()
    new = dict(old)
    for name in found:
        (kept,) = {smaller.get_submodule(name).get_parameter(layer.reader).shape[1]}
        writers = [f"{name}.{one}" for one in layer.writers]
        chosen = ChannelGroup(width, kept, writers=writers).select(scores)
        for one in writers:
            parts = old[one].unflatten(0, (-1, width))
            new[one] = parts.index_select(1, chosen.to(parts.device)).flatten(0, 1)
        reader = f"{name}.{layer.reader}"
        new[reader] = old[reader].index_select(1, chosen.to(old[reader].device))
    smaller.load_state_dict(new)
    return with_network(teacher, smaller)


def _share(network: Any, width: int, ratio: float) -> int:
    """So many of the hidden channels. Raises UserError for a number that the config cannot say."""
    unit = network.config.get("multiple_of", 1)  # Lumina 2's widths are rounded up to one
    kept = round(width * ratio)
    if abs(width * ratio - kept) > 1e-6 or kept % unit or not kept:
        whole = f"multiple of {unit}" if unit > 1 else "integer"
        near = max(unit, kept // unit * unit) / width
        raise UserError(
            f"student.ratio {ratio} of {width} hidden channels is {width * ratio:g}, which is no {whole} "
            f"above 0; use another ratio, such as {near:g}"
        )
    return kept


def _changes(network: Any, width: int, kept: int) -> Mapping[str, Any]:
    """The fields of the config that say so many hidden channels, as fields of floats whose product with a
    width is rounded down."""
    config = network.config
    if kept == width:
        return {}
    if stock_name(network) == "SanaTransformer2DModel":
        return {"mlp_ratio": _factor(kept, config.num_attention_heads * config.attention_head_dim)}
    return {"ffn_dim_multiplier": _factor(kept, 4 * config.hidden_size)}


def _factor(wanted: int, width: int) -> float:
    """The least quotient whose product with the width is not below what is wanted."""
    factor = wanted / width
    return factor if int(factor * width) == wanted else math.nextafter(factor, math.inf)
