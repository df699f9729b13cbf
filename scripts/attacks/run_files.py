"""Edited files of finished and interrupted runs, for all commands that read them."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from attacks.base import Attack, Place, damaged, edited, odd_json
from attacks.run import bound_by_permissions
from attacks.surroundings import owned

RUNS = {
    "runs/teacher": ["train", "train.yaml"], "runs/stopped-teacher": ["train", "train.yaml",
        "out=runs/stopped-teacher"],
    "runs/students": ["distill", "distill.yaml"],
    "runs/stopped-students": ["distill", "distill.yaml", "out=runs/stopped-students"],
    "runs/classifier": ["distill", "classifier.yaml"], "runs/bench": ["benchmark", "bench.yaml"],
    "drawn": ["sample", "plain", "--out", "drawn", "-n", "6", "--steps", "1"], "record.json": [],
    "ref.npz": [],
}  # fmt: skip
ADDED = [".owner.json", ".lock", "metrics.json", "log.jsonl", "environment.json", "report.html",
         "config.yaml", "checkpoints",
         "students", "samples", ".metrics.json.lock", "diffkd.json", "README.md"]  # fmt: skip
SHAPES = ["gone", "folder", "loop", "dangling", "outside", "outside folder", "fifo", "zero", "read-only"]


def _shape(path: Path, how: str, outside: Path) -> None:
    """Something else in the place of a file or folder."""
    if how == "read-only":
        path.chmod(0o444 if path.is_file() else 0o555)
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif how == "fifo":
        os.mkfifo(path)
    elif how != "gone":
        targets = {
            "loop": path.name,
            "dangling": outside / "gone",
            "outside": outside / "precious",
            "outside folder": outside / "folder",
        }
        path.symlink_to(targets.get(how, "/dev/zero"))


def _content(rng: random.Random, path: Path) -> str:
    """The file's content edited in a way that suits its kind."""
    data = path.read_bytes()
    try:
        content = json.loads(data) if path.suffix == ".json" else None
    except ValueError:  # edited once already
        content = None
    if content is not None and rng.random() < 0.8:
        if rng.random() < 0.5:
            new, done = odd_json(rng, content)
        else:
            if isinstance(content, list) and rng.random() < 0.3:
                content.append(rng.choice([{"note": "mine"}, None, 3, [], "x", {}]))
            edit, done = edited(rng, content)
            new = json.dumps(edit).encode()
    elif path.suffix == ".jsonl" and rng.random() < 0.8:
        lines = data.splitlines() or [b"{}"]
        line = rng.choice([b"", b"{", b"[]", b"null", b"3", b'{"update": "x"}', b'{"update": 1e400}', b"\xff",
                           lines[0], b'{"loss": NaN}',
                           b"[" * 100_000, b'{"stage": 3}', b'{"update": -1, "stage": null}',
                           b'{"event": 3}'])  # fmt: skip
        lines.insert(rng.randrange(len(lines) + 1), line)
        new, done = b"\n".join(lines) + rng.choice([b"", b"\n"]), f"the line {line[:40]!r}"
    elif path.suffix == ".yaml" and rng.random() < 0.8:
        new = rng.choice([b"", b"# nothing\n", data + b"mine: 3\n", b"[", b"- 1\n", data + data,
                          b"\xff" + data, data.replace(b":", b": !!x", 1),
                          b"a: " + b"[" * 5000, data.decode(errors="replace").encode("utf-16"), b"3",
                          data.replace(b"seed: 0", b"seed: 1"), b"null"])  # fmt: skip
        done = f"{new[:30]!r}..."
    else:
        new, done = damaged(rng, data)
    path.write_bytes(new)
    return done


def attack(rng: random.Random, number: int, place: Place, scene: Path) -> Attack:
    names = list(RUNS)
    run = names[number % len(names)]
    needed = {"runs/teacher", "runs/students", run}
    place.bring(scene, "train.yaml", "distill.yaml", "classifier.yaml", "bench.yaml", "plain", "images",
                "images.npz", "ref.npz",
                "record.json", "record2.json", "drawn",
                *sorted(n for n in needed if n.startswith("runs/")))  # fmt: skip
    folder = place.here / run
    done = []
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2])):
        all_paths = folder.rglob("*") if folder.is_dir() else [folder]
        found = sorted(path for path in all_paths if path.exists() and not path.is_symlink())
        files = [p for p in found if p.is_file()]
        if not files:
            break
        path = rng.choice(found if rng.random() < 0.3 else files)
        how = rng.choice(["content"] * 5 + ["shape"] * 2 + ["added"])
        if how == "added" and folder.is_dir():
            path = folder / rng.choice(ADDED)
            shape = rng.choice(SHAPES[1:-1])
            _shape(path, shape, place.outside)
            done.append(f"{path.relative_to(place.here)}: {shape}")
        elif how == "content" and path.is_file():
            done.append(f"{path.relative_to(place.here)}: {_content(rng, path)}")
        else:
            shape = rng.choice(SHAPES)
            _shape(path, shape, place.outside)
            done.append(f"{path.relative_to(place.here)}: {shape}")
    made = _command(rng, run, "; ".join(done))
    if not done or rng.random() < 0.1:
        made.what += f"; another user's: {owned(rng, place)}"
        made.inside = bound_by_permissions
    return made


def _command(rng: random.Random, run: str, what: str) -> Attack:
    """The run's own command again, or one that reads what it left."""
    metrics = f"{run}/metrics.json" if run.startswith("runs/") else "record.json"
    readers: list[list[str]] = {
        "runs/teacher": [["sample", "runs/teacher/teacher", "--out", "new", "-n", "2", "--steps", "1"],
                         ["evaluate", "--repeat", metrics],
                         ["compare", metrics, "record.json"],
                         ["distill", "distill.yaml", "out=runs/new", "teacher.path=runs/teacher/teacher"]],
        "runs/students": [["sample", "runs/students/students/2-steps", "--out", "new", "-n", "2"],
                          ["evaluate", "--repeat", metrics],
                          ["compare", metrics, "record.json"]],
        "runs/classifier": [["distill", "classifier.yaml", "out=runs/new",
                             "teacher={weights: runs/classifier/teachers/teacher-seed-0}"]],
        "runs/bench": [["compare", metrics, "record.json"], ["evaluate", "--repeat", metrics]],
        "record.json": [["evaluate", "--repeat", "record.json"], ["compare", "record.json", "record2.json"],
                        ["compare", "record2.json", "record.json"],
                        ["evaluate", "images.npz", "--reference", "ref.npz", "--out", "record.json"]],
        "ref.npz": [["evaluate", "images", "--reference", "ref.npz"],
                    ["evaluate", "images.npz", "--reference", "ref.npz", "--metrics", "fid,kid,prdc"],
                    ["stats", "images", "--out", "ref.npz", "--features", "digits", "--overwrite"],
                    ["evaluate", "ref.npz", "--reference", "images"]],
        "drawn": [["evaluate", "drawn", "--reference", "ref.npz"],
                  ["stats", "drawn", "--out", "new.npz", "--features", "digits"],
                  ["sample", "plain", "--out", "drawn", "-n", "2", "--steps", "2", "--overwrite"]],
    }.get(run, [])  # fmt: skip
    own = RUNS[run]
    arguments = own if own and (not readers or rng.random() < 0.6) else rng.choice(readers)
    if arguments[0] in ("train", "distill"):
        arguments = [*arguments, "--stop-after", "30s"]
    silent = "compare" in arguments or "--repeat" in arguments
    return Attack(arguments, what, may=(0, 1, 2) if silent else (0, 2), silent=silent)
