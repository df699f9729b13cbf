"""The run folder: config, environment, log, checkpoints; used by one run at a time."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from diffkd.errors import UserError, masked
from diffkd.io.environment import commit, versions
from diffkd.io.files import append_json, new_file, read_json, read_records, remove_leftovers, sync, write_json
from diffkd.io.lock import Lock
from diffkd.io.system_errors import explained
from diffkd.io.text import changes, differences, from_json, log, quoted
from diffkd.training import surroundings
from diffkd.training.checkpoints import Checkpoints
from diffkd.training.run_files import LOG, RECORDS, check_config, check_places, plain, recorded

SAME_BITS = ("versions", "device", "processes", "threads", "variables")  # the last bits of a result need them


class RunFolder:
    """One run's folder, locked by one process at a time.

    Raises UserError for a folder that belongs to another run, holds something else, or is locked by another
    process. config: the resolved config; it must equal the folder's, if that has one. allow: whether they may
    differ in what does not change the run's result; None where nobody can ask for that. owner: whether this
    process locks and writes the folder; of several processes in a run only the main one does.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        owner: bool = True,
        keep: int = 2,
        allow: bool | None = False,
    ) -> None:
        self.folder = folder
        self.checkpoints = Checkpoints(folder / "checkpoints", config, keep=keep, before_rename=self.sync_log)
        self._parts: int | None = None
        self._lock: Lock | None = None
        if not owner:
            return
        check_config(folder, config, allow)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explained(error, f"out {folder} cannot be made") or error from error
        lock = Lock(folder, folder, "wait for it, or use another out")
        lock.take()
        self._lock = lock
        try:
            self._begin(config, allow)
        except BaseException:
            self.close()
            raise

    def _begin(self, config: Mapping[str, Any], allow: bool | None) -> None:
        """Writes the config, once the folder is locked: another process may just have begun a run in it."""
        folder = self.folder
        changed = check_config(folder, config, allow)
        check_places(folder)
        self.records()
        if changed:
            log.warning("%s resumes with another config: %s", folder, changed)
        measured = folder / RECORDS
        if "evaluation" in changed and measured.exists():  # numbers by different protocols are not comparable
            number = len(list(folder.glob("metrics-before-*.json"))) + 1
            measured.rename(folder / f"metrics-before-{number}.json")
        inner = [path for path in (*folder.glob("*"), *folder.glob("students/*")) if path.is_dir()]
        remove_leftovers(folder, *inner)
        known = folder / "config.yaml"
        if not known.exists() or recorded(known) != plain(config):
            with new_file(known) as temporary:
                temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def describe(self, device: str, processes: int = 1, threads: int | None = None) -> None:
        """Writes environment.json, once; in a resumed run, warns of what has changed since."""
        path = self.folder / "environment.json"
        content: dict[str, Any] = {
            "command": [masked(word) for word in sys.argv],
            "commit": commit(),
            "versions": versions(),
            "platform": platform.platform(),
            "device": device,
            "processes": processes,
            "threads": threads,
            "micro_batches": self._parts,
            "cores": os.cpu_count(),
        }
        if rounding := surroundings.rounding():
            content["variables"] = rounding
        if not path.exists():
            write_json(path, content)
            return
        before = self._read(path.name)
        changed = [d for key in SAME_BITS for d in differences(before.get(key), content.get(key), key)]
        if changed:
            log.warning(
                "%s resumes in another environment, so the last bits of its numbers may differ: %s",
                self.folder, "; ".join(changed),
            )  # fmt: skip

    def micro_batches(self, wanted: int, processes: int) -> int:
        """The number that the run began with, because it decides which images and noise are drawn.

        wanted: what the config says now, or else the number of processes.
        """
        before = self._read("environment.json").get("micro_batches", wanted)
        if type(before) is int and before >= 1 and before % processes == 0:
            self._parts = before
            return before
        log.warning(
            "%s resumes with %d micro-batches but began with %s, so other images and noise are drawn from "
            "here on; training.micro_batches fixes their number for any number of processes",
            self.folder, wanted, before,
        )  # fmt: skip
        self._parts = wanted
        return wanted

    def _read(self, name: str) -> dict[str, Any]:
        """One of the run's own JSON files; {} if it does not exist or is not one."""
        try:
            content = read_json(self.folder / name, {})
        except ValueError as error:
            log.warning("%s cannot be read (%s); it is ignored", self.folder / name, error)
            return {}
        return content if isinstance(content, dict) else {}

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Raises UserError if the run began with other data, or another teacher, under the same name.

        inputs: a digest of each.
        """
        before = self._read("inputs.json")
        if not before:
            write_json(self.folder / "inputs.json", dict(inputs))
            return
        for name in changes(before, dict(inputs)):
            raise UserError(
                f"the {name} of {self.folder} {'have' if name.endswith('s') else 'has'} changed since the "
                "run began; put it back, or use another out"
            )

    # what was measured

    def records(self) -> list[dict[str, Any]]:
        """The records in metrics.json. Raises UserError where it is not a list; notes of the user's are left
        out, and left alone."""
        content = read_records(self.folder / RECORDS)
        named = ("model", "role")
        return [r for r in content if isinstance(r, dict) and all(isinstance(r.get(k), str) for k in named)]

    def add_record(self, record: Mapping[str, Any]) -> None:
        append_json(self.folder / RECORDS, record)

    def check_records(self, roles: Collection[str], numbers: Collection[str]) -> None:
        """Raises UserError where a record in one of these roles has anything but numbers for `numbers`."""
        for record in self.records():
            for key in numbers if record["role"] in roles else ():
                value: Any = record.get(key)
                if type(value) not in (int, float) or not abs(value) < 1e300:
                    raise UserError(
                        f"{self.folder / RECORDS}: the record of {quoted(record['model'])} has {key} "
                        f"{quoted(value)}, which is not a number; remove the record, and it is measured again"
                    )

    # log

    def append(self, record: Mapping[str, Any]) -> None:
        with (self.folder / LOG).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def rewind_log(self, stage_index: int, update: int) -> None:
        """Drops what was logged after this update: those updates will be done, and logged, again."""
        path = self.folder / LOG
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = from_json(line)
                place = (record.get("stage_index", -1), record.get("update", 0))
                if all(type(number) is int for number in place) and place <= (stage_index, update):
                    kept.append(line)
            except (ValueError, TypeError, AttributeError):
                continue  # torn by a kill, or written by something else
        with new_file(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def sync_log(self) -> None:
        """Puts the log on the disk before a checkpoint becomes valid: it must cover the updates before."""
        path = self.folder / LOG
        if path.is_file():
            sync(path)
