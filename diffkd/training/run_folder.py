"""The run folder: config, environment, log, checkpoints; one owner at a time."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffkd.errors import UserError, masked
from diffkd.io.environment import commit, versions
from diffkd.io.files import new_file, read_json, remove_leftovers, sync, write_json
from diffkd.io.lock import Lock
from diffkd.io.text import changes, differences, from_json, log, reason
from diffkd.training.checkpoints import MOVABLE, Checkpoints, is_resumable

FORMER_DEFAULTS = {"evaluation.sampler": "ddim"}  # which older runs recorded; the default is now None
SAME_BITS = ("versions", "device", "processes", "threads")  # what the last bits depend on


class RunFolder:
    """One run's folder, held by one process at a time.

    Raises UserError for a folder that belongs to another run, holds something else, or is held by another
    process. config: the resolved config; where the folder has one already, they must be equal. allow: whether
    they may differ where that does not change what the run ends with. owner: whether this process holds and
    writes it; of several processes in one run only the main one does.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        owner: bool = True,
        keep: int = 2,
        allow: bool = False,
    ) -> None:
        self.folder = folder
        self.checkpoints = Checkpoints(folder / "checkpoints", config, keep=keep, before_rename=self.sync_log)
        self._parts: int | None = None
        self._lock: Lock | None = None
        if not owner:
            return
        self._check(config, allow)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out {folder} cannot be made ({error.strerror}); use another out") from error
        lock = Lock(folder, folder, "wait for it, or use another out")
        lock.take()
        self._lock = lock
        try:
            self._begin(config, allow)
        except BaseException:
            self.close()
            raise

    def _begin(self, config: Mapping[str, Any], allow: bool) -> None:
        """What is done once the folder is held. Another process may have begun a run in it just before."""
        folder = self.folder
        changed = self._check(config, allow)
        if changed:
            log.warning("%s goes on with another config: %s", folder, changed)
        measured = folder / "metrics.json"
        if "evaluation" in changed and measured.exists():  # numbers of two protocols do not compare
            number = len(list(folder.glob("metrics-before-*.json"))) + 1
            measured.rename(folder / f"metrics-before-{number}.json")
        inner = [path for path in (*folder.glob("*"), *folder.glob("students/*")) if path.is_dir()]
        remove_leftovers(folder, *inner)
        known = folder / "config.yaml"
        if not known.exists() or _yaml(known) != _plain(config):
            with new_file(known) as temporary:
                temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")

    def _check(self, config: Mapping[str, Any], allow: bool) -> str:
        """What differs, and may. Raises UserError for what may not."""
        if not self.folder.exists():
            return ""
        if not self.folder.is_dir():
            raise UserError(f"out {self.folder} is a file; give a folder")
        known = self.folder / "config.yaml"
        if not known.is_file():
            if any(not p.name.startswith(".") for p in self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty and holds no run of diffkd; use another out")
            return ""
        differ = changes(_yaml(known), _plain(config))
        differ = {
            key: (was, now)
            for key, (was, now) in differ.items()
            if key not in MOVABLE and not (now is None and was == FORMER_DEFAULTS.get(key, now))
        }
        said = [f"{key} was {was}, now {now}" for key, (was, now) in differ.items()]
        text = "; ".join(said[:3]) + ("; ..." if len(said) > 3 else "")
        if not all(map(is_resumable, differ)):
            raise UserError(
                f"{self.folder} belongs to a run of another config ({text}); use another out, or delete "
                "the folder"
            )
        if differ and not allow:
            raise UserError(
                f"{self.folder} belongs to a run of another config ({text}); --allow goes on with the new "
                "values, which do not change the students, or use another out"
            )
        return "; ".join(said)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def describe(self, device: str, processes: int = 1, threads: int | None = None) -> None:
        """Writes environment.json, once; in a run that goes on, says what is no longer as it says."""
        path = self.folder / "environment.json"
        content = {
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
        if not path.exists():
            write_json(path, content)
            return
        before = self._read(path.name)
        said = [d for key in SAME_BITS for d in differences(before.get(key), content[key], key)]
        if said:
            log.warning(
                "%s goes on otherwise than it began, so the last bits of its numbers may differ: %s",
                self.folder, "; ".join(said),
            )  # fmt: skip

    def micro_batches(self, wanted: int, processes: int) -> int:
        """Those that the run began with, as other parts of a batch draw other images and noise.

        wanted: what the config, and without it the number of processes, gives now.
        """
        before = self._read("environment.json").get("micro_batches", wanted)
        if isinstance(before, int) and before >= 1 and before % processes == 0:
            self._parts = before
            return before
        log.warning(
            "%s goes on with %d micro-batches where it began with %s, so other images and noise are drawn "
            "from here on; training.micro_batches fixes their number for any number of processes",
            self.folder, wanted, before,
        )  # fmt: skip
        self._parts = wanted
        return wanted

    def _read(self, name: str) -> dict[str, Any]:
        """One of the run's own files; {} where there is none, or another process has made nonsense of it."""
        try:
            found = read_json(self.folder / name, {})
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read (%s); it is passed over", self.folder / name, error)
            return {}
        return found if isinstance(found, dict) else {}

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Raises UserError where the run began with other data, or another teacher, of the same name.

        inputs: what identifies each.
        """
        before = self._read("inputs.json")
        if not before:
            write_json(self.folder / "inputs.json", dict(inputs))
            return
        for name in changes(before, dict(inputs)):
            raise UserError(
                f"the {name} of {self.folder} has changed since the run began; put it back, or use another "
                "out"
            )

    # log

    def append(self, record: Mapping[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def rewind_log(self, stage_index: int, update: int) -> None:
        """Drops what was logged after that update: it will be done, and logged, again."""
        path = self.folder / "log.jsonl"
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
                continue  # torn by a kill, or none of ours
        with new_file(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def sync_log(self) -> None:
        """What the log says of the updates before a checkpoint is on the disk when that is."""
        path = self.folder / "log.jsonl"
        if path.is_file():
            sync(path)


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({reason(error)}); put it back, or use another out"
        ) from error


def _plain(config: Mapping[str, Any]) -> Any:
    """As it is once it was written and read."""
    return json.loads(json.dumps(config))
