"""Protocols by the names that papers know them by: each fixes keys of an evaluation's config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.text import quoted
from diffkd.metrics.evaluation import image_sets
from diffkd.metrics.evaluation.reference import Reference

if TYPE_CHECKING:
    from diffkd.metrics.evaluation.config import Evaluation

PresetName = Literal["coco30k"]


class Preset(NamedTuple):
    """fixed: keys of the config and their values. samples: images, one a caption, or fewer on request. size:
    height and width that images are brought to, drawn ones and those of the reference."""

    fixed: dict[str, Any]
    samples: int
    size: int


PRESETS: dict[str, Preset] = {
    "coco30k": Preset({"features": "inception", "resize": "tf1", "dtype": "float32"}, 30_000, 256)
}


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """The config's values with those that its protocol fixes. Raises UserError for any against it."""
    name = values["protocol"]
    preset = PRESETS[name]
    found = dict(values)
    for key, fixed in (preset.fixed | {"image_size": preset.size}).items():
        found[key] = _agreed(values.get(key), fixed, f"evaluation.{key}", name)
    if (samples := values.get("samples")) is None:
        found["samples"] = preset.samples
    elif isinstance(samples, int) and samples > preset.samples:
        _agreed(samples, preset.samples, "evaluation.samples", name)
    more = ["clip_score"] if values.get("clip_score_weights") is not None else []
    metrics = values.get("metrics", [])
    if isinstance(metrics, list):
        found["metrics"] = [*metrics, *(metric for metric in ("fid", *more) if metric not in metrics)]
    found["reference"] = _reference(values.get("reference"), preset.size, name)
    return found


def _agreed(given: Any, fixed: Any, key: str, name: str) -> Any:
    if given is not None and given != fixed:
        raise UserError(
            f"{called(key)} is {quoted(given)}, and protocol {name} has {quoted(fixed)}; leave one out"
        )
    return fixed


def _reference(given: Any, size: int, name: str) -> Any:
    """As a config names it, with the size that its images are brought to."""
    if isinstance(given, str):
        return image_sets.parse(given, resize=size)
    key = {"images": "resize", "folder": "size", "datasets": "size"}
    if isinstance(given, dict) and (own := key.get(given.get("kind", ""))) is not None:
        return given | {own: _agreed(given.get(own), size, f"evaluation.reference.{own}", name)}
    return given


def check_reference(config: Evaluation, reference: Reference) -> None:
    """Raises UserError for a reference of another size than the protocol's, as far as that is known."""
    if config.protocol is None or reference.size in (None, (config.image_size, config.image_size)):
        return
    width, height = reference.size or (0, 0)
    raise UserError(
        f"{reference.name} is of {width}x{height} images, and protocol {config.protocol} compares images of "
        f"{config.image_size}x{config.image_size}; give a folder, which is resized, or statistics made with "
        f"diffkd stats --resize {config.image_size}"
    )


def check_captions(config: Evaluation, captions: Sequence[str] | None, name: str) -> None:
    """Raises UserError where a model is not drawn with a caption for each image. name: of the model."""
    if config.protocol is None:
        return
    if captions is None:
        raise UserError(
            f"protocol {config.protocol} is of images drawn from captions, and {name} is drawn without any; "
            f"leave out {called('evaluation.protocol')}"
        )
    wanted = config.samples or 0
    if len(captions) < wanted:
        raise UserError(
            f"protocol {config.protocol} is of {wanted:,} captions, an image each, and there are "
            f"{len(captions):,}; give more, or {called('evaluation.samples')} {len(captions)}, whose numbers "
            "compare with others of as many only"
        )


def notes(config: Evaluation, count: int) -> Iterator[str]:
    """What a reader of the numbers must know where a protocol was followed in part."""
    if config.protocol is not None and count < (usual := PRESETS[config.protocol].samples):
        yield f"protocol {config.protocol} with {count:,} images in place of {usual:,}"
