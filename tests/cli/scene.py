"""A folder with all that each command needs, and a quick call of each command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

TRAINING = {"batch_size": 4, "checkpoint_every": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "train.yaml": {
        "out": "made/run", "data": {"kind": "digits"}, "denoising": {"updates": 2, "warmup": 0},
        "model": {"channels": [8, 16], "norm_groups": 4, "mid_attention": False}, "training": TRAINING,
        "evaluation": None, "pictures": 1,
    },
    "distill.yaml": {
        "out": "made/run", "data": {"kind": "digits"}, "teacher": {"path": "plain"}, "training": TRAINING,
        "method": {"name": "progressive", "steps": [2, 1], "updates": 1}, "evaluation": None, "pictures": 1,
    },
    "bench.yaml": {
        "out": "made/run", "models": [{"path": "plain", "steps": [1]}],
        "evaluation": {"reference": "images", "features": "digits", "samples": 8, "metrics": ["fid"]},
    },
}  # fmt: skip
WRITING = {  # each writes below made/
    "train": ("train", "train.yaml"),
    "distill": ("distill", "distill.yaml"),
    "benchmark": ("benchmark", "bench.yaml"),
    "sample": ("sample", "plain", "--steps", 1, "-n", 3, "--device", "cpu", "--out", "made/images"),
    "sample-npz": ("sample", "plain", "--steps", 1, "-n", 3, "--device", "cpu", "--out", "made/images.npz"),
    "stats": ("stats", "images", "--features", "digits", "--out", "made/ref.npz"),
    "evaluate": (
        "evaluate", "images", "--reference", "images", "--features", "digits", "--out", "made/record.json",
    ),
}  # fmt: skip
ALL = {
    **WRITING,
    "compare": ("compare", "record.json", "record.json"),
    "fid": ("fid", "images", "images", "--features", "digits"),
    "methods": ("methods",),
    "method": ("methods", "progressive"),
}


def build(folder: Path, make_pipeline: Callable[..., Path], image_folder: Callable[..., Path]) -> None:
    make_pipeline(folder, name="plain")
    image_folder(folder, count=8)
    for name, content in CONFIGS.items():
        (folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")


def bring(built: Path, here: Path) -> None:
    shutil.copytree(built, here, dirs_exist_ok=True)
