"""`diffkd sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffkd.cli.completion import SAMPLERS, among
from diffkd.cli.options import (
    GuidanceInterval,
    GuidanceRescale,
    NoiseScheduler,
    Quantized,
    Variant,
    Worse,
    prepare_libraries,
)


def sample(
    model: Annotated[str, typer.Argument(help="A student, or any supported pipeline: folder or hub id.")],
    out: Annotated[
        Path, typer.Option("--out", help="A folder of PNGs, or one .npz file (arr_0, uint8, NHWC).")
    ],
    n: Annotated[
        int | None,
        typer.Option("-n", min=1, max=100_000_000, help="How many images: default 64, or 1 of each prompt."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to draw, for text-to-image models.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts in UTF-8, one a line; -n images of each, in turn.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option(help="What guidance leads away from, in place of the empty prompt.")
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 14, help="Of a text-to-image image; default the model's own."),
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, max=1 << 14, help="With --height.")] = None,
    classes: Annotated[
        str, typer.Option(help="Labels: balanced, data (as often as there), or in turn, as 0-9 or 3,5,7.")
    ] = "balanced",
    seed: Annotated[int, typer.Option(min=0, help="Image i starts from the noise of seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the student's own.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="ddim, heun, dpmpp_2m, ancestral or renoise. Default: the model's own.",
            autocompletion=among(*SAMPLERS),
        ),
    ] = None,
    eta: Annotated[float | None, typer.Option(min=0, max=1, help="Noise of the ancestral sampler.")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "-w",
            "--guidance",
            min=0,
            help="Guidance weight; default 1, which is none, or the usual one of a model that takes it.",
        ),
    ] = None,
    guidance_interval: GuidanceInterval = None,
    guidance_rescale: GuidanceRescale = None,
    worse: Worse = None,
    batch_size: Annotated[int, typer.Option(min=1, max=1 << 20, help="Images at a time.")] = 64,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; default bfloat16 on CUDA, float32 elsewhere.",
            autocompletion=among("float32", "bfloat16", "float16"),
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="auto, eager, graph (a CUDA graph of all steps) or compile.",
            autocompletion=among("auto", "eager", "graph", "compile"),
        ),
    ] = "auto",
    image_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Of a folder's files: png (default) or webp, both lossless.",
            autocompletion=among("png", "webp"),
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=64, help="Processes that encode images; default up to 8 with a GPU, else 0."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, cpu or mps; default cuda where there is one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other images at --out.")] = False,
    quantize: Quantized = None,
    variant: Variant = None,
    scheduler: NoiseScheduler = None,
) -> None:
    """Draw images from a student: a folder of image files or an .npz, and a grid of the first 64.

    A text-to-image model draws --prompt, or the lines of --prompts. The same command resumes it.
    """
    from rich.console import Console

    prepare_libraries()
    from diffkd.errors import UserError
    from diffkd.generation.sample import sample_to
    from diffkd.io.prompts import read_prompts
    from diffkd.models import guidance_kind

    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts are both given; leave out one")
    if (height is None) != (width is None):
        raise UserError("--height and --width go together; give both, or none for the model's own")
    chosen = [prompt] if prompt is not None else None if prompts is None else read_prompts(prompts)
    size = None if height is None or width is None else (height, width)
    options = {key: value for key, value in (("eta", eta), ("guidance", guidance)) if value is not None}
    sample_to(
        model, out, Console(), n=n, classes=classes, prompts=chosen, negative=negative, size=size, seed=seed,
        steps=steps, sampler=sampler, batch_size=batch_size, dtype=dtype, mode=mode,
        image_format=image_format, workers=workers, device=device, overwrite=overwrite, quantize=quantize,
        variant=variant, scheduler=scheduler, options=options,
        guidance_kind=guidance_kind.of_options(guidance_interval, guidance_rescale, worse),
    )  # fmt: skip
