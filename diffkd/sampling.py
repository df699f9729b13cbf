"""`diffkd sample`: images of a model to a folder of PNGs or one .npz, with a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffkd import models, pictures
from diffkd.base import UserError
from diffkd.generation import generate, labels_for
from diffkd.runs import new_file, new_folder


def parse_classes(text: str) -> list[int] | None:
    """ "0-9" or "3,5,7" or a mix as labels in turn; "balanced" as None, which is every class in turn."""
    if text == "balanced":
        return None
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(
                f"--classes {text!r} is not understood; use balanced, or labels such as 0-9 or 3,5,7"
            )
        labels += range(int(first), int(last if dash else first) + 1)
    if not labels:
        raise UserError(f"--classes {text!r} names no class; write the lower label of a range first")
    return labels


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
    if out.exists() and not overwrite and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is there already; use another --out, or --overwrite")
    if out.suffix == ".npz" and out.is_dir() or out.suffix != ".npz" and out.is_file():
        raise UserError(
            f"--out {out} is a {'folder' if out.is_dir() else 'file'}; give a folder, or a name in .npz"
        )
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
        pictures.save(pictures.grid(images[:64]), out.with_suffix(".grid.png"))
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
            pictures.grid(np.stack(first)).save(temporary / "grid.png")
    print(f"{n} images of {steps or denoiser.steps} steps: {out}")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name!r} cannot be used ({str(error).splitlines()[0]}); try cpu"
        ) from error
    return device
