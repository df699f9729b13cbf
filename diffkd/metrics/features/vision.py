"""Vision transformers as feature networks: DINOv2 for FD-DINOv2, CLIP for CMMD (extra `dino`) and CLIP score.

All take uint8 images (B, 1 or 3, H, W) to features (B, num_features) in float32, always in eval mode.
Weights come from a folder that save_pretrained of transformers wrote, or from the hub; safetensors only.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.text import a_or_an, from_json, quoted, read_text, reason
from diffkd.models import transformers_models
from diffkd.models.pipeline_files import check_index


class Kind(NamedTuple):
    """What tells one network from the other: where it comes from and how its input is normalised."""

    name: str
    hub_id: str
    architecture: str  # the class of transformers
    model_types: tuple[str, ...]  # those that its config.json may say
    mean: tuple[float, float, float]  # of RGB in [0, 1], as the network was trained
    std: tuple[float, float, float]
    chosen: bool = True  # whether it can be the main feature network of an evaluation
    files: tuple[str, ...] = ()  # that are read beside config and weights


class VisionFeatures(nn.Module, ABC):
    """All that DINOv2 and CLIP share. They say the input's size and which output is the feature."""

    num_features: int
    size: int
    resize: str
    mean: Tensor
    std: Tensor

    def __init__(self, kind: Kind, weights: str | Path | None) -> None:
        super().__init__()
        self.kind = kind
        self.weights = kind.hub_id if weights is None else str(weights)
        transformers_models.library(f"feature network {kind.name}")
        self.folder = _folder(kind, self.weights)
        _check(kind, self.weights, self.folder)
        self.network: Any = transformers_models.load(kind.architecture, self.folder, self.weights)
        self.register_buffer("mean", torch.tensor(kind.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(kind.std).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> VisionFeatures:
        return self  # locked: a metric that is put in train mode keeps its features

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) uint8 -> (B, num_features), in the dtype and on the device of the weights."""
        x = self.resized(images.to(self.mean.device)).expand(-1, 3, -1, -1)
        return self.features((x / 255 - self.mean) / self.std)

    @abstractmethod
    def resized(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> (B, C, size, size) in 0..255, as the metric's authors do it."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """(B, 3, size, size), normalised -> (B, num_features)."""

    @property
    def weights_sha256(self) -> str:
        """Of the shapes and float32 values of all weights, in the order in which the network holds them.

        Names are left out: transformers 5 gave DINOv2's weights other ones.
        """
        digest = hashlib.sha256()
        for value in self.network.state_dict().values():
            digest.update(str(tuple(value.shape)).encode())
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a protocol says of this network; features compare where all but `weights` is the same."""
        return {
            "name": self.kind.name,
            "sha256": self.weights_sha256,
            "num_features": self.num_features,
            "resize": self.resize,
            "size": self.size,
            "weights": self.weights,
        }


def _folder(kind: Kind, weights: str) -> Path:
    """The local folder of the weights; downloads a hub id's config and safetensors."""
    path = Path(weights)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or weights.count("/") != 1 or weights.startswith((".", "/", "~")):
        raise UserError(f"{weights} is neither a folder nor a hub id (owner/name); check the path")
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(weights, allow_patterns=[*patterns, *kind.files]))
    except Exception as error:  # whatever the hub's client and the network raise
        raise UserError(
            f"{weights} is not a folder here and could not be downloaded from the hub ({reason(error)}); "
            f"check the name, or run {_recipe(kind, weights)} on a machine with a network, bring DIR here "
            f"and give it as {_option(kind)}"
        ) from error


def _check(kind: Kind, weights: str, folder: Path) -> None:
    """Raises UserError for what from_pretrained would accept, guess, or refuse without naming a remedy."""

    try:
        config = from_json(read_text(folder / "config.json"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{weights} has no config.json that can be read ({reason(error)}); "
            "give a folder that save_pretrained wrote"
        ) from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in kind.model_types:
        raise UserError(
            f"{weights} is of model_type {quoted(model_type)}, not {kind.model_types[0]!r}, by its "
            f"config.json; give the weights of {a_or_an(kind.architecture)}, such as {kind.hub_id}"
        )
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise UserError(
            f"{weights} has no model.safetensors, and pickled weights are not loaded: they can run code; "
            f"if you trust them, run {_recipe(kind, weights)} and give DIR"
        )
    check_index(folder)


def _option(kind: Kind) -> str:
    own = called(f"evaluation.{kind.name}_weights")
    if not kind.chosen:
        return own
    return f"{called('evaluation.weights')}, or for a metric that brings the network along as {own}"


def _recipe(kind: Kind, weights: str) -> str:
    """The command that brings the weights, in any format, as safetensors to DIR, with the tokenizer."""
    classes = {"M": kind.architecture, **({"T": "CLIPTokenizer"} if kind.files else {})}
    named = ", ".join(f"{name} as {short}" for short, name in classes.items())
    saved = "; ".join(f"{short}.from_pretrained({weights!r}).save_pretrained('DIR')" for short in classes)
    return f'python -c "from transformers import {named}; {saved}"'
