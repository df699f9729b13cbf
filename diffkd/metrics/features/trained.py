"""A small feature network that was trained on a user's own images (`diffkd features train`), and its file.

The file is a .safetensors of float32 tensors with one key of metadata, JSON of what the network is and how
well it learned.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffkd.core.digest import digest
from diffkd.errors import UserError
from diffkd.io.config import Strict, validation_message
from diffkd.io.files import new_file
from diffkd.io.text import from_json, reason

SUFFIX = ".safetensors"
KEY = "diffkd_features"  # of the metadata; one key, since the order of several in the file is not fixed
PREFIX = "trained-"  # of the name in records; the first digits of the weights' sha256 follow
SIZES = (8, 16, 32, 64, 128)  # height and width that images are brought to
LEAST_SIDE = 4  # of the last level
GROUPS = 8  # of normalisation


class About(Strict):
    """What a file says of its network; beside the first four keys for people."""

    channels: Literal[1, 3] = Field(description="of the images that it takes: 1 for grey")
    size: Literal[8, 16, 32, 64, 128] = Field(description="height and width that images are brought to")
    width: int = Field(ge=GROUPS, le=256, multiple_of=GROUPS, description="channels of the first level")
    num_features: int = Field(ge=2, le=2048, description="that it gives of an image")
    classes: list[str] = Field([], max_length=10_000, description="that it was taught to tell; [] for none")
    images: int = Field(ge=1, description="that it learned from")
    held_out: int = Field(ge=1, description="that the numbers below are of")
    accuracy: float | None = Field(None, ge=0, le=1, description="share of held-out images told right")
    largest_class: float | None = Field(None, ge=0, le=1, description="accuracy of always naming that class")
    same_image: float | None = Field(
        None, ge=0, le=1, description="share of views whose nearest other view is of the same image"
    )
    effective_rank: float = Field(ge=0, description="of the features' covariance")
    updates: int = Field(ge=1, description="of its training")
    seed: int = Field(ge=0, description="of its training")


class TrainedNetwork(nn.Module):
    """Levels of two convolutions and a halving, down to 4x4; the features are a linear map of the last."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, size: int, width: int, num_features: int, num_classes: int) -> None:
        super().__init__()
        levels: list[nn.Module] = []
        inner, outer, side = channels, width, size
        while side > LEAST_SIDE:
            levels += [
                nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(GROUPS, outer), nn.SiLU(),
                nn.Conv2d(outer, outer, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2),
            ]  # fmt: skip
            inner, outer, side = outer, min(2 * outer, 4 * width), side // 2
        self.levels = nn.Sequential(*levels)
        self.embed = nn.Linear(inner * side * side, num_features)
        self.classify = nn.Linear(num_features, num_classes) if num_classes else None
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    def raw(self, x: Tensor) -> Tensor:
        """(B, C, size, size) in [-1, 1] -> (B, num_features), of whatever scale was learned."""
        found: Tensor = self.embed(self.levels(x).flatten(1))
        return found

    def features(self, x: Tensor) -> Tensor:
        """The same with mean 0 and variance 1 over the images that it learned from."""
        return (self.raw(x) - self.mean) / self.std

    def logits(self, raw: Tensor) -> Tensor:
        """(B, num_features) of `raw` -> (B, classes)."""
        assert self.classify is not None
        found: Tensor = self.classify(F.silu(raw))
        return found


class TrainedFeatures(nn.Module):
    """uint8 images (B, 1 or 3, H, W) -> (B, num_features), by the network of a file. Always in eval mode.

    Images are resized to the network's square, with a filter; grey is repeated or colours averaged, as it
    takes them. One that was taught classes has their `probabilities(features)`, (B, classes).
    """

    probabilities: Callable[[Tensor], Tensor]

    def __init__(self, path: str | Path) -> None:
        """Raises UserError for a file that is not there, broken, or of something else."""
        super().__init__()
        self.about, tensors = read(Path(path))
        self.network = empty(self.about)
        self.network.load_state_dict(tensors, assign=True)
        self.num_features = self.about.num_features
        self.sha256 = digest(tensors)
        if self.about.classes:
            self.probabilities = self._probabilities
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> TrainedFeatures:
        return self  # locked: a metric that is put in train mode keeps its features

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(brought_to(images, self.about.channels, self.about.size))

    def _probabilities(self, features: Tensor) -> Tensor:
        """(B, num_features) -> (B, classes)."""
        return self.network.logits(features * self.network.std + self.network.mean).softmax(1)

    def describe(self) -> dict[str, Any]:
        """What a protocol says of this network: numbers compare where its sha256 is the same."""
        return {
            "name": f"{PREFIX}{self.sha256[:8]}", "sha256": self.sha256, "num_features": self.num_features,
            "size": self.about.size, "learned_from": "classes" if self.about.classes else "views",
        }  # fmt: skip


def brought_to(images: Tensor, channels: int, size: int) -> Tensor:
    """uint8 (B, 1 or 3, H, W) -> (B, channels, size, size) float32 in [-1, 1]."""
    x = images.float() / 127.5 - 1
    x = x.mean(1, keepdim=True) if channels == 1 else x.expand(-1, 3, -1, -1)
    if x.shape[2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x


def empty(about: About) -> TrainedNetwork:
    """The network without values, which takes no memory and no random numbers."""
    with torch.device("meta"):
        return TrainedNetwork(about.channels, about.size, about.width, about.num_features, len(about.classes))


def save(path: Path, network: TrainedNetwork, about: About) -> None:
    """Whole or not at all; the same bytes for the same network."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with new_file(path) as temporary:
        save_file(tensors, temporary, metadata={KEY: about.model_dump_json()})


def read(path: Path) -> tuple[About, dict[str, Tensor]]:
    """What a file says of its network, and its tensors, if they are those of one. Raises UserError."""
    remedy = "make one with diffkd features train"
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path} of features; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get(KEY)
            if said is None:
                raise UserError(f"{path} is not a feature network of diffkd features train; {remedy}")
            about = About.model_validate(from_json(said))
            expected = {name: list(value.shape) for name, value in empty(about).state_dict().items()}
            if {name: list(file.get_slice(name).get_shape()) for name in file.keys()} != expected:  # noqa: SIM118
                raise UserError(f"{path} holds other tensors than the network that it describes; {remedy}")
            tensors = {name: file.get_tensor(name) for name in expected}
    except UserError:
        raise
    except ValidationError as error:
        raise UserError(f"{path}: {validation_message(error, About)}; {remedy}") from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path} cannot be read as features ({reason(error)}); {remedy}") from error
    if any(value.dtype != torch.float32 or not value.isfinite().all() for value in tensors.values()):
        raise UserError(f"{path} has tensors that are not finite float32 numbers; {remedy}")
    if not (tensors["std"] > 0).all():
        raise UserError(f"{path} has features without a scale; {remedy}")
    return about, tensors
