"""Latent text-to-image UNets: Stable Diffusion and SDXL, read from and written to their stock pipelines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import GUIDANCE, Denoiser
from diffkd.core.schedules import to_diffusers
from diffkd.errors import UserError
from diffkd.io.files import write_json
from diffkd.io.text import quoted
from diffkd.models import components, guidance_input, networks, plain_unets, schedulers
from diffkd.models.codecs import Autoencoder
from diffkd.models.conditioners import ClipPrompts
from diffkd.models.families import unet2d
from diffkd.models.lora_files import Keys
from diffkd.models.pipeline_files import INDEX, STEM
from diffkd.models.source import Source
from diffkd.models.unet import to_fast, to_stock

XL = "StableDiffusionXLPipeline"
PIPELINES = ("StableDiffusionPipeline", XL)
NETWORK = UNet2DConditionModel
CALL: dict[str, Any] = {}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LORA = Keys("unet", kohya="lora_unet", call={"guidance_scale": 1.0})  # the base guides by default
EMBEDDED = 16  # width of the guidance embedding of students that have guidance baked in
UNKNOWN_RANGE = (1.0, 15.0)  # of the weights that a network was trained for, where no card says it
COPIED = {  # components that students have of their teacher, and the stem of their weights' names
    "vae": STEM, "text_encoder": "model", "text_encoder_2": "model", "tokenizer": None, "tokenizer_2": None,
    "safety_checker": "model", "feature_extractor": None, "image_encoder": "model",
}  # fmt: skip
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
}


def load(source: Source) -> Denoiser:
    """A pipeline as a Denoiser in float32 (see `Family.load`). Its text encoders and autoencoder are checked,
    and read when they are first used."""
    if source.network is not None:
        return _load_alone(source)
    two = source.index["_class_name"] == XL
    components.check(source, "unet", COPIED)
    _check_config(networks.config_of(source.place_of("unet"), UNet2DConditionModel), source.name, two=two)
    network = networks.read(source, "unet", UNet2DConditionModel)
    network = to_fast(network)
    sampling = schedulers.read(source)
    codec = Autoencoder(source, normalised=two)  # StableDiffusionPipeline has no use for means
    zeros = two and bool(source.index.get("force_zeros_for_empty_prompt", True))
    conditioner = ClipPrompts(source, two=two, zeros=zeros)
    _check_widths(network.config, codec, conditioner)
    if guidance_input.is_unused(network):
        guidance_input.detach(network)
    takes = network.config.time_cond_proj_dim is not None
    return Denoiser(
        network,
        sampling.schedule,
        sampling.prediction,
        clip=sampling.clip if two else None,  # StableDiffusionPipeline turns clip_sample off
        steps=source.card.get("steps"),
        sampler=sampling.sampler,
        guidance_range=source.card.get("guidance_range", UNKNOWN_RANGE) if takes else None,
        call=call,
        example=conditioner.example,
        codec=codec,
        conditioner=conditioner,
    )


def _load_alone(source: Source) -> Denoiser:
    """A network that attends to nothing, which is one of pixels. Raises UserError for others."""
    config = networks.config_of(source.place_of("unet"), UNet2DConditionModel)
    if not plain_unets.attends(config):
        return unet2d.load(source)
    if config["num_class_embeds"] is not None and config["in_channels"] == config["out_channels"]:
        raise UserError(
            f"{source.name} is a UNet2DConditionModel of {config['num_class_embeds']} class labels with "
            "cross-attention: no stock pipeline gives it labels without prompts, so none would draw its "
            "students; train a UNet2DModel with labels, or on latents a DiT"
        )
    raise UserError(
        f"{source.name} is a UNet2DConditionModel alone, without its text encoder and its autoencoder; "
        "give the folder of their pipeline"
    )


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Any:
    """cond: encoder_hidden_states (B, 77, D); for SDXL text_embeds (B, P) and time_ids (B, 6); for a network
    that takes it guidance_scale (B,)."""
    weight = None
    if GUIDANCE in cond:
        config = cast(Any, getattr(network, "module", network)).config  # which DDP does not pass on
        width = config.time_cond_proj_dim
        weight = guidance_input.embedded(cond[GUIDANCE], width).to(x_t.dtype)
    added = {key: cond[key].to(x_t.dtype) for key in ("text_embeds", "time_ids") if key in cond}
    states = cond["encoder_hidden_states"].to(x_t.dtype)
    return network(
        x_t, time, encoder_hidden_states=states, timestep_cond=weight, added_cond_kwargs=added or None,
        return_dict=False,
    )  # fmt: skip


def _check_config(config: Mapping[str, Any], name: str, *, two: bool) -> None:
    """Raises UserError for a network that `call` does not describe."""
    channels = config["in_channels"], config["out_channels"]
    if channels[0] != channels[1]:
        kind = {8: "an image-editing", 9: "an inpainting"}.get(channels[0], "another")
        raise UserError(
            f"{name} has in_channels {quoted(channels[0])} and out_channels {quoted(channels[1])}, the "
            f"network of {kind} pipeline; supported are those that take noised latents alone"
        )
    for key in ("num_class_embeds", "class_embed_type"):
        if config[key] is not None:
            raise UserError(
                f"{name} has {key} {quoted(config[key])}, and its pipeline gives its network no class "
                "labels; give a teacher without, or for labels alone a UNet2DModel or a DiT"
            )
    networks.check_supported(config, name, SUPPORTED)
    added = config["addition_embed_type"]
    if (added == "text_time") != two:
        raise UserError(
            f"{name} has addition_embed_type {quoted(added)}, and its pipeline's is "
            f"{'text_time' if two else 'none'}; is model_index.json the one that it was saved with?"
        )
    width = config["time_cond_proj_dim"]
    if width is not None and not (type(width) is int and width >= 4):
        raise UserError(f"{name} has time_cond_proj_dim {quoted(width)}; supported is an integer from 4")
    networks.check_sample_size(config, name)


def _check_widths(config: Any, codec: Autoencoder, conditioner: ClipPrompts) -> None:
    """Raises UserError where encoder, autoencoder and network do not fit each other."""
    width = conditioner.example["encoder_hidden_states"].shape[-1]
    if config.cross_attention_dim != width:
        raise UserError(
            f"{codec.name} has text encoders of width {width}, and its network takes "
            f"{config.cross_attention_dim}; are they of one model?"
        )
    codec.check_channels(config.in_channels)


def save(denoiser: Denoiser, folder: Path) -> None:
    """The teacher's pipeline with another network and scheduler; all else is copied.

    A student's network gets a guidance embedding of zeros: stock pipelines do without guidance where there
    is an embedding of it, and draw the student's images at their default arguments.
    """
    network: Any = denoiser.network
    networks.check_saved(network)
    conditioner = denoiser.conditioner
    if not isinstance(conditioner, ClipPrompts):
        raise UserError("a text-to-image UNet is saved with the pipeline that it was loaded from; load it so")
    source = conditioner.source
    folder.mkdir(parents=True, exist_ok=True)
    with _guidance_embedding(network) if denoiser.steps is not None else nullcontext():
        to_stock(network).save_pretrained(folder / "unet", safe_serialization=True)
    scheduler = scheduler_of(denoiser)
    scheduler.save_pretrained(folder / "scheduler")
    components.copy(source, COPIED, folder, network.dtype)
    write_json(folder / INDEX, {**source.index, "scheduler": ["diffusers", type(scheduler).__name__]})


def scheduler_of(denoiser: Denoiser) -> Any:
    """The stock scheduler that draws it."""
    scheduler = to_diffusers(denoiser.schedule, denoiser.prediction, denoiser.clip, denoiser.sampler)
    scheduler.register_to_config(steps_offset=1)  # which a trailing grid ignores, and else stock warns
    return scheduler


@contextmanager
def _guidance_embedding(network: Any) -> Iterator[None]:
    """With one of zeros, unless there is one."""
    if network.time_embedding.cond_proj is not None:
        yield
        return
    guidance_input.attach(network, EMBEDDED)
    try:
        yield
    finally:
        guidance_input.detach(network)
