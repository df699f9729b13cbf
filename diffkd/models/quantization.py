"""Weights of a finished network in 8 bits, through torchao (extra `quant`)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError

Quantize = Literal["int8"]
FEW = 8  # channels that share a scale; of fewer the scales would weigh more than they save


def quantized(denoiser: Denoiser, how: str = "int8") -> Denoiser:
    """The same denoiser, in place: weights of its linear layers and convolutions as int8 with scales.

    Weight-only: a scale for each output channel of a linear layer, and for each output channel and place of
    a convolution's kernel; biases, norms, embeddings and convolutions of fewer than FEW channels stay.
    Weights take about a quarter of the memory, and are brought back for each use, which takes time. It cannot
    be trained or saved then. Raises UserError without torchao.
    """
    if how != "int8":
        raise UserError(f"quantize {how!r} is unknown; use int8")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis
    except ImportError as error:
        raise UserError("int8 weights need torchao; install it with pip install 'diffkd[quant]'") from error
    network = denoiser.network.requires_grad_(False)
    quantize_(network, Int8WeightOnlyConfig())
    # torchao's own int8 tensor has no convolution; its tensor for any number of bits has
    convolutions = IntxWeightOnlyConfig(torch.int8, PerAxis(0))
    quantize_(network, convolutions, filter_fn=_is_wide)
    return denoiser


def _is_wide(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Conv2d) and module.in_channels // module.groups >= FEW
