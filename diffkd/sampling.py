"""`diffkd sample`: images of a model to a folder of PNGs or one .npz, with a grid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffkd import models, pictures
from diffkd.base import UserError
from diffkd.generation import generate, labels_for
from diffkd.metrics.processes import usable
from diffkd.runs import new_file, new_folder

MOST_CLASSES = 1_000_000
OURS = re.compile(r"\d{6,}\.png")  # what a folder of drawn images holds


def parse_classes(text: str) -> list[int] | None:
    """Labels in turn, from text such as 0-9 or 3,5,7; None for "balanced", which is every class in turn."""
    if text == "balanced":
        return None
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (_is_number(first) and (_is_number(last) or not dash)) or int(last or first) < int(first):
            raise UserError(
                f"--classes {text!r} is not understood; use balanced, or labels such as 0-9 or 3,5,7"
            )
        if int(last or first) > MOST_CLASSES:
            raise UserError(f"--classes {text!r} is out of range; no model has so many classes")
        labels += range(int(first), int(last or first) + 1)
    return labels


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def sample_to(
    model: str,
    out: Path,
    *,
    n: int,
    classes: str = "balanced",
    seed: int = 0,
    steps: int | None = None,
    sampler: str = "ddim",
    batch_size: int = 64,
    device: str | None = None,
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Draws n images; nothing is at `out` before all of it is."""
    asked = parse_classes(classes)
    _check_out(out, overwrite)
    denoiser = models.load(model, device=_device(device))
    if denoiser.steps is None and steps is None:
        raise UserError(f"{model} has no step count of its own (it is no student); say --steps")
    labels = labels_for(denoiser, n, asked)
    batches = generate(
        denoiser,
        n,
        steps=steps,
        seed=seed,
        labels=labels,
        batch_size=batch_size,
        sampler=sampler,
        **(options or {}),
    )
    if out.suffix == ".npz":
        images = np.concatenate([batch.cpu().numpy() for batch in batches])
        arrays: dict[str, Any] = {"arr_0": images} | ({} if labels is None else {"arr_1": labels.numpy()})
        with new_file(out) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)
        pictures.save(pictures.grid(images[:64]), _grid(out))
    else:
        first: list[np.ndarray] = []
        with new_folder(out) as temporary:
            done = 0
            for batch in batches:
                for image in batch.cpu().numpy():
                    pictures.to_image(image).save(temporary / f"{done:06d}.png", compress_level=1)
                    done += 1
                    if len(first) < 64:
                        first.append(image)
        pictures.save(pictures.grid(np.stack(first)), _grid(out))
    print(f"{n} images of {steps or denoiser.steps} steps: {out}")


def _grid(out: Path) -> Path:
    """Beside the images and not among them: a folder of images is what any tool of FID may read."""
    out = out.resolve()
    return out.with_suffix(".grid.png") if out.suffix == ".npz" else out.with_name(f"{out.name}-grid.png")


def _check_out(out: Path, overwrite: bool) -> None:
    """Raises UserError where something would be lost: --overwrite replaces images of ours alone."""
    for parent in out.parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"--out {out} is inside {parent}, which is a file; use another --out")
            break
    if out.suffix == ".npz":
        if out.is_dir():
            raise UserError(f"--out {out} is a folder; give a file's name in .npz, or another folder")
        there = [path for path in (out, _grid(out)) if path.exists()]
    else:
        if out.is_file():
            raise UserError(f"--out {out} is a file; give a folder, or a name in .npz")
        there = [out] if out.is_dir() and any(out.iterdir()) else [_grid(out)] if _grid(out).exists() else []
        foreign = [p.name for p in out.iterdir() if not OURS.fullmatch(p.name)] if out.is_dir() else []
        if foreign or (out.exists() and out.resolve() == Path.cwd()):
            raise UserError(
                f"--out {out} holds more than images ({', '.join(foreign[:2])}); use another --out"
            )
    if there and not overwrite:
        raise UserError(f"{there[0]} is there already; use another --out, or --overwrite")


def _device(name: str | None) -> torch.device:
    return usable(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
