"""Loading a diffusers pipeline as a Denoiser, and saving a student as a stock pipeline."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import quoted, reason
from diffkd.models import validation
from diffkd.models.families import families
from diffkd.models.quantization import quantized
from diffkd.models.validation import read_object

CARD = "diffkd.json"


def load(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> Denoiser:
    """A diffusers pipeline, from a folder or a hub id, as a Denoiser in eval mode.

    quantize: "int8" keeps the weights in 8 bits (see `quantization.quantized`). Only safetensors are read.
    Raises UserError for anything but a pipeline of a supported family.
    """
    folder = folder_of(path_or_hub_id)
    index = read_object(folder / validation.INDEX)
    name = str(index.get("_class_name"))
    for family in families():
        if name in family.PIPELINES:
            denoiser = family.load(folder, index, str(path_or_hub_id), card(folder))
            denoiser = denoiser.to(device=device, dtype=dtype).eval()
            return quantized(denoiser, quantize) if quantize else denoiser
    supported = ", ".join(p for family in families() for p in family.PIPELINES)
    raise UserError(
        f"{path_or_hub_id} is a {name}, which is not a supported pipeline; supported are {supported} "
        "(diffkd evaluate --sampler stock measures others)"
    )


def open_stock(path_or_hub_id: str | Path) -> Any:
    """A diffusers pipeline opened by diffusers itself: any class that needs only noise and class labels.

    Raises UserError for other classes, and for pipelines that are incomplete or not safe to open.
    """
    import diffusers

    folder = folder_of(path_or_hub_id)
    index = read_object(folder / validation.INDEX)
    name = str(index.get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise UserError(
            f"{path_or_hub_id} is a {name}, which the installed diffusers does not provide; "
            "install a version that does"
        )
    parameters = inspect.signature(kind.__call__).parameters
    given = ("self", "class_labels", "kwargs")
    required = [key for key, p in parameters.items() if p.default is p.empty and key not in given]
    if required or "prompt" in parameters or "generator" not in parameters:
        raise UserError(
            f"a {name} needs more than noise and class labels (it takes "
            f"{', '.join(required or ['prompt'])}); save its images to a folder, and evaluate that"
        )
    diffusers.utils.logging.disable_progress_bar()  # of loading components
    try:
        validation.check_components(folder, index, str(path_or_hub_id))
        pipeline = kind.from_pretrained(  # type: ignore[attr-defined]
            folder, use_safetensors=True, local_files_only=True
        )
    except UserError:
        raise
    except Exception as error:  # diffusers raises many types for an incomplete pipeline
        raise UserError(
            f"{path_or_hub_id} cannot be opened as a {name} ({reason(error)}); is it complete?"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(denoiser: Denoiser, folder: Path) -> None:
    """Writes a stock pipeline that needs no diffkd, without its model card."""
    for family in families():
        if isinstance(denoiser.network, family.NETWORK):
            family.save(denoiser, folder)
            return
    raise UserError(
        f"a {type(denoiser.network).__name__} cannot be saved: no pipeline of its own is supported"
    )


def set_null_label(denoiser: Denoiser, null_label: int) -> None:
    """Sets the label that means "no class", for a pipeline whose config does not name it."""
    total = getattr(denoiser.network.config, "num_class_embeds", None)
    if total is None or null_label >= total:
        raise UserError(f"null_label {null_label} is not a label of this model, which has {total or 'none'}")
    denoiser.null_label = null_label
    denoiser.num_classes = total - 1 if null_label == total - 1 else total


def card(folder: Path) -> dict[str, Any]:
    """The content of diffkd.json, which diffkd writes beside its pipelines; {} for other pipelines."""
    path = folder / CARD
    content = read_object(path) if path.is_file() else {}
    for key, least in {"steps": 1, "num_classes": 1, "null_label": 0, "num_train_timesteps": 1}.items():
        value = content.get(key)
        if value is not None and (type(value) is not int or not least <= value <= validation.MAX_NUMBER):
            raise UserError(
                f"{path} has {key} {quoted(value)}, which is not an integer from {least}; repair it"
            )
    if content.get("sampler", "ddim") not in ("ddim", "renoise"):
        raise UserError(
            f"{path} has sampler {quoted(content['sampler'])}, which is neither ddim nor renoise; repair it"
        )
    metrics = content.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(record, dict) for record in metrics):
        raise UserError(f"{path} has metrics that are not a list of records; repair or remove them")
    return content


def folder_of(path_or_hub_id: str | Path) -> Path:
    """The local folder of a pipeline; for a hub id, its configs and safetensors are downloaded first."""
    path = Path(path_or_hub_id)
    if os.path.isdir(path):  # pathlib's own raises for a name that is too long
        if not (path / validation.INDEX).is_file():
            raise UserError(
                f"{path} is not a diffusers pipeline: it has no model_index.json; give the folder that has it"
            )
        return path
    if path.suffix.lower() in validation.PICKLE_SUFFIXES and os.path.isfile(path):
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened; if you trust it, open it with "
            "diffusers, save it with pipeline.save_pretrained(folder, safe_serialization=True), and give it"
        )
    if (
        os.path.exists(path)
        or str(path_or_hub_id).count("/") != 1
        or str(path_or_hub_id).startswith((".", "/", "~"))
    ):
        raise UserError(
            f"{path_or_hub_id} is neither a pipeline's folder nor a hub id (owner/name); check the path"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's client and the network raise many types
        raise UserError(
            f"{path_or_hub_id} is not a local folder and could not be downloaded from the hub "
            f"({reason(error)}); check the name, or download it and give its folder"
        ) from error
