"""Channel groups of a UNet: the channels that must be kept or dropped together in all its weights.

Everything that writes into a residual stream or reads from it must keep the same channels. The groups are
found by walking through the network in the order of its forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from diffusers import Transformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor

from diffkd.errors import UserError
from diffkd.models.unet import UNet


@dataclass(eq=False)
class ChannelGroup:
    """`width` channels, of which the same `kept_width` are kept wherever they occur.

    parts: equal consecutive parts, each of which keeps the same number: the groups of a group norm. unit:
    consecutive channels that stay together, such as an attention head's. writers: parameters whose rows
    compute the channels, once or several times over, such as the values and then the gates of a GEGLU.
    """

    width: int
    kept_width: int
    parts: int = 1
    unit: int = 1
    writers: list[str] = field(default_factory=list)
    kept: Tensor | None = None

    def select(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Indices of the channels that stay, ascending: those of the highest scores in each part. scores: one
        for every row of every parameter."""
        if self.kept is None:
            total = torch.zeros(self.width, dtype=torch.float64)
            for name in self.writers:
                total += scores[name].view(-1, self.width).sum(0)
            units = total.view(self.parts, -1, self.unit).sum(-1)
            count = self.kept_width // self.parts // self.unit
            best = units.topk(count, dim=1).indices.sort(1).values
            first = torch.arange(self.parts)[:, None] * units.shape[1]
            self.kept = ((best + first).flatten()[:, None] * self.unit + torch.arange(self.unit)).flatten()
        return self.kept


Groups = dict[str, dict[int, tuple[ChannelGroup, ...]]]  # parameter, dimension: the groups along it


def channel_groups(network: UNet, smaller: UNet) -> Groups:
    """The groups along the dimensions of every parameter. smaller: the same network with the widths to keep.

    Raises UserError for a network with parameters that the walk does not meet.
    """
    walk = _Walk(network, smaller)
    walk.run()
    missing = [name for name, _ in network.named_parameters() if name not in walk.groups]
    if missing:
        raise UserError(f"narrow does not support {missing[0]} of this network; use drop_blocks")
    return walk.groups


class _Walk:
    """A walk through a network in the order of its forward pass, which fills `groups`."""

    def __init__(self, network: UNet, smaller: UNet) -> None:
        self.network, self.smaller = network, smaller
        self.norm_groups = network.config.norm_num_groups
        self.groups: Groups = {}

    def run(self) -> None:
        network = self.network
        self.time = self._time_embedding()
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
                    self._attend(f"mid_block.attentions.{j}", now)
                now = self._resnet(f"mid_block.resnets.{j + 1}", (now,))
        for i, block in enumerate(network.up_blocks):
            for j in range(len(block.resnets)):
                now = self._layer(f"up_blocks.{i}", j, (now, skips.pop()))
            for _ in block.upsamplers or ():
                now = self._weight(f"up_blocks.{i}.upsamplers.0.conv", (now,))
        self._norm("conv_norm_out", (now,))
        self._put("conv_out.weight", {1: (now,)})
        self._put("conv_out.bias", {})

    def _time_embedding(self) -> ChannelGroup:
        """Time, with what is added to it: the guidance weight to its angles, class labels or SDXL's pooled
        prompt and sizes to what is made of them. The frequencies nearest to the narrower network's are
        kept."""
        wide, few = (n.config.block_out_channels[0] for n in (self.network, self.smaller))
        angles = ChannelGroup(wide, few)
        shift = self.network.config.freq_shift  # frequency k of n has the exponent k / (n - shift)
        scale = (wide // 2 - shift) / max(few // 2 - shift, 1)
        frequencies = (torch.arange(few // 2) * scale).round().long().clamp(max=wide // 2 - 1)
        angles.kept = torch.cat([frequencies, wide // 2 + frequencies])
        if self.network.time_embedding.cond_proj is not None:
            self._weight("time_embedding.cond_proj", (), angles)
        hidden = self._weight("time_embedding.linear_1", (angles,), parts=1)
        time = self._weight("time_embedding.linear_2", (hidden,), parts=1)
        if self.network.class_embedding is not None:
            self._put("class_embedding.weight", {1: (time,)})
        if isinstance(getattr(self.network, "add_embedding", None), TimestepEmbedding):
            hidden = self._weight("add_embedding.linear_1", (), parts=1)
            self._weight("add_embedding.linear_2", (hidden,), time)
        return time

    def _layer(self, block: str, j: int, into: tuple[ChannelGroup, ...]) -> ChannelGroup:
        """A resnet and the attention beside it."""
        out = self._resnet(f"{block}.resnets.{j}", into)
        if hasattr(self.network.get_submodule(block), "attentions"):
            self._attend(f"{block}.attentions.{j}", out)
        return out

    def _resnet(self, name: str, into: tuple[ChannelGroup, ...]) -> ChannelGroup:
        self._norm(f"{name}.norm1", into)
        hidden = self._weight(f"{name}.conv1", into)
        self._weight(f"{name}.time_emb_proj", (self.time,), hidden)
        self._norm(f"{name}.norm2", (hidden,))
        if self.network.get_submodule(name).conv_shortcut is None:
            return self._weight(f"{name}.conv2", (hidden,), into[0])
        return self._weight(f"{name}.conv_shortcut", into, self._weight(f"{name}.conv2", (hidden,)))

    def _attend(self, name: str, stream: ChannelGroup) -> None:
        """What stands beside a resnet: attention, or a transformer with channels of its own inside."""
        module = self.network.get_submodule(name)
        if isinstance(module, Attention):
            self._norm(f"{name}.group_norm", (stream,))
            self._attention(name, stream, self.network.config.attention_head_dim)
        elif isinstance(module, Transformer2DModel):
            self._norm(f"{name}.norm", (stream,))
            inner = self._weight(f"{name}.proj_in", (stream,), parts=1)
            for k in range(len(module.transformer_blocks)):
                self._transformer_block(f"{name}.transformer_blocks.{k}", inner)
            self._weight(f"{name}.proj_out", (inner,), stream)

    def _transformer_block(self, name: str, stream: ChannelGroup) -> None:
        for number, attention in enumerate(("attn1", "attn2"), 1):
            self._norm(f"{name}.norm{number}", (stream,))
            module = self.network.get_submodule(f"{name}.{attention}")
            self._attention(f"{name}.{attention}", stream, module.inner_dim // module.heads)
        self._norm(f"{name}.norm3", (stream,))
        self._feed_forward(f"{name}.ff.net", stream)

    def _attention(self, name: str, stream: ChannelGroup, head: int | None) -> None:
        """head: channels of a head, None for a single one of any width. A prompt is read whole."""
        unit = head or 1
        source = () if self.network.get_submodule(name).is_cross_attention else (stream,)
        keys = self._weight(f"{name}.to_q", (stream,), parts=1, unit=unit)
        self._weight(f"{name}.to_k", source, keys)
        values = keys if head else None  # a head keeps its queries, keys and values together
        values = self._weight(f"{name}.to_v", source, values, parts=1, unit=unit)
        self._weight(f"{name}.to_out.0", (values,), stream)

    def _feed_forward(self, name: str, stream: ChannelGroup) -> None:
        """GEGLU: a channel is a value and its gate, rows of one layer, which go together."""
        wide, few = (n.get_parameter(f"{name}.2.weight").shape[1] for n in (self.network, self.smaller))
        hidden = ChannelGroup(wide, few)
        self._put(f"{name}.0.proj.weight", {0: (hidden, hidden), 1: (stream,)})
        self._put(f"{name}.0.proj.bias", {0: (hidden, hidden)})
        hidden.writers += [f"{name}.0.proj.weight", f"{name}.0.proj.bias"]
        self._weight(f"{name}.2", (hidden,), stream)

    def _norm(self, name: str, groups: tuple[ChannelGroup, ...]) -> None:
        self._put(f"{name}.weight", {0: groups})
        self._put(f"{name}.bias", {0: groups})

    def _weight(
        self,
        name: str,
        into: tuple[ChannelGroup, ...],
        out: ChannelGroup | None = None,
        *,
        parts: int | None = None,
        unit: int = 1,
    ) -> ChannelGroup:
        """A convolution or linear layer that writes into `out`, by default a group of its own."""
        weight = self.network.get_parameter(f"{name}.weight")
        if out is None:
            few = self.smaller.get_parameter(f"{name}.weight").shape[0]
            out = ChannelGroup(weight.shape[0], few, self.norm_groups if parts is None else parts, unit)
        self._put(f"{name}.weight", {0: (out,)} | ({1: into} if into else {}))
        out.writers.append(f"{name}.weight")
        if self.network.get_submodule(name).bias is not None:
            self._put(f"{name}.bias", {0: (out,)})
            out.writers.append(f"{name}.bias")
        return out

    def _put(self, name: str, groups: dict[int, tuple[ChannelGroup, ...]]) -> None:
        self.groups[name] = groups
