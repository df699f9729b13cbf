"""A run told to TensorBoard, Weights & Biases, MLflow or Trackio, by accelerate's trackers, as a callback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
from accelerate import tracking
from PIL import Image

from diffkd.errors import Interrupted, Unfinished, UserError
from diffkd.io.text import log, reason
from diffkd.runs.callbacks import Callback
from diffkd.runs.tracker_state import Entry, TrackerState
from diffkd.training.config import TrackerName
from diffkd.training.run_files import TENSORBOARD, TRACKERS

AXIS = ("update", "updates")  # of a stage; trackers have the updates of the whole run
UNFIT = r"[^A-Za-z0-9_-]"  # for an identity
PROJECT = "diffkd"  # of which a run is one, unless the tracker's own environment variable names another
TRAINING = "train"  # what the names of numbers of training begin with
ONCE = ("tensorboard", "mlflow")  # that are given the config once: one would begin another run, one refuses


def check(names: Sequence[TrackerName]) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"training.trackers has {name}, which is not installed; install it with pip install {name} "
                f"(extra {name}), or leave it out"
            )
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"training.trackers has {name}, which accelerate {accelerate.__version__} does not know; "
                "install a newer accelerate, or leave it out"
            )


class Tracker(Callback):
    """One of accelerate's trackers. Losses are `train/...`, metrics `evaluation/<model>/...`, pictures
    `samples/<name>`, all over the updates of the whole run; the config is flattened into hyperparameters.

    A resumed run goes on in the log that it began, and tells what that does not have. A tracker that fails as
    the run begins ends it; one that fails later does not: what it did not take is told at the next checkpoint
    or measurement, and if it cannot be then, by the run that resumes.
    """

    def __init__(self, name: TrackerName) -> None:
        self.name = name
        self._tracker: Any = None
        self._folder = Path()
        self._config: Mapping[str, Any] = {}
        self._state: Any = None
        self._failing = False
        self._error: BaseException | None = None

    def on_start(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder, config
        self._state = TrackerState(folder, self.name)
        if self.name != "tensorboard" or self._state.waiting:  # whose files begin with what there is to tell
            with self._explained("what is done is kept"):
                self._deliver()

    def on_log(self, update: int, values: Mapping[str, Any]) -> None:
        self._tell(Entry(update, _numbers(values, TRAINING)), at_once=not self._failing)

    def on_evaluation(self, update: int, record: Mapping[str, Any]) -> None:
        model = record["model"]
        if record["role"] == "teacher" and "steps" in record:  # which is measured at several step counts
            model = f"{model}-{record['steps']}-steps"
        self._tell(Entry(update, _numbers(record, f"evaluation/{model}")))

    def on_images(self, update: int, name: str, images: np.ndarray) -> None:
        self._tell(Entry(update, picture=name))

    def on_checkpoint(self, folder: Path) -> None:
        if self._failing:
            self._try()

    def on_error(self, error: BaseException) -> None:
        self._error = error

    def on_end(self) -> None:
        if self._tracker is None and not self._failing:
            return
        with self._explained(f"what it was not told waits in {TRACKERS}, and the students are as without it"):
            try:
                if self._failing:
                    self._deliver()
            finally:
                self._state.save()
                tracker, self._tracker = self._tracker, None
                if tracker is not None:
                    self._finish(tracker)
        self._state.closed()
        self._state.save()

    def _tell(self, entry: Entry, *, at_once: bool = True) -> None:
        self._state.add(entry)
        if at_once:  # else it is stored at the next checkpoint; a kill before has those updates done again
            self._try()

    def _try(self) -> None:
        """Delivers what waits, if that can be done now."""
        try:
            self._deliver()
        except Exception as error:
            if not self._failing:
                log.warning(
                    "tracker %s failed (%s: %s); training goes on, and it is tried again at each checkpoint",
                    self.name, type(error).__name__, reason(error),
                )  # fmt: skip
            self._failing = True
            self._state.save()
        else:
            self._failing = False

    def _deliver(self) -> None:
        """Tells what waits, the oldest first. Raises what the tracker raises."""
        tracker = self._open()
        while self._state.waiting:
            self._send(tracker, self._state.waiting[0])
            self._state.took()
        self._state.save()

    def _send(self, tracker: Any, entry: Entry) -> None:
        update = entry.update
        if self.name == "wandb" and not any(key.startswith(f"{TRAINING}/") for key in entry.values):
            # It drops what is of an update before its last. Losses that it has may be dropped, those are done
            # again after a checkpoint; a measurement, which a kill may have parted from its update, may not.
            update = max(update, tracker.tracker.step)
        if entry.picture is None:
            tracker.log(entry.values, step=update)
            return
        key, path = f"samples/{entry.picture}", self._folder / "samples" / f"{entry.picture}.png"
        if self.name == "mlflow":
            if path.is_file():
                tracker.log_artifact(str(path), "samples")
            return
        try:
            with Image.open(path) as stored:
                sheet = stored.convert("L" if stored.mode == "L" else "RGB")
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s), and %s does without", path, reason(error), self.name)
            return
        if self.name == "tensorboard":
            pixels = np.asarray(sheet).reshape(1, sheet.height, sheet.width, -1)
            tracker.log_images({key: pixels}, step=update, dataformats="NHWC")
            tracker.tracker.flush()
        elif self.name == "wandb":
            tracker.log_images({key: [sheet]}, step=update)
        else:
            import trackio

            tracker.log({key: trackio.Image(sheet)}, step=update)

    def _open(self) -> Any:
        """accelerate's tracker, started once."""
        if self._tracker is not None:
            return self._tracker
        known = self._state.identity
        folder, name = str(self._folder), self._folder.absolute().name
        token = secrets.token_hex(4)  # of no generator that training could draw from
        identity = known or f"{re.sub(UNFIT, '-', name)[:64]}-{token}"
        kind: Any = tracking.LOGGER_TYPE_TO_CLASS[self.name]
        if self.name == "tensorboard":
            tracker = kind(TENSORBOARD, logging_dir=folder)
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
        if known is None or self.name not in ONCE:
            tracker.store_init_configuration(dict(_flat(self._config)))
        if known is None:
            self._state.identity = tracker.tracker.info.run_id if self.name == "mlflow" else identity
            self._state.save()
        return tracker

    def _finish(self, tracker: Any) -> None:
        """What was stopped or failed is no finished run, where the tracker tells these apart."""
        if self._error is not None and self.name == "wandb":
            tracker.tracker.finish(exit_code=1)
            return
        if self._error is not None and self.name == "mlflow":
            import mlflow

            mlflow.end_run("KILLED" if isinstance(self._error, Interrupted) else "FAILED")
        tracker.finish()

    @contextmanager
    def _explained(self, kept: str) -> Iterator[None]:
        """Whatever a tracker raises in one line: no fault of diffkd's."""
        try:
            yield
        except Exception as error:
            raise Unfinished(
                f"tracker {self.name} failed ({type(error).__name__}: {reason(error)}); {kept}: mend that, "
                "or leave it out of training.trackers and use --allow, and the same command resumes the run"
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
