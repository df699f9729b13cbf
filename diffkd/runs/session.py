"""The run's lifecycle: validate, lock, stop cleanly on signals, always release."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console

from diffkd.core.denoiser import Denoiser
from diffkd.core.digest import digest
from diffkd.data.images import Images
from diffkd.errors import Interrupted, Unfinished, UserError, printable
from diffkd.io.files import format_bytes, free_bytes, is_disk_full
from diffkd.io.progress import bar
from diffkd.methods.base import Method, Stage
from diffkd.metrics.evaluation.evaluator import networks_of, require
from diffkd.metrics.evaluation.reference import Reference
from diffkd.runs import config, config_files
from diffkd.runs.classification.config import Classify
from diffkd.training.config import Training
from diffkd.training.launch import is_lost_peer
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage


@dataclass
class StopRequest:
    """Whether a run is to stop. until: the time (of time.time) that it has; signals: those that came."""

    until: float | None = None
    signals: list[int] = field(default_factory=list)

    def due(self, early: float = 0.0) -> bool:
        """Whether the time is over, or nearly."""
        return self.until is not None and time.time() > self.until - early


class Session:
    """One run's parts. seed: of everything random in it."""

    def __init__(
        self,
        seed: int,
        training: Training,
        accelerator: Accelerator,
        run: RunFolder,
        console: Console,
        stop: StopRequest,
    ) -> None:
        self.seed, self.training = seed, training
        self.accelerator = accelerator
        self.run = run
        self.console = console
        self.stop = stop

    def should_stop(self) -> bool:
        return bool(self.stop.signals) or self.stop.due()

    def run_stage(
        self,
        method: Method,
        stage: Stage,
        nets: dict[str, Any],
        images: Images,
        index: int,
        *,
        seed: int | None = None,
    ) -> None:
        """Trains one stage, from its last checkpoint where there is one. index: among the run's. seed:
        default the run's."""
        with self.bar(stage.name, stage.updates) as advance:
            rate = 0.0

            def on_update(done: int, record: dict[str, Any]) -> None:
                nonlocal rate
                rate = record.get("images_per_second", rate)
                text = f"loss {record['loss']:.4f}  {rate:.0f} images/s" if record else ""
                advance(done, text)

            run_stage(
                self.accelerator, method, stage, nets, images, self.training, self.run,
                seed=self.seed if seed is None else seed, stage_index=index, on_update=on_update,
                should_stop=self.should_stop,
            )  # fmt: skip

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def bar(self, title: str, total: int) -> AbstractContextManager[Callable[[int, str], None]]:
        return bar(self.console, title, total, shown=self.accelerator.is_main_process)


CLOCK_TOLERANCE = 10.0  # seconds that the clocks of processes, and what they are doing, may be apart


@dataclass(frozen=True)
class ResumeOptions:
    """How a run is to go on, which is no part of its config.

    allow: whether the config may differ from the run's where that is harmless. until: the time (of
    time.time) to stop at.
    """

    allow: bool = False
    until: float | None = None


NO_OPTIONS = ResumeOptions()


def check(settings: config.Train | config.Distill | Classify, accelerator: Accelerator) -> None:
    """Raises UserError for what could only fail later, when there is a run folder already."""
    settings.training.parts(accelerator.num_processes)
    if settings.training.compile and accelerator.device.type != "cuda":
        # On CPUs the backward pass that torch 2.13 compiles of a UNet2DModel is wrong (docs/log.md).
        raise UserError(
            f"training.compile is for CUDA, and the device is {accelerator.device.type}; leave it out"
        )
    hooked = [m for m in settings.method if m.hooks] if isinstance(settings, config.Distill) else []
    if settings.training.compile and hooked:
        raise UserError(
            f"training.compile passes over the hooks of method {config_files.name_of(hooked[0])}; leave it out"
        )
    how = None if isinstance(settings, Classify) else settings.evaluation
    if how is not None:
        if "fid" not in how.metrics:
            raise UserError(
                f"evaluation.metrics {how.metrics} has no fid, which a run's report is drawn from; add it"
            )
        if "agreement" in how.metrics and isinstance(settings, config.Train):
            raise UserError(
                "evaluation.metrics has agreement, which is with a teacher: it is for diffkd distill"
            )
        if how.reference is None:
            networks_of(how)
        else:
            require(how, Reference(how.reference))


@contextmanager
def open_run(
    settings: config.Train | config.Distill | Classify,
    accelerator: Accelerator,
    images: Images,
    console: Console,
    terms: ResumeOptions = NO_OPTIONS,
    inputs: Mapping[str, str] | None = None,
) -> Iterator[Session]:
    """The run folder, held; SIGINT or SIGTERM asks for a checkpoint and a stop, a second SIGINT ends at once.

    Launchers pass signals on that processes have had already, so a second SIGTERM says nothing new. inputs:
    what identifies the data, and else must be what the run began with. Raises Interrupted for signals and for
    the end of the time, Unfinished where the disk is full.
    """
    check(settings, accelerator)
    until = [terms.until]
    broadcast_object_list(until)
    stop = StopRequest(until[0])

    def handler(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in stop.signals:
            raise KeyboardInterrupt
        stop.signals.append(number)

    asked = (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.signal(s, handler) for s in asked} if _in_main_thread() else {}
    run: RunFolder | None = None
    try:
        run = RunFolder(
            settings.out, config_files.resolved(settings), owner=accelerator.is_main_process,
            keep=settings.training.keep, allow=terms.allow,
        )  # fmt: skip
        parts = [settings.training.parts(accelerator.num_processes)]
        if accelerator.is_main_process:
            run.check_inputs({"data": images.digest(), **(inputs or {})})
            parts[0] = run.micro_batches(parts[0], accelerator.num_processes)
            run.describe(accelerator.device.type, accelerator.num_processes, torch.get_num_threads())
        broadcast_object_list(parts)
        training = settings.training.model_copy(update={"micro_batches": parts[0]})
        yield Session(settings.seed, training, accelerator, run, console, stop)
    except Interrupted as told:  # perhaps another process was, or its clock is ahead
        raise Interrupted(told.saved, due=not stop.signals and stop.due(early=CLOCK_TOLERANCE)) from None
    except (UserError, Unfinished):
        raise
    except Exception as error:
        if is_lost_peer(error) and (
            stop.signals or stop.due(early=CLOCK_TOLERANCE)
        ):  # stopped as this one is
            raise Interrupted(due=not stop.signals) from error
        if is_disk_full(error):
            raise Unfinished(
                f"{settings.out}: the disk is full ({format_bytes(free_bytes(settings.out))} free); what was done is "
                "kept: make room, and the same command goes on"
            ) from error
        raise
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
        if run is not None:
            run.close()


def identity(teacher: Denoiser) -> str:
    """Of its weights, and of how they are read."""
    read = (teacher.prediction, teacher.num_classes, teacher.null_label, teacher.clip)
    total = hashlib.sha256(f"{digest(teacher.network.state_dict())} {read}".encode())
    total.update(teacher.schedule.alphas_cumprod.numpy().tobytes())
    return total.hexdigest()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
