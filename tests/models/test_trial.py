"""A network that opens and fails when it is called is refused when it is opened, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffkd.errors import UserError
from diffkd.models import loading
from tests.refusals import refuse

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


FAILING = [
    {"sample_size": 7},
    {"sample_size": [8, 6 + 1]},
    {"sample_size": 1},
    {"norm_eps": None},
    {"norm_eps": "small"},
    {"norm_num_groups": 4.0},
    {"down_block_types": ["KDownBlock2D"] * 2},
    {"downsample_padding": -1},
    {"norm_eps": -1.0},
    {"class_embed_type": "timestep"},
    {"downsample_padding": 3},
    {"mid_block_scale_factor": 0},
    {"mid_block_scale_factor": None},
    {"freq_shift": 4},
    {"center_input_sample": 2, "sample_size": 7},
    {"time_embedding_type": "learned", "num_train_timesteps": 4},
]


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("changes", FAILING, ids=lambda changes: "-".join(map(str, changes.items())))
def test_configs_with_which_the_network_cannot_be_called(changes, classes, tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path, classes=classes)
    rewrite(folder / "unet/config.json", **changes)
    with pytest.raises(UserError, match="fails when it is called|NaN or infinite|cannot be read|lack"):
        loading.load(folder)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_weights_that_are_not_finite(value, quantize, tmp_path, make_pipeline):
    if quantize:
        pytest.importorskip("torchao")
    folder = make_pipeline(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_out.weight"] = torch.full_like(tensors["conv_out.weight"], value)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="makes NaN or infinite values of noise; its weights are broken"):
        loading.load(folder, quantize=quantize)


def test_a_dtype_too_narrow_for_the_weights_is_named(tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_out.bias"] += 1e6
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert loading.load(folder).dtype == torch.float32
    with pytest.raises(UserError, match=r"torch\.float16 is too narrow"):
        loading.load(folder, dtype=torch.float16)


class Wide(diffusers.UNet2DModel):
    """Gives back an image of another size."""

    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options).sample.repeat(1, 1, 1, 2)


def test_an_output_of_another_shape(tmp_path, make_pipeline, monkeypatch):
    folder = make_pipeline(tmp_path)
    from diffkd.models import unets

    def widened(network: Any) -> Any:
        network.__class__ = Wide
        return network

    monkeypatch.setattr(unets, "to_fast", widened)
    with pytest.raises(UserError, match="makes 1x8x16 of an image of 1x8x8; they must be equal"):
        loading.load(folder)


def test_random_numbers_and_gradients_are_left_alone(tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path, classes=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    denoiser = loading.load(folder)
    assert torch.equal(torch.get_rng_state(), before) and not denoiser.training
    x, t, cond = denoiser.example_inputs()
    denoiser(x + 1, t, **cond).sum().backward()  # what the schedule keeps can be trained with
    assert all(parameter.grad is not None for parameter in denoiser.network.parameters())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sample_size": 16_384, "block_out_channels": [2**20, 16]}, "sample_size|parameters"),
        ({"sample_size": 10**6}, "sample_size 1000000"),
        ({"sample_size": [8, 10**6]}, "sample_size 1000000"),
        ({"layers_per_block": 10**6}, "layers_per_block 1000000"),
        ({"block_out_channels": [10**9, 16]}, "block_out_channels 1000000000"),
        ({"time_embedding_dim": 10**9}, "time_embedding_dim 1000000000"),
        ({"in_channels": 10**9, "out_channels": 10**9}, "channels 1000000000"),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_beyond_memory_are_refused_before_it_is_taken(changes, says, tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    rewrite(folder / "unet/config.json", **changes)
    with pytest.raises(UserError, match=says):
        loading.load(folder)


def test_an_image_beyond_memory(tmp_path, make_pipeline, monkeypatch):
    import psutil

    folder = make_pipeline(tmp_path)
    rewrite(folder / "unet/config.json", sample_size=4096)
    needed = 4096**2 * 8 * 4 * 4
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": needed - 1}))
    with pytest.raises(UserError, match="sample_size 4096 and 8 channels, of which one image needs 2 GiB"):
        loading.load(folder)


def test_every_command_says_so(cli, tmp_path, make_pipeline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_pipeline(tmp_path)
    rewrite(folder / "unet/config.json", sample_size=7)
    Path("run.yaml").write_text(
        "out: run\nteacher: {path: pipeline}\ndata: {kind: digits}\n"
        "method: {name: progressive, steps: [1], updates: 2}\nevaluation: null\n"
    )
    Path("table.yaml").write_text(
        "out: table\nmodels: [{path: pipeline, steps: [1]}]\n"
        "evaluation: {reference: digits, samples: 8, features: digits}\n"
    )
    says = "pipeline: its network fails when it is called with an image of 1x7x7"
    refuse(cli, tmp_path, "sample", "pipeline", "--steps", 1, "-n", 2, "--out", "o", says=says)
    refuse(cli, tmp_path, "evaluate", "pipeline", "--steps", 1, "--reference", "digits", says=says)
    refuse(cli, tmp_path, "distill", "run.yaml", says=says)
    refuse(cli, tmp_path, "benchmark", "table.yaml", says=says)


def test_the_stock_pipeline_of_one(cli, tmp_path, make_pipeline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_pipeline(tmp_path)
    rewrite(folder / "unet/config.json", sample_size=7)
    args = ["--steps", 1, "--reference", "digits", "--samples", 8, "--sampler", "stock"]
    code, out, err = cli("evaluate", "pipeline", *args)
    assert code == 2 and "the pipeline cannot generate" in err and len(err.splitlines()) == 1
