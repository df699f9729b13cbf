"""A run told to TensorBoard, Weights & Biases, MLflow or Trackio, by accelerate's trackers, as a callback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import tracking

from diffkd.errors import Unfinished, UserError
from diffkd.generation import grids
from diffkd.io.files import read_json, write_json
from diffkd.io.text import log, reason
from diffkd.runs.callbacks import Callback
from diffkd.training.config import TrackerName
from diffkd.training.run_files import TENSORBOARD, TRACKERS

AXIS = ("update", "updates")  # of a stage; trackers have the updates of the whole run
UNFIT = r"[^A-Za-z0-9_-]"  # for an identity
PROJECT = "diffkd"  # of which a run is one, unless the tracker's own environment variable names another


def check(names: Sequence[TrackerName]) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name in names:
        if not is_installed(name):
            raise UserError(
                f"training.trackers has {name}, which is not installed; install it with pip install {name} "
                f"(extra {name}), or leave it out"
            )


def is_installed(name: str) -> bool:
    """Whether its package is, and accelerate knows it."""
    return name in tracking.LOGGER_TYPE_TO_CLASS and importlib.util.find_spec(name) is not None


class Tracker(Callback):
    """One of accelerate's trackers. Losses are `train/...`, metrics `evaluation/<model>/...`, pictures
    `samples/<name>`, all over the updates of the whole run; the config is flattened into hyperparameters.

    A resumed run goes on in the log that it began: its identity is in trackers.json of the run folder.
    """

    def __init__(self, name: TrackerName) -> None:
        self.name = name
        self._tracker: Any = None
        self._folder = Path()
        self._config: Mapping[str, Any] = {}
        self._rewind = False  # whether the log may hold updates that are done, and told, again

    def on_start(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder, config
        self._rewind = self._identity() is not None
        if self.name != "tensorboard":  # whose files begin with what there is to tell; the others may refuse
            with self._explained():
                self._open()

    def on_log(self, update: int, values: Mapping[str, Any]) -> None:
        with self._explained():
            if self._rewind and self.name == "tensorboard":  # the others take a step once
                self._close()
                self._open(purge_step=update)
            self._rewind = False
            self._open().log(_numbers(values, "train"), step=update)

    def on_evaluation(self, update: int, record: Mapping[str, Any]) -> None:
        model = record["model"]
        if record["role"] == "teacher" and "steps" in record:  # which is measured at several step counts
            model = f"{model}-{record['steps']}-steps"
        with self._explained():
            self._open().log(_numbers(record, f"evaluation/{model}"), step=update)

    def on_images(self, update: int, name: str, images: np.ndarray) -> None:
        sheet, key = grids.grid(images), f"samples/{name}"
        with self._explained():
            tracker = self._open()
            if self.name == "tensorboard":
                pixels = np.asarray(sheet).reshape(1, sheet.height, sheet.width, -1)
                tracker.log_images({key: pixels}, step=update, dataformats="NHWC")
            elif self.name == "wandb":
                tracker.log_images({key: [sheet]}, step=update)
            elif self.name == "trackio":
                import trackio

                tracker.log({key: trackio.Image(sheet)}, step=update)
            else:
                with tempfile.TemporaryDirectory() as place:
                    path = Path(place) / f"{name}.png"
                    grids.save(sheet, path)
                    tracker.log_artifact(str(path), "samples")

    def on_end(self) -> None:
        with self._explained():
            self._close()

    def _close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.finish()

    def _open(self, **more: Any) -> Any:
        """accelerate's tracker, started once; a new one is given the config."""
        if self._tracker is not None:
            return self._tracker
        known = self._identity()
        folder, name = str(self._folder), self._folder.absolute().name
        token = secrets.token_hex(4)  # of no generator that training could draw from
        identity = known or f"{re.sub(UNFIT, '-', name)[:64]}-{token}"
        kind: Any = tracking.LOGGER_TYPE_TO_CLASS[self.name]
        if self.name == "tensorboard":
            tracker = kind(TENSORBOARD, logging_dir=folder, **more)
        elif self.name == "wandb":
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            tracker = kind(project, id=identity, name=name, resume="allow", dir=folder)
        elif self.name == "trackio":
            project = os.environ.get("TRACKIO_PROJECT", PROJECT)
            tracker = kind(project, name=identity, resume="allow")
        else:
            tracker = kind(PROJECT, run_id=known, run_name=name)
        getattr(tracker, "start", lambda: None)()  # older ones of accelerate have started by now
        self._tracker = tracker
        if known is None:
            if self.name == "mlflow":
                identity = tracker.tracker.info.run_id
            tracker.store_init_configuration(dict(_flat(self._config)))
            self._keep(identity)
        return tracker

    def _identity(self) -> str | None:
        """Of the log that this run began; None where it did not."""
        try:
            known = read_json(self._folder / TRACKERS, {})
        except ValueError as error:
            log.warning("%s cannot be read (%s); a new log begins", self._folder / TRACKERS, error)
            return None
        identity = known.get(self.name) if isinstance(known, dict) else None
        return identity if isinstance(identity, str) else None

    def _keep(self, identity: str) -> None:
        path = self._folder / TRACKERS
        try:
            known = read_json(path, {})
        except ValueError:
            known = {}
        write_json(path, {**(known if isinstance(known, dict) else {}), self.name: identity})

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever a tracker raises in one line: no fault of diffkd's."""
        try:
            yield
        except Exception as error:
            raise Unfinished(
                f"tracker {self.name} failed ({type(error).__name__}: {reason(error)}); what is done is "
                "kept: mend that, or leave it out of training.trackers and use --allow, and the same command "
                "resumes it"
            ) from error


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers of a record, those of a list by their index."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if key in AXIS:
            continue
        parts = {key: value}
        if isinstance(value, list):
            parts = {f"{key}/{index}": one for index, one in enumerate(value)}
        for name, one in parts.items():
            if isinstance(one, int | float) and not isinstance(one, bool):
                found[f"{prefix}/{name}"] = one
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """key.sub and value of a config; lists and null as text."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", json.dumps(value)
