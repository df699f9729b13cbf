"""Checkpoints: written in the background, whole or not at all; verified before they are used."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffkd.errors import Unfinished, UserError
from diffkd.io.files import new_folder, sha256
from diffkd.io.places import free_bytes
from diffkd.io.system_errors import explained, is_disk_full
from diffkd.io.text import changes, format_bytes, from_json, log, read_text, reason

SCHEMA = 2
MANIFEST = "checkpoint.json"
NAME = re.compile(r"stage-(\d+)-update-(\d+)")
Tensors = Mapping[str, Mapping[str, Tensor]]  # by file, by name

# Config keys that do not change a run's result: they may change half way, if the user allows it.
RESUMABLE_CHANGES = (
    "training.log_every", "training.checkpoint_every", "training.keep", "training.max_skipped",
    "training.trackers", "evaluation", "pictures", "pairs", "spread_every",
)  # fmt: skip
MOVABLE = ("out",)  # keys that change when a run folder is moved


@dataclass(frozen=True)
class Checkpoint:
    """update: how many are done. state: everything that is not a tensor."""

    update: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Damaged(Exception):
    """A checkpoint that is not what was written, proven by its digests; the message says how."""


class Checkpoints:
    """A run's checkpoints, `stage-<index>-update-<number>/` each: safetensors files, and a manifest with the
    size and sha256 of every file, the run's config, and its own digest. The last `keep` are kept.

    Saving one deletes those before it but the last, and of those after it only what is damaged.

    before_rename: called before a checkpoint becomes valid, to put on the disk what must be there by then.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        keep: int = 2,
        before_rename: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.config = json.loads(json.dumps(config))
        self.keep = keep
        self._before_rename = before_rename
        self._damaged: set[Path] = set()
        self._written: list[Path] = []
        self._writing: Path | None = None
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, stage_index: int, update: int, tensors: Tensors, state: Mapping[str, Any]) -> None:
        """Starts writing one, once the previous one is written. tensors: on the host, and not changed later.

        Raises what writing the previous one failed with; see `wait`.
        """
        self.wait()
        content = {
            "schema": SCHEMA, "stage_index": stage_index, "update": update, "config": self.config,
            "state": json.loads(json.dumps(state)),
        }  # fmt: skip

        def write() -> None:
            try:
                self._write(content, tensors)
            except BaseException as error:
                self._error = error

        # A daemon, so that a process can end at once: what the thread leaves behind is not a checkpoint.
        self._writing = self.folder / _name(stage_index, update)
        self._writer = threading.Thread(target=write, name="diffkd-checkpoint", daemon=True)
        self._writer.start()

    def check(self) -> None:
        """Raises what writing failed with, if it has ended."""
        if self._writer is not None and not self._writer.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written. Raises Unfinished if it could not be."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        path, self._writing = self._writing, None
        if error is not None:
            raise error
        if path is not None:
            self._written.append(path)

    def written(self) -> list[Path]:
        """Those that are whole and were not given before, of the ones that this process saved."""
        paths, self._written = self._written, []
        return paths

    def _write(self, content: dict[str, Any], tensors: Tensors) -> None:
        path = self.folder / _name(content["stage_index"], content["update"])
        try:
            with new_folder(path) as temporary:
                files = {}
                for name, values in tensors.items():
                    file = temporary / f"{name}.safetensors"
                    save_file({key: value.contiguous() for key, value in values.items()}, file)
                    files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
                content = {**content, "files": files}
                content["digest"] = _digest(content)
                (temporary / MANIFEST).write_text(json.dumps(content, indent=2), encoding="utf-8")
                self._before_rename()
        except (OSError, SafetensorError) as error:
            size = sum(value.nbytes for values in tensors.values() for value in values.values())
            full = is_disk_full(error)
            room = f"the disk is full ({format_bytes(free_bytes(self.folder))} free)"
            why = room if full else getattr(error, "strerror", None) or reason(error)
            raise Unfinished(
                f"checkpoint {path} needs {format_bytes(size)} and could not be written: {why}; the last "
                f"good one is kept: {'make room' if full else 'mend that'}, and the same command resumes "
                "from it"
            ) from error
        checkpoints = self._all()
        after = checkpoints.index(path) + 1
        later = [old for old in checkpoints[after:] if old in self._damaged]
        for old in [*checkpoints[: max(0, after - self.keep)], *later]:
            try:
                shutil.rmtree(old)
            except OSError as error:  # of another user's
                log.warning("checkpoint %s is superseded and cannot be deleted (%s)", old, reason(error))

    def load(self, stage_index: int) -> Checkpoint | None:
        """The newest intact checkpoint of a stage; None if there is none.

        A damaged one gets a warning, and the one before it is tried. Whatever else is wrong with one ends
        the run, as going back would lose work: raises UserError for one that cannot be read, was renamed, or
        is of another config or another version, Unfinished where the disk fails.
        """
        found = self.folder
        try:
            for found in reversed(self._all()):
                if _numbers(found)[0] == stage_index:
                    try:
                        return self._read(found)
                    except Damaged as error:
                        self._damaged.add(found)
                        log.warning(
                            "checkpoint %s cannot be used (%s); falling back to the one before",
                            found.name, error,
                        )  # fmt: skip
        except (OSError, SafetensorError) as error:
            raise explained(error, f"checkpoint {found} cannot be read") or UserError(
                f"checkpoint {found} cannot be read ({reason(error)}); repair it, or move it elsewhere to go "
                "back to the one before"
            ) from error
        return None

    def _read(self, path: Path) -> Checkpoint:
        content = _manifest(path)
        self._check_config(path, content["config"])
        tensors = {}
        for name, file in content["files"].items():
            try:
                if (path / name).stat().st_size != file["bytes"]:
                    raise Damaged(f"{name} is torn")
                if sha256(path / name) != file["sha256"]:
                    raise Damaged(f"{name} was altered")
            except FileNotFoundError:
                raise Damaged(f"{name} is missing") from None
            tensors[name.removesuffix(".safetensors")] = load_file(path / name)
        return Checkpoint(content["update"], tensors, content["state"])

    def _check_config(self, path: Path, config: Any) -> None:
        wrong = [key for key in changes(config, self.config) if not is_resumable(key)]
        if wrong:
            raise UserError(
                f"checkpoint {path} belongs to another config ({', '.join(wrong)} differ); delete it, "
                "or use the config that it was written with"
            )

    def _all(self) -> list[Path]:
        """From the oldest to the newest; anything else in the folder is ignored."""
        try:
            paths = list(self.folder.iterdir())  # not glob, which passes over a folder that cannot be read
        except FileNotFoundError:
            return []
        found = [p for p in paths if NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
        return sorted(found, key=_numbers)


def is_resumable(key: str) -> bool:
    """Whether a config key may differ from a checkpoint's."""
    return any(key == one or key.startswith(f"{one}.") for one in (*RESUMABLE_CHANGES, *MOVABLE))


def _name(stage_index: int, update: int) -> str:
    return f"stage-{stage_index:02d}-update-{update:07d}"


def _numbers(path: Path) -> tuple[int, int]:
    """Stage and update, from a checkpoint's name."""
    stage, update = NAME.fullmatch(path.name).groups()  # type: ignore[union-attr]
    return int(stage), int(update)


def _manifest(path: Path) -> dict[str, Any]:
    """Raises Damaged if it is not what was written, UserError if it is of another version or was renamed."""
    try:
        content = from_json(read_text(path / MANIFEST))
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except ValueError as error:
        raise Damaged(f"{MANIFEST} is no JSON: {reason(error)}") from error
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise Damaged(f"{MANIFEST} was altered")
    if content["schema"] != SCHEMA:  # after the digest, which is the same in every version
        which, remedy = (
            ("a newer", "update diffkd") if content["schema"] > SCHEMA else ("an older", "delete it")
        )
        raise UserError(
            f"checkpoint {path} was written by {which} diffkd (schema {content['schema']}, this one reads "
            f"{SCHEMA}); {remedy}, or use the diffkd that wrote it"
        )
    own = _name(content["stage_index"], content["update"])
    if path.name != own:
        raise UserError(
            f"checkpoint {path} is {own} by its {MANIFEST}; give it that name again, or move it out"
        )
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
