"""DiT: class-conditional transformers on latents (Peebles & Xie 2023), in and out of DiTPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import to_diffusers
from diffkd.errors import UserError
from diffkd.io.files import write_json
from diffkd.io.text import quoted
from diffkd.models import components, networks, schedulers
from diffkd.models.codecs import Autoencoder
from diffkd.models.pipeline_files import INDEX, STEM, tensor_sizes, weights_of
from diffkd.models.source import Source

PIPELINES = ("DiTPipeline",)
NETWORK = DiTTransformer2DModel
CALL = {"guidance_scale": 1.0}  # the pipeline guides by default, and names label 1000 as no class
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
GLOBAL_NOISE = True
ONCE = "Transformer2DModel"  # what diffusers called the network before version 0.29
COPIED = {"vae": STEM}
MOST_TOKENS = 1 << 16  # of an image; the published networks have 1024 at most
COUNTS = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "sample_size", "patch_size",
    "num_embeds_ada_norm",
)  # fmt: skip


def load(source: Source) -> Denoiser:
    """A pipeline as a Denoiser in float32 (see `Family.load`). Its autoencoder is checked, and read when it
    is first used."""
    if source.network is not None:
        raise UserError(
            f"{source.name} is a DiTTransformer2DModel alone, without its autoencoder; give the folder of "
            "their pipeline"
        )
    components.check(source, "transformer", COPIED)
    config = networks.config_of(source.place_of("transformer"), DiTTransformer2DModel)
    _check_config(config, source.name)
    _check_table(config, source)
    network = networks.read(source, "transformer", DiTTransformer2DModel, once=ONCE)
    network.register_to_config(out_channels=network.out_channels)  # which the stock pipeline divides by two
    classes, side = config["num_embeds_ada_norm"], config["sample_size"]
    _check_classes(classes, source)
    sampling = schedulers.read(source)
    codec = Autoencoder(source, only=(side, side), normalised=False)
    codec.check_channels(config["in_channels"])
    return Denoiser(
        network,
        sampling.schedule,
        sampling.prediction,
        num_classes=classes,
        null_label=classes,
        clip=sampling.clip,
        steps=source.card.get("steps"),
        sampler=sampling.sampler,
        call=call,
        codec=codec,
    )


def call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """cond: class_labels (B,). A learned variance, the second half of the channels, is left out."""
    output: Tensor = network(x_t, timestep=time, class_labels=cond["class_labels"], return_dict=False)[0]
    return output[:, : x_t.shape[1]]


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """Raises UserError for a network that `call` does not describe, or of images beyond all use."""
    networks.check_supported(config, name, {"norm_type": ("ada_norm_zero",)})
    for key in COUNTS:
        value = config[key]
        if not (type(value) is int and value > 0) and (key, value) != ("out_channels", None):
            raise UserError(f"{name} has {key} {quoted(value)}; supported is a positive integer")
    given, made = config["in_channels"], config["out_channels"]
    if made not in (None, given, 2 * given):
        raise UserError(
            f"{name} has in_channels {given} and out_channels {made}; supported are as many, or twice as "
            "many for a learned variance"
        )
    side, patch = config["sample_size"], config["patch_size"]
    if side % patch:
        raise UserError(f"{name} has sample_size {side}, which does not divide by its patch_size {patch}")
    if (tokens := (side // patch) ** 2) > MOST_TOKENS:
        raise UserError(
            f"{name} has sample_size {side} and patch_size {patch}, which are {tokens:,} tokens; supported "
            f"are up to {MOST_TOKENS:,}"
        )


def _check_table(config: Mapping[str, Any], source: Source) -> None:
    """Raises UserError where the weights have other classes than the config: one more, which means none."""
    classes, width = (
        config["num_embeds_ada_norm"],
        config["num_attention_heads"] * config["attention_head_dim"],
    )
    _, files = weights_of(source.place_of("transformer"), source.name, source.variant)
    for name, numbers in (found for file in files for found in tensor_sizes(file)):
        if name.endswith("class_embedder.embedding_table.weight") and numbers != (classes + 1) * width:
            raise UserError(
                f"{source.name} has num_embeds_ada_norm {classes}, and its weights embed "
                f"{numbers // width - 1} classes and none; give the config that they were trained with"
            )


def _check_classes(classes: int, source: Source) -> None:
    """Raises UserError for a card of other labels than the network has: those of its classes, and then the
    one that means no class."""
    for key in ("num_classes", "null_label"):
        value = source.card.get(key, classes)
        if value != classes:
            raise UserError(
                f"{source.card_path} has {key} {value}, and the network has num_embeds_ada_norm "
                f"{classes}; repair it"
            )


def save(denoiser: Denoiser, folder: Path) -> None:
    """The teacher's pipeline with another network and scheduler; the autoencoder is copied."""
    network: Any = denoiser.network
    networks.check_saved(network)
    codec = denoiser.codec
    if not isinstance(codec, Autoencoder):
        raise UserError("a DiT is saved with the autoencoder of its pipeline; load it from there")
    folder.mkdir(parents=True, exist_ok=True)
    network.save_pretrained(folder / "transformer", safe_serialization=True)
    scheduler = to_diffusers(denoiser.schedule, denoiser.prediction, denoiser.clip, denoiser.sampler)
    scheduler.save_pretrained(folder / "scheduler")
    components.copy(codec.source, COPIED, folder, network.dtype)
    changed = {
        "transformer": ["diffusers", DiTTransformer2DModel.__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    write_json(folder / INDEX, {**codec.source.index, **changed})
