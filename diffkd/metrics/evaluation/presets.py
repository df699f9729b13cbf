"""Protocols by name, of papers and of other tools: each fixes keys of an evaluation's config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from diffkd.errors import UserError
from diffkd.io.naming import called
from diffkd.io.text import quoted
from diffkd.metrics.evaluation import image_sets
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.tool_distances import TOOLS

PresetName = Literal["coco30k", "pytorch-fid", "clean-fid", "torch-fidelity", "edm", "adm"]


class Preset(NamedTuple):
    """fixed: keys of the config and their values. samples: images, one a caption, or fewer on request; None
    for any number, of any images. size: height and width that images are brought to, drawn ones and those of
    the reference; None for as they are."""

    fixed: dict[str, Any]
    samples: int | None = None
    size: int | None = None


def _tool(name: str, resize: str) -> Preset:
    return Preset({"features": "inception", "resize": resize, "dtype": "float32", "fid_as": name})


PRESETS: dict[str, Preset] = {
    "coco30k": Preset({"features": "inception", "resize": "tf1", "dtype": "float32"}, 30_000, 256),
    "pytorch-fid": _tool("pytorch-fid", "pytorch-fid"),
    "clean-fid": _tool("clean-fid", "clean"),
    "torch-fidelity": _tool("torch-fidelity", "tf1"),
    "edm": _tool("edm", "tf1"),
    "adm": _tool("adm", "tf1"),
}


def as_stored(name: str | None) -> bool:
    """Whether image files are decoded as other tools do."""
    return name is not None and "fid_as" in PRESETS[name].fixed


def of_tool(name: str, **given: Any) -> dict[str, Any]:
    """What a tool's preset fixes of these keys of the config. Raises UserError for a preset that is no
    tool's, and for a value against it."""
    if name not in TOOLS:
        raise UserError(f"{called('preset')} {name!r} is unknown; use {', '.join(TOOLS)}")
    fixed = PRESETS[name].fixed
    return {key: _agreed(value, fixed[key], f"evaluation.{key}", name) for key, value in given.items()}


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """The config's values with those that its protocol fixes. Raises UserError for any against it."""
    name = values["protocol"]
    preset = PRESETS[name]
    found = dict(values)
    size = {} if preset.size is None else {"image_size": preset.size}
    for key, fixed in (preset.fixed | size).items():
        found[key] = _agreed(values.get(key), fixed, f"evaluation.{key}", name)
    samples = values.get("samples")
    if preset.samples is not None and samples is None:
        found["samples"] = preset.samples
    elif preset.samples is not None and isinstance(samples, int) and samples > preset.samples:
        _agreed(samples, preset.samples, "evaluation.samples", name)
    more = ["clip_score"] if values.get("clip_score_weights") is not None else []
    metrics = values.get("metrics", [])
    if isinstance(metrics, list):
        found["metrics"] = [*metrics, *(metric for metric in ("fid", *more) if metric not in metrics)]
    found["reference"] = _reference(values.get("reference"), name)
    return found


def _agreed(given: Any, fixed: Any, key: str, name: str) -> Any:
    if given is not None and given != fixed:
        raise UserError(
            f"{called(key)} is {quoted(given)}, and protocol {name} has {quoted(fixed)}; leave one out"
        )
    return fixed


def _reference(given: Any, name: str) -> Any:
    """As a config names it, with how its images are decoded and the size that they are brought to."""
    size = PRESETS[name].size
    if isinstance(given, str):
        return image_sets.parse(given, resize=size, as_stored=as_stored(name))
    if isinstance(given, dict) and as_stored(name) and given.get("kind") == "images":
        return given | {"as_stored": True}
    if size is None:
        return given
    keys = {"images": "resize", "folder": "size", "datasets": "size"}
    if isinstance(given, dict) and (own := keys.get(str(given.get("kind")))) is not None:
        return given | {own: _agreed(given.get(own), size, f"evaluation.reference.{own}", name)}
    return given


def check_reference(name: str | None, reference: Reference) -> None:
    """Raises UserError for a reference of another size than the protocol's, as far as that is known."""
    size = None if name is None else PRESETS[name].size
    if size is None or reference.size is None or reference.size == (size, size):
        return
    width, height = reference.size
    raise UserError(
        f"{reference.name} is of {width}x{height} images, and protocol {name} compares at {size}x{size}; "
        f"give a folder, which is resized, or statistics made with diffkd stats --resize {size}"
    )


def check_captions(name: str | None, captions: Sequence[str] | None, samples: int | None, model: str) -> None:
    """Raises UserError where a model is drawn without a caption for each of its images. model: its name."""
    if name is None or PRESETS[name].samples is None:
        return
    if captions is None:
        raise UserError(
            f"protocol {name} is of images drawn from captions, and {model} is drawn without any; leave out "
            f"{called('evaluation.protocol')}"
        )
    wanted = samples or PRESETS[name].samples or 0
    if len(captions) < wanted:
        raise UserError(
            f"protocol {name} is of {wanted:,} captions, an image each, and there are {len(captions):,}; "
            f"give more, or {called('evaluation.samples')} {len(captions)}, whose numbers compare with those "
            "of as many only"
        )


def notes(name: str | None, count: int) -> Iterator[str]:
    """What a reader of the numbers must know where a protocol was followed in part."""
    usual = None if name is None else PRESETS[name].samples
    if usual is not None and count < usual:
        yield f"protocol {name} with {count:,} images in place of {usual:,}"
