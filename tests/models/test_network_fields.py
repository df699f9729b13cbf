"""Every field of a UNet2DModel's config: the stock class honours it, whatever value a pipeline has."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffkd.errors import UserError
from diffkd.generation.generator import generate
from diffkd.generation.stock import generate_stock
from diffkd.models import loading

# The network is the stock class itself, which honours every field; diffkd reads or restricts these besides.
READ = {
    "sample_size": "the shape of an image; positive integers",
    "in_channels": "the shape of an image",
    "out_channels": "equal to in_channels: a learned variance is cut off (test_edm.py)",
    "time_embedding_type": "positional alone: fourier takes log-sigmas, learned whole indices",
    "num_class_embeds": "how many labels there are",
    "class_embed_type": "none, since labels are integers: timestep and identity take other things",
    "dropout": "off outside training",
}
STOCK: dict[str, list[Any]] = {
    "center_input_sample": [False, True],
    "time_embedding_dim": [None, 12],
    "freq_shift": [0, 1],
    "flip_sin_to_cos": [False, True],
    "down_block_types": [["DownBlock2D"] * 2, ["ResnetDownsampleBlock2D"] * 2, ["AttnDownBlock2D"] * 2],
    "up_block_types": [["UpBlock2D"] * 2, ["ResnetUpsampleBlock2D"] * 2, ["AttnUpBlock2D"] * 2],
    "mid_block_type": ["UNetMidBlock2D", None],
    "block_out_channels": [[8, 16], [16, 16], [16, 8]],
    "layers_per_block": [1, 2],
    "mid_block_scale_factor": [1, 0.7],
    "downsample_padding": [1, 0],
    "downsample_type": ["conv", "resnet"],
    "upsample_type": ["conv", "resnet"],
    "act_fn": ["silu", "mish", "gelu", "relu"],
    "attention_head_dim": [8, 4, None],
    "norm_num_groups": [4, 2],
    "attn_norm_num_groups": [None, 4],
    "norm_eps": [1e-5, 1e-2],
    "resnet_time_scale_shift": ["default", "scale_shift"],
    "add_attention": [False, True],
    "num_train_timesteps": [None, 7],
}


def test_every_field_is_in_the_table():
    """A field of a newer diffusers fails here: it has to be looked at before it is drawn with."""
    fields = set(inspect.signature(diffusers.UNet2DModel.__init__).parameters) - {"self"}
    assert fields == READ.keys() | STOCK.keys() and not READ.keys() & STOCK.keys()


@pytest.mark.parametrize("seed", range(12))
def test_random_values_give_the_stock_pipelines_pixels(seed, tmp_path):
    """Weights are far from their initialisation, in which a residual network is nearly the identity."""
    rng = np.random.default_rng(seed)
    options = {key: values[int(rng.integers(len(values)))] for key, values in STOCK.items()}
    options |= {"sample_size": [8, [8, 16]][int(rng.integers(2))], "dropout": float(rng.integers(2)) / 2}
    torch.manual_seed(seed)
    network = diffusers.UNet2DModel(in_channels=1, out_channels=1, **options)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=40, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    diffusers.DDIMPipeline(network.eval(), scheduler).save_pretrained(tmp_path)
    ours = next(generate(loading.load(tmp_path), 3, steps=4, seed=seed))
    stock = next(generate_stock(loading.open_stock(tmp_path), 3, steps=4, seed=seed))
    assert ours.float().std() > 5 and torch.equal(ours, stock)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier', which is not supported"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 40}, "time_embedding_type 'learned'"),
        ({"out_channels": 3}, "in_channels 1 and out_channels 3; supported are as many, or twice as many"),
        ({"class_embed_type": "timestep"}, "class_embed_type timestep and no num_class_embeds"),
        ({"class_embed_type": "identity", "num_class_embeds": 3}, "class_embed_type 'identity'"),
    ],
    ids=str,
)
def test_what_is_refused(options, says, tmp_path):
    common = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4,
        "layers_per_block": 1, "add_attention": False,
    }  # fmt: skip
    network = diffusers.UNet2DModel(**{**common, **options})
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=says):
        loading.load(tmp_path)
