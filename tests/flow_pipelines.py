"""Tiny pipelines of the true text-to-image classes of flows, of random weights and tokenizers of letters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image

from tests import text_to_image

SIDE = 8  # of latents; images are four times as large
CHANNELS = 4


def t5_tokenizer(folder: Path) -> Any:
    """A T5 tokenizer whose tokens are letters, after a word's mark."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [("\u2581", -2.0), *((letter, -3.0) for letter in text_to_image.LETTERS)]
    made = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], 2)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.T5TokenizerFast.from_pretrained(folder)


def t5(width: int, tokens: int) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=tokens, d_model=width, d_kv=4, d_ff=2 * width, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False,
        )
    )  # fmt: skip


def autoencoder(**options: Any) -> Any:
    return diffusers.AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
            "block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": CHANNELS,
            "sample_size": 32, "scaling_factor": 1.5305, "shift_factor": 0.0609, **options,
        }
    )  # fmt: skip


def sd3_network(**options: Any) -> Any:
    return diffusers.SD3Transformer2DModel(
        **{
            "sample_size": SIDE, "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS,
            "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 48,
            "caption_projection_dim": 16, "pooled_projection_dim": 36, "pos_embed_max_size": 8,
            "qk_norm": "rms_norm", "dual_attention_layers": (0,), **options,
        }
    )  # fmt: skip


def flux_network(**options: Any) -> Any:
    return diffusers.FluxTransformer2DModel(
        **{
            "in_channels": 4 * CHANNELS, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 16,
            "axes_dims_rope": (2, 2, 4), "guidance_embeds": True, **options,
        }
    )  # fmt: skip


def scheduler(kind: str, **options: Any) -> Any:
    """The published ones: of Stable Diffusion 3 a static shift of 3, of Flux a dynamic one."""
    given = {"shift": 3.0} if kind == "sd3" else {"shift": 3.0, "use_dynamic_shifting": True}
    return diffusers.FlowMatchEulerDiscreteScheduler(**{**given, **options})


def pipeline(
    work: Path,
    kind: str,
    *,
    noise: Any = None,
    vae: Any = None,
    with_t5: bool = True,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A whole StableDiffusion3Pipeline (sd3) or FluxPipeline (flux) for images of 32x32, latents of 8x8."""
    clip_tokens, t5_tokens = text_to_image.tokenizer(work / "clip"), t5_tokenizer(work / "t5")
    count = len(clip_tokens)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = sd3_network(**options) if kind == "sd3" else flux_network(**options)
        parts: dict[str, Any] = {"transformer": network, "vae": vae or autoencoder()}
        if kind == "sd3":
            parts |= {
                "text_encoder": text_to_image.text_encoder(16, count, projected=16),
                "text_encoder_2": text_to_image.text_encoder(24, count, projected=20),
                "text_encoder_3": t5(48, len(t5_tokens)) if with_t5 else None,
            }
        else:
            parts |= {
                "text_encoder": text_to_image.text_encoder(16, count),
                "text_encoder_2": t5(24, len(t5_tokens)),
            }
        for name in ("transformer", "vae"):
            for parameter in parts[name].parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    t5_name = "tokenizer_3" if kind == "sd3" else "tokenizer_2"
    words = {"tokenizer": clip_tokens, "tokenizer_2": clip_tokens, t5_name: t5_tokens if with_t5 else None}
    made: Any = diffusers.StableDiffusion3Pipeline if kind == "sd3" else diffusers.FluxPipeline
    found = made(**parts, **words, scheduler=noise or scheduler(kind))
    for part in parts.values():
        if part is not None:
            part.eval()
    found.set_progress_bar_config(disable=True)
    return found


def teacher_and_images(folder: Path, kind: str, captions: Sequence[str], **options: Any) -> None:
    """A teacher in `teacher`; in `images` ten of random pixels, with these captions in turn."""
    made = pipeline(folder / "parts", kind, **options)
    made.save_pretrained(folder / "teacher", safe_serialization=True)
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(captions[i % len(captions)] + "\n")
