"""`diffkd fid`: one number for two sets of images, in either order."""

from __future__ import annotations

import os
import zipfile

from rich.console import Console

from diffkd.io.places import expanded
from diffkd.metrics.base import MAIN
from diffkd.metrics.evaluation import image_sets, notes
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.frechet import distance
from diffkd.runs.evaluate import measure
from diffkd.runs.evaluate_options import Options
from diffkd.runs.reports import tables


def fid(
    one: str, two: str, options: Options, console: Console, *, device: str | None = None
) -> tuple[float, list[str]] | None:
    """The FID of two sets of images, or of their statistics, and what a reader must know of it.

    None in all processes of a launcher but the main one. Raises UserError for what cannot be measured.
    """
    stored = [_is_statistics(text) for text in (one, two)]
    if all(stored):
        first, second = (Reference(image_sets.parse(text)) for text in (one, two))
        assert first.statistics is not None and second.statistics is not None
        unknown = {"name": one, "num_features": first.statistics.num_features}
        made_with = first.protocol.get("features")
        second.require({MAIN: made_with or unknown}, set(), options.allow_mismatch or made_with is None)
        value = distance(first.statistics.gaussian(one), second.statistics.gaussian(two))
        silent = [r.name for r in (first, second) if not r.protocol.get("features")]
        return value, [notes.UNKNOWN.format(name) for name in silent]
    if stored[0]:  # the distance is the same both ways
        one, two = two, one
    found = measure(one, two, options, console, device=device)
    return (found[0]["fid"], tables.notes(found)) if found else None


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
