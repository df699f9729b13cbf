"""`diffkd features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffkd.cli.completion import among
from diffkd.cli.options import Device, ImageSize, Split, prepare_libraries


def features(
    action: Annotated[
        str, typer.Argument(help="train, or show what a file says.", autocompletion=among("train", "show"))
    ],
    images: Annotated[
        str,
        typer.Argument(
            help="A folder of images (subfolders are the classes), an .npz, or a data set; of show, a file "
            "that train wrote."
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The .safetensors to write.")] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Height and width that the network takes: 8, 16, 32, 64 or 128; default as the images, at "
            "most 64."
        ),
    ] = None,
    num_features: Annotated[int | None, typer.Option(min=2, max=2048, help="Default 64.")] = None,
    width: Annotated[
        int | None, typer.Option(min=8, max=256, help="Channels of the first level; default 32.")
    ] = None,
    updates: Annotated[int | None, typer.Option(min=1, max=10_000_000, help="Default 1500.")] = None,
    views: Annotated[
        bool, typer.Option("--views", help="Learn from views alone; where subfolders are no classes.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Default 0.")] = None,
    resize: ImageSize = None,
    split: Split = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
) -> None:
    """Train a small feature network on images of your own, for --features of other commands.

    It learns their classes, or without classes to tell views of one image from those of others.
    """
    from rich.console import Console

    from diffkd.errors import UserError

    given = {
        "size": size, "num_features": num_features, "width": width, "updates": updates, "seed": seed,
        "views": views or None,
        "resize": resize, "split": split, "device": device, "overwrite": overwrite or None,
    }  # fmt: skip
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    prepare_libraries()
    from diffkd.runs import feature_training as job

    if action == "show":
        if out is not None or options:
            name = "out" if out is not None else next(iter(options)).replace("_", "-")
            raise UserError(f"--{name} is for diffkd features train; leave it out")
        job.show(Path(images), Console())
    elif action == "train":
        if out is None:
            raise UserError(
                "say where to write the network: diffkd features train IMAGES --out net.safetensors"
            )
        job.train(images, out, Console(), **options)
    else:
        raise UserError(f"diffkd features {action!r} is unknown; use train or show")
