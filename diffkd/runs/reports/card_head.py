"""The head of a model card: what the Hugging Face Hub reads of it, in its words."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from diffkd.errors import UserError
from diffkd.io.text import read_text
from diffkd.models import loading

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE = re.compile(r"[\w.+-]{1,64}")
LINK = re.compile(r"https?://[\w./%~#-]{1,200}")
LICENSED = {"license": LICENSE, "license_name": LICENSE, "license_link": LINK}
WIDGET = "a lighthouse at dusk, a red boat in front of it"  # a prompt to try it with, where none is known
LONGEST = 300  # characters of a prompt to try


def origin(path: str) -> dict[str, Any]:
    """What a student's diffkd.json has of its teacher, for the head of its card: `base_model`, where that is
    on the Hub or comes from there, and the fields of its license, where its own card has them.

    path: a folder or a Hub id. Whether it is one is asked now: where the card is read again, a folder of that
    name may be gone.
    """
    try:
        folder = loading.folder_of(path)
        base = loading.card(folder).get("base_model") if os.path.isdir(path) else path
    except UserError:  # of a teacher that is gone, in a run that goes on
        return {}
    found = {"base_model": base} if isinstance(base, str) and HUB_ID.fullmatch(base) else {}
    return {**found, **_license(folder)}


def prompt_to_try(prompts: Sequence[str]) -> dict[str, str]:
    """What a model's diffkd.json has of the prompts that it is drawn with: as `prompt` the first of them that
    is printable and not too long, as one line; {} where none is."""
    lines = (" ".join(prompt.split()) for prompt in prompts)
    return next(({"prompt": line} for line in lines if _is_prompt(line)), {})


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable()


def _license(folder: Path) -> dict[str, str]:
    try:
        said = ModelCard(read_text(folder / "README.md"), ignore_metadata_errors=True).data
    except Exception:  # no card, or one from anywhere: YAML raises many types
        return {}
    found = {key: said.get(key) for key in LICENSED}
    return {key: value for key, value in found.items() if _is_license(key, value)}


def _is_license(key: str, value: Any) -> bool:
    return isinstance(value, str) and LICENSED[key].fullmatch(value) is not None


def lines(card: Mapping[str, Any]) -> list[str]:
    """card: the content of diffkd.json, which may come from anywhere."""
    lora, kind = card.get("lora", {}), card.get("export", {}).get("kind")
    adapter = "scheduler" in lora
    base = lora.get("base") if adapter else card.get("base_model")
    tags = ["diffusion", "distillation", "diffkd", *["lora"] * adapter, *[kind] * (kind is not None)]
    fields: dict[str, Any] = {key: card[key] for key in LICENSED if _is_license(key, card.get(key))}
    if isinstance(base, str) and HUB_ID.fullmatch(base):
        fields["base_model"] = base
        fields["base_model_relation"] = (
            "adapter" if adapter else "quantized" if kind == "int8" else "finetune"
        )
    if card.get("prompts"):
        prompt = card["prompt"] if _is_prompt(card.get("prompt")) else WIDGET
        fields |= {"pipeline_tag": "text-to-image", "widget": [{"text": prompt}]}
    elif not card.get("num_classes"):
        fields["pipeline_tag"] = "unconditional-image-generation"
    data = ModelCardData(library_name=_library(card, kind), tags=tags, **fields)
    return ["---", *data.to_yaml().splitlines(), "---", ""]


def _library(card: Mapping[str, Any], kind: str | None) -> str | None:
    """That which opens it, as the Hub calls it."""
    if kind in ("onnx", "torch-export"):
        return {"onnx": "onnx", "torch-export": None}[kind]
    return "diffusers" if card.get("stock") is not False else "diffkd"
