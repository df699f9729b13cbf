"""Which weights of a UNet2DModel share their channels: what a narrower one has to take together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffkd.errors import UserError


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
