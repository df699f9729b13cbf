"""CLIP score: how well pictures fit their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from diffkd.core.precision import full_float32
from diffkd.io.text import counted
from diffkd.metrics.base import Add, Batch, Inputs, Metric, Running, Value

SCALE = 100.0


def scores(images: Tensor, texts: Tensor) -> Tensor:
    """100 max(cos(image, text), 0) of each pair, (B,) (Hessel et al. 2021, https://arxiv.org/abs/2104.08718).

    images, texts: (B, d), CLIP embeddings of unit length. The paper's own weight is 2.5 in place of 100, so
    its CLIP-S is this divided by 40.
    """
    return SCALE * (images.double() * texts.double()).sum(1).clamp(min=0)


class Fits:
    """Adds up the scores of pictures with their prompts, how many there are, and how many prompts are cut."""

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network, self.device = network, device
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Images with their prompts."""
        assert batch.prompts is not None
        with full_float32(self.device.type):
            texts, cut = self.network.embed(batch.prompts)
        found = scores(batch.features, texts)
        self.sums += torch.tensor([found.sum().item(), len(found), cut]).to(self.sums)

    def merge_across(self, add: Add) -> None:
        """Adds up all processes, each of which must call it, with images or without."""
        self.sums = add(self.sums)


class ClipScore(Metric):
    """The mean CLIP score of images with their prompts, from 0 to 100."""

    name: ClassVar[str] = "clip_score"
    values: ClassVar[tuple[Value, ...]] = (Value("clip_score", "CLIP score", ".2f"),)
    network: ClassVar[str] = "clip_score"
    with_prompts: ClassVar[bool] = True
    with_reference: ClassVar[bool] = False

    clip_score_weights: str | None = Field(
        None, description="of clip_score; default openai/clip-vit-large-patch14"
    )

    def weights(self) -> str | None:
        return self.clip_score_weights

    def options(self, samples: int, reference: int | None) -> dict[str, Any]:
        return {"scale": SCALE}

    def running(self, network: nn.Module, count: int, device: torch.device) -> Running:
        return Fits(network, device)

    def compute(self, inputs: Inputs) -> dict[str, float | None]:
        total, count, _ = inputs.running.sums.tolist()
        return {"clip_score": total / count}

    def notes(self, inputs: Inputs) -> Sequence[str]:
        cut = int(inputs.running.sums[2])
        if not cut:
            return ()
        tokens = inputs.running.network.tokens
        return [f"{counted(cut, 'image')} with a prompt of more than {tokens} tokens, cut for the CLIP score"]
