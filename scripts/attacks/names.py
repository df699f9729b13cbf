"""Odd names, for every option, argument and config key of every command that takes text or a path."""

from __future__ import annotations

import json
import random
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

from attacks.base import SECRET, Attack, Place

ARGUMENTS: dict[str,
                dict[str,
                     list[str]]] = {  # by command and parameter, of a command that works; "" for the rest
    "train": {"config": ["train.yaml"], "": ["out=runs/new", "evaluation=null", "--stop-after", "20s"]},
    "distill": {"config": ["distill.yaml"], "": ["out=runs/new", "evaluation=null", "--stop-after", "20s"]},
    "sample": {"model": ["plain"], "out": ["--out", "new"], "": ["-n", "2", "--steps", "1"]},
    "evaluate": {"target": ["images.npz"], "reference": ["--reference", "ref.npz"]},
    "fid": {"one": ["images.npz"], "two": ["drawn"], "": ["--features", "digits"]},
    "stats": {"images": ["images"], "out": ["--out", "new.npz"], "": ["--features", "digits"]},
    "benchmark": {"config": ["bench.yaml"], "": ["out=runs/new"]},
    "compare": {"one": ["record.json"], "two": ["record2.json"]},
    "methods": {},
}  # fmt: skip
WITH = {  # what an option needs beside it
    ("evaluate", "repeat"): (["target", "reference"], []), ("evaluate", "teacher"): ([],
        ["--metrics", "agreement"]),
    ("evaluate", "dino_weights"): ([], ["--metrics", "fd_dino"]),
    ("evaluate", "clip_weights"): ([], ["--metrics", "cmmd"]),
    ("evaluate", "clip_score_weights"): ([], ["--metrics", "clip_score"]),
    ("evaluate", "weights"): ([], ["--features", "inception"]),
    ("stats", "weights"): ([], ["--features", "inception"]),
}  # fmt: skip
KEYS = [
    ("train", "train.yaml", "out"), ("train", "train.yaml", "data.path"),
    ("train", "train.yaml", "evaluation.reference"),
    ("train", "train.yaml", "evaluation.reference.path"), ("train", "train.yaml", "evaluation.weights"),
    ("train", "train.yaml", "evaluation.features"), ("distill", "distill.yaml", "out"),
    ("distill", "distill.yaml", "teacher.path"), ("distill", "distill.yaml", "teacher.train"),
    ("distill", "distill.yaml", "data.path"), ("distill", "distill.yaml", "method.name"),
    ("distill", "distill.yaml", "evaluation.reference.path"), ("distill", "distill.yaml", "student.blocks.0"),
    ("distill", "classifier.yaml", "out"), ("distill", "classifier.yaml", "teacher.weights"),
    ("distill", "classifier.yaml", "students"), ("distill", "classifier.yaml", "students.small.name"),
    ("benchmark", "bench.yaml", "out"), ("benchmark", "bench.yaml", "models.0.path"),
    ("benchmark", "bench.yaml", "models.0.name"), ("benchmark", "bench.yaml", "evaluation.reference.path"),
    ("benchmark", "bench.yaml", "teacher.path"), ("benchmark", "bench.yaml", "evaluation.features"),
]  # fmt: skip
BESIDE = {  # what a key needs beside it
    "data.path": ["data.kind=folder", "data.size=8"], "evaluation.weights": ["evaluation.features=inception"],
    "teacher.train": ["teacher={}"], "student.blocks.0": ["student={kind: drop_blocks, blocks: [x]}"],
    "teacher.weights": ["teacher={}"],
}  # fmt: skip
ODD_NAMES = [
    "e" * 255, "e" * 256, "e" * 300, "e" * 300 + ".npz", "e" * 250 + ".npz", "e" * 5000, "e/" * 2500 + "x",
    "é" * 128,
    "new\x1b[31m", "new\x1b]0;x\x07", "a\nb", "a\tb", "a\rb", "\x7f", "\u202enew", "\u200b", "🙂", "e\u0301",
    "\udcff\udcfe", "new\udcff.npz", "\udcff/x", " ", "", " new ", "~", "~/new", "~nobody", "~nobody/x",
    "~root/x",
    "~nosuchuser/x", ".", "..", "./", "../", "...", "/", "//", "/new", "/proc/new", "/proc/self/mem",
    "/dev/null",
    "/dev/full", "/dev/stdin", "/dev/stdout", "-", "--", "-x", "--out", "-n", "-new.npz", "new/", "new//",
    "new/.",
    "new/../x", "new/..", "../outside/new", "../outside/folder", "../outside/precious",
    "../outside/precious/x",
    "plain", "plain/", "plain/unet", "plain/model_index.json", "plain/model_index.json/",
    "plain/model_index.json/x",
    "images", "images/", "images/one/000.png", "images.npz", "images.npz/", "images.npz/x", "train.yaml",
    "record.json",
    "ref.npz", "runs", "runs/teacher", "runs/teacher/teacher", "runs/stopped-teacher", "drawn",
    "drawn/000000.png", "empty",
    "link", "link/", "link/x", "linked.npz", "loop", "loop/x", "dangling", "dangling/x", "full",
    "up/up/up/here",
    "new.NPZ", "new.npz.npz", ".npz", "new.pkl", "new.pt", "new.bin", "new.json", "new.yaml", "new.zip",
    "new.PNG", "x.safetensors",
    SECRET, f"https://user:{SECRET}@host/x", f"x?token={SECRET}", "file:///etc/passwd", "s3://bucket/x",
    "http://localhost:9/x",
    "owner/name", "owner/name@main", "owner/name/x", "datasets/owner/name", "C:\\new", "\\\\host\\x", "nul",
    "con.txt",
    "*", "?", "[a]", "[red]new[/red]", "[/]", "[/x]", "$HOME", "$(new)", "`new`", "%s", "%n", "{0}", "{",
    "new;x", "new|x",
    "'", '"', "\\", "#", "!!python/name:os.system", "&a", "*a", "0", "-1", "1e9", "nan", "null", "true",
    "digits", "Digits",
    "inception", "os.system", "os", "a.b.c", "torch.nn.Linear", "torch.nn.Identity", "builtins.exec", "..x",
    "x..y", ".x",
    "diffkd", "diffkd.cli", "subprocess.run", "__main__", "1.2", "a b.c", "progressive", "cnn", "é.b",
    "e" * 300 + ".x",
]  # fmt: skip


@cache
def parameters() -> list[tuple[str, str, str, bool]]:
    """(command, parameter, option, whether it is positional) of all that take text or a path."""
    from diffkd.cli.app import app

    found = []
    for command in app.registered_commands:
        assert command.callback is not None
        hints = typing.get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            kind, *infos = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
            kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
            if not infos or not {str, Path} & {*kinds} or name == "json":
                continue
            long = [d for d in getattr(infos[0], "param_decls", None) or () if d.startswith("--")]
            option = long[0] if long else "--" + name.replace("_", "-")
            found.append((command.callback.__name__, name, option, "Argument" in type(infos[0]).__name__))
    return found


def scenery(place: Place, scene: Path) -> None:
    """All that a name may lead to."""
    names = ["plain", "images", "images.npz", "ref.npz", "record.json", "record2.json", "drawn", "train.yaml",
             "distill.yaml",
             "classifier.yaml", "bench.yaml", "runs/teacher", "runs/stopped-teacher",
             "runs/classifier"]  # fmt: skip
    place.bring(scene, *names)
    here = place.here
    (here / "empty").mkdir()
    for name, target in {
        "link": "../outside/folder", "linked.npz": "../outside/precious", "loop": "loop",
        "dangling": "../outside/gone", "up": "..",
        "full": "/dev/full",
    }.items():  # fmt: skip
        (here / name).symlink_to(target)


def _of_key(rng: random.Random, command: str, config: str, key: str, name: str, named: list[str]) -> Attack:
    """A config with that name as the value of the key."""
    quick = {
        "train.yaml": ["pictures=0", "--stop-after", "20s"], "distill.yaml": ["pictures=0", "--stop-after",
            "20s"],
        "classifier.yaml": ["--stop-after", "20s"], "bench.yaml": [],
    }  # fmt: skip
    kind = rng.choice(["npz", "images"])
    beside = {
        "evaluation.reference.path": [f"evaluation.reference={{kind: {kind}}}"],
        "teacher.path": ["evaluation.metrics=[fid, agreement]"] if command == "benchmark" else [],
        **BESIDE,
    }  # fmt: skip
    value: Any = {name: {"name": "cnn", "arguments": {"channels": [2, 4]}}} if key == "students" else name
    out = [] if key == "out" else ["out=runs/new"]
    overrides = [*out, *beside.get(key, []), f"{key}={json.dumps(value)}"]
    return Attack([command, config, *overrides, *quick[config]], f"{key} is {ascii(name)[:80]}", named=named)


def attack(rng: random.Random, number: int, place: Place, scene: Path) -> Attack:
    targets: list[Any] = [*parameters(), *KEYS]
    command, *what = targets[number % len(targets)]
    name = rng.choice(ODD_NAMES)
    scenery(place, scene)
    leads_out = any(part in name for part in ("outside", "link", "dangling", "up/", "..", "loop"))
    named = [str(place.root)] if leads_out else []
    named += ["/"] if name.startswith(("/", "~")) else []
    if len(what) == 2:
        return _of_key(rng, command, what[0], what[1], name, named)
    parameter, option, positional = what
    valid = dict(ARGUMENTS.get(command, {}))
    leave_out, more = WITH.get((command, parameter), ([], []))
    own = valid.pop("", [])
    positionals = [p for c, p, _, is_positional in parameters() if c == command and is_positional]
    given: list[str] = []
    name = name.replace("\0", "")
    for p in [*positionals, *(p for p in valid if p not in positionals)]:
        if p in leave_out:
            continue
        if p == parameter:
            given += [name] if positional else [option, name]
        else:
            given += valid.get(p, [])
    if not positional and parameter not in valid:
        given += [option, name]
    may = (0, 1, 2) if command == "compare" or parameter == "repeat" else (0, 2)
    return Attack(
        [command, *given, *own, *more],
        f"{parameter} is {ascii(name)[:80]}",
        may=may,
        silent=1 in may,
        named=named,
    )
