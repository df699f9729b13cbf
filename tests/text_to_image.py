"""Tiny pipelines of the true text-to-image classes, of random weights and a tokenizer of letters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"


def tokenizer(folder: Path, length: int = 77) -> transformers.CLIPTokenizer:
    """A CLIPTokenizer whose tokens are letters, and a few pairs of them."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = list(LETTERS)
    merges = [("r", "e"), ("t", "h"), ("a", "n</w>"), ("re", "d</w>")]
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length
    )


def text_encoder(width: int, tokens: int, *, projected: int | None = None, layers: int = 2) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=tokens, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=projected or width,
        bos_token_id=tokens - 2, eos_token_id=tokens - 1, pad_token_id=tokens - 1,
    )  # fmt: skip
    kind = transformers.CLIPTextModel if projected is None else transformers.CLIPTextModelWithProjection
    return kind(config)


def scheduler(prediction: str = "epsilon", **options: Any) -> Any:
    """Stable Diffusion's own: PNDM of a scaled linear table, whose first index is 1."""
    return diffusers.PNDMScheduler(
        **{
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
            "skip_prk_steps": True, "set_alpha_to_one": False, "prediction_type": prediction, **options,
        }
    )  # fmt: skip


def network(*, xl: bool = False, **options: Any) -> Any:
    """A UNet2DConditionModel for latents of 8x8."""
    more: dict[str, Any] = {"cross_attention_dim": 16}
    if xl:
        more = {
            "cross_attention_dim": 40, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20, "use_linear_projection": True,
        }  # fmt: skip
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
            "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **more, **options,
        }
    )  # fmt: skip


def conditions(count: int, *, xl: bool = False) -> dict[str, torch.Tensor]:
    """What such a network takes beside latents, of so many examples, random and always the same."""
    rng = torch.Generator().manual_seed(8)
    cond = {"encoder_hidden_states": torch.randn(count, 77, 40 if xl else 16, generator=rng)}
    if xl:
        sizes = torch.tensor([32.0, 32, 0, 0, 32, 32]).expand(count, 6)
        cond |= {"text_embeds": torch.randn(count, 20, generator=rng), "time_ids": sizes.clone()}
    return cond


def pipeline(
    work: Path,
    *,
    xl: bool = False,
    prediction: str = "epsilon",
    noise: Any = None,
    tiny_vae: bool = False,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A whole StableDiffusionPipeline or StableDiffusionXLPipeline for images of 32x32, latents of 8x8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = tokenizer(work / "tokenizer")
        encoders = {"text_encoder": text_encoder(16, len(tokens)), "tokenizer": tokens}
        if xl:
            encoders |= {"text_encoder_2": text_encoder(24, len(tokens), projected=20), "tokenizer_2": tokens}
        unet = network(xl=xl, **options)
        if tiny_vae:
            vae: Any = diffusers.AutoencoderTiny(
                encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
                num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
            )  # fmt: skip
        else:
            vae = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
                scaling_factor=0.13025 if xl else 0.18215,
            )  # fmt: skip
        for part in (unet, vae):
            for parameter in part.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
    parts = {
        "unet": unet,
        "vae": vae,
        "scheduler": noise or scheduler(prediction),
        **encoders,
    }
    if xl:
        made = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        made = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    made.set_progress_bar_config(disable=True)
    return made


def teacher_and_images(folder: Path, captions: Sequence[str], *, xl: bool = False) -> None:
    """A v-prediction teacher in `teacher`; in `images` ten of random pixels, with these captions in turn."""
    made = pipeline(folder / "parts", xl=xl, prediction="v_prediction")
    made.save_pretrained(folder / "teacher", safe_serialization=True)
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(captions[i % len(captions)] + "\n")


def clip(folder: Path, *, seed: int = 0, side: int = 56) -> Any:
    """A CLIPModel of random weights, saved with its tokenizer: its cosines have both signs."""
    tokens = tokenizer(folder / "parts")
    small = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    words = {
        "vocab_size": len(tokens), "max_position_embeddings": 77, "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={**small, **words}, vision_config={**small, "image_size": side, "patch_size": 14},
        projection_dim=24,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = transformers.CLIPModel(config).eval().requires_grad_(False)
        for name, parameter in network.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")  # of a norm
            parameter.normal_(std=0.1 if parameter.ndim == 1 else 0.4).add_(float(gain))
    transformers.utils.logging.disable_progress_bar()
    network.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    tokens.save_pretrained(folder)
    return network
