"""Pipelines in and out: students draw the same images with diffusers alone."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from rich.console import Console

import diffkd
from diffkd.core.samplers import sample
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.generation import sample as sampling
from diffkd.models import saving
from diffkd.models.unet import UNet2D
from diffkd.runs.reports import model_card
from tests.stock import stock_pictures
from tests.tiny import student

LINEAR = from_diffusers(DDPMScheduler())
COSINE = Schedule.cosine(64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "prediction", "schedule", "channels", "clip", "steps"),
    [
        (10, "v_prediction", COSINE, 1, None, 4),
        (10, "v_prediction", Schedule.cosine(1024), 3, 1.0, 1),
        (None, "v_prediction", LINEAR, 3, 1.0, 5),
        (None, "epsilon", LINEAR, 1, None, 10),
        (None, "sample", COSINE, 1, None, 32),
    ],
)
def test_a_student_draws_the_same_images_without_diffkd(
    classes, prediction, schedule, channels, clip, steps, tmp_path
):
    """Maximum difference 0 in uint8, and 0 in float too, through a saved folder and `diffkd sample`."""
    denoiser = student(classes, prediction, schedule, channels=channels, clip=clip, steps=steps)
    folder, n = tmp_path / "student", 24
    saving.save(denoiser, folder)
    model_card.write(folder, model_card.describe(denoiser))
    labels = None if classes is None else [i % classes for i in range(n)]
    (stock,) = stock_pictures([(folder, steps)], tmp_path, n, labels)
    sampling.sample_to(
        str(folder), tmp_path / "ours.npz", Console(quiet=True), n=n, seed=5, batch_size=n, device="cpu"
    )
    ours = np.load(tmp_path / "ours.npz")["arr_0"]
    assert str(stock["kind"]) == ("DDIMPipeline" if classes is None else "ConsistencyModelPipeline")
    assert ours.std() > 10 and np.array_equal(ours, stock["pictures"])

    noise = torch.cat(
        [torch.randn(1, *denoiser.shape, generator=torch.Generator().manual_seed(5 + i)) for i in range(n)]
    )
    cond = {} if labels is None else {"class_labels": torch.tensor(labels)}
    with torch.inference_mode():
        x0 = sample(diffkd.load(folder), noise, steps, **cond)
    assert np.abs((x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() - stock["floats"]).max() == 0


def test_early_repositories_keep_everything_at_the_root(tmp_path):
    """google/ddpm-cifar10-32 has its network and scheduler beside model_index.json, and old config keys."""
    network = UNet2D(channels=[8, 16], norm_groups=4, attention=[False, True]).build((3, 8, 8), None)
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in set(config) - {
        "_class_name",
        "act_fn",
        "attention_head_dim",
        "block_out_channels",
        "center_input_sample",
        "down_block_types",
        "downsample_padding",
        "flip_sin_to_cos",
        "freq_shift",
        "in_channels",
        "layers_per_block",
        "mid_block_scale_factor",
        "norm_eps",
        "norm_num_groups",
        "out_channels",
        "sample_size",
        "time_embedding_type",
        "up_block_types",
    }:
        del config[key]
    config["_diffusers_version"] = "0.0.4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    scheduler = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_start": 0.0001,
        "beta_schedule": "linear",
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.1.1",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    denoiser = diffkd.load(tmp_path)
    assert (denoiser.prediction, denoiser.clip, denoiser.shape) == ("epsilon", 1.0, (3, 8, 8))
    stock = DiffusionPipeline.from_pretrained(tmp_path).unet
    for key, value in stock.state_dict().items():
        assert torch.equal(value, denoiser.network.state_dict()[key])


def test_another_time_embedding_is_refused(tmp_path):
    from diffusers import DDPMPipeline

    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
        time_embedding_type="fourier",
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="time_embedding_type 'fourier', which is not supported"):
        diffkd.load(tmp_path)
