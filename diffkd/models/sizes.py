"""The size of a network: parameters, multiply-accumulates for one image, bytes of its weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffkd.core.denoiser import Denoiser


def _attention_flops(query: Any, key: Any, value: Any, *more: Any, **options: Any) -> int:
    count: int = sdpa_flop_count(query, key, value)
    return count


# torch counts attention on CUDA only
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class Size(NamedTuple):
    """macs: multiply-accumulates of matrix products, convolutions and attention in one pass of one image;
    elementwise work, such as normalisation, is not counted. bytes: of all weights in their present dtype.
    """

    parameters: int
    macs: int
    bytes: int

    def recorded(self) -> dict[str, int]:
        """As a record of a measurement holds it."""
        return {"parameters": self.parameters, "macs": self.macs, "bytes": self.bytes}

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.3g} M parameters, {self.macs / 1e6:.3g} M MACs"


def network_size(network: nn.Module, *inputs: Any, **options: Any) -> Size:
    """The size of a network that is called with these inputs, of one image."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        network(*inputs, **options)
    parameters = sum(p.numel() for p in network.parameters())
    return Size(parameters, counter.get_total_flops() // 2, weight_bytes(network))


def weight_bytes(network: nn.Module) -> int:
    return sum(map(_bytes, (*network.parameters(), *network.buffers())))


def _bytes(weight: Tensor) -> int:
    if is_traceable_wrapper_subclass(weight):  # a quantized weight is integers and their scales
        return sum(_bytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
    return weight.numel() * weight.element_size()


def denoiser_size(denoiser: Denoiser) -> Size:
    """The size of a denoiser's network; macs of one evaluation, of which guidance takes two."""
    x_t, t, cond = denoiser.example_inputs()
    found = network_size(denoiser, x_t, t, **cond)
    if denoiser.worse is None:
        return found
    worse = denoiser_size(denoiser.worse)  # whose weights are among the denoiser's
    return Size(found.parameters - worse.parameters, found.macs, found.bytes - worse.bytes)


def drawn_size(denoiser: Denoiser) -> Size:
    """Of all that it is drawn with: a worse model that guidance leads away from counts, too. macs are then
    the mean of the two networks', which take turns."""
    own = denoiser_size(denoiser)
    if denoiser.worse is None:
        return own
    worse = denoiser_size(denoiser.worse)
    return Size(own.parameters + worse.parameters, (own.macs + worse.macs) // 2, own.bytes + worse.bytes)
