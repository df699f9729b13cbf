"""What every room shares: the error for a user's mistake, and the strict typed config object."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class UserError(ValueError):
    """A mistake in what the user gave. The message is one line: the thing, the value, the remedy."""


class Unfinished(Exception):
    """Work that stopped half way, for the reason in the one line of its message; the same command goes on."""


class Strict(BaseModel):
    """Base of every config object: unknown keys are errors, values cannot change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Positive = Annotated[int, Field(ge=1)]
