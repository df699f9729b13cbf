"""Loading a diffusers pipeline as a Denoiser."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import a_or_an, reason
from diffkd.models import guidance_input, lora_files, source, validation
from diffkd.models.families import Family, families, of_newer_diffusers
from diffkd.models.pipeline_files import read_object
from diffkd.models.quantization import cast, is_quantized, quantized
from diffkd.models.source import CARD, Source, card, folder_of
from diffkd.models.students import lora

__all__ = ["CARD", "card", "folder_of", "load", "open_stock", "set_null_label"]

TRIED = 32  # latents a side, at most, of what a network of any size is tried with


def load(
    path_or_hub_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    variant: str | None = None,
    scheduler: str | None = None,
) -> Denoiser:
    """A diffusers pipeline, from a folder or a hub id, as a Denoiser in eval mode.

    The folder may also hold a network alone: a component, or a checkpoint of diffusers' training scripts, of
    which the averaged weights (unet_ema) are taken. quantize: "int8" keeps the weights in 8 bits (see
    `quantization.quantized`). variant: of the weights, such as fp16 or non_ema; by default the plain ones, or
    the only ones there are. scheduler: the noise scheduler in place of the model's own: a
    scheduler_config.json, a folder that has one, or the name of a class. A student that is an adapter is
    added to the weights of its base. Only safetensors are read.

    Raises UserError for anything but a model of a supported family that can be called.

    >>> import diffkd, diffusers
    >>> network = diffusers.UNet2DModel(
    ...     sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
    ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
    ... )
    >>> noise = diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    >>> diffusers.DDIMPipeline(network, noise).save_pretrained("stock")
    >>> denoiser = diffkd.load("stock")
    >>> denoiser.prediction, denoiser.shape
    ('v_prediction', (1, 8, 8))
    """
    found = source.find(path_or_hub_id, variant, scheduler)
    family = _family_of(found)
    with quiet():
        denoiser = family.load(found)
    if found.adapter is not None:
        _merge(denoiser, found)
    denoiser.name = str(path_or_hub_id)
    options = {"variant": variant, "scheduler": scheduler}
    denoiser.opened_with = {key: value for key, value in options.items() if value is not None}
    denoiser.guidance_baked_in = float(found.card.get("guidance_baked_in", 1.0))
    denoiser.taught_kind = found.card.get("guidance_kind", {})
    denoiser.label_dropout = found.card.get("label_dropout")
    denoiser = denoiser.to(device=device, dtype=dtype).eval()
    if dtype is not None and is_quantized(denoiser.network):
        cast(denoiser.network, dtype)
    if quantize:
        denoiser = quantized(denoiser, quantize)
    _try(denoiser)
    return denoiser


def _merge(denoiser: Denoiser, found: Source) -> None:
    """Adds an adapter to the weights of its base. Raises UserError where it is not of that base."""
    assert found.adapter is not None
    lora_files.check_base(found)
    said = found.card["lora"]
    if "guidance" in said:
        guidance_input.fold(denoiser, said["guidance"])
    lora.add(denoiser.network, lora_files.read(found.adapter, denoiser.network, said["rank"]))
    denoiser.fused = True


def _family_of(found: Source) -> Family:
    """Raises UserError where there is none."""
    alone = found.network is not None
    config = read_object(found.network / "config.json") if found.network is not None else found.index
    name, supported = str(config.get("_class_name")), list[str]()
    for family in families():
        names = family.PIPELINES
        if alone:
            names = () if getattr(family, "LATENT", False) else (family.NETWORK.__name__,)
        if name in names:
            return family
        supported += names
    (near,) = difflib.get_close_matches(name, supported, n=1, cutoff=0)
    newer = of_newer_diffusers()
    raise UserError(
        f"{found.name} is {a_or_an(name)}, which is not a supported {'network' if alone else 'pipeline'}; "
        f"supported are {', '.join(supported)}, the nearest {near}"
        + ("" if alone else " (diffkd evaluate --sampler stock measures others)")
        + (f"; with a newer diffusers {', '.join(newer)}" if newer else "")
    )


def small_inputs(denoiser: Denoiser) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """x_t, t and cond to try it with: one image of noise, small where the network takes any size, at the time
    of pure noise, of the first class or an empty prompt."""
    x, t, cond = denoiser.example_inputs()
    codec = denoiser.codec
    if codec is not None and getattr(codec, "only", None) is None:
        x = x[..., :TRIED, :TRIED]
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device), t, cond


@torch.no_grad()  # not inference_mode: the schedule keeps what it computes, for training too
def _try(denoiser: Denoiser) -> None:
    """Calls the network once, with one image of noise and the first label.

    Raises UserError where it fails, or does not return a finite image of the same shape.
    """
    if denoiser.shape is None:  # says so where it is drawn
        return
    x, t, cond = small_inputs(denoiser)
    size = "x".join(map(str, x.shape[1:]))
    try:
        output = denoiser.output(x, t, **cond)
        finite = bool(output.isfinite().all())
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever its config makes it do
        raise UserError(
            f"{denoiser.name}: its network fails when it is called with an image of {size} "
            f"({reason(error)}); is its config the one that its weights were trained with?"
        ) from error
    if output.shape != x.shape:
        got = "x".join(map(str, output.shape[1:]))
        raise UserError(f"{denoiser.name}: its network makes {got} of an image of {size}; they must be equal")
    if not finite:
        raise UserError(
            f"{denoiser.name}: its network makes NaN or infinite values of noise; its weights are broken"
            + ("" if denoiser.dtype == torch.float32 else f", or {denoiser.dtype} is too narrow for them")
        )


def check_runs(denoiser: Denoiser) -> None:
    """Raises UserError where its network cannot be called as it says, or draws nothing finite."""
    _try(denoiser)


def open_stock(path_or_hub_id: str | Path, variant: str | None = None) -> Any:
    """A diffusers pipeline opened by diffusers itself: any class that needs only noise and class labels.

    variant: as for `load`. Raises UserError for other classes, and for pipelines that are incomplete or not
    safe to open.
    """
    import diffusers

    found = source.find(path_or_hub_id)
    if found.network is not None:
        raise UserError(
            f"{path_or_hub_id} is a network alone, and the stock sampler is a pipeline's; give a pipeline"
        )
    if found.adapter is not None:
        raise UserError(
            f"{path_or_hub_id} is an adapter, and the stock sampler opens whole pipelines; run diffkd fuse on"
            " it, and give the pipeline that this makes"
        )
    folder, index = found.folder, found.index
    name = str(index.get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise UserError(
            f"{path_or_hub_id} is {a_or_an(name)}, which the installed diffusers does not provide; "
            "install a version that does"
        )
    parameters = inspect.signature(kind.__call__).parameters
    given = ("self", "class_labels", "kwargs")
    required = [key for key, p in parameters.items() if p.default is p.empty and key not in given]
    if required or "prompt" in parameters or "generator" not in parameters:
        raise UserError(
            f"{a_or_an(name)} needs more than noise and class labels (it takes "
            f"{', '.join(required or ['prompt'])}); save its images to a folder, and evaluate that"
        )
    try:
        variant = validation.check_components(folder, index, str(path_or_hub_id), variant)
        with quiet():
            pipeline = kind.from_pretrained(  # type: ignore[attr-defined]
                folder, use_safetensors=True, local_files_only=True, variant=variant
            )
        _check_filled(pipeline)
    except UserError:
        raise
    except Exception as error:  # diffusers raises many types for an incomplete pipeline
        raise UserError(
            f"{path_or_hub_id} cannot be opened as {a_or_an(name)} ({reason(error)}); is it complete?"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_filled(pipeline: Any) -> None:
    """Raises ValueError where a network has a tensor that no file holds: diffusers leaves it unmade."""
    for part in pipeline.components.values():
        for key, tensor in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            if tensor.is_meta:
                raise ValueError(f"its weights lack {key}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and log of diffusers: what goes wrong is said in one line of ours."""
    from diffusers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def set_null_label(denoiser: Denoiser, null_label: int) -> None:
    """Sets the label that means "no class", for a pipeline whose config does not name it."""
    if null_label == denoiser.null_label:
        return
    total = getattr(denoiser.network.config, "num_class_embeds", None)
    if total is None and denoiser.null_label is not None:
        raise UserError(
            f"null_label {null_label} is not that of this model, which is {denoiser.null_label}; leave it out"
        )
    if total is None or null_label >= total:
        raise UserError(f"null_label {null_label} is not a label of this model, which has {total or 'none'}")
    denoiser.null_label = null_label
    denoiser.num_classes = total - 1 if null_label == total - 1 else total
