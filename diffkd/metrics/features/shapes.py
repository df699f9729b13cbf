"""Features of the pictures of `data.shapes`: a small network that ships, and reads what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diffkd.core.digest import digest
from diffkd.data.shapes import COLOURS, KINDS, PLACES, RELATIONS, SIZES, Scene

SHAPES_WEIGHTS = Path(__file__).with_name("shapes_features.safetensors")
SIDE = 32  # of the pictures that it was trained on; others are resized to it
LAYOUTS = (*PLACES, "vertical", "horizontal")  # of one shape where it lies, of two how
ONE = (KINDS, tuple(COLOURS), tuple(SIZES))  # what is told of each of two shapes, the upper or left one first


class ShapesNetwork(nn.Module):
    """A small convolutional network; the 96 features are the inputs of its last layer."""

    num_features = 96

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, self.num_features)
        self.tell = nn.Linear(self.num_features, len(LAYOUTS) + 2 * sum(map(len, ONE)))

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) in [-1, 1] -> (B, 96)."""
        x = F.max_pool2d(F.silu(self.conv1(x)), 2)
        x = F.max_pool2d(F.silu(self.conv2(x)), 2)
        x = F.max_pool2d(F.silu(self.conv3(x)), 2)
        return F.silu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, 32, 32) in [-1, 1] -> logits of the layout, then of kind, colour and size of each shape."""
        return self.logits(self.features(x))

    def logits(self, features: Tensor) -> list[Tensor]:
        sizes = [len(LAYOUTS), *map(len, ONE), *map(len, ONE)]
        return list(self.tell(features).split(sizes, 1))


class ShapesFeatures(nn.Module):
    """The 96 features of the network that ships with diffkd (made by scripts/make_shapes_features.py).

    Pictures of other sizes are resized to 32x32. Always in eval mode, in float64.
    """

    num_features = 96

    def __init__(self) -> None:
        super().__init__()
        self.network = ShapesNetwork()
        self.network.load_state_dict(load_file(SHAPES_WEIGHTS))
        self.double().requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> ShapesFeatures:
        return self  # locked: a metric that is put in train mode keeps its features

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 1 or 3, H, W) -> (B, 96)."""
        x = images.double().expand(-1, 3, -1, -1) / 127.5 - 1
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        return self.network.features(x)

    def read(self, features: Tensor) -> Tensor:
        """What pictures show, by their features: (B, 7) numbers as `asked` gives them."""
        return torch.stack([logits.argmax(1) for logits in self.network.logits(features)], 1)

    def describe(self) -> dict[str, Any]:
        return {
            "name": "shapes",
            "sha256": digest(self.network.state_dict()),
            "num_features": self.num_features,
        }


def asked(of: Scene) -> list[int]:
    """What a scene is to show: the layout, then kind, colour and size of the upper or left shape and of the
    other one, as places in their lists; -1 for what is not said."""
    shapes, place = list(of.shapes), of.place
    if place in RELATIONS:
        if place in ("below", "right of"):
            shapes.reverse()
        place = "vertical" if place in ("above", "below") else "horizontal"
    wanted = [-1 if place is None else LAYOUTS.index(place)]
    for one in shapes:
        wanted += [KINDS.index(one.kind), [*COLOURS].index(one.colour)]
        wanted.append(-1 if one.size is None else [*SIZES].index(one.size))
    return wanted + [-1] * (7 - len(wanted))
