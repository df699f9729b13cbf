"""A small StableDiffusion3Pipeline from nothing, without T5: autoencoder, tokenizer, two CLIP text encoders,
and a transformer that learns a flow (Esser et al. 2024)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import SD3Transformer2DModel
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import FlowSchedule, Schedule, to_flow_diffusers
from diffkd.data.images import Images
from diffkd.io.config import Strict
from diffkd.models.codecs import Autoencoder
from diffkd.models.conditioners import SD3_TOKENS
from diffkd.models.joint_attention import repeat_last
from diffkd.models.new.autoencoder import NewAutoencoder
from diffkd.models.new.prompts import (
    NewTextEncoder,
    Tokens,
    check_captions,
    denoiser_of_tokens,
    learn_tokenizer,
)
from diffkd.models.new.transformer import NewTransformer, adaln_zero
from diffkd.models.transformers_models import silent


class NewSD3(Strict):
    """The config of a new StableDiffusion3Pipeline (see `new.NewPipeline`)."""

    shifted: ClassVar[bool] = True
    kind: Literal["sd3"]
    autoencoder: NewAutoencoder = Field(NewAutoencoder(), description="between images and their latents")
    text: NewTextEncoder = Field(NewTextEncoder(), description="each of the two text encoders")
    transformer: NewTransformer = Field(NewTransformer(), description="which learns the latents")

    def check(self, images: Images) -> None:
        """Raises UserError for images without captions, in grey, or whose latents the transformer does not
        take."""
        check_captions(images)
        self.autoencoder.check(images.shape)
        self.transformer.check(images, self.autoencoder.factor)

    def conditioner(self, images: Images) -> Tokens:
        return Tokens(learn_tokenizer(images.captions, self.text), self.text.length)

    def network(self, latents: tuple[int, int, int]) -> SD3Transformer2DModel:
        """Freshly initialised, for latents (C, S, S)."""
        sizes, told = self.transformer, 2 * self.text.width
        network: Any = SD3Transformer2DModel(
            sample_size=latents[1], patch_size=sizes.patch, in_channels=latents[0], out_channels=latents[0],
            num_layers=sizes.layers, attention_head_dim=sizes.width // sizes.heads,
            num_attention_heads=sizes.heads, joint_attention_dim=told, caption_projection_dim=sizes.width,
            pooled_projection_dim=told, pos_embed_max_size=latents[1] // sizes.patch, qk_norm="rms_norm",
        )  # fmt: skip
        blocks = network.transformer_blocks
        scales = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
        adaln_zero(
            network, network.pos_embed.proj, zero=[*scales, network.norm_out.linear, network.proj_out],
            embeds=[network.time_text_embed],
        )  # fmt: skip
        return network

    def build(
        self,
        latents: tuple[int, int, int],
        images: Images,
        conditioner: Tokens,
        schedule: Schedule,
        prediction: str,
    ) -> Denoiser:
        """Transformer and both text encoders, freshly initialised, which take tokens."""
        encoders = [self.text.build(conditioner.tokenizer, projected=True) for _ in range(2)]
        network = PromptedFlow(self.network(latents), *encoders)
        return denoiser_of_tokens(network, schedule, prediction, latents, conditioner)

    def save(
        self, denoiser: Denoiser, codec: Autoencoder, conditioner: Tokens, images: Images, folder: Path
    ) -> None:
        with silent():  # what diffusers imports for it warns of parts that are not used
            from diffusers import StableDiffusion3Pipeline

        network: Any = denoiser.network
        schedule, tokenizer = denoiser.schedule, conditioner.tokenizer
        assert isinstance(schedule, FlowSchedule)
        pipeline = StableDiffusion3Pipeline(
            vae=codec.network.cpu(), text_encoder=network.text_encoder.cpu(), tokenizer=tokenizer,
            text_encoder_2=network.text_encoder_2.cpu(), tokenizer_2=tokenizer, text_encoder_3=None,
            tokenizer_3=None, transformer=network.transformer.cpu(),
            scheduler=to_flow_diffusers(schedule, denoiser.prediction),
        )  # fmt: skip
        with silent():
            pipeline.save_pretrained(folder, safe_serialization=True)


class PromptedFlow(nn.Module):
    """Transformer and text encoders as one network, which takes tokens: they learn together."""

    def __init__(self, transformer: SD3Transformer2DModel, text_encoder: Any, text_encoder_2: Any) -> None:
        super().__init__()
        repeat_last(transformer, SD3_TOKENS)
        self.transformer, self.text_encoder, self.text_encoder_2 = transformer, text_encoder, text_encoder_2

    def forward(self, x_t: Tensor, time: Tensor, input_ids: Tensor) -> Tensor:
        """As stock encodes a prompt without T5, whose tokens are zeros."""
        told = [
            encoder(input_ids, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        states = torch.cat([one.hidden_states[-2] for one in told], -1)
        states = functional.pad(states, (0, 0, 0, 1))  # the token that stands for T5's
        pooled = torch.cat([one[0] for one in told], -1)
        output: Tensor = self.transformer(
            x_t, encoder_hidden_states=states.to(x_t.dtype), pooled_projections=pooled.to(x_t.dtype),
            timestep=time, return_dict=False,
        )[0]  # fmt: skip
        return output
