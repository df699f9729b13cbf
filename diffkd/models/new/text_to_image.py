"""A small StableDiffusionPipeline from nothing: autoencoder, tokenizer, text encoder, UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusers import UNet2DConditionModel
from pydantic import Field, model_validator
from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, to_diffusers
from diffkd.data.images import Images
from diffkd.io.config import Strict
from diffkd.models.codecs import Autoencoder
from diffkd.models.new.autoencoder import NewAutoencoder, Widths
from diffkd.models.new.prompts import (
    NewTextEncoder,
    Tokens,
    check_captions,
    denoiser_of_tokens,
    learn_tokenizer,
)
from diffkd.models.transformers_models import silent


class NewUNet(Strict):
    """The config of a new UNet2DConditionModel."""

    channels: Widths = Field([64, 128], description="at each resolution, each half the size of the last")
    attention: list[bool] | None = Field(
        None, description="whether there is cross-attention at each resolution; default at all"
    )
    layers: int = Field(1, ge=1, le=100, description="residual blocks at each resolution")
    heads: int = Field(4, ge=1, description="of attention; divides every channel count")
    norm_groups: int = Field(8, ge=1, description="groups of group normalisation; divides all channels")

    @model_validator(mode="after")
    def _asked_somewhere(self) -> NewUNet:
        if self.attention is not None and (
            len(self.attention) != len(self.channels) or not any(self.attention)
        ):
            raise ValueError(
                f"attention {self.attention} is not one of true and false for each of channels "
                f"{self.channels}, with true at least once"
            )
        return self

    def build(self, latents: tuple[int, int, int], width: int) -> UNet2DConditionModel:
        """Freshly initialised, for latents (C, H, W). width: of an embedding."""
        attends = self.attention or [True] * len(self.channels)
        return UNet2DConditionModel(
            sample_size=(latents[1], latents[2]), in_channels=latents[0], out_channels=latents[0],
            down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in attends[::-1]),
            block_out_channels=tuple(self.channels),
            layers_per_block=self.layers, norm_num_groups=self.norm_groups, attention_head_dim=self.heads,
            cross_attention_dim=width,
        )  # fmt: skip


class TextToImage(Strict):
    """The config of a new StableDiffusionPipeline (see `new.NewPipeline`)."""

    shifted: ClassVar[bool] = False
    kind: Literal["text_to_image"]
    autoencoder: NewAutoencoder = Field(NewAutoencoder(), description="between images and their latents")
    text: NewTextEncoder = Field(NewTextEncoder(), description="the text encoder and its tokenizer")
    unet: NewUNet = Field(NewUNet(), description="which learns the latents")

    def check(self, images: Images) -> None:
        """Raises UserError for images without captions, in grey, or of a size that does not divide."""
        check_captions(images)
        self.autoencoder.check(images.shape)

    def conditioner(self, images: Images) -> Tokens:
        return Tokens(learn_tokenizer(images.captions, self.text), self.text.length)

    def build(
        self,
        latents: tuple[int, int, int],
        images: Images,
        conditioner: Tokens,
        schedule: Schedule,
        prediction: str,
    ) -> Denoiser:
        """UNet and text encoder, freshly initialised, which take tokens."""
        encoder = self.text.build(conditioner.tokenizer)
        network = Prompted(self.unet.build(latents, self.text.width), encoder)
        return denoiser_of_tokens(network, schedule, prediction, latents, conditioner)

    def save(
        self, denoiser: Denoiser, codec: Autoencoder, conditioner: Tokens, images: Images, folder: Path
    ) -> None:
        with silent():  # what diffusers imports for it warns of parts that are not used
            from diffusers import StableDiffusionPipeline

        network: Any = denoiser.network
        scheduler = to_diffusers(denoiser.schedule, denoiser.prediction)
        scheduler.register_to_config(steps_offset=1)  # which a trailing grid ignores, and else stock warns
        pipeline = StableDiffusionPipeline(
            vae=codec.network.cpu(), text_encoder=network.text_encoder.cpu(), tokenizer=conditioner.tokenizer,
            unet=network.unet.cpu(), scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
        with silent():
            pipeline.save_pretrained(folder, safe_serialization=True)


class Prompted(nn.Module):
    """UNet and text encoder as one network, which takes tokens: they learn together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: Any) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, time: Tensor, input_ids: Tensor) -> Tensor:
        states = self.text_encoder(input_ids)[0].to(x_t.dtype)
        output: Tensor = self.unet(x_t, time, encoder_hidden_states=states, return_dict=False)[0]
        return output
