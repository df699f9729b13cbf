"""What new transformers have in common: their sizes, and how they begin."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, model_validator
from torch import nn

from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.io.config import Strict

SPREAD = 0.02  # of embeddings


class NewTransformer(Strict):
    """The sizes of a new transformer on latents."""

    width: int = Field(128, ge=4, le=1 << 14, multiple_of=4, description="of a token")
    layers: int = Field(6, ge=1, le=100, description="blocks")
    heads: int = Field(4, ge=1, description="of attention; divides the width")
    patch: int = Field(2, ge=1, le=64, description="latents a side of a token; divides the latents' side")

    @model_validator(mode="after")
    def _divides(self) -> NewTransformer:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide the transformer's width {self.width}")
        return self

    def check(self, images: Images, factor: int) -> None:
        """Raises UserError for images whose latents, so many times smaller, it does not take."""
        _, height, width = images.shape
        if height != width:
            raise UserError(
                f"images of {width}x{height} are not square, as those of this kind of pipeline are; set "
                "data.size"
            )
        side = height // factor
        if side % self.patch:
            raise UserError(
                f"model.transformer.patch {self.patch} does not divide the side of the latents, {side}; use "
                f"{', '.join(str(n) for n in range(1, side + 1) if side % n == 0)}"
            )


def adaln_zero(
    network: nn.Module, patches: nn.Conv2d, zero: Iterable[nn.Linear], embeds: Iterable[nn.Module]
) -> None:
    """Makes every block begin as the identity and the network as zero, in place (Peebles & Xie 2023, section
    3.2); the classes of diffusers have torch's own defaults.

    patches: what embeds them, a linear map. zero: what gives blocks their scales, shifts and gates, and the
    last layers. embeds: of time, labels or prompts, small normal numbers.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    for part in embeds:
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=SPREAD)
    for module in zero:
        nn.init.zeros_(module.weight)
