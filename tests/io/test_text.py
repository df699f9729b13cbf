"""Words around the names in messages."""

from __future__ import annotations

import pytest

from diffkd.io.text import a_or_an


@pytest.mark.parametrize(
    "phrase",
    [
        "a UNet2DModel", "a UVit2DModel", "a DiTTransformer2DModel", "a FluxTransformer2DModel", "a VQModel",
        "a CLIPTextModel", "a T5EncoderModel", "a ZImagePipeline", "a UniPCMultistepScheduler", "a unet",
        "a SANA-Sprint", "a SanaTransformer2DModel", "a HunyuanDiT2DModel", "a LoRA", "a text_encoder", "a ",
        "an SD3Transformer2DModel", "an SDXL", "an LDMPipeline", "an EDM2UNet", "an MT5EncoderModel",
        "an AutoencoderKL", "an AutoencoderDC", "an EulerDiscreteScheduler", "an I2VGenXLUNet",
        "an image_encoder", "an UpBlock2D", "an RGBImage", "an XLMRobertaModel",
    ],
)  # fmt: skip
def test_articles_go_by_the_sound(phrase):
    assert a_or_an(phrase.partition(" ")[2]) == phrase
