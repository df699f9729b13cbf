"""`diffkd.save`: a denoiser as a whole pipeline, with its model card."""

from __future__ import annotations

from pathlib import Path

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.files import new_folder
from diffkd.io.places import check_writable, expanded
from diffkd.models import loading, saving
from diffkd.runs.reports import model_card


def save(denoiser: Denoiser, folder: str | Path) -> None:
    """Writes a denoiser as a stock diffusers pipeline, in float32 or whatever its weights are, with the card
    by which `diffkd.load` opens the same one again. Raises UserError for a folder that is there already.

    >>> import diffkd
    >>> from diffkd.models.unet import UNet2D
    >>> network = UNet2D(channels=[8, 16], norm_groups=4, mid_attention=False).build((1, 8, 8), None)
    >>> denoiser = diffkd.Denoiser(network, diffkd.schedules.Schedule.cosine(1024), "v_prediction", steps=4)
    >>> diffkd.save(denoiser, "mine")
    >>> diffkd.load("mine").steps
    4
    """
    place = expanded(folder)
    check_writable(place, "folder", folder=True)
    if place.exists():
        raise UserError(f"folder {place} exists already; use another, or delete it")
    loading.check_runs(denoiser)
    with new_folder(place) as temporary:
        saving.save(denoiser, temporary)
        model_card.write(temporary, model_card.describe(denoiser))
