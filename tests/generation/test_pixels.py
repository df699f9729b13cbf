"""8-bit pixels, beside those of the stock pipelines."""

import numpy as np
import torch

from diffkd.generation.pixels import to_uint8


def test_pixels_are_rounded_as_pil_pipelines_do():
    x0 = torch.linspace(-1.5, 1.5, 4001).reshape(1, 1, 1, -1)
    stock = ((x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    assert np.array_equal(to_uint8(x0).numpy(), stock)
    every = torch.arange(256).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(every / 127.5 - 1)[..., 0].long(), every[:, 0])
