"""A small DiTPipeline from nothing: autoencoder, and a transformer on its latents (Peebles & Xie 2023)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers import DiTTransformer2DModel
from pydantic import Field, model_validator
from torch import nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.models.codecs import Autoencoder
from diffkd.models.families import dit
from diffkd.models.new.autoencoder import NewAutoencoder


class NewTransformer(Strict):
    """The config of a new DiTTransformer2DModel."""

    width: int = Field(128, ge=4, le=1 << 14, multiple_of=4, description="of a token")
    layers: int = Field(6, ge=1, le=100, description="blocks")
    heads: int = Field(4, ge=1, description="of attention; divides the width")
    patch: int = Field(2, ge=1, le=64, description="latents a side of a token; divides the latents' side")

    @model_validator(mode="after")
    def _divides(self) -> NewTransformer:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide the transformer's width {self.width}")
        return self

    def build(self, latents: tuple[int, int, int], classes: int) -> DiTTransformer2DModel:
        """Freshly initialised, for latents (C, S, S) and this many classes, and for none."""
        network = DiTTransformer2DModel(
            num_attention_heads=self.heads, attention_head_dim=self.width // self.heads,
            in_channels=latents[0], out_channels=latents[0], num_layers=self.layers, sample_size=latents[1],
            patch_size=self.patch, num_embeds_ada_norm=classes,
        )  # fmt: skip
        initialise(network)
        return network


class NewDiT(Strict):
    """The config of a new DiTPipeline (see `new.NewPipeline`)."""

    kind: Literal["dit"]
    autoencoder: NewAutoencoder = NewAutoencoder()
    transformer: NewTransformer = NewTransformer()

    def check(self, images: Images) -> None:
        """Raises UserError for images without labels, or whose latents the transformer does not take."""
        _, height, width = images.shape
        if images.labels is None:
            raise UserError(
                f"{images.name} has no labels, of which a DiT draws; provide class subfolders, or leave out "
                "model.kind"
            )
        if height != width:
            raise UserError(f"images of {width}x{height} are not square, as a DiT's are; set data.size")
        self.autoencoder.check(images.shape)
        side, patch = height // self.autoencoder.factor, self.transformer.patch
        if side % patch:
            raise UserError(
                f"model.transformer.patch {patch} does not divide the side of the latents, {side}; use "
                f"{', '.join(str(n) for n in range(1, side + 1) if side % n == 0)}"
            )

    def conditioner(self, images: Images) -> None:
        return None

    def build(
        self,
        latents: tuple[int, int, int],
        images: Images,
        conditioner: None,
        schedule: Schedule,
        prediction: str,
    ) -> Denoiser:
        """The transformer, freshly initialised. In eval mode, as in train mode it drops labels itself, by
        numbers of torch's global generator, which no run could repeat."""
        classes = len(images.classes)
        network = self.transformer.build(latents, classes)
        return Denoiser(
            network, schedule, prediction, num_classes=classes, null_label=classes, call=dit.call
        ).eval()

    def save(
        self, denoiser: Denoiser, codec: Autoencoder, conditioner: None, images: Images, folder: Path
    ) -> None:
        """With the classes' names, by which the pipeline knows their labels."""
        named = {str(label): name for label, name in enumerate(images.classes)}
        index = {
            "_class_name": dit.PIPELINES[0], "_diffusers_version": diffusers.__version__, "id2label": named
        }  # fmt: skip
        denoiser.codec = Autoencoder(replace(codec.source, index=codec.source.index | index))
        dit.save(denoiser, folder)


def initialise(network: DiTTransformer2DModel) -> None:
    """adaLN-Zero: every block begins as the identity, and the network as zero (Peebles & Xie 2023, section
    3.2); the class of diffusers has torch's own defaults."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    made: Any = network
    nn.init.xavier_uniform_(made.pos_embed.proj.weight.flatten(1))  # a linear map of a patch
    nn.init.zeros_(made.pos_embed.proj.bias)
    for block in made.transformer_blocks:
        embedding = block.norm1.emb
        nn.init.normal_(embedding.class_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(embedding.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedding.timestep_embedder.linear_2.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(made.proj_out_1.weight)
    nn.init.zeros_(made.proj_out_2.weight)
