"""Numbers beyond memory or use: refused before any work, not after hours or by a failed allocation."""

from __future__ import annotations

import pytest
import yaml

from tests.refusals import refuse

HUGE = [10**12, 10**30]
SAMPLE = ("sample", "plain", "--device", "cpu", "--out", "made/images")
EVALUATE = ("evaluate", "--reference", "images", "--features", "digits")
OPTIONS = [
    (*SAMPLE, "--steps", "N"),
    (*SAMPLE, "--steps", 1, "-n", "N"),
    (*SAMPLE, "--steps", 1, "-n", 2, "--batch-size", "N"),
    (*SAMPLE, "--steps", 1, "-n", 2, "--workers", "N"),
    (*SAMPLE, "--steps", 1, "-n", 2, "--classes", "N"),
    (*EVALUATE, "plain", "--steps", "N"),
    (*EVALUATE, "plain", "--steps", 1, "--samples", "N"),
    (*EVALUATE, "images", "--batch-size", "N"),
    (*EVALUATE, "images", "--bootstrap", "N"),
    (*EVALUATE, "images", "--resize", "N"),
    (*EVALUATE, "images", "--metrics", "kid", "--kid-subsets", "N"),
    (*EVALUATE, "images", "--metrics", "is", "--is-splits", "N"),
    ("fid", "images", "images", "--features", "digits", "--resize", "N"),
    ("stats", "images", "--features", "digits", "--out", "made/ref.npz", "--batch-size", "N"),
    ("stats", "images", "--features", "digits", "--out", "made/ref.npz", "--resize", "N"),
]
KEYS = [
    ("train", "training.batch_size"),
    ("train", "training.micro_batches"),
    ("train", "model.channels.0"),
    ("train", "model.layers"),
    ("train", "model.norm_groups"),
    ("train", "schedule.num_train_timesteps"),
    ("train", "pictures"),
    ("distill", "method.steps.0"),
    ("distill", "method.substeps"),
    ("distill", "training.batch_size"),
    ("distill", "pictures"),
    ("bench", "evaluation.samples"),
    ("bench", "evaluation.batch_size"),
    ("bench", "evaluation.bootstrap"),
    ("bench", "models.0.steps.0"),
]


@pytest.mark.parametrize("number", [*HUGE, "9" * 5000], ids=["12 digits", "30 digits", "5000 digits"])
@pytest.mark.parametrize("args", OPTIONS, ids=lambda args: f"{args[0]} {args[-2]}")
def test_options(at_scene, cli, args, number):
    refuse(cli, at_scene, *(str(number) if word == "N" else word for word in args))


@pytest.mark.parametrize("number", HUGE, ids=["12 digits", "30 digits"])
@pytest.mark.parametrize(("command", "key"), KEYS, ids=lambda value: value)
def test_keys(at_scene, cli, command, key, number):
    name = "benchmark" if command == "bench" else command
    refuse(cli, at_scene, name, f"{command}.yaml", f"{key}={number}")


@pytest.mark.parametrize("key", ["seed", "training.keep", "denoising.updates", "model.channels"])
def test_no_key_takes_more_than_64_bits(at_scene, cli, key):
    value = yaml.safe_dump([2**63] if key == "model.channels" else 2**63, default_flow_style=True).split(
        "\n"
    )[0]
    says = [key.rpartition(".")[2], "64 bits"]
    refuse(cli, at_scene, "train", "train.yaml", f"{key}={value}", says=says)


@pytest.mark.parametrize("time", ["9" * 400 + "s", "9" * 5000 + "d", "1h" * 1000, "-1s", "1e3s", ""])
def test_times(at_scene, cli, time):
    refuse(cli, at_scene, "train", "train.yaml", f"--stop-after={time}", says="--stop-after")


def test_indices_and_keys_of_overrides(at_scene, cli):
    refuse(cli, at_scene, "train", "train.yaml", f"model.channels.{'9' * 5000}=1")
