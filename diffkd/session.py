"""One run at work: its folder held, its stages trained, its bars and its words."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from diffkd.data import Images
from diffkd.engine import run_stage
from diffkd.method import Method, Stage
from diffkd.progress import bar
from diffkd.runs import Run
from diffkd.text import printable
from diffkd.training import Training


@dataclass
class Stop:
    """Whether a run is to stop. until: the time (of time.time) that it has; signals: those that came."""

    until: float | None = None
    signals: list[int] = field(default_factory=list)

    def due(self, early: float = 0.0) -> bool:
        """Whether the time is over, or nearly."""
        return self.until is not None and time.time() > self.until - early


class Session:
    """One run's parts. seed: of everything random in it."""

    def __init__(
        self, seed: int, training: Training, accelerator: Accelerator, run: Run, console: Console, stop: Stop
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
