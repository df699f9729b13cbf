"""Features of 8x8 digits: a small classifier that ships with diffkd, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diffkd.core.digest import digest
from diffkd.io.naming import called
from diffkd.io.text import log

MAX_SIDE = 32  # of images that may be digits: MNIST's, and those of datasets that pad them
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
        self._seen = False

    def train(self, mode: bool = True) -> DigitsFeatures:
        return self  # locked: a metric that is put in train mode keeps its features

    def forward(self, images: Tensor) -> Tensor:
        if not self._seen:
            self._seen = True
            _warn_of_others(images)
        x = images.double().mean(1, keepdim=True) / 127.5 - 1
        return self.network.features(F.adaptive_avg_pool2d(x, 8))

    def probabilities(self, features: Tensor) -> Tensor:
        """(B, 64) -> (B, 10)."""
        return self.network.classify(features).softmax(1)

    def describe(self) -> dict[str, Any]:
        return {
            "name": "digits",
            "sha256": digest(self.network.state_dict()),
            "num_features": self.num_features,
        }


def _warn_of_others(images: Tensor) -> None:
    """Where they cannot be small grey digits, which is all that the network knows."""
    height, width = images.shape[2:]
    if max(height, width) > MAX_SIDE or not bool((images == images[:, :1]).all()):
        log.warning(
            "digits features know small grey digits and nothing else, and these are images of %dx%d%s: "
            "numbers by them say little; %s: inception, or your own",
            width, height, "" if images.shape[1] == 1 else " in colour", called("evaluation.features"),
        )  # fmt: skip
