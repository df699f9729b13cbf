"""Networks of NVlabs' EDM that are of no stock class: scripts/convert_edm.py makes them of their pickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffkd.core.denoiser import Denoiser
from diffkd.models import networks, preconditioned
from diffkd.models.song_unet import SongUNet
from diffkd.models.source import Source

PIPELINES: tuple[str, ...] = ()  # stock diffusers has none for it
NETWORK = SongUNet
CALL: dict[str, Any] = {}
LORA_TARGETS = ("qkv", "proj", "conv1")


def load(source: Source) -> Denoiser:
    """A network and its scheduler in one folder as a Denoiser in float32 (see `Family.load`)."""
    return preconditioned.denoiser(source, networks.read(source, "unet", SongUNet))


def save(denoiser: Denoiser, folder: Path) -> None:
    """The network and its scheduler, side by side, as the conversion leaves them."""
    preconditioned.save(denoiser, folder)
