"""BK-SDM's architectures by name; smaller students of Stable Diffusion and SDXL at full size, without
weights."""

import math
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import TypeAdapter

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.models.families import sd
from diffkd.models.sizes import network_size
from diffkd.models.students.blocks import drop_blocks
from diffkd.models.students.config import Student
from tests.models.unets import COSINE, denoiser_of, network, outputs, prompted

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def without_weights(config):
    with torch.device("meta"):
        return Denoiser(UNet2DConditionModel(sample_size=64, **config), COSINE, "v_prediction", call=sd.call)


def built(teacher, **student):
    return TypeAdapter(Student).validate_python(student).build(teacher, 0).network


def count(net):
    return sum(parameter.numel() for parameter in net.parameters())


PUBLISHED = {"base": (579_384_964, 0.58), "small": (482_346_884, 0.49), "tiny": (323_384_964, 0.33)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_students_of_stable_diffusion_have_the_published_sizes(name):
    """Of 0.86 billion. The paper rounds up; the published small and tiny have these numbers exactly."""
    teacher = without_weights(SD15)
    assert count(teacher.network) == 859_520_964
    made = built(teacher, kind="drop_blocks", blocks=name)
    exact, rounded = PUBLISHED[name]
    assert count(made) == exact and math.ceil(exact / 1e7) / 100 == rounded
    assert made.config.layers_per_block == 1 and (made.config.mid_block_type is None) == (name != "base")
    assert made.config.block_out_channels == (320, 640, 1280, 1280)[: 3 if name == "tiny" else 4]
    assert all(parameter.is_meta for parameter in made.parameters())


SIZES = [  # of docs/methods/knowledge-distillation.md: millions of parameters, billions of MACs an evaluation
    (SD15, 64, [160, 320, 640, 640], [859.5, 579.4, 482.3, 323.4, 219.8], [402, 261, 255, 243, 117]),
    (SD21, 96, [192, 320, 640, 640], [865.9, 583.5, 485.8, 326.8, 227.8], [1075, 691, 677, 649, 399]),
    (SDXL, 128, [160, 320, 640], [2567.5, 1717.3, 1304.2, 728.4], [3381, 2252, 1853, 950]),
]
LAYOUTS = pytest.mark.parametrize(
    ("config", "side", "channels", "parameters", "macs"), SIZES, ids=["sd15", "sd21", "sdxl"]
)


def family(config, channels):
    """The teacher, its students by name, and the narrow one."""
    teacher = without_weights(config)
    names = ["base", "small"] if config is SDXL else ["base", "small", "tiny"]
    made = [built(teacher, kind="drop_blocks", blocks=name) for name in names]
    return [teacher.network, *made, built(teacher, kind="narrow", channels=channels)]


@LAYOUTS
def test_networks_of_full_size_are_made_smaller_without_weights(config, side, channels, parameters, macs):
    found = family(config, channels)
    assert [round(count(net) / 1e6, 1) for net in found] == parameters
    assert all(parameter.is_meta for net in found for parameter in net.parameters())


@pytest.mark.slow
@LAYOUTS
def test_what_an_evaluation_of_them_costs(config, side, channels, parameters, macs):
    """Of latents of these sides."""
    with torch.device("meta"):
        text = torch.zeros(1, 77, config["cross_attention_dim"])
        added = {"time_ids": torch.zeros(1, 6), "text_embeds": torch.zeros(1, 1280)}
        x, t = torch.zeros(1, 4, side, side), torch.zeros(1)
    given = {"encoder_hidden_states": text, "added_cond_kwargs": added}
    found = [network_size(net, x, t, **given).macs for net in family(config, channels)]
    assert [round(one / 1e9) for one in found] == macs


def test_tiny_does_not_fit_sdxl():
    with pytest.raises(UserError, match=r"down_blocks.2 has 1280 channels and down_blocks.1 has 640"):
        drop_blocks(without_weights(SDXL), "tiny")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_it_keeps_are_its_teachers_weights(name):
    """The first layer of a down block, the first and the third of an up block."""
    teacher = prompted((8, 16, 16), (True, True, False), layers_per_block=2)
    made, old = drop_blocks(denoiser_of(teacher), name).network, teacher.state_dict()
    shift, place = int(name == "tiny"), {"down_blocks": [0], "up_blocks": [0, 2]}
    for key, value in made.state_dict().items():
        found = re.fullmatch(r"(down_blocks|up_blocks)\.(\d)\.(\w+)\.(\d)\.(.+)", key)
        if found:
            side, block, kind, layer, rest = found.groups()
            number = place[side][int(layer)] if kind in ("resnets", "attentions") else layer
            key = f"{side}.{int(block) + shift * (side == 'up_blocks')}.{kind}.{number}.{rest}"
        assert torch.equal(value, old[key]), key
    assert len(made.down_blocks) == 3 - shift and (made.mid_block is None) == (name != "base")
    assert outputs(made).isfinite().all()


def test_a_name_is_what_the_list_of_its_blocks_is():
    """For networks without prompts, too."""
    teacher = denoiser_of(network((8, 16, 16), layers_per_block=2))
    blocks = ["*_blocks.*.resnets.1", "mid_block", "down_blocks.2"]
    for name, number in (("base", 1), ("small", 2), ("tiny", 3)):
        ours, theirs = (outputs(drop_blocks(teacher, given).network) for given in (name, blocks[:number]))
        assert torch.equal(ours, theirs)
