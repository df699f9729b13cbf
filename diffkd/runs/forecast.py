"""How long a run takes, said once, as soon as its first updates have given a rate."""

from __future__ import annotations

from collections.abc import Callable

from diffkd.io.progress import Pace, duration, rounded

AFTER = 20.0  # seconds of training; what is over by then needs no forecast


class Forecast:
    """later: updates of the stages after the present one, None where they are not known. measuring: seconds
    that it takes to measure what is still to be trained, None likewise."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._said = say, False
        self.later: int | None = None
        self.measuring: float | None = None

    def say(self, pace: Pace, updates: int) -> None:
        """Says it once. pace: of the present stage. updates: of that stage, in all."""
        if self._said or pace.seconds < AFTER or pace.rate <= 0:
            return
        self._said = True
        left = updates - pace.done + (self.later or 0)
        of_stage = " of this stage" if self.later is None else ""
        measuring = f", and {duration(self.measuring)} for measuring" if self.measuring else ""
        self._say(
            f"about {duration(left / pace.rate)} for the {left:,} updates{of_stage} that are left, at the "
            f"rate so far ({rounded(pace.rate)} a second){measuring}"
        )
