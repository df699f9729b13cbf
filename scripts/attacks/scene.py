"""What attacks are made from: tiny pipelines, finished and interrupted runs, images, statistics, records."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

TRAINING = {"batch_size": 4, "log_every": 1, "checkpoint_every": 1}
MEASURED = {"samples": 16, "batch_size": 16, "teacher_steps": [2], "reference": "images.npz"}
TRAIN: dict[str, Any] = {
    "out": "runs/teacher", "data": {"kind": "digits"}, "model": {"channels": [8, 16], "norm_groups": 4},
    "denoising": {"updates": 2, "warmup": 0}, "training": TRAINING, "evaluation": MEASURED, "pictures": 2,
}  # fmt: skip
DISTILL: dict[str, Any] = {
    "out": "runs/students", "teacher": {"path": "plain"}, "data": {"kind": "digits"},
    "method": {"name": "progressive", "steps": [4, 2], "updates": 2, "warmup": 0}, "training": TRAINING,
    "evaluation": MEASURED, "pictures": 2,
}  # fmt: skip
CLASSIFIER: dict[str, Any] = {
    "out": "runs/classifier", "repeats": 1, "data": {"kind": "digits"}, "held_out": 97, "labelled": 40,
    "teacher": {"model": {"arguments": {"channels": [4, 4]}}, "updates": 2},
    "students": {"small": {"name": "cnn", "arguments": {"channels": [2, 4]}}},
    "method": {"name": "logits", "alpha": 0.5, "updates": 2}, "training": TRAINING,
}  # fmt: skip
BENCH: dict[str, Any] = {
    "out": "runs/bench", "models": [{"path": "plain", "name": "one", "steps": [1]}],
    "evaluation": {**MEASURED, "metrics": ["fid"]},
}  # fmt: skip
CONFIGS = {"train.yaml": TRAIN, "distill.yaml": DISTILL, "classifier.yaml": CLASSIFIER, "bench.yaml": BENCH}
STOPPED = {"train.yaml": "runs/stopped-teacher", "distill.yaml": "runs/stopped-students"}


def pipelines(folder: Path) -> None:
    """plain: unconditional. labelled: ten classes. linear: a DDPM of epsilon. colour: three channels."""
    import diffusers
    import torch

    cosine = {
        "num_train_timesteps": 1024, "beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing", "prediction_type": "v_prediction",
    }  # fmt: skip
    linear = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
    for name, classes, channels, kind, scheduler in (
        ("plain", None, 1, diffusers.DDIMPipeline, diffusers.DDIMScheduler(**cosine)),
        ("labelled", 10, 1, diffusers.ConsistencyModelPipeline, diffusers.DDIMScheduler(**cosine)),
        ("linear", None, 1, diffusers.DDPMPipeline, diffusers.DDPMScheduler(**linear)),
        ("colour", None, 3, diffusers.DDIMPipeline, diffusers.DDIMScheduler(**cosine)),
    ):
        torch.manual_seed(0)
        network = diffusers.UNet2DModel(
            sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
            norm_num_groups=4, add_attention=False, num_class_embeds=classes,
        )  # fmt: skip
        kind(unet=network, scheduler=scheduler).save_pretrained(folder / name)


def images(folder: Path) -> None:
    """images/: PNGs of two classes. images.npz: as many, in one file."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    for i, image in enumerate(pixels):
        place = folder / "images" / ("one", "two")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(place / f"{i:03d}.png")
    np.savez(folder / "images.npz", arr_0=pixels, arr_1=np.arange(16) % 2)


def interrupt() -> None:
    """SIGTERM comes when the first checkpoint is renamed."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and "update-0000001" in os.fspath(args[1]):
            os.kill(os.getpid(), signal.SIGTERM)

    sys.addaudithook(hook)


def build(folder: Path, call: Callable[..., None], command: Callable[..., None]) -> None:
    """Fills the folder. call(function, ...) and command(*arguments) do so in processes of their own."""
    folder.mkdir(parents=True)
    call(pipelines, folder)
    call(images, folder)
    for name, content in CONFIGS.items():
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    command("train", "train.yaml")
    command("distill", "distill.yaml")
    command("distill", "classifier.yaml")
    for name, out in STOPPED.items():
        command(name.removesuffix(".yaml"), name, f"out={out}", inside=interrupt, status=130)
    command("sample", "plain", "--out", "drawn", "-n", "4", "--steps", "1")
    command("stats", "images", "--out", "ref.npz", "--features", "digits", "--store-features")
    command("evaluate", "images.npz", "--reference", "ref.npz", "--out", "record.json")
    command("evaluate", "plain", "--reference", "images.npz", "--features", "digits", "--steps", "1",
            "--samples", "8", "--out", "record2.json")  # fmt: skip
    command("benchmark", "bench.yaml")
