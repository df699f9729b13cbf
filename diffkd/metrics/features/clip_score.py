"""CLIP with both of its towers, for CLIP score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.metrics.features.clip import CLIP_VISION
from diffkd.metrics.features.vision import Kind, VisionFeatures
from diffkd.models import transformers_models
from diffkd.models.pipeline_files import read_object

CLIP_BOTH = Kind(
    name="clip_score",
    hub_id="openai/clip-vit-large-patch14",
    architecture="CLIPModel",
    model_types=("clip",),
    mean=CLIP_VISION.mean,
    std=CLIP_VISION.std,
    chosen=False,
    files=("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
           "preprocessor_config.json"),
)  # fmt: skip
TOGETHER = 128  # prompts that are embedded at once


class CLIPTextImage(VisionFeatures):
    """The image embedding of CLIP (ViT-L/14 at 224x224) divided by its L2 norm, 768 features, and the same of
    texts.

    Images are brought to the network's size as the stock image processor of transformers does with Pillow:
    the short side resized (bicubic, antialiased, in 8 bits), the centre cropped. Pillow computes in fixed
    point, so that a few pixels differ by a grey level.

    weights: a folder with a tokenizer, or a hub id. Raises UserError where they cannot be loaded, are not
    CLIP's, or take images that are normalised otherwise.
    """

    resize = "short side bicubic, antialiased, 8 bits; centre crop"

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__(CLIP_BOTH, weights)
        config = self.network.config
        self.num_features, self.size = config.projection_dim, config.vision_config.image_size
        _check_normalisation(self.folder)
        if not any((self.folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise UserError(
                f"{self.weights} has no tokenizer (tokenizer.json, or vocab.json and merges.txt), which "
                "clip_score reads prompts with; copy it from where the weights are from"
            )
        self.tokenizer = transformers_models.load_tokenizer(self.folder, self.weights)
        self.tokens = min(self.tokenizer.model_max_length, config.text_config.max_position_embeddings)

    def resized(self, images: Tensor) -> Tensor:
        short = min(images.shape[2:])
        height, width = (self.size * side // short for side in images.shape[2:])
        x = images.to(self.mean.dtype)
        for shape in ((images.shape[2], width), (height, width)):  # Pillow keeps 8 bits between the two
            x = F.interpolate(x, shape, mode="bicubic", align_corners=False, antialias=True)
            x = x.round().clamp(0, 255)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return x[..., top : top + self.size, left : left + self.size]

    def features(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.network.vision_model(pixel_values=x).pooler_output
        return F.normalize(self.network.visual_projection(pooled), dim=1)

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, int]:
        """Their embeddings, (B, num_features) of unit length, on the device of the weights; how many of them
        have more tokens than the network takes, and are cut."""
        with transformers_models.silent():
            whole = self.tokenizer(list(prompts)).input_ids
            tokens = self.tokenizer(
                list(prompts), padding="max_length", max_length=self.tokens, truncation=True,
                return_tensors="pt",
            ).input_ids.to(self.mean.device)  # fmt: skip
        pooled = [self.network.text_model(part).pooler_output for part in tokens.split(TOGETHER)]
        embeddings = F.normalize(self.network.text_projection(torch.cat(pooled)), dim=1)
        return embeddings, sum(len(ids) > self.tokens for ids in whole)

    def describe(self) -> dict[str, Any]:
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        words = {"tokens": self.tokens, "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()}
        return super().describe() | words


def _check_normalisation(folder: Path) -> None:
    """Raises UserError where the network's own image processor does not normalise as CLIP's does."""
    path = folder / "preprocessor_config.json"
    said = read_object(path) if path.is_file() else {}
    for key, usual in (("image_mean", CLIP_BOTH.mean), ("image_std", CLIP_BOTH.std)):
        if said.get(key, [*usual]) != [*usual]:
            raise UserError(
                f"{path} has {key} {quoted(said[key])}, and clip_score normalises images with {[*usual]}; "
                f"give weights such as {CLIP_BOTH.hub_id}"
            )
