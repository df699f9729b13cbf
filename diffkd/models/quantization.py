"""8-bit weights for a trained network, by torchao (extra `quant`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.models import sizes
from diffkd.models.installed import dtype_argument
from diffkd.models.pipeline_files import forget_origin

SAVED = {"Int8WeightOnlyConfig", "PerRow"}  # classes in the config of saved weights that are opened
KEPT = ["time_embedding.cond_proj"]  # layers of saved networks that are looked at, and so no integers
Quantize = Literal["int8"]
MIN_CHANNELS = 8  # that share a scale; with fewer, the scales would outweigh the savings


def quantized(denoiser: Denoiser, scheme: str = "int8") -> Denoiser:
    """Quantizes the weights of linear layers and convolutions to int8 with scales, in place.

    Weight-only: one scale for each output channel of a linear layer, and for each output channel and position
    of a convolution's kernel; biases, norms, embeddings and convolutions of fewer than MIN_CHANNELS channels
    stay. Weights take about a quarter of the memory and are dequantized on every use, which takes time; the
    denoiser can no longer be trained or saved. Raises UserError without torchao.
    """
    if scheme != "int8":
        raise UserError(f"quantize {scheme!r} is unknown; use int8")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis
    except ImportError as error:
        raise UserError("int8 weights need torchao; install it with pip install torchao") from error
    network = denoiser.network.requires_grad_(False)
    quantize_(network, Int8WeightOnlyConfig())
    # torchao's int8 tensor does not support convolutions; its intx tensor does
    convolutions = IntxWeightOnlyConfig(torch.int8, PerAxis(0))
    quantize_(network, convolutions, filter_fn=_is_wide_convolution)
    return denoiser


def _is_wide_convolution(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Conv2d) and module.in_channels // module.groups >= MIN_CHANNELS


# weights that are saved: as diffusers has them, of linear layers alone


class Held(NamedTuple):
    """Weights of a network: how many are integers, how many there are, and the bytes of all."""

    integers: int
    all: int
    bytes: int


def held(network: nn.Module) -> Held:
    weights = [*network.parameters()]
    integers = sum(p.numel() for p in weights if is_traceable_wrapper_subclass(p))
    return Held(integers, sum(p.numel() for p in weights), sizes.weight_bytes(network))


def is_quantized(network: nn.Module) -> bool:
    return any(map(is_traceable_wrapper_subclass, network.parameters()))


def stock(kind: Any, place: Path) -> Any:
    """The network of this class in a folder, read by diffusers in bfloat16 with the weights of its linear
    layers in int8, a scale for each output channel. Its save_pretrained writes it so."""
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[*KEPT])
    how: dict[str, Any] = {dtype_argument(): torch.bfloat16}
    network = kind.from_pretrained(place, use_safetensors=True, quantization_config=config, **how)
    forget_origin(network)
    return network


def is_opened(config: Any) -> bool:
    """Whether the quantization_config of a network that is to be read is what `stock` writes: it names
    classes of torchao, and no others are built. Raises UserError without torchao."""
    if not isinstance(config, dict) or config.get("quant_method") != "torchao":
        return False
    if not (named := {*_named(config.get("quant_type"))}) or not named <= SAVED:
        return False
    if importlib.util.find_spec("torchao") is None:
        raise UserError("int8 weights need torchao; install it with pip install torchao")
    return True


def _named(content: Any) -> list[str]:
    """Classes that a nested config names, in any place."""
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    here = [str(content["_type"])] if isinstance(content, dict) and "_type" in content else []
    return here + [name for value in inner for name in _named(value)]


@torch.no_grad()
def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Makes a network compute in this dtype, in place: an integer weight keeps its integers and scales, and
    says that it stands for one of this dtype, which `Module.to` does not change."""
    for module in network.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if is_traceable_wrapper_subclass(parameter):
                weight: Any = parameter
                made = type(weight)(
                    weight.qdata, weight.scale, weight.block_size, dtype, zero_point=weight.zero_point
                )
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
            elif parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in [*module.named_buffers(recurse=False)]:
            if buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
