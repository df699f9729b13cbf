"""`diffkd stats`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffkd.cli.options import (
    Cache,
    CacheFolder,
    Device,
    Dtype,
    FeatureResize,
    Features,
    ImageSize,
    Preset,
    Split,
    Weights,
    cache_of,
    prepare_libraries,
)


def stats(
    images: Annotated[str, typer.Argument(help="digits, shapes, a folder, an image .npz, or a data set.")],
    out: Annotated[Path, typer.Option("--out", help="The .npz to write: mu, sigma, and their protocol.")],
    features: Features = None,
    weights: Weights = None,
    feature_resize: FeatureResize = None,
    dtype: Dtype = None,
    preset: Preset = None,
    resize: ImageSize = None,
    split: Split = None,
    store_features: Annotated[
        bool, typer.Option("--store-features", help="Keep every feature, for kid, prdc and cmmd.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=1 << 20, help="Images at a time.")] = 64,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    cache: Cache = True,
    cache_folder: CacheFolder = None,
) -> None:
    """Compute reference statistics of images once, in the format that other FID tools read."""
    from rich.console import Console

    prepare_libraries()
    from diffkd.runs import stats as job

    job.stats(
        images, out, Console(), features_name=features, weights=weights, feature_resize=feature_resize,
        dtype=dtype, preset=preset, resize=resize, split=split, store=store_features,
        batch_size=batch_size, device=device, overwrite=overwrite, cache=cache_of(cache, cache_folder),
    )  # fmt: skip
