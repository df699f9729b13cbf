"""The text encoders of pipelines, their files checked before anything is read: CLIP, T5, Gemma 2, Qwen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffkd.errors import UserError
from diffkd.io.text import a_or_an, quoted
from diffkd.models.pipeline_files import MAX_NUMBER, read_object, variants_of, weights_of
from diffkd.models.source import Source

STEM = "model"  # of a transformers network's weights
TOKENIZERS = {  # that are read by the first: the slow one and the fast one give the same tokens
    "CLIPTokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "T5TokenizerFast": ("T5TokenizerFast", "T5Tokenizer"),
    "GemmaTokenizerFast": ("GemmaTokenizerFast", "GemmaTokenizer"),
    "Qwen2TokenizerFast": ("Qwen2TokenizerFast", "Qwen2Tokenizer"),
}
TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")  # of which one is there
CLIP_SIZES = {  # of a config, and what they are where it does not name them
    "max_position_embeddings": 77, "hidden_size": 512, "projection_dim": 512, "num_hidden_layers": 12,
    "vocab_size": 49408, "intermediate_size": 2048,
}  # fmt: skip
T5_SIZES = {
    "d_model": 512, "vocab_size": 32128, "num_layers": 6, "num_heads": 8, "d_kv": 64, "d_ff": 2048,
}  # fmt: skip
LANGUAGE_SIZES = {  # of every language model; their configs name them all
    "hidden_size": 0, "vocab_size": 0, "num_hidden_layers": 0, "num_attention_heads": 0,
    "intermediate_size": 0,
}  # fmt: skip
LANGUAGE_MODELS = {  # by their class, as which the pipelines open them: model_type, tokenizer
    "Gemma2Model": ("gemma2", "GemmaTokenizerFast"),
    "Qwen3Model": ("qwen3", "Qwen2TokenizerFast"),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "Qwen2TokenizerFast"),
}


class TextEncoder(NamedTuple):
    """A tokenizer and a text encoder, and the widths of what it gives."""

    tokenizer: Path
    tokenizer_kind: str
    place: Path
    architecture: str
    variant: str | None
    width: int
    length: int | None = None  # tokens that it has positions for, None for one of any number
    pooled: int | None = None  # of the embedding of the whole prompt, where it has one
    padding: str | None = None  # the side that its pipeline pads on, None for the tokenizer's own

    def files(self, name: str) -> list[Path]:
        """What decides its embeddings. name: the model's, for messages."""
        tokenizer = sorted(path for path in self.tokenizer.iterdir() if path.suffix in TOKENIZER_FILES)
        return [
            *tokenizer,
            self.place / "config.json",
            *weights_of(self.place, name, self.variant, STEM)[1],
        ]


def clip(source: Source, suffix: str, *, projected: bool) -> TextEncoder:
    """The CLIP encoder of a pipeline's text_encoder + suffix. Raises UserError where it is not one, or not
    complete."""
    architecture = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    sizes = _checked(
        source, suffix, (architecture, "CLIPTokenizer", "clip_text_model", "vocab.json, merges.txt"),
        CLIP_SIZES, ("vocab_size", "hidden_size"),
    )  # fmt: skip
    return TextEncoder(
        source.folder / f"tokenizer{suffix}", "CLIPTokenizer", source.folder / f"text_encoder{suffix}",
        architecture, _variant(source, suffix), sizes["hidden_size"], sizes["max_position_embeddings"],
        sizes["projection_dim"] if projected else None,
    )  # fmt: skip


def t5(source: Source, suffix: str) -> TextEncoder:
    """The same for a T5 encoder."""
    sizes = _checked(
        source, suffix, ("T5EncoderModel", "T5TokenizerFast", "t5", "tokenizer.json or spiece.model"),
        T5_SIZES, ("vocab_size", "d_model"),
    )  # fmt: skip
    return TextEncoder(
        source.folder / f"tokenizer{suffix}", "T5TokenizerFast", source.folder / f"text_encoder{suffix}",
        "T5EncoderModel", _variant(source, suffix), sizes["d_model"],
    )  # fmt: skip


def language_model(source: Source, architecture: str, *, padding: str | None = None) -> TextEncoder:
    """The same for the language model of a pipeline's text_encoder. padding: as in `TextEncoder`."""
    model_type, tokenizer = LANGUAGE_MODELS[architecture]
    needed = "tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
    sizes = _checked(
        source, "", (architecture, tokenizer, model_type, needed), LANGUAGE_SIZES,
        ("vocab_size", "hidden_size"),
    )  # fmt: skip
    return TextEncoder(
        source.folder / "tokenizer", tokenizer, source.folder / "text_encoder", architecture,
        _variant(source, ""), sizes["hidden_size"], padding=padding,
    )  # fmt: skip


def _variant(source: Source, suffix: str) -> str | None:
    place = source.folder / f"text_encoder{suffix}"
    variant = source.variant if source.variant in variants_of(place, STEM) else None
    return weights_of(place, source.name, variant, STEM)[0]


def _checked(
    source: Source,
    suffix: str,
    kind: tuple[str, str, str, str],
    known: Mapping[str, int],
    embedding: tuple[str, str],
) -> dict[str, int]:
    """The sizes of a config. kind: architecture, tokenizer, model_type, and the files of a tokenizer for
    messages. embedding: keys of the two sizes of the table of tokens. Raises UserError."""
    architecture, tokenizer, model_type, needed = kind
    name, place = source.name, source.folder / f"text_encoder{suffix}"
    _check_entry(source, f"text_encoder{suffix}", (architecture,))
    _check_entry(source, f"tokenizer{suffix}", TOKENIZERS[tokenizer])
    config = read_object(place / "config.json")
    within = config.get("text_config", config)  # of a model of images and texts
    if not isinstance(within, dict):
        raise UserError(f"{name}: {place / 'config.json'} has text_config {quoted(within)}; is it complete?")
    sizes: dict[str, Any] = {key: within.get(key, default) for key, default in known.items()}
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value <= MAX_NUMBER:
            raise UserError(f"{name}: {place / 'config.json'} has {key} {quoted(value)}; is it complete?")
    if config.get("model_type") != model_type:
        raise UserError(
            f"{name}: {place / 'config.json'} is of model_type {quoted(config.get('model_type'))}, and a "
            f"{architecture} is {model_type}; is it complete?"
        )
    variant = source.variant if source.variant in variants_of(place, STEM) else None
    _, files = weights_of(place, name, variant, STEM)
    held, table = sum(file.stat().st_size for file in files), sizes[embedding[0]] * sizes[embedding[1]]
    if 2 * table > 2 * held + MAX_NUMBER:
        raise UserError(
            f"{name}: {place / 'config.json'} describes a network much larger than its weights; are they "
            "complete?"
        )
    folder = source.folder / f"tokenizer{suffix}"
    if not any((folder / file).is_file() for file in VOCABULARIES):
        raise UserError(f"{name} has no tokenizer in {folder} ({needed}); is it complete?")
    return sizes


def _check_entry(source: Source, component: str, kinds: Sequence[str]) -> None:
    entry = source.index.get(component)
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] != "transformers" or entry[1] not in kinds:
        raise UserError(
            f"{source.name} has {a_or_an(component)} of {quoted(entry)}, which is not supported; supported "
            f"is {' or '.join(kinds)} of transformers"
        )
