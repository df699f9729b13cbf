"""DINOv2 features."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from diffkd.metrics.features.resize import resize
from diffkd.metrics.features.vision import Kind, VisionFeatures

DINOV2 = Kind(
    name="dinov2",
    hub_id="facebook/dinov2-large",
    architecture="Dinov2Model",
    model_types=("dinov2",),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


class DINOv2(VisionFeatures):
    """The CLS token of DINOv2 (ViT-L/14) after its last layer norm, 1024 features of 224x224 images, for
    FD-DINOv2 (Stein et al. 2023, "Exposing flaws of generative model evaluation metrics").

    weights: a folder or a hub id. Raises UserError where they cannot be loaded, or are not DINOv2's.
    """

    resize = "clean"
    size = 224  # the paper's, whatever size the config says: position embeddings are interpolated

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__(DINOV2, weights)
        self.num_features = self.network.config.hidden_size

    def resized(self, images: Tensor) -> Tensor:
        return resize(images, self.size, "clean", dtype=self.mean.dtype)

    def features(self, x: Tensor) -> Tensor:
        cls: Tensor = self.network(pixel_values=x).last_hidden_state[:, 0]
        return cls
