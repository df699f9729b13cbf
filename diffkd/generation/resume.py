"""Images that are on disk already: the record of how they were made, and what is left to do."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffkd.io.files import read_json
from diffkd.io.system_errors import explained
from diffkd.io.text import differences

DIGEST = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}")  # of which the first digits tell two apart
RECORD = "diffkd.json"  # beside the images: {"drawn": settings, "images": n, "complete": whether all n exist}


@dataclass(frozen=True)
class ResumePlan:
    """existing: (n,) bool as bytes, which images exist. clear: whether existing files must be deleted first.
    complete: whether there is nothing left to do."""

    existing: bytes
    clear: bool = False
    complete: bool = False

    @staticmethod
    def from_scratch(n: int) -> ResumePlan:
        return ResumePlan(bytes(n), clear=True)

    @staticmethod
    def resume(indices: np.ndarray, n: int, complete: bool = False) -> ResumePlan:
        """indices: of the images that exist. complete: whether their record says so."""
        existing = np.zeros(n, bool)
        existing[indices] = True
        return ResumePlan(existing.tobytes(), complete=complete and bool(existing.all()))

    @property
    def missing(self) -> np.ndarray:
        """(n,) bool."""
        return ~np.frombuffer(self.existing, bool)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file, None where there is none. Raises UserError or Unfinished for one that cannot be
    read: what it describes is not to be taken for images of unknown making."""
    try:
        return as_record(read_json(path, None))
    except ValueError:
        return None
    except OSError as error:
        raise explained(error, f"{path} cannot be read") or error from error


def as_record(content: Any) -> dict[str, Any] | None:
    """The content if it is a record, else None: a pipeline's card is a file of the same name."""
    is_record = isinstance(content, dict) and {"drawn", "images", "complete"} <= content.keys()
    return content if is_record else None


def describe_difference(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """How the settings of a record differ from these, as the predicate of a message; None if they match."""
    changed = differences(record["drawn"], json.loads(json.dumps(settings)))
    said = DIGEST.sub(r"\1...", "; ".join(changed[:3]))
    return f"holds images of other settings ({said})" if changed else None
