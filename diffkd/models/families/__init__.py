"""Model families, one file each: how a pipeline is read as a Denoiser, and a student saved as a pipeline.

A family is a module in this folder with the names of `Family`; adding one is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import nn

if TYPE_CHECKING:
    from diffkd.core.denoiser import Denoiser
    from diffkd.models.source import Source


class Family(Protocol):
    """The contract of a family's module."""

    @property
    def PIPELINES(self) -> tuple[str, ...]:
        """Class names of the pipelines it loads, as model_index.json has them."""

    @property
    def NETWORK(self) -> type[nn.Module]:
        """The class of the networks it saves."""

    @property
    def CALL(self) -> Mapping[str, Any]:
        """Arguments of the stock pipeline's call, beside steps and labels or prompts, with which it draws
        what diffkd draws; {} where its defaults do.

        More names are read where a family has them. `LORA_TARGETS`: what the names of the layers end in that
        get an adapter by default. `LORA` and `scheduler_of(denoiser)`, where the stock pipeline loads
        adapters: what the keys of their file are called (`lora_files.Keys`), and the stock scheduler that
        draws a student; without them an adapter is saved merged. `default_size(denoiser)`: height and width
        of the latents that the pipeline draws where none are named; a student of another size is called with
        its own. `GLOBAL_NOISE = True`: the pipeline hands its scheduler no generator, so that a student drawn
        by renoise in several steps has fresh noise of torch's global one. And where two families have the
        same class of networks, `LATENT`: whether it is the one of latents, which takes no network alone.
        """

    def load(self, source: Source) -> Denoiser:
        """The model of this source as a Denoiser in float32. Raises UserError for what is not supported.

        A source of a network alone has its folder in `source.network` and no index.
        """

    def save(self, denoiser: Denoiser, folder: Path) -> None:
        """Writes a stock pipeline that draws the same images without diffkd."""


def families() -> list[Family]:
    """The modules of this folder, by name, but for those in `of_newer_diffusers`."""
    return [module for module in _modules().values() if module is not None]


def of_newer_diffusers() -> list[str]:
    """Names of the modules whose networks the installed diffusers does not have."""
    return [name for name, module in _modules().items() if module is None]


def _modules() -> dict[str, Family | None]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: _module(name) for name in names}


def _module(name: str) -> Family | None:
    try:
        return cast(Family, importlib.import_module(f"{__name__}.{name}"))
    except ImportError as error:
        if error.name != "diffusers":
            raise
        return None
