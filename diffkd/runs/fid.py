"""`diffkd fid`: one number for two sets of images, in either order."""

from __future__ import annotations

import os
import zipfile
from typing import NamedTuple

from rich.console import Console

from diffkd.errors import UserError
from diffkd.io.places import expanded
from diffkd.metrics.base import MAIN, FeatureSet
from diffkd.metrics.evaluation import image_sets, notes, presets
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.frechet import distance
from diffkd.metrics.tool_distances import tool_distance
from diffkd.runs.evaluate import measure
from diffkd.runs.evaluate_options import Options, option
from diffkd.runs.reports import tables


class Found(NamedTuple):
    """value: the FID. notes: what a reader must know of it. classes: the FID within each class by its name,
    where that was asked for, and mean, over the classes."""

    value: float
    notes: list[str]
    classes: dict[str, float]
    mean: float | None = None


def fid(one: str, two: str, options: Options, console: Console, *, device: str | None = None) -> Found | None:
    """The FID of two sets of images, or of their statistics; where the metrics have class_fid, also within
    each class.

    None in all processes of a launcher but the main one. Raises UserError for what cannot be measured.
    """
    tool = options.protocol
    if tool is not None:
        presets.of_tool(tool)
    stored = [_is_statistics(text) for text in (one, two)]
    per_class = "class_fid" in options.metrics
    if all(stored) and per_class:
        raise UserError(f"{one} and {two} are statistics, which have no classes; give images for --per-class")
    if all(stored):
        _check_unneeded(one, two, options)
        first, second = (Reference(image_sets.parse(text)) for text in (one, two))
        assert first.statistics is not None and second.statistics is not None
        unknown = {"name": one, "num_features": first.statistics.num_features}
        made_with = first.protocol.get("features")
        second.require({MAIN: made_with or unknown}, set(), options.allow_mismatch or made_with is None)
        if tool is not None and not options.allow_mismatch:
            _check_made_for(tool, first)
            _check_made_for(tool, second)
        value = _distance(first, second, tool)
        silent = [r.name for r in (first, second) if not r.protocol.get("features")]
        return Found(value, [notes.UNKNOWN.format(name) for name in silent], {})
    if stored[0]:  # the distance is the same both ways
        one, two = two, one
    found = measure(one, two, options, console, device=device)
    if not found:
        return None
    [record] = found
    return Found(record["fid"], tables.notes(found), record.get("class_fids", {}), record.get("class_fid"))


def _check_unneeded(one: str, two: str, options: Options) -> None:
    """Raises UserError for an option that says how images are read, where both sets are statistics."""
    for name in options.given():
        if name not in ("metrics", "protocol", "allow_mismatch") and getattr(options, name) is not False:
            raise UserError(
                f"{option(name)} is for images, and {one} and {two} are statistics already; leave it out"
            )


def _check_made_for(tool: str, read: Reference) -> None:
    """Raises UserError for statistics that say they are of other features than the tool's."""
    fixed, made_with = presets.PRESETS[tool].fixed, read.protocol.get("features")
    if made_with and (made_with.get("name"), made_with.get("resize")) != (fixed["features"], fixed["resize"]):
        raise UserError(
            f"{read.name} is by the features {made_with['name']} {made_with.get('resize', '')}, and preset "
            f"{tool} is inception {fixed['resize']}; "
            f"make it with diffkd stats --preset {tool}"
        )


def _distance(one: Reference, two: Reference, tool: str | None) -> float:
    """Of two files of statistics."""
    assert one.statistics is not None and two.statistics is not None
    ours, theirs = one.statistics.gaussian(one.name), two.statistics.gaussian(two.name)  # checked
    if tool is None:
        return distance(ours, theirs)
    return tool_distance(tool, FeatureSet(one.statistics), FeatureSet(two.statistics))


def _is_statistics(text: str) -> bool:
    """Whether it is a file of statistics without images."""
    path = expanded(text)
    if path.suffix.lower() != ".npz" or not os.path.isfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False  # whoever opens it says why
    return "mu.npy" in names and "arr_0.npy" not in names
