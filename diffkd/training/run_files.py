"""What may lie in a run folder when a run begins or goes on: edited files, links, another config."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffkd.errors import UserError
from diffkd.io.strict_yaml import read_yaml
from diffkd.io.system_errors import explained
from diffkd.io.text import changes
from diffkd.training.checkpoints import MOVABLE, is_resumable

FORMER_DEFAULTS = {"evaluation.sampler": "ddim"}  # of older runs; None, the default now, means the same
ADDED = ("pairs", "spread_every", "training.trackers")  # keys that the configs of older runs have not
LOG, RECORDS = "log.jsonl", "metrics.json"
TRACKERS, TENSORBOARD = "trackers.json", "tensorboard"  # the logs elsewhere that are this run's; the one here
FILES = (LOG, RECORDS, TRACKERS, "config.yaml", "environment.json", "inputs.json")  # that a run reads again
CACHE = "cache"  # what `diffkd cache` writes into the folder of a run that is still to begin
FOLDERS = (  # that it writes into
    CACHE, "autoencoder", "checkpoints", "pairs", "samples", "students", "teacher", "teachers", TENSORBOARD,
)  # fmt: skip


def check_config(folder: Path, config: Mapping[str, Any], allow: bool | None) -> str:
    """The differences between the configs, all allowed. Raises UserError for others."""
    if not folder.exists():
        return ""
    if not folder.is_dir():
        raise UserError(f"out {folder} is a file; give a folder")
    known = folder / "config.yaml"
    if not known.is_file():
        if any(not p.name.startswith(".") and p.name != CACHE for p in folder.iterdir()):
            raise UserError(f"{folder} is not empty and does not hold a diffkd run; use another out")
        return ""
    differ = changes(recorded(known), plain(config))
    differ = {
        key: (was, now)
        for key, (was, now) in differ.items()
        if key not in MOVABLE
        and not (now is None and was == FORMER_DEFAULTS.get(key, now))
        and not (was is None and key in ADDED)
    }
    described = [f"{key} was {was}, now {now}" for key, (was, now) in differ.items()]
    text = "; ".join(described[:3]) + ("; ..." if len(described) > 3 else "")
    if not all(map(is_resumable, differ)):
        raise UserError(
            f"{folder} belongs to a run with another config ({text}); use another out, or delete the folder"
        )
    if differ and not allow:
        resume = "use --allow to resume with the new values, which do not change the students, or "
        raise UserError(
            f"{folder} belongs to a run with another config ({text}); "
            f"{'' if allow is None else resume}use another out"
        )
    return "; ".join(described)


def check_places(folder: Path) -> None:
    """Raises UserError, before anything is trained, for what would stop the run later: a file of its own
    that cannot be read, a folder that takes no files, and links, through which nothing is written."""
    for path in (folder / name for name in FILES):
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link, and a run writes through none; put the file there")
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file; move it away, or use another out")
        if path.exists():
            with _explained(f"{path} cannot be {'written' if path.name == LOG else 'read'}"):
                path.open("r+b" if path.name == LOG else "rb").close()
    for place in (folder, *(folder / name for name in FOLDERS)):
        if place != folder:
            _check_link(folder, place)
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is not a folder; move it away, or use another out")
        if place.exists():
            with _explained(f"{place} cannot be written into"), tempfile.TemporaryFile(dir=place):
                inner = [] if place == folder else list(place.iterdir())
            for path in inner:
                _check_link(folder, path)


def _check_link(folder: Path, path: Path) -> None:
    """Raises UserError for a link out of the run folder. That itself may be one: it is the user's own."""
    real = os.path.realpath  # Path.resolve raises for a link to itself
    inside = path.exists() and Path(real(path)).is_relative_to(real(folder))
    if path.is_symlink() and not inside:
        raise UserError(
            f"{path} is a symbolic link that leads out of the run folder, or nowhere, and a run writes "
            "through none; put the folder itself there, or make the whole run folder a link"
        )


@contextmanager
def _explained(thing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explained(error, thing) or error from error


def recorded(path: Path) -> Any:
    """The config in a run folder. Raises UserError for anything but one."""
    try:
        return read_yaml(path)
    except UserError as error:
        raise UserError(f"{error}; put it back, or use another out") from error


def plain(config: Mapping[str, Any]) -> Any:
    """The config as it is after being written and read."""
    return json.loads(json.dumps(config))
