"""Network families, one file each: a pipeline in as a Denoiser, a student out as a stock pipeline."""

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
from diffkd.models.families import unet2d
from diffkd.models.quantization import quantized
from diffkd.models.validation import read_object

FAMILIES = (unet2d,)
CARD = "diffkd.json"


def load(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> Denoiser:
    """A diffusers pipeline, from a folder or a hub id, as a Denoiser in eval mode.

    quantize: "int8" keeps the weights in 8 bits (see `quantization.quantized`). Reads safetensors only.
    Raises UserError for what is no pipeline, or one of an unsupported family.
    """
    folder = folder_of(path_or_hub_id)
    index = read_object(folder / validation.INDEX)
    name = str(index.get("_class_name"))
    for family in FAMILIES:
        if name in family.PIPELINES:
            denoiser = family.load(folder, index, str(path_or_hub_id), card(folder))
            denoiser = denoiser.to(device=device, dtype=dtype).eval()
            return quantized(denoiser, quantize) if quantize else denoiser
    supported = ", ".join(p for family in FAMILIES for p in family.PIPELINES)
    raise UserError(
        f"{path_or_hub_id} is a {name}, a family that is not supported; supported are {supported} "
        "(diffkd evaluate --sampler stock measures others)"
    )


def open_stock(path_or_hub_id: str | Path) -> Any:
    """A diffusers pipeline as diffusers opens it, of any class that draws from noise and class labels."""
    import diffusers

    folder = folder_of(path_or_hub_id)
    index = read_object(folder / validation.INDEX)
    name = str(index.get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise UserError(f"{path_or_hub_id} is a {name}, which this diffusers has not; install one that has")
    takes = inspect.signature(kind.__call__).parameters
    known = ("self", "class_labels", "kwargs")
    needs = [key for key, p in takes.items() if p.default is p.empty and key not in known]
    if needs or "prompt" in takes or "generator" not in takes:
        raise UserError(
            f"a {name} does not draw from noise and class labels alone (it takes "
            f"{', '.join(needs or ['prompt'])}); draw its images to a folder, and evaluate that"
        )
    try:
        validation.check_components(folder, index, str(path_or_hub_id))
        pipeline = kind.from_pretrained(  # type: ignore[attr-defined]
            folder, use_safetensors=True, local_files_only=True
        )
    except UserError:
        raise
    except Exception as error:  # diffusers raises many kinds for a pipeline that is not whole
        raise UserError(
            f"{path_or_hub_id} cannot be opened as a {name} ({reason(error)}); is it whole?"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(denoiser: Denoiser, folder: Path) -> None:
    """Writes a stock pipeline that opens with nothing of ours installed (without its card)."""
    for family in FAMILIES:
        if isinstance(denoiser.network, family.NETWORK):
            family.save(denoiser, folder)
            return
    raise UserError(f"a {type(denoiser.network).__name__} has no pipeline to be saved as")


def name_null_label(denoiser: Denoiser, null_label: int) -> None:
    """Says which of a pipeline's labels means "no class", where its config does not."""
    total = getattr(denoiser.network.config, "num_class_embeds", None)
    if total is None or null_label >= total:
        raise UserError(f"null_label {null_label} is no label of this model, which has {total or 'none'}")
    denoiser.null_label = null_label
    denoiser.num_classes = total - 1 if null_label == total - 1 else total


def card(folder: Path) -> dict[str, Any]:
    """What diffkd wrote beside a pipeline of its own, {} for any other."""
    path = folder / CARD
    found = read_object(path) if path.is_file() else {}
    for key, least in (
        ("steps", 1),
        ("num_classes", 1),
        ("null_label", 0),
        ("num_train_timesteps", 1),
    ):
        value = found.get(key)
        if value is not None and (type(value) is not int or not least <= value <= validation.LARGEST):
            raise UserError(f"{path} has {key} {quoted(value)}, no whole number from {least}; repair it")
    if found.get("sampler", "ddim") not in ("ddim", "renoise"):
        raise UserError(
            f"{path} has sampler {quoted(found['sampler'])}, which is neither ddim nor renoise; repair it"
        )
    metrics = found.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(record, dict) for record in metrics):
        raise UserError(f"{path} has metrics that are no records; repair it, or leave them out")
    return found


def folder_of(path_or_hub_id: str | Path) -> Path:
    """The local folder of a pipeline; downloads a hub id's configs and safetensors."""
    path = Path(path_or_hub_id)
    if os.path.isdir(path):  # pathlib fails for a name that is too long
        if not (path / validation.INDEX).is_file():
            raise UserError(
                f"{path} is no diffusers pipeline: it has no model_index.json; give the folder that has it"
            )
        return path
    if path.suffix.lower() in validation.PICKLED and os.path.isfile(path):
        raise UserError(
            f"{path} is a pickle, which can run code when it is opened; where you trust it, open it with "
            "diffusers, save it with pipeline.save_pretrained(folder, safe_serialization=True), and give that"
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
    except Exception as error:  # whatever the hub's client and the network raise: the model is not here
        raise UserError(
            f"{path_or_hub_id} is no folder here and could not be had from the hub ({reason(error)}); "
            "check the name, or download it and give its folder"
        ) from error
