"""Tiny pipelines of the true text-to-image transformers that are told which tokens are padding, of random
weights and tokenizers of letters."""

from __future__ import annotations

import inspect
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
from tokenizers.pre_tokenizers import ByteLevel

from tests import flow_pipelines

NAMES = {
    "pixart_alpha": "PixArtAlphaPipeline", "pixart_sigma": "PixArtSigmaPipeline", "sana": "SanaPipeline",
    "lumina2": "Lumina2Pipeline", "z_image": "ZImagePipeline", "qwen_image": "QwenImagePipeline",
}  # fmt: skip
PIPELINES: dict[str, Any] = {
    kind: getattr(diffusers, name) for kind, name in NAMES.items() if hasattr(diffusers, name)
}
KINDS = tuple(PIPELINES)  # those that the installed diffusers has
SIDE = 8  # of latents
CHANNELS = 4
WIDTH = 16  # of text encoders
PIXELS = dict.fromkeys(KINDS, 4 * SIDE) | {"lumina2": 8 * SIDE}  # a side of an image
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,.-'<>:;|\n\u2581"
CHAT = (  # as Qwen's, but short
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sana_instruction() -> list[str]:
    """What SanaPipeline puts before a prompt by default."""
    call: Any = inspect.signature(diffusers.SanaPipeline.__call__)
    found: list[str] = call.parameters["complex_human_instruction"].default
    return found


def gemma_tokenizer() -> Any:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocabulary = {token: number for number, token in enumerate([*special, *LETTERS])}
    made = transformers.GemmaTokenizerFast(vocab=vocabulary, merges=[], add_bos_token=True)
    # or the instruction of a thousand letters would be most of the time of a test
    made.add_tokens([tokenizers.AddedToken(line, normalized=False) for line in sana_instruction()])
    return made


def qwen_tokenizer() -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    made = transformers.Qwen2TokenizerFast(
        vocab=vocabulary, merges=[], additional_special_tokens=special[1:], chat_template=CHAT
    )
    assert made("<|im_start|>").input_ids == [1]
    return made


def language_model(kind: str, tokens: int) -> Any:
    sizes = {
        "vocab_size": tokens, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    if kind in ("sana", "lumina2"):
        return transformers.Gemma2Model(transformers.Gemma2Config(**sizes, query_pre_attn_scalar=8))
    if kind == "z_image":
        return transformers.Qwen3Model(transformers.Qwen3Config(**sizes))
    del sizes["head_dim"]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0], "patch_size": 14,
    }  # fmt: skip
    ids = dict.fromkeys(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 0
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={**sizes, "rope_parameters": rope, "rope_scaling": rope}, vision_config=vision, **ids
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def text_parts(work: Path, kind: str) -> dict[str, Any]:
    if kind.startswith("pixart"):
        tokenizer = flow_pipelines.t5_tokenizer(work / "t5")
        return {"tokenizer": tokenizer, "text_encoder": flow_pipelines.t5(WIDTH, len(tokenizer))}
    tokenizer = gemma_tokenizer() if kind in ("sana", "lumina2") else qwen_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": language_model(kind, len(tokenizer))}


def autoencoder(kind: str, **options: Any) -> Any:
    if kind == "sana":
        levels: dict[str, Any] = {
            f"{part}_{name}": value
            for part in ("encoder", "decoder")
            for name, value in (
                ("block_types", "ResBlock"), ("block_out_channels", (8, 8, 8)),
                ("layers_per_block", (1, 1, 1)), ("qkv_multiscales", ((), (), ())),
            )
        }  # fmt: skip
        given = {"latent_channels": CHANNELS, "attention_head_dim": 8, "scaling_factor": 0.41407, **levels}
        return diffusers.AutoencoderDC(**{**given, **options})
    if kind == "qwen_image":
        given = {
            "base_dim": 8, "z_dim": CHANNELS, "dim_mult": [1, 1, 1], "num_res_blocks": 1,
            "temperal_downsample": [False, True], "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [1.5, 0.5, 2.0, 1.0],
        }  # fmt: skip
        return diffusers.AutoencoderKLQwenImage(**{**given, **options})
    depth = 4 if kind == "lumina2" else 3
    given = {
        "down_block_types": ("DownEncoderBlock2D",) * depth, "up_block_types": ("UpDecoderBlock2D",) * depth,
        "block_out_channels": (8,) * depth,
    }  # fmt: skip
    if kind.startswith("pixart"):
        given |= {"scaling_factor": 0.13025, "shift_factor": None}
    return flow_pipelines.autoencoder(**{**given, **options})


def network(kind: str, **options: Any) -> Any:
    if kind.startswith("pixart"):
        given: dict[str, Any] = {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": CHANNELS,
            "out_channels": 2 * CHANNELS, "num_layers": 2, "cross_attention_dim": 24, "sample_size": SIDE,
            "caption_channels": WIDTH,
        }  # fmt: skip
        return diffusers.PixArtTransformer2DModel(**{**given, **options})
    if kind == "sana":
        given = {
            "in_channels": CHANNELS, "out_channels": CHANNELS, "num_attention_heads": 2,
            "attention_head_dim": 8, "num_layers": 2, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": WIDTH,
            "sample_size": SIDE, "timestep_scale": 0.5, "qk_norm": "rms_norm_across_heads",
        }  # fmt: skip
        return diffusers.SanaTransformer2DModel(**{**given, **options})
    if kind == "lumina2":
        given = {
            "sample_size": SIDE, "in_channels": CHANNELS, "hidden_size": 16, "num_layers": 2,
            "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8,
            "axes_dim_rope": (2, 2, 4), "axes_lens": (300, 16, 16), "cap_feat_dim": WIDTH,
        }  # fmt: skip
        return diffusers.Lumina2Transformer2DModel(**{**given, **options})
    if kind == "z_image":
        given = {
            "in_channels": CHANNELS, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
            "n_kv_heads": 2, "cap_feat_dim": WIDTH, "axes_dims": [2, 2, 4], "axes_lens": [1024, 32, 32],
        }  # fmt: skip
        return diffusers.ZImageTransformer2DModel(**{**given, **options})
    given = {
        "in_channels": 4 * CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip
    return diffusers.QwenImageTransformer2DModel(**{**given, **options})


def scheduler(kind: str) -> Any:
    """The published ones."""
    if kind == "sana":
        return diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    if kind.startswith("pixart"):
        return diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", thresholding=False)
    if kind == "qwen_image":
        return diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
            shift_terminal=0.02, time_shift_type="exponential",
        )  # fmt: skip
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0 if kind == "lumina2" else 3.0)


def pipeline(
    work: Path, kind: str, *, noise: Any = None, vae: Any = None, seed: int = 0, **options: Any
) -> Any:
    """A whole pipeline for latents of 8x8, random but far from initialisation, where it says little."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {
            "transformer": network(kind, **options), "vae": vae or autoencoder(kind), **text_parts(work, kind)
        }  # fmt: skip
        for name in ("transformer", "vae"):
            for parameter in parts[name].parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    made = PIPELINES[kind](**parts, scheduler=noise or scheduler(kind))
    made.set_progress_bar_config(disable=True)
    return made


def save(made: Any, kind: str, folder: Path) -> None:
    """With the size of its images, which by the pipelines' own default would be 1024 pixels."""
    made.save_pretrained(folder, safe_serialization=True)
    call = {"height": PIXELS[kind], "width": PIXELS[kind]}
    (folder / "diffkd.json").write_text(json.dumps({"call": call}))


def teacher_and_images(folder: Path, kind: str, captions: Sequence[str], **options: Any) -> None:
    """A teacher in `teacher`; in `images` ten of random pixels, with these captions in turn."""
    save(pipeline(folder / "parts", kind, **options), kind, folder / "teacher")
    (folder / "images").mkdir()
    side = PIXELS[kind]
    pixels = np.random.default_rng(0).integers(0, 256, (10, side, side, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(captions[i % len(captions)] + "\n")
