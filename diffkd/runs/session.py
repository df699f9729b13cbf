"""The run's lifecycle: validate, lock, stop cleanly on signals, always release."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console

from diffkd.core import guidance_kinds
from diffkd.core.denoiser import Denoiser
from diffkd.core.digest import digest
from diffkd.data.absent import Unseen
from diffkd.data.images import Examples, Images
from diffkd.errors import Interrupted, Unfinished, UserError
from diffkd.io import progress
from diffkd.io.files import new_folder
from diffkd.io.places import free_bytes
from diffkd.io.system_errors import is_disk_full
from diffkd.io.text import format_bytes
from diffkd.methods.base import Method, Stage
from diffkd.runs import trackers
from diffkd.runs.callbacks import Callbacks, Given
from diffkd.runs.config import TrainingRun
from diffkd.runs.config_files import resolved
from diffkd.runs.forecast import Forecast
from diffkd.training.config import Training
from diffkd.training.launch import is_lost_peer
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage

TOLERANCE = 10.0  # seconds by which processes may differ in how far they are


@dataclass(frozen=True)
class ResumeOptions:
    """How to continue a run; not part of its config.

    allow: accept a config that differs where that does not change the students. until: when to stop, in the
    time of time.monotonic, which does not jump when the clock is set.
    """

    allow: bool = False
    until: float | None = None


@dataclass
class StopRequest:
    """Whether a run should stop. until: when its time is up, by time.monotonic; signals: received so far."""

    until: float | None = None
    signals: list[int] = field(default_factory=list)

    def overdue(self, early: float = 0.0) -> bool:
        """Whether the time is up, or will be in `early` seconds."""
        return self.until is not None and time.monotonic() > self.until - early


class Session:
    """An open run: trains its stages, exports its models, keeps their records. seed: of everything random.

    update: how many updates of the run are done, all stages together. told: the callbacks, of the main
    process.
    """

    def __init__(
        self,
        seed: int,
        training: Training,
        accelerator: Accelerator,
        run: RunFolder,
        console: Console,
        stop: StopRequest,
        told: Callbacks,
    ) -> None:
        self.seed, self.training = seed, training
        self.accelerator, self.run, self.console, self.stop = accelerator, run, console, stop
        self.main = accelerator.is_main_process
        self.told, self.update = told, 0
        self.forecast = Forecast(self.say)

    def should_stop(self) -> bool:
        return bool(self.stop.signals) or self.stop.overdue()

    def run_stage(
        self,
        method: Method,
        stage: Stage,
        nets: dict[str, Any],
        images: Examples,
        index: int,
        *,
        seed: int | None = None,
        look: Callable[[int], None] | None = None,
    ) -> None:
        """Trains one stage, from its last checkpoint if there is one. index: among the run's. seed: default
        the run's. look: called with the number of updates done, after each."""
        before = self.update
        with self.bar(stage.name, stage.updates, unit="updates") as advance:
            rate, pace = 0.0, progress.Pace()

            def on_update(done: int, record: dict[str, Any]) -> None:
                nonlocal rate
                rate = record.get("images_per_second", rate)
                self.update = before + done
                if record.get("update") == done:
                    self.told.on_log(self.update, record)
                if look is not None:
                    look(done)
                advance(done, f"{_losses(record)}, {progress.rounded(rate)} images/s" if record else "")
                pace.reached(done)
                self.forecast.say(pace, stage.updates)

            run_stage(
                self.accelerator, method, stage, nets, images, self.training, self.run,
                seed=self.seed if seed is None else seed, stage_index=index, on_update=on_update,
                on_checkpoint=self.told.on_checkpoint, should_stop=self.should_stop,
            )  # fmt: skip

    def export(self, folder: Path, write: Callable[[Path], None]) -> None:
        """The model's folder, which `write` fills: complete or absent, written by the main process."""
        if self.main:
            with new_folder(folder) as temporary:
                write(temporary)
                self.run.sync_log()  # the stage will not be trained again: its log must not be lost
        self.accelerator.wait_for_everyone()

    def records(self) -> list[dict[str, Any]]:
        """What was measured so far."""
        return self.run.records()

    def add_record(self, record: dict[str, Any], said: str | None = None) -> None:
        """said: the record in a line, which is on the screen before the record is in metrics.json: neither a
        full disk nor a closed terminal loses it. None where it was said."""
        if self.main:
            try:
                if said is not None:
                    self.say(said)
            finally:
                self.run.add_record(record)
            self.told.on_evaluation(self.update, record)

    def say(self, text: str) -> None:
        if self.main:
            progress.say(self.console, text)

    def say_report(self, page: Path | None) -> None:
        """Where the report is; without one, why."""
        self.say(f"report: {page}" if page else "no report: it needs matplotlib (pip install matplotlib)")

    def bar(
        self, title: str, total: int, *, unit: str = "images"
    ) -> AbstractContextManager[progress.Advance]:
        return progress.bar(self.console, title, total, unit=unit, shown=self.main)

    @contextmanager
    def image_bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Gives on_images(count), called with so many more images; it raises Interrupted to stop the run."""
        with self.bar(title, total) as advance:
            count_images = progress.counter(advance, self.accelerator.num_processes)

            def on_images(count: int) -> None:
                if self.should_stop():
                    raise Interrupted
                count_images(count)

            yield on_images


def _losses(record: Mapping[str, Any]) -> str:
    """Those of a log record: the student's, then those of the other networks by their names."""
    others = [key for key in record if key.endswith("_loss") and f"{key[:-5]}_grad_norm" in record]
    parts = [f"{key.replace('_loss', ' loss')} {record[key]:.4f}" for key in others]
    return ", ".join([f"loss {record['loss']:.4f}", *parts])


@contextmanager
def open_run(
    config: TrainingRun,
    accelerator: Accelerator,
    images: Images | Unseen,
    console: Console,
    options: ResumeOptions = ResumeOptions(),
    inputs: Mapping[str, str] | None = None,
    callbacks: Sequence[Given] = (),
) -> Iterator[Session]:
    """Locks the run folder. SIGINT or SIGTERM asks for a checkpoint and a stop, a second SIGINT ends at once.

    Launchers forward signals that the processes have already received, so a second SIGTERM means nothing new.
    inputs: identifies what the run reads besides the data; all of it must be what the run began with.
    callbacks: of the user's, told after the config's trackers, which so miss nothing at which one of them
    ends the run. Raises Interrupted for signals and when the time is up, Unfinished when the disk is full.
    """
    config.check(accelerator)
    own = [trackers.Tracker(name) for name in dict.fromkeys(config.training.trackers)]
    told = Callbacks([*own, *callbacks])  # in every process, so that all of them refuse what is wrong
    if not accelerator.is_main_process:
        told = Callbacks()
    left = [None if options.until is None else options.until - time.monotonic()]
    broadcast_object_list(left)  # not the time itself: that of another host began at another moment
    stop = StopRequest(None if left[0] is None else time.monotonic() + left[0])

    def handler(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in stop.signals:
            raise KeyboardInterrupt
        stop.signals.append(number)

    handled = (signal.SIGINT, signal.SIGTERM) if _in_main_thread() else ()
    previous = {number: signal.signal(number, handler) for number in handled}
    run: RunFolder | None = None
    try:
        run = _run_folder(config, accelerator, options)
        parts = [config.training.parts(accelerator.num_processes)]
        if accelerator.is_main_process:
            run.check_inputs({"data": images.digest(), **(inputs or {})})
            parts[0] = run.micro_batches(parts[0], accelerator.num_processes)
            run.describe(accelerator.device.type, accelerator.num_processes, torch.get_num_threads())
        broadcast_object_list(parts)
        training = config.training.model_copy(update={"micro_batches": parts[0]})
        with told.of_run(config.out, resolved(config)):
            yield Session(config.seed, training, accelerator, run, console, stop, told)
    except Interrupted as error:  # perhaps because another process received the signal, or is ahead
        due = not stop.signals and stop.overdue(early=TOLERANCE)
        raise Interrupted(error.saved, due=due) from None
    except (UserError, Unfinished):
        raise
    except Exception as error:
        if is_lost_peer(error) and (stop.signals or stop.overdue(early=TOLERANCE)):  # it stopped first
            raise Interrupted(due=not stop.signals) from error
        if is_disk_full(error):
            raise Unfinished(
                f"{config.out}: the disk is full ({format_bytes(free_bytes(config.out))} free); what is done "
                "is kept: make room, and the same command resumes it"
            ) from error
        raise
    finally:
        for number, action in previous.items():
            signal.signal(number, action)
        if run is not None:
            run.close()


def check_run(config: TrainingRun, accelerator: Accelerator, options: ResumeOptions) -> None:
    """Raises UserError where a run that has begun cannot be resumed: for before another one is trained."""
    if accelerator.is_main_process and config.out.exists():
        _run_folder(config, accelerator, options).close()


def _run_folder(config: TrainingRun, accelerator: Accelerator, options: ResumeOptions) -> RunFolder:
    return RunFolder(
        config.out, resolved(config), owner=accelerator.is_main_process, keep=config.training.keep,
        allow=options.allow,
    )  # fmt: skip


def identity(teacher: Denoiser) -> str:
    """A hash of its weights, of how its output is read, and of how it is guided where that is not plainly."""
    reading = (teacher.prediction, teacher.num_classes, teacher.null_label, teacher.clip)
    total = hashlib.sha256(f"{digest(teacher.network.state_dict())} {reading}".encode())
    total.update(teacher.schedule.content())
    if kind := guidance_kinds.described(teacher):
        total.update(json.dumps(kind, sort_keys=True).encode())
    if teacher.worse is not None:
        total.update(identity(teacher.worse).encode())
    return total.hexdigest()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
