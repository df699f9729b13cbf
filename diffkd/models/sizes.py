"""How large a network is: parameters, multiply-accumulates of one image, bytes of its weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffkd.core.denoiser import Denoiser


def _attention(query: Any, key: Any, value: Any, *more: Any, **options: Any) -> int:
    count: int = sdpa_flop_count(query, key, value)
    return count


ON_CPUS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention
}  # torch counts CUDA's alone


class Size(NamedTuple):
    """macs: multiply-accumulates of matrix products, convolutions and attention in one pass of one image;
    what is done element by element, such as normalisation, is not counted. bytes: of all weights as they are.
    """

    parameters: int
    macs: int
    bytes: int

    def recorded(self) -> dict[str, int]:
        """What a record of a measurement says of it."""
        return {"parameters": self.parameters, "macs": self.macs, "bytes": self.bytes}

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.3g} M parameters, {self.macs / 1e6:.3g} M MACs"


def network_size(network: nn.Module, *inputs: Any, **more: Any) -> Size:
    """Of a network called with these inputs, of one image."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPUS) as counter, torch.no_grad():
        network(*inputs, **more)
    weights = [*network.parameters(), *network.buffers()]
    parameters = sum(p.numel() for p in network.parameters())
    return Size(parameters, counter.get_total_flops() // 2, sum(map(_bytes, weights)))


def _bytes(weight: Tensor) -> int:
    if is_traceable_wrapper_subclass(weight):  # of quantized ones, integers and their scales
        return sum(_bytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
    return weight.numel() * weight.element_size()


def denoiser_size(denoiser: Denoiser) -> Size:
    """Of one network evaluation; guidance takes two."""
    x_t, t, cond = denoiser.example_inputs()
    return network_size(denoiser, x_t, t, **cond)
