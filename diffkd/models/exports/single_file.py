"""One .safetensors for the programs that read no folders: of Stable Diffusion and SDXL the whole model in its
original layout, of transformers the network under diffusers' own names. Both are read back before they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.files import write_json
from diffkd.io.system_errors import system_error
from diffkd.io.text import reason
from diffkd.models import components, loading, saving
from diffkd.models.codecs import Autoencoder
from diffkd.models.conditioners import ClipPrompts
from diffkd.models.exports import Student, original_names
from diffkd.models.pipeline_files import INDEX
from diffkd.models.unet import to_stock

WHOLE, NETWORK = "model.safetensors", "transformer.safetensors"
DTYPE = torch.float32
NEEDS: tuple[str, ...] = ()
TAKES = "which is for Stable Diffusion, SDXL, and transformers whose class has from_single_file"
OPEN_CLIP_WIDTH = 1024  # of the text encoder of Stable Diffusion 2, by which programs tell it from the first
PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # whose configs lie beside it
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # which such a file does not hold
INSTEAD = "hand on its folder, or --to fp16"


def fits(student: Student) -> bool:
    network = student.denoiser.network
    return isinstance(network, UNet2DConditionModel) or hasattr(network, "from_single_file")


def write(student: Student, folder: Path) -> dict[str, Any]:
    network: Any = student.denoiser.network
    scheduler = saving.stock_scheduler(student.denoiser)
    scheduler.save_pretrained(folder / "scheduler")
    whole = isinstance(network, UNet2DConditionModel)
    try:
        if whole:
            return _write_whole(student, folder, type(scheduler).__name__)
        return _write_network(network, folder, type(scheduler).__name__)
    except UserError:
        raise
    except Exception as error:  # of diffusers, which raises many types where a name has no place
        if system_error(error) is not None:
            raise
        raise UserError(
            f"{student.name} does not fit a single file of its family, as smaller students may not "
            f"({reason(error)}); {INSTEAD}"
        ) from error


def _write_network(network: Any, folder: Path, scheduler: str) -> dict[str, Any]:
    network.save_config(folder / "transformer")
    weights = _held(network)
    save_file(weights, folder / NETWORK, {"format": "pt"})
    read = type(network).from_single_file(
        str(folder / NETWORK), config=str(folder), subfolder="transformer", local_files_only=True
    )
    _check_same(weights, read, NETWORK)
    return {"export": {"class": type(network).__name__, "scheduler": scheduler}}


def _write_whole(student: Student, folder: Path, scheduler: str) -> dict[str, Any]:
    denoiser, network = student.denoiser, to_stock(cast(UNet2DConditionModel, student.denoiser.network))
    codec, prompts = denoiser.codec, denoiser.conditioner
    assert isinstance(codec, Autoencoder) and isinstance(prompts, ClipPrompts)
    _check_places(student, codec, prompts)
    encoders = [_held(encoder) for _, encoder in prompts.networks]
    parts = {"unet": _held(network), "vae": _held(codec.network), "text_encoder": encoders[0]}
    parts |= {"text_encoder_2": encoders[1]} if prompts.two else {}
    denoiser.close()

    components.copy_configs(codec.source, PARTS, folder)
    network.save_config(folder / "unet")
    index = {**codec.source.index, "scheduler": ["diffusers", scheduler]}
    index |= {one: [None, None] for one in UNUSED if one in index}
    write_json(folder / INDEX, index | {"requires_safety_checker": False} if not prompts.two else index)
    held = _renamed(parts, network.config.layers_per_block, prompts.encoders[0].width)
    save_file({name: value.contiguous() for name, value in held.items()}, folder / WHOLE, {"format": "pt"})

    kind: Any = getattr(diffusers, index["_class_name"])
    with loading.quiet():
        read = kind.from_single_file(str(folder / WHOLE), config=str(folder), local_files_only=True)
    for name, weights in parts.items():
        _check_same(weights, getattr(read, name), name)
    # the embedding by which a student says that it needs no guidance has no place in it
    call = {} if denoiser.steps is None else {"guidance_scale": 1.0}
    return {"export": {"class": kind.__name__}, "call": {**saving.stock_call(denoiser), **call}}


def _check_places(student: Student, codec: Autoencoder, prompts: ClipPrompts) -> None:
    """Raises UserError for what the original layout has no place for."""
    if student.denoiser.guidance_range is not None:
        raise UserError(
            f"{student.name} takes its guidance as an input, which the original layout has no place "
            f"for; {INSTEAD}"
        )
    if codec.kind.__name__ != "AutoencoderKL":
        raise UserError(
            f"{student.name} has an {codec.kind.__name__}, which the original layout has no place "
            f"for; {INSTEAD}"
        )
    widths = [one.width for one in prompts.encoders]
    if len({*widths}) != len(widths):
        raise UserError(
            f"{student.name} has two text encoders of width {widths[0]}, and readers of the original layout "
            f"tell them apart by it; {INSTEAD}"
        )


def _held(network: Any) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in network.state_dict().items()}


def _renamed(parts: Mapping[str, Mapping[str, Tensor]], layers: int, width: int) -> dict[str, Tensor]:
    """All weights in the original layout. layers: of the UNet's blocks. width: of the first text encoder."""
    made = {**original_names.unet(parts["unet"], layers), **original_names.vae(parts["vae"])}
    first = parts["text_encoder"]
    if "text_encoder_2" in parts:
        made |= original_names.clip(first, original_names.XL_CLIP)
        return made | original_names.open_clip(parts["text_encoder_2"], original_names.XL_OPEN_CLIP)
    if width == OPEN_CLIP_WIDTH:
        return made | original_names.open_clip(first, original_names.OPEN_CLIP)
    return made | original_names.clip(first, original_names.CLIP)


def _check_same(weights: Mapping[str, Tensor], read: Any, name: str) -> None:
    """Raises ValueError where stock does not read what was written."""
    found = read.state_dict()
    for key, value in weights.items():
        if key not in found or found[key].is_meta or not torch.equal(found[key], value):
            raise ValueError(f"{key} of its {name} has no place in it")
