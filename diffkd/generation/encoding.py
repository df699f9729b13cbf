"""Encoding pixels as image files. Worker processes import this, so it stays light."""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

# Both lossless: an image that changed on saving would change the FID.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {"compress_level": 1}),
    "webp": ("WEBP", {"lossless": True, "quality": 0, "method": 0}),
}


def to_image(image: np.ndarray) -> Image.Image:
    """(H, W, 1 or 3) uint8."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def read_image(path: Path) -> np.ndarray:
    """(H, W, 1 or 3) uint8, from a file that `write_images` wrote."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def file_name(index: int, suffix: str) -> str:
    return f"{index:06d}.{suffix}"


def write_images(
    folder: Path,
    indices: Sequence[int],
    images: np.ndarray,
    suffix: str,
    prompts: Sequence[str] | None = None,
) -> None:
    """Writes images[k] as the file of index indices[k], atomically: to a temporary file, synced, renamed.
    prompts: of each, kept in a PNG as the text "prompt"."""
    kind, options = FORMATS[suffix]
    written: list[tuple[str, str]] = []
    try:
        for k, (index, image) in enumerate(zip(indices, images, strict=True)):
            name = file_name(index, suffix)
            temporary = f"{folder}/.{name}.tmp"
            encoded = io.BytesIO()
            to_image(image).save(encoded, kind, **options, **(_text(prompts[k]) if prompts else {}))
            written.append((temporary, f"{folder}/{name}"))
            with open(temporary, "wb", buffering=0) as stream:
                left = encoded.getbuffer()
                while left:  # an unbuffered write may end early, without an error, as the disk fills up
                    left = left[stream.write(left) :]
        _sync(folder, [temporary for temporary, _ in written])
        for temporary, path in written:
            os.replace(temporary, path)
    except BaseException:
        for temporary, _ in written:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise


def _text(prompt: str) -> dict[str, Any]:
    """As what only PNGs take, and other formats leave out."""
    text = PngInfo()
    text.add_itxt("prompt", prompt)
    return {"pnginfo": text}


def _sync(folder: Path, paths: Sequence[str]) -> None:
    """Flushes files to the disk; on Linux with one syncfs, as fsync of each costs more than encoding it."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    for path in [folder] if libc else paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if libc is None:
                os.fsync(descriptor)
            elif libc.syncfs(descriptor):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes that are started here never see Ctrl-C, which a terminal sends to them too: until they have
    imported what they need, nothing in them could keep it from ending in a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # as it starts, it lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker() -> None:
    """Sets up a worker process: interrupts are the parent's, and the worker ends when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
