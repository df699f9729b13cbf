"""What the tests of datasets share: random images, broken files, saved datasets, an independent resize."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image

from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset
from diffkd.data.images import Images

RNG = np.random.default_rng(7)  # reset before each test, see conftest.py


def folder(path, **fields) -> Images:
    return Folder(kind="folder", path=path, **{"size": 8, "channels": 1} | fields).load()


def hub(path, **fields) -> Images:
    return HubDataset(kind="datasets", path=str(path), **{"size": 8, "channels": 1} | fields).load()


def noise(height: int, width: int, channels: int | None = None) -> np.ndarray:
    shape = (height, width) if channels is None else (height, width, channels)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def bicubic(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W) -> the middle (size, size) of it, shrunk or grown until its short side is size, in float64.

    Keys' cubic with a = -1/2, stretched over the input where that shrinks, cut off at the image's edges.
    """
    scale = min(image.shape) / size

    def matrix(n: int) -> np.ndarray:
        centre = (n - min(image.shape)) / 2 + (np.arange(size) + 0.5) * scale
        x = np.abs((np.arange(n) + 0.5 - centre[:, None]) / max(scale, 1))
        inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        w = np.where(x < 1, inner, np.where(x < 2, outer, 0))
        return w / w.sum(1, keepdims=True)

    height, width = image.shape
    return (matrix(height) @ (image @ matrix(width).T).clip(0, 255)).clip(0, 255)


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


ARRAYS = [np.random.default_rng(8 + i).integers(0, 256, (8, 8), dtype=np.uint8) for i in range(4)]


def saved(**columns) -> datasets.Dataset:
    """Four rows: a name, ARRAYS as pictures, a class label and a number; `columns` replaces some."""
    features = datasets.Features(
        {
            "name": datasets.Value("string"),
            "picture": datasets.Image(),
            "sort": datasets.ClassLabel(names=["zebra", "ant", "bee"]),
            "number": datasets.Value("int64"),
        }
    )
    content = {
        "name": list("abcd"),
        "picture": [Image.fromarray(a) for a in ARRAYS],
        "sort": [2, 0, 1, 2],
        "number": [5, 0, 3, 1],
    }
    return datasets.Dataset.from_dict(content | columns, features=features)
