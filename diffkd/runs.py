"""The run folder: config, environment, log, checkpoints, lock. Every file is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffkd.base import UserError

log = logging.getLogger("diffkd")
PACKAGES = ("diffkd", "torch", "diffusers", "accelerate", "torchmetrics", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_rss() -> int:
    """Bytes: the most that this process has held in memory."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def commit() -> str | None:
    """The commit of this very code, with "+" where it was changed since; None outside a checkout of it."""
    here, own = Path(__file__).parent, Path(__file__).name
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", own], cwd=here, capture_output=True, check=True)
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=here, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to, synced and renamed to `path` at the end, removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; one that was there is replaced."""
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for inner in temporary.rglob("*"):
            _sync(inner)
        _sync(temporary)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def check_place(path: Path, option: str) -> None:
    """Raises UserError where no file can be written at `path`, before any work is done for it."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file's name")
    parent = next((p for p in path.absolute().parents if p.exists()), None)
    if parent is not None and not parent.is_dir():
        raise UserError(f"{option} {path} is inside {parent}, which is a file; use another place")
    if parent is not None and not os.access(parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written in {parent}; use another place")


def append_json(path: Path, record: Any) -> None:
    """Adds to a list in a file that other processes may be adding to."""
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=30):
        write_json(path, [*read_json(path, []), record])


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Where two nested mappings differ, each as "key was x, now y"."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for k in keys for d in differences(before.get(k), now.get(k), f"{where}.{k}".lstrip("."))]
    return [] if before == now else [f"{where} was {before}, now {now}"]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Run:
    """One run's folder, held by one process at a time.

    Raises UserError for a folder that belongs to another run, holds something else, or is held by another
    process. config: the resolved config; where the folder has one already, they must be equal. owner: whether
    this process holds and writes it; of several processes in one run only the main one does.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, owner: bool = True, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self._lock: FileLock | None = None
        if not owner:
            return
        self._check(config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out {folder} cannot be made ({error.strerror}); use another out") from error
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder} is in use by another diffkd process; wait for it, or use another out"
            ) from None
        for left in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not (folder / "config.yaml").exists():
            with new_file(folder / "config.yaml") as temporary:
                temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")

    def _check(self, config: Mapping[str, Any]) -> None:
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise UserError(f"out {self.folder} is a file; give a folder")
        known = self.folder / "config.yaml"
        if known.is_file():
            before = yaml.safe_load(known.read_text(encoding="utf-8"))
            differ = differences(before, json.loads(json.dumps(config)))
            if differ:
                raise UserError(
                    f"{self.folder} belongs to a run of another config ({'; '.join(differ[:3])}"
                    f"{'; ...' if len(differ) > 3 else ''}); use another out, or delete the folder"
                )
        elif any(not p.name.startswith(".") for p in self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and holds no run of diffkd; use another out")

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def describe(self, device: str, processes: int = 1) -> None:
        """Writes environment.json, once."""
        if not (self.folder / "environment.json").exists():
            content = {
                "command": sys.argv,
                "commit": commit(),
                "versions": versions(),
                "platform": platform.platform(),
                "device": device,
                "processes": processes,
                "cores": os.cpu_count(),
            }
            write_json(self.folder / "environment.json", content)

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
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # torn by a kill
            if (record.get("stage_index", -1), record.get("update", 0)) <= (stage_index, update):
                kept.append(line)
        with new_file(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    # checkpoints

    def save_checkpoint(
        self,
        stage_index: int,
        update: int,
        tensors: Mapping[str, dict[str, Tensor]],
        state: Mapping[str, Any],
    ) -> None:
        """tensors: one safetensors file each. Keeps the last `keep`."""
        path = self.folder / "checkpoints" / f"stage-{stage_index:02d}-update-{update:07d}"
        with new_folder(path) as temporary:
            hashes = {}
            for name, values in tensors.items():
                file = temporary / f"{name}.safetensors"
                save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, file)
                hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            content = {
                "schema": 1,
                "stage_index": stage_index,
                "update": update,
                "sha256": hashes,
                "state": state,
            }
            content["digest"] = _digest(content)
            (temporary / "checkpoint.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        for old in self._checkpoints()[: -self.keep]:
            shutil.rmtree(old)

    def load_checkpoint(
        self, stage_index: int
    ) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """(update, tensors, state) of the newest whole checkpoint of that stage; None where there is none."""
        for path in reversed(self._checkpoints()):
            try:
                content = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
                if content.pop("digest") != _digest(content):
                    raise ValueError("checkpoint.json was altered")
                if content["stage_index"] != stage_index:
                    continue
                for name, expected in content["sha256"].items():
                    if hashlib.sha256((path / name).read_bytes()).hexdigest() != expected:
                        raise ValueError(f"{name} was altered or torn")
                tensors = {
                    name.removesuffix(".safetensors"): load_file(path / name) for name in content["sha256"]
                }
                return content["update"], tensors, content["state"]
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                log.warning(
                    "checkpoint %s cannot be used (%s); going back to the one before", path.name, error
                )
        return None

    def _checkpoints(self) -> list[Path]:
        folder = self.folder / "checkpoints"
        return sorted(folder.glob("stage-*-update-*")) if folder.is_dir() else []


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
