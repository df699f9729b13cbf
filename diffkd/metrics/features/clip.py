"""CLIP image features."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from diffkd.metrics.features.vision import Kind, VisionFeatures

CLIP_VISION = Kind(
    name="clip",
    hub_id="openai/clip-vit-large-patch14-336",
    architecture="CLIPVisionModelWithProjection",
    model_types=("clip_vision_model", "clip"),  # the second has a text tower too, left unread
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


class CLIP(VisionFeatures):
    """The image embedding of CLIP (ViT-L/14 at 336x336) divided by its L2 norm, 768 features, for CMMD
    (Jayasumana et al. 2024, "Rethinking FID: Towards a better evaluation metric for image generation"). Its
    code resizes without a filter and without clipping; so does this.

    weights: a folder or a hub id. Raises UserError where they cannot be loaded, or are not CLIP's.
    """

    resize = "bicubic"

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__(CLIP_VISION, weights)
        self.num_features = self.network.config.projection_dim
        self.size = self.network.config.image_size

    def resized(self, images: Tensor) -> Tensor:
        x = images.to(self.mean.dtype)
        return F.interpolate(x, (self.size, self.size), mode="bicubic", align_corners=False)

    def features(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.network(pixel_values=x).image_embeds
        return embedding / embedding.norm(dim=1, keepdim=True)
