"""8-bit weights for a trained network, by torchao (extra `quant`)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError

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
