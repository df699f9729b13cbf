"""What a LoRA student takes beside a whole one (docs/lora.md): the most memory of a process that trains it.

    python scripts/bench_lora.py [--methods progressive dmd2] [--rank 32] [--updates 3]

One process trains a whole student for a few updates, another an adapter, each as `diffkd distill` does, from
the same teacher of pixels (random weights, batches of one 16x16 image, so that weights are what takes
memory). The most that each had resident is printed, with its imports and libraries ("before": the same
without a teacher).
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import diffusers
import numpy as np
import torch
from machine import describe

from diffkd import methods
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.data.images import Images
from diffkd.io.environment import peak_rss
from diffkd.models.students.config import Lora
from diffkd.models.unet import UNet2D

CHANNELS = [256, 512, 512]


def train(method_name: str, kind: str, rank: int, updates: int, channels: list[int]) -> int:
    """The number of weights that learned."""
    import stages  # not before: it is part of what a run takes

    network = UNet2D(channels=channels, layers=2, attention=[False, True, True], norm_groups=32)
    teacher = Denoiser(network.build((3, 16, 16), None), Schedule.cosine(), "v_prediction")
    if kind == "lora":
        Lora(kind="lora", rank=rank).mark(teacher)
    method = methods.find(method_name)(updates=updates)
    stage = method.stages(teacher)[0]
    nets = stages.networks_of(method, stage, teacher)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)
    images = Images("random", pixels, None, [])
    stages.train(method, stage, nets, images, stages.Training(batch_size=1))
    return sum(p.numel() for p in nets["student"].parameters() if p.requires_grad)


def measured(*arguments: str) -> tuple[int, int]:
    """Of a process of its own: weights that learned, most bytes that were resident."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    learned, most = done.stdout.split()[-2:]
    return int(learned), int(most)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["progressive", "dmd2"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, help="a resolution each; three")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "KIND"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    if given.one is not None:
        method, kind = given.one
        learned = 0 if kind == "none" else train(method, kind, given.rank, given.updates, given.channels)
        print(learned, peak_rss())
        return
    sizes = ["--rank", str(given.rank), "--updates", str(given.updates)]
    sizes += ["--channels", *map(str, given.channels)]
    print(describe(torch.device("cpu")), flush=True)
    _, before = measured("--one", "-", "none")
    print(f"before: {before / 1e9:.2f} GB\n")
    print(f"| method | weights | adapter, rank {given.rank} | whole: peak | LoRA: peak | ratio |")
    print("|---|---|---|---|---|---|")
    for method in given.methods:
        (weights, whole), (adapter, lora) = (
            measured("--one", method, kind, *sizes) for kind in ("copy", "lora")
        )
        print(
            f"| `{method}` | {weights / 1e6:.1f} M | {adapter / 1e6:.1f} M | {whole / 1e9:.2f} GB "
            f"| {lora / 1e9:.2f} GB | {lora / whole:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
