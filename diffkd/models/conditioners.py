"""Prompts for Stable Diffusion: one CLIP text encoder, or two with SDXL's pooled embedding and size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import log, quoted
from diffkd.models import fingerprints, transformers_models
from diffkd.models.pipeline_files import MAX_NUMBER, read_object, variants_of, weights_of
from diffkd.models.source import Source

STEM = "model"  # of a transformers network's weights
TOGETHER = 32  # prompts that are encoded at once
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
LONGEST_TOLD = 200  # characters of what is cut off a prompt


class Encoder(NamedTuple):
    """A tokenizer and a text encoder, and the widths of what it gives."""

    tokenizer: Path
    place: Path
    architecture: str
    variant: str | None
    length: int  # tokens
    width: int
    pooled: int | None  # of the projected embedding of the whole prompt, where it has one


class ClipPrompts:
    """The conditioner of StableDiffusionPipeline and StableDiffusionXLPipeline: what their encode_prompt
    gives. Encoders and tokenizers are read when they are first used, in float32.

    two: SDXL's way, with the last layer but one of two encoders side by side, the pooled embedding of the
    second, and the image's size in time_ids. zeros: whether no prompt is zeros, not the encoding of "".
    """

    def __init__(self, source: Source, *, two: bool, zeros: bool) -> None:
        self.source, self.name, self.two, self.zeros = source, source.name, two, zeros
        self.device = torch.device("cpu")
        names = ("", "_2") if two else ("",)
        self.encoders = [_encoder(source, suffix, projected=suffix == "_2") for suffix in names]
        if len({one.length for one in self.encoders}) > 1:
            raise UserError(f"{self.name} has text encoders of different lengths, which is not supported")

    @cached_property
    def key(self) -> str:
        """Hash of encoders, tokenizers and the way they are used."""
        files: list[Path] = []
        for one in self.encoders:
            files += sorted(path for path in one.tokenizer.iterdir() if path.suffix in (".json", ".txt"))
            files += [one.place / "config.json", *weights_of(one.place, self.name, one.variant, STEM)[1]]
        way = f"{'xl' if self.two else 'sd'}-{'zeros' if self.zeros else 'encoded'}"
        return f"{fingerprints.of_files(files)}-{way}"

    @property
    def example(self) -> dict[str, Tensor]:
        """What it gives for one prompt, as zeros."""
        length, width = self.encoders[0].length, sum(one.width for one in self.encoders)
        cond = {"encoder_hidden_states": torch.zeros(1, length, width)}
        if self.two:
            cond |= {
                "text_embeds": torch.zeros(1, self.encoders[-1].pooled or 0),
                "time_ids": torch.zeros(1, 6),
            }
        return cond

    @cached_property
    def networks(self) -> list[tuple[Any, Any]]:
        """The tokenizer and the network of each encoder."""
        transformers_models.library(f"a prompt for {self.name}")
        opened = []
        for one in self.encoders:
            tokenizer = transformers_models.load_tokenizer(one.tokenizer, self.name)
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
        """encoder_hidden_states (B, 77, D); for SDXL text_embeds (B, P) and time_ids (B, 6): the original
        height and width, the crop's top and left, the target's height and width. On the CPU, float32.

        A prompt of more tokens than the encoders take is cut, and a line says what is lost.
        """
        parts = [self._embed(prompts[start : start + TOGETHER]) for start in range(0, len(prompts), TOGETHER)]
        cond = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        if self.two:
            if size is None:
                raise ValueError("SDXL is conditioned on the size of its images")
            cond["time_ids"] = torch.tensor([[*size, 0.0, 0.0, *size]]).repeat(len(prompts), 1)
        return cond

    def null(self, prompt: str | None = None) -> dict[str, Tensor]:
        """What stands for no prompt, or for a negative one: as `embed`, without the size."""
        cond = self._embed([prompt or ""])
        if prompt is None and self.zeros:
            return {key: torch.zeros_like(value) for key, value in cond.items()}
        return cond

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        states, pooled = [], None
        for number, (tokenizer, network) in enumerate(self.networks):
            tokens = self._tokens(tokenizer, prompts, tell=number == 0)
            masked = bool(getattr(network.config, "use_attention_mask", False)) and not self.two
            mask = tokens.attention_mask.to(self.device) if masked else None
            output = network(
                tokens.input_ids.to(self.device), attention_mask=mask, output_hidden_states=self.two
            )
            states.append(output.hidden_states[-2] if self.two else output[0])
            pooled = output[0] if self.two else None  # of the last encoder: its projection
        cond = {"encoder_hidden_states": torch.cat(states, -1)}
        if pooled is not None:
            cond["text_embeds"] = pooled
        return {key: value.float().cpu() for key, value in cond.items()}

    def _tokens(self, tokenizer: Any, prompts: Sequence[str], *, tell: bool) -> Any:
        longest = min(tokenizer.model_max_length, self.encoders[0].length)
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


def _encoder(source: Source, suffix: str, *, projected: bool) -> Encoder:
    """The encoder of a pipeline's text_encoder + suffix, its files checked. Raises UserError."""
    name, place = source.name, source.folder / f"text_encoder{suffix}"
    architecture = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    _check_entry(source, f"text_encoder{suffix}", (architecture,))
    _check_entry(source, f"tokenizer{suffix}", TOKENIZERS)
    config = read_object(place / "config.json")
    sizes = {
        key: config.get(key, default)
        for key, default in (
            ("max_position_embeddings", 77), ("hidden_size", 512), ("projection_dim", 512),
            ("num_hidden_layers", 12), ("vocab_size", 49408), ("intermediate_size", 2048),
        )
    }  # fmt: skip
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value <= MAX_NUMBER:
            raise UserError(f"{name}: {place / 'config.json'} has {key} {quoted(value)}; is it complete?")
    if config.get("model_type") != "clip_text_model":
        raise UserError(
            f"{name}: {place / 'config.json'} is of model_type {quoted(config.get('model_type'))}, and a "
            f"{architecture} is clip_text_model; is it complete?"
        )
    variant = source.variant if source.variant in variants_of(place, STEM) else None
    variant, files = weights_of(place, name, variant, STEM)
    held, needed = sum(file.stat().st_size for file in files), 2 * sizes["vocab_size"] * sizes["hidden_size"]
    if needed > 2 * held + MAX_NUMBER:
        raise UserError(
            f"{name}: {place / 'config.json'} describes a network much larger than its weights; are they "
            "complete?"
        )
    tokenizer = source.folder / f"tokenizer{suffix}"
    if not any((tokenizer / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{name} has no tokenizer in {tokenizer} (vocab.json, merges.txt); is it complete?")
    return Encoder(
        tokenizer, place, architecture, variant, sizes["max_position_embeddings"], sizes["hidden_size"],
        sizes["projection_dim"] if projected else None,
    )  # fmt: skip


def _check_entry(source: Source, component: str, kinds: Sequence[str]) -> None:
    entry = source.index.get(component)
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] != "transformers" or entry[1] not in kinds:
        raise UserError(
            f"{source.name} has a {component} of {quoted(entry)}, which is not supported; supported is "
            f"{' or '.join(kinds)} of transformers"
        )
