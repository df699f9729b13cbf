"""The components of a pipeline that a student has of its teacher: checked when it is read, then copied."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffkd.errors import UserError
from diffkd.io.files import write_json
from diffkd.io.text import quoted
from diffkd.models.pipeline_files import ORIGINS, read_object, variants_of, weights_of
from diffkd.models.source import Source

Copied = Mapping[str, str | None]  # by component the stem of its weights' names, None for one without
FLOATS_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors says it
FLOATS = frozenset(FLOATS_OF.values())


def check(source: Source, trained: str, copied: Copied) -> None:
    """Raises UserError for components that a student cannot have from its teacher. trained: the network's."""
    for component in source.index:
        if not _has(source, component) or component in (trained, "scheduler"):
            continue
        if component not in copied:
            raise UserError(
                f"{source.name} has a component {quoted(component)}, which is not supported; supported are "
                f"{trained}, scheduler, {', '.join(copied)}"
            )
        place, stem = source.folder / component, copied[component]
        if not place.is_dir():
            raise UserError(
                f"{source.name} has no folder {component}, which its index names; is it complete?"
            )
        if stem is not None:
            asked = source.variant if source.variant in variants_of(place, stem) else None
            weights_of(place, source.name, asked, stem)


def copy(source: Source, copied: Copied, folder: Path, dtype: torch.dtype) -> None:
    """The files of the components that are not trained into a pipeline's folder: configs, and of the weights
    those that are read, under the plain name and in this dtype, so that stock pipelines open them without a
    word."""
    for component, stem in copied.items():
        if _has(source, component):
            _copy(source, component, stem, folder / component, dtype)


def copy_configs(source: Source, names: Iterable[str], folder: Path) -> None:
    """Of these components, where the pipeline has them, all that is no weights."""
    for component in names:
        if _has(source, component):
            _copy_configs(source.folder / component, folder / component)


def _has(source: Source, component: str) -> bool:
    entry = source.index.get(component)
    return isinstance(entry, list) and entry != [None, None]


def _copy_configs(place: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in place.iterdir():
        if path.suffix in (".json", ".txt", ".model", ".jinja") and ".safetensors.index." not in path.name:
            shutil.copy(path, folder / path.name)
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        content = read_object(path) if path.is_file() else {}
        places = {key for key in ORIGINS if os.path.isabs(str(content.get(key)))}
        if places:  # of the machine that the teacher was saved on
            write_json(path, {key: value for key, value in content.items() if key not in places})


def _copy(source: Source, component: str, stem: str | None, folder: Path, dtype: torch.dtype) -> None:
    place = source.folder / component
    _copy_configs(place, folder)
    if stem is None:
        return
    asked = source.variant if source.variant in variants_of(place, stem) else None
    variant, files = weights_of(place, source.name, asked, stem)
    index = variants_of(place, stem)[variant]
    sharded = index.suffix == ".json"
    if sharded:
        shutil.copy(index, folder / f"{stem}.safetensors.index.json")
    for path in files:
        _copy_weights(path, folder / (path.name if sharded else f"{stem}.safetensors"), dtype)
    config = read_object(folder / "config.json")
    if named := [key for key in ("dtype", "torch_dtype") if key in config]:  # which transformers goes by
        write_json(folder / "config.json", config | dict.fromkeys(named, str(dtype).removeprefix("torch.")))


def _copy_weights(path: Path, to: Path, dtype: torch.dtype) -> None:
    with safe_open(path, framework="pt") as file:
        held = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        if not held.intersection(FLOATS) - {FLOATS_OF.get(dtype)}:
            shutil.copy(path, to)
            return
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    made = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    save_file(made, to, metadata={"format": "pt"})
