"""`diffkd fid`."""

from __future__ import annotations

from typing import Annotated

import typer

from diffkd.cli.options import (
    Cache,
    Device,
    Dtype,
    FeatureResize,
    Features,
    ImageSize,
    Weights,
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
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time; default 64.")] = None,
    device: Device = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Use statistics that other features made.")
    ] = False,
    cache: Cache = True,
) -> int:
    """The FID of two sets of images, in one line; what to know of it goes to stderr.

    diffkd evaluate gives more numbers, and their protocol.
    """
    import sys

    from rich.console import Console

    prepare_libraries()
    from diffkd.errors import printable
    from diffkd.runs.evaluate_options import Options
    from diffkd.runs.fid import fid as measured

    options = Options(
        features=features, weights=weights, feature_resize=feature_resize, dtype=dtype, resize=resize,
        batch_size=batch_size, allow_mismatch=allow_mismatch, cache=cache,
    )  # fmt: skip
    found = measured(one, two, options, Console(stderr=True), device=device)
    if found is not None:
        value, notes = found
        print(f"FID: {value}")
        for note in notes:
            print(f"diffkd: {printable(note)}", file=sys.stderr)
    return 0
