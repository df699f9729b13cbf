"""A real distillation, from nothing: 32x32 images in colour are drawn, a feature network and a teacher are
trained on them, the teacher is halved to one step; prints FID by steps.

    python scripts/checking/distillation.py FOLDER [--device cuda] [--small]

The configs are those of configs/colour, at a batch size that fills a GPU; --small tries all of it in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DIFFKD = (sys.executable, "-m", "diffkd.cli")
IMAGES, FEATURE_UPDATES, SAMPLES = 4000, 1000, 4000
LARGER = {"batch_size": 128, "ema": 0.99}  # of training, on a GPU
SMALL: dict[str, Any] = {
    "model": {"channels": [8, 16], "layers": 1, "norm_groups": 4, "mid_attention": False},
    "denoising": {"updates": 4, "warmup": 0},
    "method": {"name": "progressive", "steps": [2, 1], "substeps": 2, "updates": 2, "learning_rate": 1e-3},
    "training": {"batch_size": 8},
}


def configs(folder: Path, device: str, small: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the teacher's training, and of the distillation."""
    train, distill = (
        yaml.safe_load((ROOT / f"configs/colour/{name}.yaml").read_text(encoding="utf-8"))
        for name in ("teacher", "progressive")
    )
    training = {**LARGER, "precision": "bf16" if device == "cuda" else "float32"}
    data = {**train["data"], "path": str(folder / "images")}
    evaluation = {
        "features": str(folder / "features.safetensors"), "samples": 32 if small else SAMPLES,
        "teacher_steps": [4] if small else [64, 8, 4, 2, 1],
    }  # fmt: skip
    train |= {"out": str(folder / "teacher"), "data": data, "training": training}
    distill |= {
        "out": str(folder / "students"), "data": data, "training": training, "evaluation": evaluation,
        "teacher": {"train": "teacher.yaml"}, "pictures": 0,
    }  # fmt: skip
    if small:
        train |= {key: SMALL[key] for key in ("model", "denoising", "training")}
        distill |= {key: SMALL[key] for key in ("method", "training")}
    return train, distill


def table(records: list[dict[str, Any]]) -> str:
    """The teacher's at its steps, most first, then the students'."""
    teacher = sorted((r for r in records if r["role"] == "teacher"), key=lambda r: -r["steps"])
    students = [r for r in records if r["role"] == "student"]
    best = teacher[0]["fid"]
    lines = ["| model | steps | FID | of the teacher's |", "|---|--:|--:|--:|"]
    for title, found in (("teacher", teacher), ("student", students)):
        lines += [f"| {title} | {r['steps']} | {r['fid']:.3f} | {r['fid'] / best:.2f} |" for r in found]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    folder, started = given.folder.resolve(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in zip(("teacher", "distill"), configs(folder, given.device, given.small), strict=True):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    images, updates = (64, 2) if given.small else (IMAGES, FEATURE_UPDATES)
    environment = dict(os.environ)
    if given.device == "cpu":
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    for command in (
        (sys.executable, "scripts/shapes_folder.py", folder / "images", "--count", images),
        (*DIFFKD, "features", "train", folder / "images", "--out", folder / "features.safetensors",
         "--size", 32, "--updates", updates, "--device", given.device),
        (*DIFFKD, "distill", folder / "distill.yaml"),
    ):  # fmt: skip
        subprocess.run([*map(str, command)], cwd=ROOT, env=environment, stdout=sys.stderr, check=True)
    records = json.loads((folder / "students/metrics.json").read_text(encoding="utf-8"))
    print(table(records))
    print(f"\n{images} images, all of it in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)} ended with exit status {error.returncode}")
