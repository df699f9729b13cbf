"""Images measured by a config, as `diffkd evaluate` and `diffkd benchmark` do it."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from diffkd.io.files import write_json
from diffkd.io.processes import Processes
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_sets import File
from diffkd.metrics.evaluation.records import Record
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import Target
from diffkd.runs.measurement import Measurement


def measure(images: Path, reference: Path, config: Evaluation, out: Path) -> Record:
    """The record of one .npz of images against another, which is also written to `out`."""
    quiet = Console(file=io.StringIO())
    measurement = Measurement(config, Reference(File(path=reference)), Processes("cpu"), quiet)
    record = next(measurement.records(Target(str(images))))
    write_json(out, record)
    return record
