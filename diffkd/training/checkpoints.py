"""Checkpoints: written in the background, whole or not at all; verified before they are used.

Either by the main process alone, or by several processes together, each its part (`parts`).
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffkd.errors import Unfinished, UserError
from diffkd.io.files import new_folder, sha256, sync
from diffkd.io.places import free_bytes
from diffkd.io.system_errors import explained, is_disk_full
from diffkd.io.text import changes, format_bytes, log, reason
from diffkd.training import manifest
from diffkd.training.manifest import Damaged
from diffkd.training.parts import SUFFIX, file_name, is_divided, opened
from diffkd.training.sharding import Stored
from diffkd.training.team import ALONE, Team

Tensors = Mapping[str, Mapping[str, Tensor]]  # by file, by name

# Config keys that do not change a run's result: they may change half way, if the user allows it.
RESUMABLE_CHANGES = (
    "training.log_every", "training.checkpoint_every", "training.keep", "training.max_skipped",
    "training.trackers", "evaluation", "pictures", "pairs", "spread_every",
)  # fmt: skip
MOVABLE = ("out",)  # keys that change when a run folder is moved


@dataclass(frozen=True)
class Checkpoint:
    """update: how many are done. tensors: whole, in the main process alone; or in parts, in every process.
    state: everything that is not a tensor."""

    update: int
    tensors: Mapping[str, Mapping[str, Stored]]
    state: dict[str, Any]


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

    def save(
        self,
        stage_index: int,
        update: int,
        tensors: Tensors,
        state: Mapping[str, Any],
        team: Team = ALONE,
    ) -> None:
        """Starts writing one, once the previous one is written. tensors: on the host, and not changed later;
        of several processes, which all call this, each its own. state: the main process's counts.

        Raises what writing the previous one failed with; see `wait`.
        """
        self.wait()
        content = {
            "schema": manifest.SCHEMA if team.world == 1 else manifest.IN_PARTS, "stage_index": stage_index,
            "update": update, "config": self.config, "state": json.loads(json.dumps(state)),
        }  # fmt: skip

        def write() -> None:
            try:
                self._write(content, tensors, team)
            except BaseException as error:
                self._error = error

        # A daemon, so that a process can end at once: what the thread leaves behind is not a checkpoint.
        self._writing = self.folder / manifest.name_of(stage_index, update)
        self._writer = threading.Thread(target=write, name="diffkd-checkpoint", daemon=True)
        self._writer.start()

    def check(self) -> None:
        """Raises what writing failed with, if it has ended."""
        if self._writer is not None and not self._writer.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written, of several processes this one's part. Raises Unfinished if it
        could not be."""
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

    def _write(self, content: dict[str, Any], tensors: Tensors, team: Team) -> None:
        path = self.folder / manifest.name_of(content["stage_index"], content["update"])
        own = sum(value.nbytes for values in tensors.values() for value in values.values())
        size = sum(team.each(lambda: own))
        try:
            with ExitStack() as stack:
                temporary = team.first(lambda: stack.enter_context(new_folder(path)))
                written = team.each(lambda: _write_files(temporary, tensors, team))
                if team.main:
                    content = {**content, "files": {k: file for part in written for k, file in part.items()}}
                    content["digest"] = manifest.digest(content)
                    (temporary / manifest.FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")
                    self._before_rename()
        except (OSError, SafetensorError) as error:
            full = is_disk_full(error)
            room = f"the disk is full ({format_bytes(free_bytes(self.folder))} free)"
            why = room if full else getattr(error, "strerror", None) or reason(error)
            raise Unfinished(
                f"checkpoint {path} needs {format_bytes(size)} and could not be written: {why}; the last "
                f"good one is kept: {'make room' if full else 'mend that'}, and the same command resumes "
                "from it"
            ) from error
        if team.main:
            self._delete_superseded(path)

    def _delete_superseded(self, path: Path) -> None:
        """By the checkpoint at path, which was just written."""
        checkpoints = self._all()
        after = checkpoints.index(path) + 1
        later = [old for old in checkpoints[after:] if old in self._damaged]
        for old in [*checkpoints[: max(0, after - self.keep)], *later]:
            try:
                shutil.rmtree(old)
            except OSError as error:  # of another user's
                log.warning("checkpoint %s is superseded and cannot be deleted (%s)", old, reason(error))

    def load(self, stage_index: int, team: Team = ALONE) -> Checkpoint | None:
        """The newest intact checkpoint of a stage; None if there is none. Every process of the team must call
        it.

        A damaged one gets a warning, and the one before it is tried. Whatever else is wrong with one ends
        the run, as going back would lose work: raises UserError for one that cannot be read, was renamed, or
        is of another config or another version, Unfinished where the disk fails.
        """
        found = self.folder
        try:
            for found in reversed(team.first(self._all)):
                if manifest.numbers(found)[0] == stage_index:
                    try:
                        return self._read(found, team)
                    except Damaged as error:
                        self._damaged.add(found)
                        if team.main:
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

    def _read(self, path: Path, team: Team) -> Checkpoint:
        content = team.first(lambda: manifest.read(path))
        self._check_config(path, content["config"])
        files: dict[str, dict[str, Any]] = content["files"]
        if is_divided(files):  # each process verifies its share of them, and reads of all what it needs
            share = dict([*files.items()][team.rank :: team.world])
            team.each(lambda: _verify(path, share))
            return Checkpoint(content["update"], opened(path, files), content["state"])
        tensors: dict[str, dict[str, Tensor]] = {}

        def read() -> None:
            if team.main:
                _verify(path, files)
                tensors.update({name.removesuffix(SUFFIX): load_file(path / name) for name in files})

        team.each(read)
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
        found = [p for p in paths if manifest.NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
        return sorted(found, key=manifest.numbers)


def _write_files(folder: Path, tensors: Tensors, team: Team) -> dict[str, dict[str, Any]]:
    """Writes what this process holds; size and digest of each file by its name."""
    if not folder.is_dir():
        raise UserError(
            f"process {team.rank} does not see {folder.parent}, where the main one writes; put out on a file "
            "system that all processes share"
        )
    files = {}
    for name, values in tensors.items():
        if not values and not team.main:
            continue
        file = folder / file_name(name, team.rank, team.world)
        save_file({key: value.contiguous() for key, value in values.items()}, file)
        sync(file)  # by the host that wrote it
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    return files


def _verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises Damaged for a file that is not what was written."""
    for name, file in files.items():
        try:
            if (folder / name).stat().st_size != file["bytes"]:
                raise Damaged(f"{name} is torn")
            if sha256(folder / name) != file["sha256"]:
                raise Damaged(f"{name} was altered")
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None


def is_resumable(key: str) -> bool:
    """Whether a config key may differ from a checkpoint's."""
    return any(key == one or key.startswith(f"{one}.") for one in (*RESUMABLE_CHANGES, *MOVABLE))
