"""What every conditioner of prompts does: encoders that are read when they are first used, tokens, a key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffkd.io.text import log, quoted
from diffkd.models import fingerprints, transformers_models
from diffkd.models.source import Source
from diffkd.models.text_encoders import TextEncoder

TOGETHER = 32  # prompts that are encoded at once
LONGEST_TOLD = 200  # characters of what is cut off a prompt


class Prompts(ABC):
    """A conditioner (`diffkd.core.conditioning.Conditioner`) of a pipeline's own encoders, in float32. Its
    subclasses are final, one for each encode_prompt of stock pipelines.

    way: what beside the encoders decides the embeddings, such as lengths; it is in the key. absent: optional
    components that its pipeline is without: diffusers opens it where they are named as None.
    """

    way: str
    absent: tuple[str, ...] = ()

    def __init__(self, source: Source, encoders: Sequence[TextEncoder]) -> None:
        self.source, self.name, self.encoders = source, source.name, list(encoders)
        self.device = torch.device("cpu")

    @cached_property
    def key(self) -> str:
        """Hash of encoders, tokenizers and the way they are used."""
        files = [path for one in self.encoders for path in one.files(self.name)]
        return f"{fingerprints.of_files(files)}-{self.way}"

    @property
    @abstractmethod
    def example(self) -> dict[str, Tensor]:
        """What it gives for one prompt, as zeros."""

    @abstractmethod
    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the stock pipeline passes on for a few prompts, on any device in any dtype."""

    @cached_property
    def networks(self) -> list[tuple[Any, Any]]:
        """The tokenizer and the network of each encoder."""
        transformers_models.library(f"a prompt for {self.name}")
        opened = []
        for one in self.encoders:
            tokenizer = transformers_models.load_tokenizer(one.tokenizer, self.name, one.tokenizer_kind)
            name = f"{self.name}: {one.place}"
            network = transformers_models.load(one.architecture, one.place, name, one.variant)
            opened.append((tokenizer, network.eval().requires_grad_(False).to(self.device)))
        return opened

    def to(self, device: torch.device) -> None:
        self.device = device
        for _, network in self.__dict__.get("networks", ()):
            network.to(device)

    def close(self) -> None:
        """Frees encoders and tokenizers."""
        self.__dict__.pop("networks", None)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Tensors (B, ...) on the CPU, float32. size: height and width, of a pipeline that is told.

        A prompt of more tokens than the encoders take is cut, and a line says what is lost.
        """
        parts = [self._kept(prompts[start : start + TOGETHER]) for start in range(0, len(prompts), TOGETHER)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    @torch.no_grad()
    def null(self, prompt: str | None = None) -> dict[str, Tensor]:
        """What stands for no prompt, the encoding of "", or for a negative one: as `embed`, without the
        size."""
        return self._kept([prompt or ""])

    def _kept(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {key: value.float().cpu() for key, value in self._embed(prompts).items()}

    def tokens(self, number: int, prompts: Sequence[str], longest: int | None, *, tell: bool) -> Any:
        """What the tokenizer of this encoder makes of them, padded and cut to the encoder's length or to
        `longest`. tell: whether a line says what is cut off."""
        tokenizer, length = self.networks[number][0], self.encoders[number].length
        longest = min(one for one in (longest, length, tokenizer.model_max_length) if one is not None)
        with transformers_models.silent():
            tokens = tokenizer(
                list(prompts), padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
            )
            whole = tokenizer(list(prompts)).input_ids if tell else []
        for prompt, ids in zip(prompts, whole, strict=False):
            if len(ids) > longest:
                lost = tokenizer.decode(ids[longest - 1 : -1]).strip()
                log.warning(
                    "the prompt %s has more than the %d tokens that %s takes; cut off: %s",
                    quoted(prompt, 40), longest, self.name, quoted(lost, LONGEST_TOLD),
                )  # fmt: skip
        return tokens
