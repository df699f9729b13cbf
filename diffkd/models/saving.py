"""Saving a student as a stock pipeline, which family does that, and how stock draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffkd.core import adapters
from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import a_or_an
from diffkd.models import lora_files
from diffkd.models.families import Family, families


def save(denoiser: Denoiser, folder: Path) -> None:
    """Writes a stock pipeline that needs no diffkd, without its model card; of a student that is an adapter
    what its base's pipeline loads, or where that loads none the whole, merged, with the adapter beside it."""
    family = family_saving(denoiser)
    if family is None:
        raise UserError(
            f"{a_or_an(type(denoiser.network).__name__)} cannot be saved: no pipeline of its own is supported"
        )
    if not adapters.own(denoiser.network):
        family.save(denoiser, folder)
        return
    from diffkd.models.students import copies

    keys = lora_keys(denoiser)
    if keys is None:
        family.save(copies.merged(denoiser), folder)
    else:
        stock_scheduler(denoiser).save_pretrained(folder / "scheduler")
    lora_files.write(denoiser.network, keys, folder)


def lora_keys(denoiser: Denoiser) -> lora_files.Keys | None:
    """What its stock pipeline reads of an adapter; None where that loads none, and for one without."""
    keys: lora_files.Keys | None = getattr(family_saving(denoiser), "LORA", None)
    return keys if adapters.own(denoiser.network) else None


def stock_scheduler(denoiser: Denoiser) -> Any:
    """The scheduler with which a stock pipeline draws it."""
    from diffkd.core.schedules import to_diffusers
    from diffkd.models import preconditioned

    if (own := getattr(family_saving(denoiser), "scheduler_of", None)) is not None:
        return own(denoiser)
    if preconditioned.is_written(denoiser):
        return preconditioned.write(denoiser)
    return to_diffusers(denoiser.schedule, denoiser.prediction, denoiser.clip, denoiser.sampler)


def stock_call(denoiser: Denoiser) -> dict[str, Any]:
    """Arguments with which its stock pipeline draws what diffkd draws, beside steps and labels or prompts."""
    family = family_saving(denoiser)
    call = {} if family is None else {**family.CALL}
    if (keys := lora_keys(denoiser)) is not None:
        call |= {} if denoiser.guidance_range is not None else keys.call
        folded = None if denoiser.adapter is None else denoiser.adapter.guidance
        call |= {} if folded is None else {"guidance_scale": folded}
    default_size: Any = getattr(family, "default_size", None)
    if default_size is not None and denoiser.codec is not None and denoiser.shape is not None:
        latents = denoiser.shape[1:]
        if latents != tuple(default_size(denoiser)):
            height, width = (side * denoiser.codec.factor for side in latents)
            call |= {"height": height, "width": width}
    return call


def has_global_noise(denoiser: Denoiser) -> bool:
    """Whether its stock pipeline draws the noise between steps from torch's global generator."""
    return bool(getattr(family_saving(denoiser), "GLOBAL_NOISE", False))


def is_stock(denoiser: Denoiser) -> bool:
    """Whether what it is saved as is a pipeline of diffusers, and not a network that diffkd alone opens."""
    family = family_saving(denoiser)
    return family is None or bool(family.PIPELINES)


def family_saving(denoiser: Denoiser) -> Family | None:
    """The family that saves it; None where there is none."""
    latent = denoiser.codec is not None
    fitting = (family for family in families() if isinstance(denoiser.network, family.NETWORK))
    return next((family for family in fitting if getattr(family, "LATENT", latent) == latent), None)
