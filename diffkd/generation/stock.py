"""Images from a diffusers pipeline by its own code and scheduler, as a reference or to evaluate it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.generation.pixels import check_finite
from diffkd.io.naming import called
from diffkd.io.text import reason


@torch.inference_mode()
def generate_stock(
    pipeline: Any,
    n: int,
    *,
    steps: int | None = None,
    seed: int = 0,
    labels: Tensor | None = None,
    batch_size: int = 64,
    share: tuple[int, int] = (0, 1),
    call: Mapping[str, Any] | None = None,
) -> Iterator[Tensor]:
    """n images as uint8 batches (B, H, W, C); image i from `torch.Generator().manual_seed(seed + i)`.

    labels: (n,), for a pipeline that takes class labels. share: as for `generate`. call: other arguments.
    Raises UserError where the pipeline refuses its arguments.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    rank, world = share
    for start in range(rank * batch_size, n, world * batch_size):
        count = min(batch_size, n - start)
        options: dict[str, Any] = {**(call or {})}
        if steps is not None:
            options["num_inference_steps"] = steps
        if "batch_size" in parameters:
            options["batch_size"] = count
        if labels is not None:
            options["class_labels"] = labels[start : start + count].tolist()
        options["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(start, start + count)]
        try:
            output = pipeline(**options, output_type="np").images
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever its files make it do
            remedy = f"use other {called('steps')}" if isinstance(error, ValueError) else "is it complete?"
            raise UserError(f"the pipeline cannot generate ({reason(error)}); {remedy}") from error
        images = torch.from_numpy(np.ascontiguousarray(output))
        check_finite(images.isfinite().all())
        yield (images * 255).round().to(torch.uint8)


def stock_defaults(pipeline: Any) -> dict[str, Any]:
    """The default arguments of a pipeline's call, such as guidance_scale and eta."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return scalars({key: p.default for key, p in parameters.items()})


def scalars(content: dict[str, Any]) -> dict[str, Any]:
    """The entries of a mapping that a record can hold."""
    return {k: v for k, v in content.items() if isinstance(v, bool | int | float | str)}
