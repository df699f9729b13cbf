"""What a tracker has been told of a run, in trackers.json of its folder: a resumed run goes on from there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffkd.io.files import read_json, write_json
from diffkd.io.text import log
from diffkd.training.run_files import TRACKERS

# Seconds for which a tracker may have what it is told in memory alone, where a kill loses it: wandb writes
# its file every 15, trackio its database every half. The others have it when their call returns.
HELD = {"wandb": 20.0, "trackio": 1.0}
MOST = 100  # entries of those, so that a run that logs every update is not slowed by writing them


@dataclass(frozen=True)
class Entry:
    """What is told at once: numbers by their names, or the picture of that name in samples/."""

    update: int
    values: dict[str, float] = field(default_factory=dict)
    picture: str | None = None

    def names(self) -> list[str]:
        return list(self.values) if self.picture is None else [f"samples/{self.picture}"]

    def content(self) -> dict[str, Any]:
        told = {"values": self.values} if self.picture is None else {"picture": self.picture}
        return {"update": self.update, **told}


class TrackerState:
    """Of one tracker of one run.

    identity: of its log, None before there is one. waiting: what is still to be told, the oldest first, after
    a kill with what may have been lost in it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path, self._name = folder / TRACKERS, name
        known = self._content().get(name)
        if isinstance(known, str):  # as older runs have it
            known = {"id": known}
        known = known if isinstance(known, dict) else {}
        self.identity: str | None = known.get("id")
        if not isinstance(self.identity, str | None):
            self.identity, known = None, {}
        last = known.get("last")
        last = last if isinstance(last, dict) else {}
        self._earlier = {key: update for key, update in last.items() if type(update) is int}
        self._last = dict(self._earlier)
        waiting = known.get("waiting")
        found = map(_entry, waiting if isinstance(waiting, list) else [])
        self.waiting = [entry for entry in found if entry is not None]
        self._held: list[tuple[float, Entry]] = []  # told, at that time

    def add(self, entry: Entry) -> None:
        """To what waits, but for what an earlier process added: updates after a checkpoint are done again."""
        news = {k: v for k, v in entry.values.items() if entry.update > self._earlier.get(k, -1)}
        if entry.picture is not None:
            if entry.update <= self._earlier.get(f"samples/{entry.picture}", -1):
                return
        elif not news:
            return
        entry = Entry(entry.update, news, entry.picture)
        self._last.update(dict.fromkeys(entry.names(), entry.update))
        self.waiting.append(entry)

    def took(self) -> None:
        """The tracker has taken the oldest of what waits."""
        self._held.append((time.monotonic(), self.waiting.pop(0)))

    def closed(self) -> None:
        """The log was closed in order: it has lost nothing of what it took."""
        self._held.clear()

    def save(self) -> None:
        first = time.monotonic() - HELD.get(self._name, 0.0)
        held = [(at, entry) for at, entry in self._held if self._name in HELD and at > first]
        self._held = held[-MOST:]
        waiting = [entry.content() for entry in (*(entry for _, entry in self._held), *self.waiting)]
        state = {"id": self.identity, "last": self._last, "waiting": waiting}
        write_json(self._path, {**self._content(), self._name: state})

    def _content(self) -> Mapping[str, Any]:
        """Of the file, which other trackers write into too; nothing where it was edited beyond reading."""
        try:
            known = read_json(self._path, {})
        except ValueError as error:
            log.warning("%s cannot be read (%s); a new log begins", self._path, error)
            return {}
        return known if isinstance(known, dict) else {}


def _entry(content: Any) -> Entry | None:
    """None for what is no entry; a picture's name must not lead elsewhere."""
    if not isinstance(content, dict) or type(content.get("update")) is not int:
        return None
    picture, values = content.get("picture"), content.get("values")
    if isinstance(picture, str):
        return Entry(content["update"], picture=picture) if Path(picture).name == picture else None
    if not isinstance(values, dict) or not values:
        return None
    return Entry(content["update"], values) if all(type(v) in (int, float) for v in values.values()) else None
