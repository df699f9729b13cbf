"""The three networks that the speed benchmarks run, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DModel

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.models.unet import UNet2D, to_fast
from diffkd.runs import config, config_files

DIGITS = Path(__file__).parent.parent / "configs/digits/teacher.yaml"


def digits() -> Denoiser:
    """The digits student: 8x8x1, ten classes and the null label."""
    network = config_files.load(DIGITS, config.Train).model.build((1, 8, 8), 11)
    return Denoiser(network, Schedule.cosine(), "v_prediction", num_classes=10, null_label=10)


def middle() -> Denoiser:
    """32x32x3, unconditional, about 6 M parameters."""
    network = UNet2D(channels=[64, 128, 128], layers=2, attention=[False, True, False], norm_groups=32)
    return Denoiser(network.build((3, 32, 32), None), Schedule.cosine(), "v_prediction")


def cifar10() -> Denoiser:
    """The architecture of google/ddpm-cifar10-32."""
    network = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None, norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
    )  # fmt: skip
    return Denoiser(to_fast(network), Schedule.cosine(), "v_prediction")


NETWORKS = {"digits": digits, "middle": middle, "cifar10": cifar10}


def make(name: str, device: torch.device) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name]().to(device).eval()


def parameters(denoiser: Denoiser) -> str:
    return f"{sum(p.numel() for p in denoiser.network.parameters()) / 1e6:.2f} M"
