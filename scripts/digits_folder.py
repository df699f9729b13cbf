"""Makes a folder of PNG images with class subfolders: scikit-learn's digits, enlarged and in colour.

python scripts/digits_folder.py data/digits-16 [--size 16]
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from diffkd.data.digits import Digits


def make(out: Path, size: int = 16) -> int:
    """Writes out/<digit>/<index>.png, (size, size) RGB, each of its own colour; returns the count."""
    images = Digits(kind="digits").load()
    rng = np.random.default_rng(0)
    for index, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
        grey = Image.fromarray(pixels[0]).resize((size, size), Image.Resampling.BICUBIC)
        colour = rng.uniform(0.6, 1.0, 3)
        rgb = (np.asarray(grey)[..., None] * colour).round().astype(np.uint8)
        folder = out / images.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb).save(folder / f"{index:04d}.png")
    return len(images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=16)
    arguments = parser.parse_args()
    print(f"{make(arguments.out, arguments.size)} images in {arguments.out}")
