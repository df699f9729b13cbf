"""Feature networks: modules from uint8 images (B, C, H, W) to features (B, num_features), in float64."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diffkd.base import UserError

DIGITS_WEIGHTS = Path(__file__).with_name("digits_features.safetensors")


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 8x8 digits; the 64 features are the inputs of its last layer."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 2 * 2, self.num_features)
        self.classify = nn.Linear(self.num_features, 10)

    def features(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) in [-1, 1] -> (B, 64)."""
        x = F.max_pool2d(F.silu(self.conv2(F.silu(self.conv1(x)))), 2)
        x = F.max_pool2d(F.silu(self.conv3(x)), 2)
        return F.silu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) in [-1, 1] -> logits (B, 10)."""
        logits: Tensor = self.classify(self.features(x))
        return logits


class DigitsFeatures(nn.Module):
    """The 64 features of the digits classifier that ships with diffkd (made by
    scripts/make_digits_features.py).

    Images of other sizes are averaged down to 8x8, colours to grey. Always in eval mode.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.network = DigitsClassifier()
        self.network.load_state_dict(load_file(DIGITS_WEIGHTS))
        self.double().requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> DigitsFeatures:
        return self  # locked: a metric that is put in train mode keeps its features

    def forward(self, images: Tensor) -> Tensor:
        x = images.double().mean(1, keepdim=True) / 127.5 - 1
        return self.network.features(F.adaptive_avg_pool2d(x, 8))


def load(name: str) -> nn.Module:
    """The feature network of that name: "digits", or the dotted path `module.Class` of the user's own."""
    if name == "digits":
        return DigitsFeatures()
    module_name, _, class_name = name.rpartition(".")
    try:
        network = getattr(importlib.import_module(module_name), class_name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"feature network {name!r} cannot be had ({error}); use digits, or an nn.Module's dotted path"
        ) from error
    if not isinstance(network, nn.Module) or not isinstance(getattr(network, "num_features", None), int):
        raise UserError(f"feature network {name!r} is no nn.Module with an integer num_features; give it one")
    return network.eval().requires_grad_(False)


def describe(name: str, network: nn.Module) -> dict[str, Any]:
    """What a protocol says of a feature network: its name, size, and the sha256 of its weights."""
    if name == "digits":
        sha256 = hashlib.sha256(DIGITS_WEIGHTS.read_bytes()).hexdigest()
    else:
        digest = hashlib.sha256()
        for key, value in sorted(network.state_dict().items()):
            digest.update(key.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        sha256 = digest.hexdigest()
    return {"name": name, "sha256": sha256, "num_features": network.num_features}
