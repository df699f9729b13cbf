"""Many images from a denoiser. Image i depends on (seed, i) alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkd import samplers
from diffkd.base import UserError
from diffkd.denoiser import Denoiser


def to_uint8(x0: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, by the very operations of the stock pipelines."""
    return ((x0 / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def labels_for(denoiser: Denoiser, n: int, labels: Sequence[int] | Tensor | None) -> Tensor | None:
    """Labels of images 0 to n - 1: those given, repeated in turn, or every class in turn; None if it takes
    none.

    Raises UserError for labels that the model does not take.
    """
    if denoiser.num_classes is None:
        if labels is not None:
            raise UserError("class labels were given, and this model is unconditional; leave them out")
        return None
    given = list(range(denoiser.num_classes) if labels is None else map(int, labels))
    wrong = [label for label in given if not 0 <= label < denoiser.num_classes]
    if wrong or not given:
        value = wrong[0] if wrong else "(none)"
        raise UserError(
            f"class label {value} is out of range; this model has labels 0 to {denoiser.num_classes - 1}"
        )
    return torch.tensor(given)[torch.arange(n) % len(given)]


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    n: int,
    *,
    steps: int | None = None,
    seed: int = 0,
    labels: Sequence[int] | Tensor | None = None,
    batch_size: int = 64,
    sampler: str = "ddim",
    share: tuple[int, int] = (0, 1),
    **options: Any,
) -> Iterator[Tensor]:
    """n images as uint8 batches (B, H, W, C) on the denoiser's device.

    steps: default the denoiser's own. labels: repeated in turn; default every class in turn. Image i starts
    from the noise of `torch.Generator().manual_seed(seed + i)` and goes on drawing from it where a sampler is
    stochastic, so the stock pipeline given these generators draws the same pictures. share: (rank, world)
    draws batches rank, rank + world, ... alone, each as it would be drawn in one process. options: guidance,
    eta. Raises UserError where the model draws values that are not finite; on a GPU once all are drawn.
    """
    steps = steps or denoiser.steps
    if steps is None:
        raise UserError("this model has no step count of its own; say how many steps to take")
    if sampler != "ancestral" and "eta" in options:
        raise UserError(f"eta is the noise of the ancestral sampler, and the sampler is {sampler}")
    if not 0 <= seed < 2**63 - n:
        raise UserError(f"seed {seed} is out of range; use 0 to {2**63 - n - 1}")
    if denoiser.shape is None:
        raise UserError(
            "the shape of this model's images is unknown; build its Denoiser with shape=(C, H, W)"
        )
    every = labels_for(denoiser, n, labels)
    rank, world = share
    finite = torch.ones((), dtype=torch.bool, device=denoiser.device)
    for start in range(rank * batch_size, n, world * batch_size):
        stop = min(start + batch_size, n)
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(start, stop)]
        like = torch.empty(0, dtype=torch.float32, device=denoiser.device)
        noise = samplers.randn((stop - start, *denoiser.shape), generators, like)
        cond = {} if every is None else {"class_labels": every[start:stop].to(denoiser.device)}
        x0 = samplers.sample(denoiser, noise, steps, sampler, generator=generators, **cond, **options)
        finite &= x0.isfinite().all()
        if denoiser.device.type == "cpu":  # elsewhere it would be a wait for the device in every batch
            _check_finite(finite)
        yield to_uint8(x0)
    _check_finite(finite)


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
) -> Iterator[Tensor]:
    """The same from any diffusers pipeline, by its own code and scheduler: uint8 batches (B, H, W, C).

    labels: (n,), for a pipeline that takes class labels. Raises UserError where it refuses what it is given.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    rank, world = share
    for start in range(rank * batch_size, n, world * batch_size):
        count = min(batch_size, n - start)
        options: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
        if "batch_size" in takes:
            options["batch_size"] = count
        if labels is not None:
            options["class_labels"] = labels[start : start + count].tolist()
        options["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(start, start + count)]
        try:
            drawn = pipeline(**options, output_type="np").images
        except ValueError as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise UserError(f"the pipeline does not draw ({reason}); use other --steps") from error
        images = torch.from_numpy(np.ascontiguousarray(drawn))
        _check_finite(images.isfinite().all())
        yield (images * 255).round().to(torch.uint8)


def stock_defaults(pipeline: Any) -> dict[str, Any]:
    """The arguments that a pipeline's own defaults decide, such as guidance_scale and eta."""
    takes = inspect.signature(pipeline.__call__).parameters
    return scalars({key: p.default for key, p in takes.items()})


def scalars(content: dict[str, Any]) -> dict[str, Any]:
    """What of a mapping a record can hold."""
    return {k: v for k, v in content.items() if isinstance(v, bool | int | float | str)}


def _check_finite(finite: Tensor) -> None:
    if not finite:
        raise UserError(
            "the model draws images with NaN or infinite values; its weights or its steps are broken"
        )
