"""What trackers have stored of a run, read back: from TensorBoard and MLflow by their own readers, from wandb
and trackio as it lies on the disk."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image


@dataclass
class Stored:
    """numbers: (update, value), in the order in which they were stored. pictures: (update, size), without the
    update where the tracker keeps none. runs: the identities; titles: (project, run). finished: whether the
    last process of the run was, of trackers that say so."""

    numbers: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    pictures: dict[str, list[tuple[int | None, tuple[int, int]]]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    runs: set[str] = field(default_factory=set)
    titles: set[tuple[str, str]] = field(default_factory=set)
    finished: bool | None = None

    def number(self, name: str, update: int, value: float) -> None:
        self.numbers.setdefault(name, []).append((update, value))

    def picture(self, name: str, update: int | None, size: tuple[int, int]) -> None:
        self.pictures.setdefault(name, []).append((update, size))


def tensorboard(run: Path) -> Stored:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, stored = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0}).Reload(), Stored()
    for name in found.Tags()["scalars"]:
        stored.numbers[name] = [(event.step, event.value) for event in found.Scalars(name)]
    for name in found.Tags()["images"]:
        stored.pictures[name] = [(one.step, (one.width, one.height)) for one in found.Images(name)]
    (hyperparameters,) = (run / "tensorboard").rglob("hparams.yml")
    stored.config = yaml.safe_load(hyperparameters.read_text())
    return stored


def mlflow(run: Path) -> Stored:
    """Of all runs of the experiment `diffkd` in the store that MLFLOW_TRACKING_URI names."""
    from mlflow.tracking import MlflowClient

    client, stored = MlflowClient(), Stored()
    for known in client.search_runs([client.get_experiment_by_name("diffkd").experiment_id]):
        stored.runs.add(known.info.run_id)
        stored.finished = known.info.status == "FINISHED"
        stored.titles.add(("diffkd", known.info.run_name))
        stored.config.update(known.data.params)
        for name in known.data.metrics:
            for one in client.get_metric_history(known.info.run_id, name):
                stored.number(name, one.step, one.value)
        for artifact in client.list_artifacts(known.info.run_id, "samples"):
            with Image.open(client.download_artifacts(known.info.run_id, artifact.path)) as sheet:
                stored.picture(artifact.path.removesuffix(".png"), None, sheet.size)
    return stored


def trackio(run: Path) -> Stored:
    from trackio.utils import TRACKIO_DIR

    stored = Stored()
    with sqlite3.connect(Path(TRACKIO_DIR) / "diffkd.db") as database:
        (name,) = json.loads((run / "trackers.json").read_text())["trackio"]["id"].splitlines()
        rows = "SELECT run_id, step, metrics FROM metrics WHERE run_name = ? ORDER BY id"
        for identity, step, metrics in database.execute(rows, (name,)).fetchall():
            stored.runs.add(identity)
            for key, value in json.loads(metrics).items():
                if isinstance(value, dict):
                    with Image.open(Path(TRACKIO_DIR) / "media" / value["file_path"]) as sheet:
                        stored.picture(key, step, sheet.size)
                else:
                    stored.number(key, step, value)
        for (config,) in database.execute("SELECT config FROM configs WHERE run_name = ?", (name,)):
            stored.config.update(json.loads(config))
    stored.titles.add(("diffkd", name[: name.rindex("-")]))
    return stored


def wandb(run: Path) -> Stored:
    """Of the files of offline runs, the oldest first: a resumed run has one more, of the same identity."""
    stored = Stored()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in _wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                stored.runs.add(record.run.run_id)
                stored.titles.add((record.run.project, record.run.display_name))
            elif kind == "exit":
                stored.finished = record.exit.exit_code == 0
            elif kind == "config":
                stored.config.update({item.key: json.loads(item.value_json) for item in record.config.update})
            elif kind == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                _add_row(stored, items)
    return stored


def _add_row(stored: Stored, items: dict[str, Any]) -> None:
    """A row of wandb's history, where a picture is several items below its name."""
    for key, value in items.items():
        name, _, last = key.rpartition("/")
        if last == "_type" and value == "images/separated":
            stored.picture(name, items["_step"], (items[f"{name}/width"], items[f"{name}/height"]))
        elif isinstance(value, int | float) and not key.startswith(("_", "samples/")):
            stored.number(key, items["_step"], value)


def _wandb_records(path: Path) -> Iterator[Any]:
    """LevelDB's log format: after 7 bytes, blocks of 32 KiB, of pieces with checksum, length and type."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record
