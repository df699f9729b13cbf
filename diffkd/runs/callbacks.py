"""What a run tells while it goes on: user code that is called, and the order in which it is."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffkd.errors import UserError
from diffkd.io.text import log, quoted, reason


class Callback:
    """Called by the main process of a run, never by the others; a subclass has the methods that it wants.

    update: how many updates of the run are done, all stages together, so that a resumed run goes on at the
    right number. Nothing that a callback does reaches training but an exception, which ends the run; the last
    checkpoint is kept, and the same call resumes from it.
    """

    def on_start(self, folder: Path, config: Mapping[str, Any]) -> None:
        """The run's folder is locked. config: as its config.yaml has it."""

    def on_log(self, update: int, values: Mapping[str, Any]) -> None:
        """A record of log.jsonl: stage, update within it, loss, learning rate, images per second, spread."""

    def on_evaluation(self, update: int, record: Mapping[str, Any]) -> None:
        """A record of metrics.json: model, role, steps, nfe, the metrics, and the protocol behind them."""

    def on_images(self, update: int, name: str, images: np.ndarray) -> None:
        """The pictures of samples/<name>.png, (N, H, W, C) uint8, of the same noises for every model."""

    def on_checkpoint(self, folder: Path) -> None:
        """A checkpoint is whole, on the disk."""

    def on_error(self, error: BaseException) -> None:
        """What ends the run before it is finished, before on_end: Interrupted where it was stopped."""

    def on_end(self) -> None:
        """The run is over: finished, stopped or failed."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))
Given = Callback | Callable[[int, Mapping[str, Any]], object]


class Callbacks:
    """Several callbacks as one, called in their order; a function is called as on_log."""

    def __init__(self, given: Sequence[Given] = ()) -> None:
        """Raises UserError for anything but a Callback or a function, and for a method of a misspelt name."""
        self._given = [one if isinstance(one, Callback) else _Function(one) for one in given]
        for one in self._given:
            for name in dir(type(one)):
                if name.startswith("on_") and name not in EVENTS:
                    near = difflib.get_close_matches(name, EVENTS, n=1, cutoff=0)[0]
                    raise UserError(
                        f"callback {type(one).__name__} has {name}, which nothing calls; did you mean {near}?"
                    )

    @contextmanager
    def of_run(self, folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
        """From on_start to on_end, which all are called with; of a run that failed its own error counts."""
        try:
            for one in self._given:
                one.on_start(folder, config)
            yield
        except BaseException as ended:
            for one in self._given:
                for call in (partial(one.on_error, ended), one.on_end):
                    try:
                        call()
                    except Exception as error:
                        log.warning("callback %s failed at the end: %s", type(one).__name__, reason(error))
            raise
        for one in self._given:
            one.on_end()

    def on_log(self, update: int, values: Mapping[str, Any]) -> None:
        for one in self._given:
            one.on_log(update, dict(values))

    def on_evaluation(self, update: int, record: Mapping[str, Any]) -> None:
        for one in self._given:
            one.on_evaluation(update, dict(record))

    def on_images(self, update: int, name: str, images: np.ndarray) -> None:
        for one in self._given:
            one.on_images(update, name, images.copy())

    def on_checkpoint(self, folder: Path) -> None:
        for one in self._given:
            one.on_checkpoint(folder)


class _Function(Callback):
    """A plain function, for those who want the log alone."""

    def __init__(self, function: Any) -> None:
        if not callable(function) or isinstance(function, type):
            raise UserError(
                f"callback {quoted(function)} is neither a function (update, values) nor a diffkd.Callback; "
                "give one of these"
            )
        self._function = function

    def on_log(self, update: int, values: Mapping[str, Any]) -> None:
        self._function(update, values)
