"""The manifest of a checkpoint, `checkpoint.json`: what it is of, its files with their digests, its own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffkd.errors import UserError
from diffkd.io.text import from_json, read_text, reason

SCHEMA, IN_PARTS = 2, 3  # of a checkpoint of one process, and of one that several wrote
FILE = "checkpoint.json"
NAME = re.compile(r"stage-(\d+)-update-(\d+)")  # of a checkpoint's folder


class Damaged(Exception):
    """A checkpoint that is not what was written, proven by its digests; the message says how."""


def name_of(stage_index: int, update: int) -> str:
    return f"stage-{stage_index:02d}-update-{update:07d}"


def numbers(path: Path) -> tuple[int, int]:
    """Stage and update, from a checkpoint's name."""
    stage, update = NAME.fullmatch(path.name).groups()  # type: ignore[union-attr]
    return int(stage), int(update)


def read(path: Path) -> dict[str, Any]:
    """Raises Damaged if it is not what was written, UserError if it is of another version or was renamed."""
    try:
        content = from_json(read_text(path / FILE))
    except FileNotFoundError:
        raise Damaged(f"{FILE} is missing") from None
    except ValueError as error:
        raise Damaged(f"{FILE} is no JSON: {reason(error)}") from error
    if not isinstance(content, dict) or content.pop("digest", None) != digest(content):
        raise Damaged(f"{FILE} was altered")
    schema = content["schema"]
    if schema not in (SCHEMA, IN_PARTS):  # after the digest, which is the same in every version
        which, remedy = ("a newer", "update diffkd") if schema > SCHEMA else ("an older", "delete it")
        raise UserError(
            f"checkpoint {path} was written by {which} diffkd (schema {schema}, this one reads {SCHEMA} and "
            f"{IN_PARTS}); {remedy}, or use the diffkd that wrote it"
        )
    own = name_of(content["stage_index"], content["update"])
    if path.name != own:
        raise UserError(f"checkpoint {path} is {own} by its {FILE}; give it that name again, or move it out")
    return content


def digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
