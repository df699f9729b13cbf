"""What a new model of prompts reads them with: a tokenizer that knows the captions' words, a text encoder."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.models import transformers_models

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORD_END = "</w>"
PRINTED = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that stand for themselves in CLIP
UNPRINTED = [byte for byte in range(256) if byte not in PRINTED]  # and those that stand from 256 on
SYMBOLS = {
    byte: chr(byte if byte in PRINTED else 256 + UNPRINTED.index(byte)) for byte in range(256)
}  # fmt: skip


class NewTextEncoder(Strict):
    """The config of a new CLIPTextModel, and of the tokenizer that is made of the captions."""

    width: int = Field(64, ge=1, le=1 << 14, description="of an embedding")
    layers: int = Field(2, ge=1, le=100, description="of the transformer")
    heads: int = Field(4, ge=1, description="of attention; divides the width")
    length: int = Field(24, ge=4, le=77, description="tokens of a prompt; longer ones are cut")
    vocabulary: int = Field(400, ge=100, le=1 << 16, description="tokens at most, of letters and words")

    def build(self, tokenizer: Any, *, projected: bool = False) -> Any:
        """Freshly initialised. projected: a CLIPTextModelWithProjection, which embeds the prompt too."""
        transformers = transformers_models.library("a text-to-image model")
        kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        return kind(
            transformers.CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=self.width, intermediate_size=4 * self.width,
                num_hidden_layers=self.layers, num_attention_heads=self.heads,
                max_position_embeddings=self.length, projection_dim=self.width,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip


def learn_tokenizer(captions: Sequence[str], config: NewTextEncoder) -> Any:
    """A CLIPTokenizer that has a token for every word of these captions, the most frequent first, as far as
    the vocabulary goes, and spells others, in letters of the captions and of English; the same for the same
    captions. Raises UserError for captions of more letters than the vocabulary has room for.

    Letters are bytes of UTF-8, as CLIP has them (Radford et al. 2019, 2.2), so that any script has some.
    """
    texts = [unicodedata.normalize("NFC", text).lower() for text in captions]
    counts = Counter(_symbols(word) for text in texts for word in re.findall(r"[^\W_]+", text))
    letters = {symbol for text in texts for word in text.split() for symbol in _symbols(word)}
    alphabet = [*LETTERS, *sorted(letters.difference(LETTERS))]
    tokens = [*alphabet, *(f"{letter}{WORD_END}" for letter in alphabet)]
    if len(tokens) + 2 > config.vocabulary:
        raise UserError(
            f"model.text.vocabulary {config.vocabulary} has no room for the {len(alphabet)} letters of the "
            f"captions; use {len(tokens) + 2} or more"
        )
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


def _symbols(text: str) -> str:
    """A text as CLIP's byte pair encoding writes it, a symbol for each byte."""
    return "".join(SYMBOLS[byte] for byte in text.encode())


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


def check_captions(images: Images) -> None:
    """Raises UserError for images that a model of prompts does not learn from."""
    if not any(images.captions):
        raise UserError(
            f"{images.name} has no captions, from which a text-to-image model learns; give data with "
            "captions, or leave out model.kind"
        )
    if images.shape[0] != 3:
        raise UserError(
            f"{images.name} is grey, and a text-to-image model makes colours; set data.channels to 3"
        )


def called(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """How a denoiser calls a network that learns with its text encoder, from tokens."""
    output: Tensor = network(x_t, time, cond["input_ids"])
    return output


def denoiser_of_tokens(
    network: nn.Module,
    schedule: Schedule,
    prediction: str,
    latents: tuple[int, int, int],
    conditioner: Tokens,
) -> Denoiser:
    """A network that learns together with its text encoders, and so is given tokens; in train mode."""
    denoiser = Denoiser(
        network, schedule, prediction, shape=latents, call=called, example=conditioner.example
    )
    denoiser.set_null(conditioner.null())
    return denoiser.train()
