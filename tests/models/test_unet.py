"""UNets from a config, and the class that diffkd runs them as."""

import json

import pytest
import torch
from diffusers import UNet2DModel

from diffkd.errors import UserError
from diffkd.models import loading, saving
from diffkd.models.unet import UNet2D


def test_networks_that_cannot_be_built():
    with pytest.raises(UserError, match="9x9 cannot be halved 1 times"):
        UNet2D().build((1, 9, 9), None)
    with pytest.raises(UserError, match="norm_groups 8 does not divide 12"):
        UNet2D(channels=[12, 24]).build((1, 8, 8), None)
    with pytest.raises(UserError, match="attention has 1 entries for 2"):
        UNet2D(attention=[True]).build((1, 8, 8), None)


def test_attention_is_where_the_config_puts_it():
    network = UNet2D(channels=[8, 16, 16], norm_groups=4, attention=[False, False, True]).build(
        (1, 8, 8), None
    )
    assert network.config.down_block_types == ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
    assert network.config.up_block_types == ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    assert isinstance(network, UNet2DModel)


def test_the_fast_network_is_the_stock_one(make_pipeline, tmp_path):
    """Its dtype is that of the stock class, in any dtype; what is saved names the stock class."""
    folder = make_pipeline(tmp_path, classes=3)
    denoiser = loading.load(folder)
    theirs = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.arange(4) * 100.0, torch.arange(4) % 3
    with torch.no_grad():
        ours = denoiser.network(x, t, class_labels=labels).sample
        assert torch.equal(ours, theirs(x, t, class_labels=labels).sample)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        assert denoiser.network.to(dtype).dtype == theirs.to(dtype).dtype == dtype
    saving.save(denoiser, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/unet/config.json").read_text())["_class_name"] == "UNet2DModel"
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert type(denoiser.network).__name__ == "FastUNet2DModel"  # saving left it as it was
