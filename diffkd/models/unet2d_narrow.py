"""A UNet2DModel with fewer channels, from the most important channels of a wider one.

Channels that meet in a sum are one `Space`: all that writes into a residual stream, or reads from it, keeps
the same of its channels. Spaces are found by walking through the network as its forward pass does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffkd.base import UserError
from diffkd.models.unet2d import like

log = logging.getLogger("diffkd")


@dataclass(eq=False)
class Space:
    """Channels that are kept or dropped together wherever they occur.

    parts: equal parts in a row that keep the same number each: the groups of a group norm. unit: channels in
    a row that stay together, as those of an attention head. writers: parameters whose rows make them.
    """

    width: int
    narrow: int
    parts: int = 1
    unit: int = 1
    writers: list[str] = field(default_factory=list)
    kept: Tensor | None = None

    def choose(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Indices of the channels that stay, in order: the highest scores of each part. scores: of every
        parameter, one for each row."""
        if self.kept is None:
            total = torch.zeros(self.width, dtype=torch.float64)
            for name in self.writers:
                total += scores[name]
            units = total.view(self.parts, -1, self.unit).sum(-1)
            count = self.narrow // self.parts // self.unit
            best = units.topk(count, dim=1).indices.sort(1).values
            first = torch.arange(self.parts)[:, None] * units.shape[1]
            self.kept = ((best + first).flatten()[:, None] * self.unit + torch.arange(self.unit)).flatten()
        return self.kept


Plan = dict[str, dict[int, tuple[Space, ...]]]  # of each parameter, the spaces along its dimensions


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
    smaller = like(network, **config)
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


class Walk:
    """The spaces of a network's parameters, found in the order of its forward pass.

    smaller: the same network with the widths that are wanted.
    """

    def __init__(self, network: UNet2DModel, smaller: UNet2DModel) -> None:
        self.network, self.smaller = network, smaller
        self.groups = network.config.norm_num_groups
        self.plan: Plan = {}
        self._walk()
        missing = [n for n, p in network.named_parameters() if n not in self.plan]
        if missing:
            raise UserError(
                f"narrow does not know {missing[0]} of this network; use drop_blocks, or from_config"
            )

    def _walk(self) -> None:
        network = self.network
        self.time = self._embedding()
        now = self._weight("conv_in", ())
        skips = [now]
        for i, block in enumerate(network.down_blocks):
            for j in range(len(block.resnets)):
                now = self._layer(f"down_blocks.{i}", j, (now,))
                skips.append(now)
            for _ in block.downsamplers or ():
                now = self._weight(f"down_blocks.{i}.downsamplers.0.conv", (now,))
                skips.append(now)
        if network.mid_block is not None:
            now = self._resnet("mid_block.resnets.0", (now,))
            for j, attention in enumerate(network.mid_block.attentions):
                if attention is not None:
                    self._attention(f"mid_block.attentions.{j}", now)
                now = self._resnet(f"mid_block.resnets.{j + 1}", (now,))
        for i, block in enumerate(network.up_blocks):
            for j in range(len(block.resnets)):
                now = self._layer(f"up_blocks.{i}", j, (now, skips.pop()))
            for _ in block.upsamplers or ():
                now = self._weight(f"up_blocks.{i}.upsamplers.0.conv", (now,))
        self._norm("conv_norm_out", (now,))
        self._put("conv_out.weight", {1: (now,)})
        self._put("conv_out.bias", {})

    def _embedding(self) -> Space:
        """Time, and class labels that are added to it. Those frequencies stay that a narrower one has."""
        wide, few = (n.config.block_out_channels[0] for n in (self.network, self.smaller))
        angles = Space(wide, few)
        shift = self.network.config.freq_shift  # frequency k of n has the exponent k / (n - shift)
        scale = (wide // 2 - shift) / max(few // 2 - shift, 1)
        frequencies = (torch.arange(few // 2) * scale).round().long().clamp(max=wide // 2 - 1)
        angles.kept = torch.cat([frequencies, wide // 2 + frequencies])
        found = angles
        for name in ("time_embedding.linear_1", "time_embedding.linear_2"):
            found = self._weight(name, (found,), parts=1)
        if self.network.class_embedding is not None:
            self._put("class_embedding.weight", {1: (found,)})
        return found

    def _layer(self, block: str, j: int, into: tuple[Space, ...]) -> Space:
        """A resnet, and the attention beside it."""
        out = self._resnet(f"{block}.resnets.{j}", into)
        if hasattr(self.network.get_submodule(block), "attentions"):
            self._attention(f"{block}.attentions.{j}", out)
        return out

    def _resnet(self, name: str, into: tuple[Space, ...]) -> Space:
        self._norm(f"{name}.norm1", into)
        hidden = self._weight(f"{name}.conv1", into)
        self._weight(f"{name}.time_emb_proj", (self.time,), hidden)
        self._norm(f"{name}.norm2", (hidden,))
        if self.network.get_submodule(name).conv_shortcut is None:
            return self._weight(f"{name}.conv2", (hidden,), into[0])
        return self._weight(f"{name}.conv_shortcut", into, self._weight(f"{name}.conv2", (hidden,)))

    def _attention(self, name: str, stream: Space) -> None:
        self._norm(f"{name}.group_norm", (stream,))
        head = self.network.config.attention_head_dim  # without it there is one head, of any width
        unit = head or 1
        keys = self._weight(f"{name}.to_q", (stream,), parts=1, unit=unit)
        self._weight(f"{name}.to_k", (stream,), keys)
        values = keys if head else None  # heads stay whole, with what they look at
        values = self._weight(f"{name}.to_v", (stream,), values, parts=1, unit=unit)
        self._weight(f"{name}.to_out.0", (values,), stream)

    def _norm(self, name: str, spaces: tuple[Space, ...]) -> None:
        self._put(f"{name}.weight", {0: spaces})
        self._put(f"{name}.bias", {0: spaces})

    def _weight(
        self,
        name: str,
        into: tuple[Space, ...],
        out: Space | None = None,
        *,
        parts: int | None = None,
        unit: int = 1,
    ) -> Space:
        """A convolution or linear layer, written into `out`, or into a space of its own."""
        weight = self.network.get_parameter(f"{name}.weight")
        if out is None:
            few = self.smaller.get_parameter(f"{name}.weight").shape[0]
            out = Space(weight.shape[0], few, self.groups if parts is None else parts, unit)
        self._put(f"{name}.weight", {0: (out,)} | ({1: into} if into else {}))
        out.writers.append(f"{name}.weight")
        if self.network.get_submodule(name).bias is not None:
            self._put(f"{name}.bias", {0: (out,)})
            out.writers.append(f"{name}.bias")
        return out

    def _put(self, name: str, spaces: dict[int, tuple[Space, ...]]) -> None:
        self.plan[name] = spaces
