"""`diffkd fid`."""

from __future__ import annotations

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
    Weights,
    cache_of,
    prepare_libraries,
)


def fid(
    one: Annotated[
        str, typer.Argument(help="A folder of images, an .npz of images or statistics, digits, or shapes.")
    ],
    two: Annotated[str, typer.Argument(help="Another.")],
    features: Features = None,
    weights: Weights = None,
    feature_resize: FeatureResize = None,
    dtype: Dtype = None,
    resize: ImageSize = None,
    preset: Preset = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Also the FID within each class, a line each, and their mean.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time; default 64.")] = None,
    device: Device = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Use statistics that other features made.")
    ] = False,
    cache: Cache = True,
    cache_folder: CacheFolder = None,
) -> int:
    """The FID of two sets of images, in one line as pytorch-fid prints it; what to know of it goes to stderr.

    diffkd evaluate gives more numbers, and their protocol.
    """
    import sys

    from rich.console import Console

    prepare_libraries()
    from diffkd.errors import printable
    from diffkd.runs.evaluate_options import Options
    from diffkd.runs.fid import fid as measured

    options = Options(
        metrics="fid,class_fid" if per_class else "fid",
        features=features, weights=weights, feature_resize=feature_resize, dtype=dtype, resize=resize,
        protocol=preset, batch_size=batch_size, allow_mismatch=allow_mismatch,
        cache=cache_of(cache, cache_folder),
    )  # fmt: skip
    found = measured(one, two, options, Console(stderr=True), device=device)
    if found is not None:
        print(f"FID: {found.value}")
        for name, value in found.classes.items():
            print(f"FID of {printable(name)}: {value}")
        if found.mean is not None:
            print(f"mean FID of classes: {found.mean}")
        for note in found.notes:
            print(f"diffkd: {printable(note)}", file=sys.stderr)
    return 0
