"""The JSON file that takes the records of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffkd.errors import Unfinished, UserError
from diffkd.io.files import write_json
from diffkd.io.places import check_writable
from diffkd.io.system_errors import explained
from diffkd.metrics.evaluation.records import Record


class RecordFile:
    """Written after every record. What goes wrong is kept until the numbers are shown."""

    def __init__(self, path: Path | None) -> None:
        """path: None for no file. Raises UserError, before anything is measured, for one that cannot be."""
        if path is not None:
            check_writable(path, "--out")
        self.path = path
        self.failure: UserError | Unfinished | None = None

    def write(self, records: Sequence[Record]) -> None:
        if self.path is None:
            return
        self.failure = None
        try:
            write_json(self.path, records[0] if len(records) == 1 else list(records))
        except (OSError, ValueError) as error:
            self.failure = explained(error, f"--out {self.path}")
            if self.failure is None:
                raise

    def check(self) -> None:
        """Raises what the last writing ended with."""
        if self.failure is not None:
            raise type(self.failure)(f"the numbers are above, and not in a file: {self.failure}")
