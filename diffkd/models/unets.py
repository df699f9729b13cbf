"""UNet2DModels of pipelines, read from untrusted files: checked, and without a learned variance."""

from __future__ import annotations

import math
from typing import Any

import psutil
import torch
from diffusers import UNet2DModel

from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import networks, plain_unets
from diffkd.models.source import Source
from diffkd.models.unet import to_fast

CONDITIONAL = "UNet2DConditionModel"


def read(source: Source) -> UNet2DModel:
    """The network of a pipeline, or the one alone, in float32. Raises UserError as `networks.read`, and for
    one that `Denoiser` does not describe."""
    if _is_conditional(source):
        network = plain_unets.read(source, _check_memory)
    else:
        network = networks.read(source, "unet", UNet2DModel, _check_memory)
    _check_config(network.config, source.name)
    return to_fast(_without_variance(network))


def _is_conditional(source: Source) -> bool:
    """Whether the network alone is a UNet2DConditionModel. Raises UserError for a pipeline of one."""
    if source.network is not None:
        return networks.config_of(source.network, UNet2DModel).get("_class_name") == CONDITIONAL
    entry = source.index.get("unet")
    if isinstance(entry, list) and entry[-1:] == [CONDITIONAL]:
        raise UserError(
            f"{source.name} has a {CONDITIONAL}, which its {source.index.get('_class_name')} cannot call, as "
            "it gives no encoder_hidden_states; supported is UNet2DModel, or of pixels its own folder alone"
        )
    return False


def _check_config(config: Any, name: str) -> None:
    networks.check_supported(
        config, name, {"time_embedding_type": ("positional",), "class_embed_type": (None, "timestep")}
    )
    if config.class_embed_type is not None and config.num_class_embeds is None:
        raise UserError(
            f"{name} has class_embed_type {config.class_embed_type} and no num_class_embeds, without which "
            "stock pipelines give it no labels; name how many classes it has in its config.json"
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise UserError(
            f"{name} has in_channels {config.in_channels} and out_channels {config.out_channels}; supported "
            "are as many, or twice as many for a learned variance"
        )
    networks.check_sample_size(config, name)


def _check_memory(config: dict[str, Any], name: str) -> None:
    """Raises UserError where one image is more than this machine can hold: the states that the first
    resolution keeps for the way up are the largest, and there are at least two more of them."""
    size, widths = config.get("sample_size"), config.get("block_out_channels")
    sides = [size, size] if type(size) is int else size
    if not isinstance(sides, list) or not isinstance(widths, list) or not widths:
        return  # says `_check_config`
    kept = 3 + config.get("layers_per_block", 2)
    needed = math.prod(sides) * widths[0] * kept * 4
    if needed > psutil.virtual_memory().total:
        raise UserError(
            f"{name} has sample_size {quoted(size)} and {widths[0]} channels, of which one image needs "
            f"{needed / 2**30:.0f} GiB, more than this machine has; repair its config.json"
        )


def check_card(embeddings: int | None, source: Source) -> None:
    """Raises UserError for a card that promises labels that the network has not."""
    for key, most in (("num_classes", embeddings), ("null_label", (embeddings or 0) - 1)):
        value = source.card.get(key)
        if value is not None and (embeddings is None or value > (most or 0)):
            raise UserError(
                f"{source.card_path} has {key} {value}, and the network has {embeddings or 'no'} class "
                "embeddings; repair it"
            )


def _without_variance(network: UNet2DModel) -> UNet2DModel:
    """The network without the learned variance, the second half of its output: no student is drawn with one,
    and of the stock schedulers only DDPMScheduler takes it."""
    channels = network.config.in_channels
    if network.config.out_channels != channels:
        whole = network.conv_out
        with torch.device("meta"):
            network.conv_out = torch.nn.Conv2d(
                whole.in_channels, channels, whole.kernel_size, padding=whole.padding
            )
        for key, value in whole.named_parameters():
            setattr(network.conv_out, key, torch.nn.Parameter(value.detach()[:channels].clone()))
        network.register_to_config(out_channels=channels)
    return network
