"""A run that is held: checked before it begins, stopped when it is told to, let go whatever happens."""

from __future__ import annotations

import hashlib
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console

from diffkd import config
from diffkd.base import Interrupted, Unfinished, UserError
from diffkd.config_classify import Classify
from diffkd.data import Images
from diffkd.denoiser import Denoiser
from diffkd.files import free, no_room, shown
from diffkd.launching import lost_another
from diffkd.metrics.evaluator import networks_of, require
from diffkd.metrics.reference import Reference
from diffkd.metrics.weights import digest
from diffkd.runs import Run
from diffkd.session import Session, Stop

TOGETHER = 10.0  # seconds that the clocks of processes, and what they are doing, may be apart


@dataclass(frozen=True)
class Terms:
    """How a run is to go on, which is no part of its config.

    allow: whether the config may differ from the run's where that is harmless. until: the time (of
    time.time) to stop at.
    """

    allow: bool = False
    until: float | None = None


PLAIN = Terms()


def duration(text: str) -> float:
    """Seconds: 90s, 50m, 1h30m, 2d; UserError for what is none."""
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text, re.ASCII)
    if parts is None or not any(parts.groups()):
        raise UserError(f"--stop-after {text!r} is no time; give one such as 50m, 1h30m or 90s")
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


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
            f"training.compile passes over the hooks of method {config.name_of(hooked[0])}; leave it out"
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
def held(
    settings: config.Train | config.Distill | Classify,
    accelerator: Accelerator,
    images: Images,
    console: Console,
    terms: Terms = PLAIN,
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
    stop = Stop(until[0])

    def handler(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in stop.signals:
            raise KeyboardInterrupt
        stop.signals.append(number)

    asked = (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.signal(s, handler) for s in asked} if _in_main_thread() else {}
    run: Run | None = None
    try:
        run = Run(
            settings.out, config.resolved(settings), owner=accelerator.is_main_process,
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
        raise Interrupted(told.saved, due=not stop.signals and stop.due(early=TOGETHER)) from None
    except (UserError, Unfinished):
        raise
    except Exception as error:
        if lost_another(error) and (stop.signals or stop.due(early=TOGETHER)):  # stopped as this one is
            raise Interrupted(due=not stop.signals) from error
        if no_room(error):
            raise Unfinished(
                f"{settings.out}: the disk is full ({shown(free(settings.out))} free); what was done is "
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
