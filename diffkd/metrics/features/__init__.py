"""Feature networks by name: modules from uint8 images (B, C, H, W) to features (B, num_features).

One that also has `probabilities(features)`, (B, classes), can be used for the Inception Score. Those of
diffkd say in `describe()` all that their features depend on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.core.digest import digest
from diffkd.errors import UserError
from diffkd.io import plugins
from diffkd.io.naming import called
from diffkd.metrics.features.clip import CLIP
from diffkd.metrics.features.clip_score import CLIPTextImage
from diffkd.metrics.features.digits import DigitsFeatures
from diffkd.metrics.features.dinov2 import DINOv2
from diffkd.metrics.features.inception import InceptionV3
from diffkd.metrics.features.resize import Resize
from diffkd.metrics.features.shapes import ShapesFeatures
from diffkd.metrics.features.trained import PREFIX, SUFFIX, TrainedFeatures

NAMES = ("digits", "shapes", "inception", "dinov2", "clip")
OF_METRICS = ("clip_score",)  # what a metric alone brings along
TRANSFORMERS: dict[str, Callable[[str | None], nn.Module]] = {
    "dinov2": DINOv2, "clip": CLIP, "clip_score": CLIPTextImage
}  # fmt: skip
STANDARD_SAMPLES = 50_000  # images that FID by such features is usually reported with


def load(
    name: str, *, weights: str | None = None, resize: Resize | None = None, dtype: str | None = None
) -> nn.Module:
    """The feature network of that name, one of NAMES and OF_METRICS, of a .safetensors of `diffkd features
    train`, or of the user's own code, as `plugins` reads its name.

    weights: a file (inception) or folder (dinov2, clip, clip_score); default as each of them documents.
    resize, dtype: of inception. Raises UserError for what cannot be loaded, and for an option that the
    network does not have.
    """
    if name == "inception":
        if dtype not in (None, "float32", "float64"):
            key = called("evaluation.dtype")
            raise UserError(f"{key} {dtype!r} is not one of inception's; use float32 or float64")
        return InceptionV3(weights, resize=resize or "tf1", dtype=getattr(torch, dtype or "float32"))
    for key, value in (("resize", resize), ("dtype", dtype)):
        if value is not None:
            option = called(f"evaluation.{key}")
            raise UserError(f"{option} {value!r} is for inception features, and the features are {name}")
    if name in TRANSFORMERS:
        return TRANSFORMERS[name](weights)
    if weights is not None:
        option = called("evaluation.weights")
        raise UserError(f"{option} {weights!r} is for inception, dinov2 and clip; the features are {name}")
    if name.endswith(SUFFIX):
        return TrainedFeatures(name)
    if name == "digits":
        return DigitsFeatures()
    return ShapesFeatures() if name == "shapes" else _own(name)


def locate(name: str) -> str:
    """The name as configs and records have it: `plugins.locate`, among those that diffkd has itself; of a
    trained network the absolute path of its file."""
    return str(plugins.find_file(name)) if name.endswith(SUFFIX) else plugins.locate(name, NAMES)


def in_config(name: str) -> str:
    """`locate` for a field of a config; what is not read from a config file stays as it is."""
    if name.endswith(SUFFIX):
        return locate(name) if plugins.reading_config() else name
    return plugins.in_config(name, NAMES)


def check_named(name: str, where: object) -> None:
    """Raises UserError where a file, and not the user, names a network of somebody's own: to load it runs its
    code. A trained network runs none, but is known by its file alone."""
    if name.startswith(PREFIX):
        raise UserError(
            f"{where} is by the trained features {name}; name their file: {called('evaluation.features')} "
            f"FILE{SUFFIX}"
        )
    if name not in NAMES and not name.endswith(SUFFIX):
        raise UserError(
            f"{where} is by the features {name!r}, code that a file may not run; "
            f"if it is yours, name it: {called('evaluation.features')} {name}"
        )


def _own(name: str) -> nn.Module:
    kind = plugins.import_own(name, nn.Module, "feature network", NAMES)
    try:
        network = kind() if isinstance(kind, type) and issubclass(kind, nn.Module) else None
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"feature network {name!r} cannot be made: {plugins.failure(error)}") from error
    if network is None or not isinstance(getattr(network, "num_features", None), int):
        raise UserError(
            f"feature network {name!r} is not an nn.Module with an integer num_features; give it one"
        )
    _guard(name, network)
    return network.eval().requires_grad_(False)


def _guard(name: str, network: Any) -> None:
    """Its forward fails in one line: with whatever it raises, and where it gives no (B, num_features)."""
    forward = network.forward

    def guarded(images: Tensor) -> Tensor:
        try:
            features = forward(images)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the user's code raises
            raise UserError(
                f"feature network {name!r} fails on images of shape {tuple(images.shape)}: "
                f"{plugins.failure(error)}"
            ) from error
        expected = len(images), network.num_features
        if not isinstance(features, Tensor) or features.shape != expected:
            given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"feature network {name!r} gives {given} for images of shape {tuple(images.shape)}; it must "
                f"give a tensor (B, num_features), here {expected}"
            )
        return features

    network.forward = guarded


def describe(name: str, network: nn.Module) -> dict[str, Any]:
    """What a protocol says of a feature network: its name, sha256 of its weights, what it does to images.

    One of the user's own is called module.Class, however it was named.
    """
    own: Any = getattr(network, "describe", None)
    if own is not None:
        return dict(own())
    name = locate(name)
    if name in sys.modules:  # which defines one
        name = f"{name}.{type(network).__name__}"
    return {"name": name, "sha256": digest(network.state_dict()), "num_features": network.num_features}
