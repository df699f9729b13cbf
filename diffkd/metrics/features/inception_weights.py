"""Where the weights of Inception come from, and how their file is read."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from http.client import HTTPException
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.naming import called, in_config
from diffkd.io.places import expanded

NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # the same file
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAMES[0]}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
VARIABLE = "DIFFKD_INCEPTION"


def find_weights(given: str | Path | None = None) -> Path:
    """The file given, else DIFFKD_INCEPTION's, else the torch hub cache's, else a download into that cache.

    UserError if a file that was named does not exist, or the download fails.
    """
    source, named = ("", given) if given is not None else (f"{VARIABLE}=", os.environ.get(VARIABLE) or None)
    if named is not None:
        path = expanded(named)
        if not os.path.isfile(path):
            state = "is a folder" if os.path.isdir(path) else "is not there"
            raise UserError(
                f"weights file {source}{path} {state}; name {NAMES[0]} or a .safetensors copy of it, "
                "or no file to have it downloaded"
            )
        return path
    folder = Path(torch.hub.get_dir(), "checkpoints")
    for name in NAMES:
        if os.path.isfile(folder / name):
            return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAMES[0]
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: the hash is wrong
        raise UserError(
            f"the Inception weights {NAMES[0]} are not in {folder}, neither {called('evaluation.weights')} "
            f"nor {VARIABLE} names them, and their download failed ({_line(error)}); get {URL} on a machine "
            f"that can, and copy it into that folder or name it there; or use other "
            f"{called('evaluation.features')}, your own or, for handwritten digits, digits"
            f"{', or evaluation: null to measure nothing' if in_config() else ''}"
        ) from error
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """name -> tensor of a .safetensors, .pth or .pt file.

    The last two are pickles: nothing of them is read unless the file is, by its hash, the published one.
    """
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"weights file {path} is not of a known kind; use a .safetensors, .pth or .pt file")
    try:
        if suffix == ".safetensors":
            return load_file(path)
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256.startswith(SHA256):
            tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"weights file {path} cannot be read ({_line(error)}); get it again from {URL}"
        ) from error
    if not sha256.startswith(SHA256):
        raise UserError(
            f"weights file {path} is not the one of FID, or is damaged: its sha256 is {sha256}, which should "
            f"begin with {SHA256}; get it again from {URL}, or use weights of your own as .safetensors"
        )
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"weights file {path} does not hold a flat state dict; get it again from {URL}")
    return tensors


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
