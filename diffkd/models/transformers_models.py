"""Networks of the transformers library, read from a folder: nothing downloaded, unpickled or left random."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from diffkd.errors import UserError
from diffkd.io.text import a_or_an, reason


def library(needed_by: str) -> ModuleType:
    """transformers itself. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"{needed_by} needs transformers ({reason(error)}); install it with pip install transformers"
        ) from error


def load(architecture: str, folder: Path, name: str, variant: str | None = None) -> Any:
    """The network of this class in float32. name: what messages call the folder. Raises UserError where any
    of its weights would not be the file's."""
    kind: Any = getattr(library(name), architecture)
    # a config may name a kernel that is downloaded code; T5 has torch's own from transformers 5 on
    attention = "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"
    try:
        with silent(), torch.random.fork_rng(devices=[]):  # transformers 4 draws weights, then reads them
            network, info = kind.from_pretrained(
                folder,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation=attention,
                ignore_mismatched_sizes=True,  # refused below, with a name
                output_loading_info=True,
            )
    except Exception as error:  # transformers, safetensors and the config's checks raise many kinds of error
        raise UserError(
            f"{name} cannot be loaded as {a_or_an(architecture)} ({reason(error)}); "
            "is it complete? copy or download it again"
        ) from error
    # transformers only warns of these, and fills them with random numbers; 4 gives names, 5 names and shapes
    misfits = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    lost = sorted(misfits.union(info["missing_keys"]))
    if lost:
        raise UserError(
            f"{name} has no {lost[0]} of the right shape, one of {len(lost)} weights that a "
            f"{architecture} would get at random; give a folder that has all of them"
        )
    return network.float()


def load_tokenizer(folder: Path, name: str, kind: str = "CLIPTokenizer") -> Any:
    """The tokenizer of this class. name: what messages call the model. Raises UserError where it cannot be
    read."""
    transformers = library(name)
    try:
        with silent():
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many types for files that are not there or wrong
        raise UserError(
            f"{name}: the tokenizer in {folder} cannot be read ({reason(error)[:200]}); is it complete?"
        ) from error


@contextmanager
def silent() -> Iterator[None]:
    """Silences progress bars, logs and warnings of transformers, and restores its settings."""
    logging = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
