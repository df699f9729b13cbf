"""A small text-to-image model from nothing: autoencoder, tokenizer, text encoder, UNet, of stock classes."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.models import transformers_models

Widths = Annotated[list[Annotated[int, Field(ge=1, le=1 << 14)]], Field(min_length=1)]
START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORD_END = "</w>"


class NewAutoencoder(Strict):
    """The config of a new AutoencoderKL."""

    channels: Widths = Field([32, 64, 64], description="at each resolution, each half the size of the last")
    layers: int = Field(1, ge=1, le=100, description="residual blocks at each resolution")
    latent_channels: int = Field(4, ge=1, le=64, description="of the latents")
    norm_groups: int = Field(8, ge=1, description="groups of group normalisation; divides all channels")

    def build(self, shape: tuple[int, int, int]) -> AutoencoderKL:
        """Freshly initialised, for images (C, H, W). Raises UserError where their size does not divide."""
        factor, levels = 2 ** (len(self.channels) - 1), len(self.channels)
        if shape[1] % factor or shape[2] % factor:
            raise UserError(
                f"model.autoencoder.channels {self.channels} halve {levels - 1} times, and images of "
                f"{shape[2]}x{shape[1]} do not divide by {factor}; use fewer, or images of another size"
            )
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(self.channels), layers_per_block=self.layers,
            latent_channels=self.latent_channels, norm_num_groups=self.norm_groups, sample_size=shape[1],
            mid_block_add_attention=False,
        )  # fmt: skip


class NewTextEncoder(Strict):
    """The config of a new CLIPTextModel, and of the tokenizer that is made of the captions."""

    width: int = Field(64, ge=1, le=1 << 14, description="of an embedding")
    layers: int = Field(2, ge=1, le=100, description="of the transformer")
    heads: int = Field(4, ge=1, description="of attention; divides the width")
    length: int = Field(24, ge=4, le=77, description="tokens of a prompt; longer ones are cut")
    vocabulary: int = Field(400, ge=100, le=1 << 16, description="tokens at most, of letters and words")


class NewUNet(Strict):
    """The config of a new UNet2DConditionModel."""

    channels: Widths = Field([64, 128], description="at each resolution, each half the size of the last")
    attention: list[bool] | None = Field(
        None, description="whether there is cross-attention at each resolution; default at all"
    )
    layers: int = Field(1, ge=1, le=100, description="residual blocks at each resolution")
    heads: int = Field(4, ge=1, description="of attention; divides every channel count")
    norm_groups: int = Field(8, ge=1, description="groups of group normalisation; divides all channels")

    @model_validator(mode="after")
    def _asked_somewhere(self) -> NewUNet:
        if self.attention is not None and (
            len(self.attention) != len(self.channels) or not any(self.attention)
        ):
            raise ValueError(
                f"attention {self.attention} is not one of true and false for each of channels "
                f"{self.channels}, with true at least once"
            )
        return self


class TextToImage(Strict):
    """The config of a new StableDiffusionPipeline."""

    kind: Literal["text_to_image"]
    autoencoder: NewAutoencoder = NewAutoencoder()
    text: NewTextEncoder = NewTextEncoder()
    unet: NewUNet = NewUNet()

    def build(self, latents: tuple[int, int, int], tokenizer: Any) -> Prompted:
        """UNet and text encoder, freshly initialised. latents: (C, H, W)."""
        transformers, text, unet = transformers_models.library("a text-to-image model"), self.text, self.unet
        tokens = len(tokenizer)
        encoder = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=tokens, hidden_size=text.width, intermediate_size=4 * text.width,
                num_hidden_layers=text.layers, num_attention_heads=text.heads,
                max_position_embeddings=text.length, projection_dim=text.width,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        attends = unet.attention or [True] * len(unet.channels)
        network = UNet2DConditionModel(
            sample_size=(latents[1], latents[2]), in_channels=latents[0], out_channels=latents[0],
            down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in attends[::-1]),
            block_out_channels=tuple(unet.channels),
            layers_per_block=unet.layers, norm_num_groups=unet.norm_groups, attention_head_dim=unet.heads,
            cross_attention_dim=text.width,
        )  # fmt: skip
        return Prompted(network, encoder)


class Prompted(nn.Module):
    """UNet and text encoder as one network, which takes tokens: they learn together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: Any) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, time: Tensor, input_ids: Tensor) -> Tensor:
        states = self.text_encoder(input_ids)[0].to(x_t.dtype)
        output: Tensor = self.unet(x_t, time, encoder_hidden_states=states, return_dict=False)[0]
        return output


def learn_tokenizer(captions: Sequence[str], config: NewTextEncoder) -> Any:
    """A CLIPTokenizer that has a token for every word of these captions, the most frequent first, as far as
    the vocabulary goes, and spells others; the same for the same captions."""
    counts = Counter(word for text in captions for word in re.findall("[a-z0-9]+", text.lower()))
    tokens = [*LETTERS, *(f"{letter}{WORD_END}" for letter in LETTERS)]
    ranks: dict[tuple[str, str], int] = {}
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(tokens) + 2 >= config.vocabulary:
            break
        symbols = _spelled(word, ranks)
        while len(symbols) > 1 and len(tokens) + 2 < config.vocabulary:
            ranks[symbols[0], symbols[1]] = len(ranks)
            symbols = ["".join(symbols[:2]), *symbols[2:]]
            tokens.append(symbols[0])
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    with tempfile.TemporaryDirectory() as folder:
        vocab, table = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps(vocabulary), encoding="utf-8")
        table.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in ranks), encoding="utf-8")
        return transformers_models.library("a tokenizer").CLIPTokenizer(
            str(vocab), str(table), model_max_length=config.length, unk_token=END, pad_token=END
        )


def _spelled(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The symbols that byte pair encoding makes of a word: the merge of the lowest rank first."""
    symbols = [*word[:-1], word[-1] + WORD_END]
    while True:
        pairs = [(ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not pairs:
            return symbols
        _, place = min(pairs)
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]


class Tokens:
    """The conditioner of a text encoder that is still learning: prompts become tokens."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length

    @property
    def key(self) -> str:
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(f"{vocabulary} {self.length}".encode()).hexdigest()[:32]

    @property
    def example(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, self.length, dtype=torch.long)}

    def embed(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """input_ids (B, length)."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return {"input_ids": tokens.input_ids}

    def null(self, prompt: str | None = None) -> dict[str, Tensor]:
        return self.embed([prompt or ""])

    def to(self, device: torch.device) -> None:
        """Nothing: there is nothing to move."""

    def close(self) -> None:
        """Nothing: there is nothing to free."""


def called(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """How a denoiser calls a `Prompted`."""
    output: Tensor = network(x_t, time, cond["input_ids"])
    return output
