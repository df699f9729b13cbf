"""Students with fewer layers: they compute what the teacher does where the dropped layers are the
identity."""

import re

import pytest
import torch

from diffkd.errors import UserError
from diffkd.models import students
from diffkd.models.students.blocks import drop_layers
from tests.models.unets import denoiser_of, max_difference, network, outputs, prompted

SIDES = {"d": "down_blocks", "u": "up_blocks"}


def pass_through(net, name):
    """Makes a resnet, and the attention beside it, the identity (of two inputs, the first)."""
    resnet = net.get_submodule(name)
    silence(resnet.conv2)
    if resnet.conv_shortcut is not None:
        silence(resnet.conv_shortcut)
        resnet.conv_shortcut.weight.data[:, : resnet.out_channels, 0, 0] = torch.eye(resnet.out_channels)
    block, _, j = name.rpartition(".resnets.")
    if j and hasattr(net.get_submodule(block), "attentions"):
        silence(last_of(net.get_submodule(block).attentions[int(j)]))


def last_of(attention):
    """The layer that adds to what it is beside: of attention, or of a transformer."""
    return attention.proj_out if hasattr(attention, "proj_out") else attention.to_out[0]


def silence(layer):
    layer.weight.data.zero_()
    layer.bias.data.zero_()


IDENTITY = [  # channels, layers, patterns, and the layers that they match
    ((8, 16), 2, ["down_blocks.*.resnets.1", "up_blocks.*.resnets.1"], "d01 d11 u01 u11"),
    ((8, 16), 2, ["*.resnets.1"], "d01 d11 u01 u11"),
    ((8, 16), 2, ["down_blocks.0.resnets.0", "*.1.resnets.1", "up_blocks.0.resnets.1"], "d00 d11 u01 u11"),
    ((8, 8), 2, ["down_blocks.*.resnets.0", "up_blocks.*.resnets.1"], "d00 d10 u01 u11"),
    ((16, 16), 3, ["*.resnets.[12]"], "d01 d02 d11 d12 u01 u02 u11 u12"),
    ((8, 8), 3, ["down_blocks.*.resnets.2", "up_blocks.*.resnets.0"], "d02 d12 u00 u10"),
]


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (network, {"num_class_embeds": 4}),
        (network, {"num_class_embeds": 4, "attention": [True, True]}),
        (prompted, {"attention": [True, True], "transformer_layers_per_block": [2, 1]}),
    ],
)
@pytest.mark.parametrize(("channels", "layers", "patterns", "goes"), IDENTITY)
def test_without_identity_layers_it_computes_the_same(make, more, channels, layers, patterns, goes):
    teacher = make(channels, layers_per_block=layers, **more)
    before = outputs(teacher)
    for side, block, layer in goes.split():
        pass_through(teacher, f"{SIDES[side]}.{block}.resnets.{layer}")
    expected = outputs(teacher)
    made = drop_layers(teacher, patterns)
    assert made.config.layers_per_block == layers - goes.count("d0")
    assert max_difference(outputs(made), expected) < 1e-5 and max_difference(expected, before) > 1e-2


@pytest.mark.parametrize("layers", [2, [3, 2]])
def test_each_resolution_may_lose_another_number_of_layers(layers):
    """Of a UNet that takes prompts, whose config can say so."""
    more = {
        "transformer_layers_per_block": [1, [1, 2]],
        "reverse_transformer_layers_per_block": [[2, 1, 1], 1],
    }
    teacher = prompted((8, 16), layers_per_block=layers, mid_block_type=None, **more)
    for name in ("down_blocks.1.resnets.1", "up_blocks.0.resnets.1"):
        pass_through(teacher, name)
    made = drop_layers(teacher, ["down_blocks.1.resnets.1", "up_blocks.0.resnets.1"])
    assert max_difference(outputs(made), outputs(teacher)) < 1e-5
    assert made.config.layers_per_block == [2 if layers == 2 else 3, 1]
    assert made.config.transformer_layers_per_block == [1, [1]]
    assert made.config.reverse_transformer_layers_per_block == [[2, 1], 1]


IDLE = [  # patterns, the types of the remaining blocks, and whether the middle attends (None: is gone)
    (["mid_block"], "AA", "AA", None),
    (["mid_block.attentions"], "AA", "AA", False),
    (["down_blocks.0.attentions"], "DA", "AA", True),
    (["up_blocks.0.attentions", "down_blocks.1.attentions"], "AD", "UA", True),
    (["*.attentions"], "DD", "UU", False),
    (["mid_block*", "down_blocks.*.attentions"], "DD", "AA", None),
]


@pytest.mark.parametrize("make", [network, prompted])
@pytest.mark.parametrize(("patterns", "down", "up", "middle"), IDLE)
def test_without_idle_attention_or_an_idle_middle_it_computes_the_same(make, patterns, down, up, middle):
    teacher = make((8, 16), [True, True], layers_per_block=2)
    for block, letter in zip([*teacher.down_blocks, *teacher.up_blocks], down + up, strict=True):
        for attention in block.attentions if letter != "A" else ():
            silence(last_of(attention))
    if middle is not True:
        silence(last_of(teacher.mid_block.attentions[0]))
    if middle is None:
        silence(teacher.mid_block.resnets[0].conv2)
    if middle is None or (middle is False and make is prompted):  # whose second resnet goes along
        silence(teacher.mid_block.resnets[1].conv2)
    made = drop_layers(teacher, patterns)
    assert max_difference(outputs(made), outputs(teacher)) < 1e-5
    blocks = [*made.down_blocks, *made.up_blocks]
    assert [type(b).__name__.removeprefix("Cross")[0] for b in blocks] == list(down + up)
    assert (made.mid_block is None) == (middle is None)
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in teacher.parameters())


@pytest.mark.parametrize("channels", [(8, 8), (8, 16, 16)])
def test_without_the_innermost_resolution_the_middle_follows_the_one_before(channels):
    """The teacher's own modules, called in the remaining order: no downsampling before the middle."""
    teacher = network(channels, [True] * len(channels), layers_per_block=2, num_class_embeds=4)
    last = len(channels) - 1

    def replayed(net, x, t, labels):
        emb = net.time_embedding(net.time_proj(t)) + net.class_embedding(labels)
        h = net.conv_in(x)
        skips = [h]
        for i, block in enumerate(net.down_blocks[:last]):
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                h = attention(resnet(h, emb))
                skips.append(h)
            if i < last - 1:
                h = block.downsamplers[0](h)
                skips.append(h)
        h = net.mid_block(h, emb)
        for block in net.up_blocks[1:]:
            h = block(h, tuple(skips[-3:]), emb)
            del skips[-3:]
        assert not skips
        return net.conv_out(net.conv_act(net.conv_norm_out(h)))

    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 40.0]), torch.tensor([2, 0])
    made = drop_layers(teacher, [f"down_blocks.{last}"])
    with torch.no_grad():
        assert torch.equal(made(x, t, class_labels=labels).sample, replayed(teacher, x, t, labels))
    assert made.config.block_out_channels == channels[:-1]
    fewer = drop_layers(teacher, [f"down_blocks.{last}", "*.resnets.1"])
    assert torch.equal(outputs(fewer), outputs(drop_layers(made, ["*.resnets.1"])))


def test_the_layers_that_stay_keep_their_weights():
    teacher = network((16, 16), [False, True], layers_per_block=3)
    names = ["down_blocks.0.resnets.0", "down_blocks.1.resnets.1", "*0.resnets.3", "up_blocks.1.resnets.0"]
    made = drop_layers(teacher, names).state_dict()
    stay = {
        "down_blocks.0": [1, 2],
        "down_blocks.1": [0, 2],
        "up_blocks.0": [0, 1, 2],
        "up_blocks.1": [1, 2, 3],
    }
    old = teacher.state_dict()
    for name, value in made.items():
        found = re.fullmatch(r"(\w+\.\d)\.(resnets|attentions)\.(\d)\.(.+)", name)
        source = f"{found[1]}.{found[2]}.{stay[found[1]][int(found[3])]}.{found[4]}" if found else name
        assert torch.equal(value, old[source]), name
    gone = r"down_blocks.0.resnets.0|down_blocks.1.\w+.1|up_blocks.0.\w+.3|up_blocks.1.resnets.0"
    assert len(made) == sum(re.match(rf"({gone})\.", name) is None for name in old)


LAYERS = {"layers_per_block": 2}

REFUSED = [
    ({}, ["mid"], "names 'mid'.*it has down_blocks.0.resnets.0, down_blocks.1.resnets.0, up_blocks.0.res"),
    ({"channels": (8,)}, ["down_blocks.0"], "names 'down_blocks.0', which this network does not have"),
    ({"add_attention": False}, ["mid_block.attentions"], "which this network does not have"),
    ({"mid_block_type": None}, ["mid_block"], "which this network does not have"),
    ({}, ["down_blocks.0.attentions"], "which this network does not have"),
    ({}, ["*.resnets.0"], "drops 1 resnets of blocks that have 1; at least one must stay"),
    ({"channels": (8, 8)}, ["*"], "drop as many from each block"),
    (LAYERS, ["down_blocks.*.resnets.1"], "1 resnets of down_blocks.0 and 0 of up_blocks.1.*drop as many"),
    (LAYERS, ["*.resnets.[01]"], "at least one must stay"),
    (LAYERS, ["*.resnets.0"], "down_blocks.1.resnets.1 does not fit.*16 for 8.*keeps the width"),
    ({}, ["down_blocks.1"], "down_blocks.1 has 16 channels and down_blocks.0 has 8.*drop layers of it"),
]


EQUAL = {"channels": (8, 8)}

REFUSED_PROMPTED = [
    ({}, ["down_blocks.1"], "down_blocks.1 has 16 channels and down_blocks.0 has 8.*drop layers of it"),
    (
        {**EQUAL, "transformer_layers_per_block": [1, 2]},
        ["down_blocks.1"],
        "down_blocks.1 has transformer_layers_per_block 2 and down_blocks.0 has 1, .*the middle's.*mid_block",
    ),
    (
        {**EQUAL, "attention_head_dim": [1, 2]},
        ["down_blocks.1"],
        "has attention_head_dim 2 and .* has 1, whi",
    ),
    (
        LAYERS,
        ["down_blocks.0.*.1"],
        "1 resnets of down_blocks.0 and 0 of up_blocks.1; the two blocks of a res",
    ),
    (
        {"layers_per_block": [2, 1]},
        ["*s.1*.0", "*_blocks.0.resnets.0"],
        "of blocks that have 1; at least one",
    ),
    ({"mid_block_type": None}, ["mid_block"], "which this network does not have; it has down_blocks.0"),
    ({}, "base", "base leaves out the second of 2 layers in each block, and this network has 1; give a list"),
    ({"layers_per_block": [2, 3]}, "small", "small leaves out .* this network has 2 or 3; give a list"),
    ({**LAYERS, "mid_block_type": None}, "small", "small leaves out mid_block, and .* none; use base"),
    (LAYERS, "tiny", "down_blocks.1 has 16 channels and down_blocks.0 has 8"),
    (LAYERS, "large", "'large', which is no architecture of BK-SDM; use base, small, tiny, or a list"),
]


@pytest.mark.parametrize(
    ("make", "config", "blocks", "message"),
    [(network, *one) for one in REFUSED] + [(prompted, *one) for one in REFUSED_PROMPTED],
)
def test_layers_that_cannot_be_dropped(make, config, blocks, message):
    with pytest.raises(UserError, match=message) as caught:
        students.drop_blocks(denoiser_of(make(**config)), blocks)
    assert "\n" not in str(caught.value)
