"""A small DiTPipeline from nothing: autoencoder, and a transformer on its latents (Peebles & Xie 2023)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
from diffusers import DiTTransformer2DModel
from pydantic import Field

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.io.config import Strict
from diffkd.models.codecs import Autoencoder
from diffkd.models.families import dit
from diffkd.models.new.autoencoder import NewAutoencoder
from diffkd.models.new.transformer import NewTransformer, adaln_zero


class NewDiT(Strict):
    """The config of a new DiTPipeline (see `new.NewPipeline`)."""

    shifted: ClassVar[bool] = False
    kind: Literal["dit"]
    autoencoder: NewAutoencoder = Field(NewAutoencoder(), description="between images and their latents")
    transformer: NewTransformer = Field(NewTransformer(), description="which learns the latents")

    def check(self, images: Images) -> None:
        """Raises UserError for images without labels, or whose latents the transformer does not take."""
        if images.labels is None:
            raise UserError(
                f"{images.name} has no labels, of which a DiT draws; provide class subfolders, or leave out "
                "model.kind"
            )
        self.autoencoder.check(images.shape)
        self.transformer.check(images, self.autoencoder.factor)

    def conditioner(self, images: Images) -> None:
        return None

    def network(self, latents: tuple[int, int, int], classes: int) -> DiTTransformer2DModel:
        """Freshly initialised, for latents (C, S, S) and this many classes, and for none."""
        sizes = self.transformer
        network: Any = DiTTransformer2DModel(
            num_attention_heads=sizes.heads, attention_head_dim=sizes.width // sizes.heads,
            in_channels=latents[0], out_channels=latents[0], num_layers=sizes.layers, sample_size=latents[1],
            patch_size=sizes.patch, num_embeds_ada_norm=classes,
        )  # fmt: skip
        blocks = network.transformer_blocks
        adaln_zero(
            network, network.pos_embed.proj,
            zero=[*(block.norm1.linear for block in blocks), network.proj_out_1, network.proj_out_2],
            embeds=[block.norm1.emb for block in blocks],
        )  # fmt: skip
        return network

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
        network = self.network(latents, classes)
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
