"""What is asked of a model against what it draws: sizes, and what it was made for."""

from __future__ import annotations

from functools import cache

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.text import counted, log


def say_range(denoiser: Denoiser, weight: float) -> None:
    """A line where a network is given a weight that it was not trained for."""
    assert denoiser.guidance_range is not None
    least, largest = denoiser.guidance_range
    if not least <= weight <= largest:
        _say_once(
            f"{denoiser.name} takes guidance from {least:g} to {largest:g}, and is drawn with {weight:g}"
        )


def shapes(denoiser: Denoiser, size: tuple[int, int] | None) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """(C, H, W) of what the network draws, and the images' height and width. Raises UserError where a size
    does not fit the model."""
    codec = denoiser.codec
    if size is not None and codec is None:
        raise UserError(f"{denoiser.name} draws pixels of its own size; leave out the height and width")
    if codec is not None and size is not None:
        return codec.shape(*size), size
    if denoiser.shape is None:
        raise UserError(
            "the shape of this model's images is unknown; build its Denoiser with shape=(C, H, W)"
        )
    factor = 1 if codec is None else codec.factor
    return denoiser.shape, (denoiser.shape[1] * factor, denoiser.shape[2] * factor)


def of_shape(denoiser: Denoiser, shape: tuple[int, int, int]) -> Denoiser:
    """The denoiser as it draws this shape: another around its network where its schedule goes by that."""
    if denoiser.schedule_of is None or shape == denoiser.shape:
        return denoiser
    from diffkd.models import students  # which takes seconds to import

    fitted = students.with_network(denoiser, denoiser.network)
    fitted.name, fitted.opened_with = denoiser.name, denoiser.opened_with
    fitted.fit(shape)
    return fitted


def say_what_it_was_made_for(denoiser: Denoiser, steps: int, sampler: str, guidance: float) -> None:
    """A line where a student is drawn otherwise than it was distilled for."""
    if denoiser.steps is None:
        return
    drawn, made = (
        f"{counted(steps, 'step')} of {sampler}",
        f"{counted(denoiser.steps, 'step')} of {denoiser.sampler}",
    )
    if denoiser.guidance_baked_in != 1 and guidance != 1:
        drawn += f" with guidance {guidance:g} on top"
        made += f" with guidance {denoiser.guidance_baked_in:g} baked in"
    if drawn != made:
        _say_once(f"{denoiser.name} was made for {made}, and is drawn in {drawn}")


@cache  # of a model that is opened several times, as by a benchmark
def _say_once(line: str) -> None:
    log.warning("%s", line)
