"""Kinds of guidance beside the plain one: within an interval of noise, rescaled, against a worse model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffkd.core.conditioning import Codec, Conditioner
from diffkd.core.denoiser import Denoiser
from diffkd.core.digest import digest
from diffkd.core.guidance import Kind
from diffkd.core.noise_schedule import Schedule
from diffkd.core.paths import check_reaches
from diffkd.errors import UserError
from diffkd.io.text import quoted


def set_kind(
    denoiser: Denoiser,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    worse: Denoiser | None = None,
) -> None:
    """Says what kind of guidance a model has from now on, whenever it is called with a weight other than 1.

    interval, rescale: see `core.guidance.Kind`. worse: a smaller or less trained model of the same images and
    conditions, which guidance leads away from: `worse + w (given - worse)`, both with the condition
    (autoguidance, Karras et al. 2024). Its schedule and prediction type may be others; its own null is not
    used. One that takes no labels is given none: a network of its own for classifier-free guidance.

    Raises UserError for values out of range, for a worse model of something else, and for a model that is no
    teacher to guide: one with guidance baked in, or with the weight as an input.
    """
    kind = Kind(interval, rescale)
    if kind == Kind() and worse is None:
        denoiser.guidance_kind, denoiser.worse = kind, None
        return
    if denoiser.guidance_range is not None:
        raise UserError(
            f"{denoiser.name} takes its guidance weight as an input, in one pass that has no other kind of "
            "guidance; take the model that it was distilled from, or leave the kind out"
        )
    if denoiser.guidance_baked_in != 1:
        raise UserError(
            f"{denoiser.name} has guidance {denoiser.guidance_baked_in:g} baked in, and a kind of guidance "
            "is for a teacher to be guided; take the model that it was distilled from, or leave the kind out"
        )
    kind.check_levels(denoiser.schedule)
    if worse is None:
        denoiser.check_guidance()
    else:
        _check_worse(denoiser, worse)
        worse.requires_grad_(False)
        if _equal(worse.schedule, denoiser.schedule):  # as most are: nothing is converted
            worse.schedule = denoiser.schedule
    denoiser.guidance_kind, denoiser.worse, denoiser.times_of_worse = kind, worse, {}


def _check_worse(denoiser: Denoiser, worse: Denoiser) -> None:
    """Raises UserError for a model that is none of the same images and conditions, at every noise level."""
    if worse is denoiser:
        raise UserError(
            f"{worse.name} is to be guided against itself, which does nothing; give a worse model"
        )
    needed = "autoguidance needs a worse model of the same images and conditions"
    labels = _classes(denoiser)
    if worse.steps is not None or worse.guidance_baked_in != 1 or worse.guidance_range is not None:
        why = "has guidance baked in" if worse.guidance_baked_in != 1 else "takes its weight as an input"
        if worse.steps is not None:
            why = f"is a student of {worse.steps} steps, which knows no other noise levels"
        raise UserError(f"{worse.name} {why}; for a worse model take a smaller teacher, or one trained less")
    for what, theirs, ours in (
        ("makes", _shape(worse), _shape(denoiser)),
        ("takes", labels if worse.num_classes is None else _classes(worse), labels),
        ("is given", _example(worse), _example(denoiser)),
    ):
        if theirs != ours:
            raise UserError(
                f"{worse.name} {what} {theirs}, and {denoiser.name} {what} {ours}; {needed}"
            )  # fmt: skip
    for what, their_part, our_part in (
        ("works in the latents of", worse.codec, denoiser.codec),
        ("is given the embeddings of", worse.conditioner, denoiser.conditioner),
    ):
        if _key(their_part) != _key(our_part):
            raise UserError(f"{worse.name} {what} other encoders than {denoiser.name}; {needed}")
    try:
        check_reaches(worse.schedule, denoiser.schedule)
    except UserError as error:
        raise UserError(f"{worse.name} cannot stand beside {denoiser.name}: {error}") from error


def _equal(one: Schedule, other: Schedule) -> bool:
    return type(one) is type(other) and one.content() == other.content()


def _shape(denoiser: Denoiser) -> str:
    size = "images of unknown size" if denoiser.shape is None else "x".join(map(str, denoiser.shape))
    return size if denoiser.codec is None else f"latents of {size}"


def _classes(denoiser: Denoiser) -> str:
    return "no class labels" if denoiser.num_classes is None else f"labels of {denoiser.num_classes} classes"


def _example(denoiser: Denoiser) -> str:
    shapes = {key: "x".join(map(str, value.shape[1:])) for key, value in denoiser.example.items()}
    return ", ".join(f"{key} of {shapes[key]}" for key in sorted(shapes)) or "no prompts"


def _key(part: Codec | Conditioner | None) -> str | None:
    return None if part is None else part.key


# what is kept of it in records, cards and settings


def described(denoiser: Denoiser) -> dict[str, Any]:
    """What tells its kind of guidance from others, {} for the plain kind: as JSON, the worse model by the
    digest of its weights."""
    kind, found = denoiser.guidance_kind, dict[str, Any]()
    if kind.interval is not None:
        found["interval"] = [*kind.interval]
    if kind.rescale:
        found["rescale"] = kind.rescale
    if denoiser.worse is not None:
        found["worse"] = {"sha256": digest(denoiser.worse.network.state_dict())}
    return found


def in_words(kind: Mapping[str, Any]) -> str:
    """What `described` gives, with a path of the worse model where it is known, as a reader wants it."""
    said = []
    if (interval := kind.get("interval")) is not None:
        said.append(f"where sigma / alpha is {interval[0]:g} to {interval[1]:g}")
    if rescale := kind.get("rescale"):
        said.append(f"rescaled by {rescale:g}")
    if worse := kind.get("worse"):
        said.append(f"against {quoted(worse.get('path') or worse['sha256'][:12], 60)}")
    return ", ".join(said)
