"""The processes of a run that write or read one checkpoint together, apart from what training exchanges."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator

from diffkd.errors import Unfinished
from diffkd.io.system_errors import system_error
from diffkd.io.text import reason

Result = TypeVar("Result")


class Team:
    """This process is `rank` of `world`, which take every step of a checkpoint together.

    group: on the hosts, and of their own, so that a thread may use it while training exchanges gradients.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None) -> None:
        self.rank, self.world, self._group = rank, world, group

    @property
    def main(self) -> bool:
        return self.rank == 0

    def each(self, work: Callable[[], Result]) -> list[Result]:
        """What every process makes of its own `work`, by rank; all of them must call it.

        An error of one is raised in all: those of diffkd as they are, any other as an OSError that says the
        same. Raises Unfinished where a process is gone.
        """
        if self.world == 1:
            return [work()]
        own: Exception | None = None
        outcome: Any = None
        try:
            outcome = work()
        except Exception as error:
            own, outcome = error, _sendable(error)
        try:
            outcomes = self._gathered(outcome)
        except RuntimeError as error:
            raise Unfinished("another process of this run is gone; its own error says why") from error
        if own is not None:
            raise own
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def first(self, work: Callable[[], Result]) -> Result:
        """What the main process makes of it, in every process; the others do not try."""
        return self.each(work if self.main else lambda: None)[0]  # type: ignore[return-value]

    def _gathered(self, outcome: Any) -> list[Any]:
        outcomes = [None] * self.world
        dist.all_gather_object(outcomes, outcome, group=self._group)
        return outcomes


ALONE = Team()


def team_of(accelerator: Accelerator) -> Team:
    """All processes of the run, each of which must call this."""
    if accelerator.num_processes == 1:
        return ALONE
    return Team(accelerator.process_index, accelerator.num_processes, _beside(dist.group.WORLD))


@cache
def _beside(world: Any) -> Any:
    """One group for all stages of a run. world: the group of training."""
    return dist.new_group(backend="gloo")


def _sendable(error: Exception) -> Exception:
    """Errors of libraries may not be made in another process from what is sent of them."""
    if type(error).__module__.startswith("diffkd."):
        return error
    number = system_error(error)
    return OSError(reason(error)) if number is None else OSError(number, os.strerror(number))
