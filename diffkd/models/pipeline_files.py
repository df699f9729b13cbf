"""The files of a pipeline, untrusted: its JSON, and which safetensors hold the weights of a component."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.text import from_json, quoted, read_text, reason

INDEX = "model_index.json"
STEM = "diffusion_pytorch_model"
SHARD = "-of-"  # in the names of sharded weights
MAX_NUMBER = 1 << 20  # in a config, other than T and the sides of an image
ORIGINS = ("_name_or_path", "name_or_path")  # in a config: where its component was read from
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OF_ONE_FILE = "model.diffusion_model."  # begins the names of a network in a file of a whole model
TEXT_IN_ONE_FILE = {  # and of its text encoders, by the pipeline that it is of
    "conditioner.embedders.": "StableDiffusionXLPipeline", "cond_stage_model.": "StableDiffusionPipeline",
}  # fmt: skip


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for anything else."""
    try:
        content = from_json(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({reason(error)}); is the pipeline complete?"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; is the pipeline complete?")
    return content


def forget_origin(network: Any) -> None:
    """Takes the folder that diffusers read a network from out of its config, and so out of whatever is saved
    of it: students are handed on, and a path of this machine with them."""
    from diffusers.configuration_utils import FrozenDict

    network._internal_dict = FrozenDict({k: v for k, v in network.config.items() if k not in ORIGINS})


def weights_of(
    place: Path, name: str, variant: str | None = None, stem: str = STEM
) -> tuple[str | None, list[Path]]:
    """The variant of a component's weights that is read, None for the plain ones, and its safetensors files.

    variant: the one to read; by default the plain weights, or the only variant that there is. stem: of the
    files' names. Raises UserError where there are none, or where an index of sharded weights is refused
    (`shards`).
    """
    found = variants_of(place, stem)
    if variant is None and None not in found and len(found) == 1:
        (variant,) = found
    if variant in found:
        file = found[variant]
        return variant, shards(file) if file.suffix == ".json" else [file]
    if found:
        there = ", ".join(sorted("the plain one" if key is None else key for key in found))
        raise UserError(
            f"{name} has no {f'variant {variant}' if variant else 'plain weights'} in {place}, only {there}; "
            f"name one of these as {called('variant')}"
        )
    pickled = sorted(p.name for p in place.glob("*") if p.suffix in PICKLE_SUFFIXES)
    there = f", only {pickled[0]}" if pickled else ""
    raise UserError(
        f"{name} has no safetensors weights ({place / f'{stem}.safetensors'}){there}, and pickled ones are "
        "never opened; if you trust the source, convert them with "
        "pipeline.save_pretrained(folder, safe_serialization=True)"
    )


def variants_of(place: Path, stem: str = STEM) -> dict[str | None, Path]:
    """By variant, None for the plain weights: their file, or their index, which diffusers reads first."""
    found = dict[str | None, Path]()
    for file in sorted(place.glob(f"{stem}.*safetensors")):  # shards have more than the stem before the dot
        middle = file.name.removeprefix(stem).removesuffix(".safetensors")
        if SHARD not in middle:
            found[middle[1:] or None] = file
    for file in place.glob(f"{stem}.safetensors.index.*json"):
        middle = file.name.removeprefix(f"{stem}.safetensors.index.").removesuffix("json")
        found[middle[:-1] or None] = file
    return found


def check_index(place: Path) -> None:
    """Raises UserError for an index of sharded weights in `place` that `shards` refuses."""
    for index in place.glob("*.safetensors.index.json"):
        shards(index)


def shards(index: Path) -> list[Path]:
    """The files of sharded weights. Raises UserError where their index names anything but safetensors files
    beside it, or a tensor that the file it names does not have."""
    tensors = read_object(index).get("weight_map")
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{index} has weight_map {quoted(tensors)}, which names no tensors; is it complete?")
    held: dict[str, list[str]] = {}
    for tensor, file in tensors.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{index} names {quoted(file)}, which is not a safetensors file beside it; "
                "is the pipeline complete?"
            )
        if file not in held:
            held[file] = [key for key, _ in tensor_sizes(index.parent / file)]
        if tensor not in held[file]:
            raise UserError(f"{index} names {quoted(tensor)} in {file}, which lacks it; is it complete?")
    return [index.parent / file for file in held]


def in_words(file: Path) -> str:
    """What a safetensors file is that is no folder of a model, and what to give instead. Raises UserError for
    one that cannot be read."""
    names = [name for name, _ in tensor_sizes(file)]
    if any(name.startswith(OF_ONE_FILE) for name in names):
        kinds = (kind for start, kind in TEXT_IN_ONE_FILE.items() if any(n.startswith(start) for n in names))
        call = f"{next(kinds, 'ITS_PIPELINE')}.from_single_file({str(file)!r}).save_pretrained(FOLDER)"
        return (
            f"{file} is a whole model in one file, as other programs have it; write it as a folder with "
            f"diffusers.{call}, and give that"
        )
    if any("lora_" in name for name in names):
        return (
            f"{file} is an adapter (LoRA) without the model that it is of; fuse it into that with diffusers "
            "(load_lora_weights, fuse_lora, save_pretrained), and give the folder"
        )
    return f"{file} is weights without their config; give the folder of the network or of the pipeline"


def tensor_sizes(file: Path) -> Iterator[tuple[str, int]]:
    """Every tensor of a safetensors file: name, number of elements. Raises UserError for another file."""
    try:
        if not file.is_file():  # a pipe would never end
            raise OSError("it is a pipe or a device" if file.exists() else "it is not there")
        with safe_open(file, "pt") as tensors:
            names: list[str] = tensors.keys()
            for key in names:
                yield key, math.prod(tensors.get_slice(key).get_shape())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({reason(error)}); is it complete?") from error
