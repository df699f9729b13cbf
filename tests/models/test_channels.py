"""Students with fewer channels: of repeated channels the first copies are recovered; what cannot be
narrowed."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffkd.errors import UserError
from diffkd.models import students
from diffkd.models.students import channels as channels_module
from diffkd.models.students.channel_groups import channel_groups
from diffkd.models.students.channels import narrow_unet
from diffkd.models.students.resolutions import of_each
from tests.models.unets import XL, config_of, denoiser_of, max_difference, network, outputs, prompted


def layout(net, many, name):
    """For the rows and the columns of a parameter: [(width, copies, channels that stay together)]."""
    last, widths = len(many) - 1, net.config.block_out_channels
    shape, (kind, *rest) = net.get_parameter(name).shape, name.split(".")
    level = {"down_blocks": 0, "up_blocks": last, "mid_block": last}.get(kind, 0)
    if kind != "mid_block" and rest[0].isdigit():
        level = abs(level - int(rest[0]))
    head = net.config.attention_head_dim or shape[0]
    if isinstance(net, UNet2DConditionModel):
        head = widths[level] // of_each(head, last + 1)[level]  # whose config has the number of heads
    rows = [(shape[0], many[level], head if re.search("to_[qkv]", name) else 1)]
    columns = [(shape[-3 if len(shape) == 4 else -1], many[level], head if "to_out" in name else 1)]
    if "time_emb_proj.weight" in name:
        columns = [(shape[1], many[0], 1)]
    read = r"attn[12].to_[kv]" if net.config.get("only_cross_attention") else r"attn2.to_[kv]"
    if re.search(f"{read}|cond_proj|add_embedding.linear_1.weight", name):  # from outside
        columns = [(shape[1], 1, 1)]
    if "ff.net.0" in name:
        rows = [(shape[0] // 2, many[level], 1)] * 2
    if re.search("resnets.*(norm1|conv1|shortcut)", name) and kind != "mid_block":
        j = int(rest[2])
        layers = of_each(net.config.layers_per_block, last + 1)[level]
        if kind == "down_blocks":
            into = [max(level - (j == 0), 0)]
        else:
            into = [min(level + (j == 0), last), max(level - (j == layers), 0)]
        columns = [(widths[i], many[i], 1) for i in into]
    if re.search("resnets.*norm1", name) and kind != "mid_block":
        rows = columns
    if kind in ("conv_out", "class_embedding"):
        rows = [(shape[0], 1, 1)]
    return rows, [(shape[1], 1, 1)] if name == "conv_in.weight" else columns


def repeated(value, dim, segments, *, empty=False):
    """Every channel, or attention head, repeated in place; empty: all copies but the first are 0."""
    found = []
    parts = value.split([width for width, _, _ in segments], dim)
    for part, (_, copies, unit) in zip(parts, segments, strict=True):
        heads = part.unflatten(dim, (-1, unit))
        more = [torch.zeros_like(heads) if empty else heads] * (copies - 1)
        found.append(torch.stack([heads, *more], dim + 1).flatten(dim, dim + 2))
    return torch.cat(found, dim)


def widened(small, many):
    """A network with every channel of resolution l many[l] times, which computes the same: what reads them
    reads the first. With it, scores that prefer the first copies, and later groups to earlier ones."""
    config = config_of(small)
    config["block_out_channels"] = [c * n for c, n in zip(config["block_out_channels"], many, strict=True)]
    if config["time_embedding_dim"]:
        config["time_embedding_dim"] *= many[0]
    if isinstance(small, UNet2DConditionModel):
        heads = of_each(config["attention_head_dim"], len(many))
        config["attention_head_dim"] = [c * n for c, n in zip(heads, many, strict=True)]
    wide, scores, found = type(small)(**config).eval(), {}, {}
    for name, value in small.named_parameters():
        rows, columns = layout(small, many, name)
        found[name] = repeated(value.data, 0, rows)
        if value.ndim > 1:
            found[name] = repeated(found[name], 1, columns, empty=not name.startswith("class_embedding"))
        first = repeated(torch.ones(len(value)), 0, rows, empty=True).double()
        group = torch.arange(len(first)) * config["norm_num_groups"] // len(first)
        free = re.search(r"(time|add)_embedding|to_[qkv]|proj_in|transformer_blocks", name)  # among all
        scores[name] = 10 * first + torch.rand(len(first)) + (0 if free else 1000 * group)
    wide.load_state_dict(found)
    return wide, scores


REPEATED = [
    ((2, 2), {"num_class_embeds": 4}),
    ((3,), {"channels": (8,), "attention": [True], "time_embedding_dim": 12}),
    ((2, 2, 2), {"channels": (8, 8, 16), "attention": [False, True, True], "layers_per_block": 2}),
    ((2, 2), {"attention": [True, True], "attention_head_dim": 8, "flip_sin_to_cos": False}),
    ((2, 2), {"mid_block_type": None, "layers_per_block": 3, "time_embedding_dim": 20}),
    # a norm of both sees more of one than of the other, so of the wide network only the weights are the same
    ((1, 3, 2), {"channels": (8, 4, 8), "attention": [True] * 3, "num_class_embeds": 4}),
    ((3, 1), {"attention": [False, True], "layers_per_block": 2}),
]


REPEATED_PROMPTED = [
    ((2, 2), {"time_cond_proj_dim": 6, "time_embedding_dim": 20}),
    ((3, 3), {"attention": (False, True), "transformer_layers_per_block": [1, 2], **XL}),
    ((2, 2, 2), {"channels": (8, 8, 16), "attention": (True, True, False), "layers_per_block": [2, 1, 1]}),
    ((2, 1), {"channels": (8, 24), "only_cross_attention": True, "mid_block_type": "UNetMidBlock2D"}),
]


@pytest.mark.parametrize(
    ("make", "many", "config"),
    [(network, *one) for one in REPEATED] + [(prompted, *one) for one in REPEATED_PROMPTED],
)
def test_of_repeated_channels_the_first_copies_are_the_network(make, many, config):
    """In the wide network nothing reads the other copies: all that is dropped counts as zero there."""
    small = make(**config)
    wide, scores = widened(small, many)
    assert max_difference(outputs(wide), outputs(small)) < 1e-5 or len(set(many)) > 1
    made = narrow_unet(wide, small.config.block_out_channels, scores)
    assert config_of(made) == config_of(small)
    for name, value in made.state_dict().items():
        assert torch.equal(value, small.state_dict()[name]), name
    assert torch.equal(outputs(made), outputs(small))


@pytest.mark.parametrize("head", [1, 4, None])
def test_heads_stay_whole(head):
    """Of what scores alone would choose, each differently. A head's queries, keys and values go together;
    where there is one head of any width, queries go with keys, and values with what reads them."""
    teacher = network((16,), [True], attention_head_dim=head)
    attention = teacher.mid_block.attentions[0]
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.bias.data = torch.arange(16.0)
    attention.to_out[0].weight.data[:] = torch.arange(16.0)
    rng = torch.Generator().manual_seed(3)
    scores = {n: torch.rand(len(p), generator=rng).double() for n, p in teacher.named_parameters()}
    made = narrow_unet(teacher, [8], scores).mid_block.attentions[0]
    kept = [layer.bias.tolist() for layer in (made.to_q, made.to_k, made.to_v)]
    total = sum(scores[f"mid_block.attentions.0.to_{x}.{y}"] for x in "qk" for y in ("weight", "bias"))
    values = sum(scores[f"mid_block.attentions.0.to_v.{y}"] for y in ("weight", "bias"))
    total = values + total if head else total
    best = total.view(-1, head or 1).sum(1).topk(8 // (head or 1)).indices.sort().values
    expected = (best[:, None] * (head or 1) + torch.arange(head or 1)).flatten().tolist()
    assert kept[0] == kept[1] == expected and (kept[2] == expected or not head)
    assert made.to_out[0].weight[0].tolist() == kept[2]
    if not head:
        assert kept[2] == values.topk(8).indices.sort().values.tolist() != expected


@pytest.mark.parametrize("layer", ["attn1", "attn2", "ff"])
def test_what_stays_of_a_transformer_is_the_teachers_with_the_rest_at_zero(layer):
    """Heads and feed-forward channels that are dropped write nothing, and dropped channels of the stream are
    zero: the others come out the same."""
    teacher = prompted((24, 16), use_linear_projection=True)
    teacher.mid_block = None
    teacher.register_to_config(mid_block_type=None)
    made = narrow_unet(teacher, [8, 16])
    scores, groups = students.norm_scores(teacher), channel_groups(teacher, made)
    place = "down_blocks.0.attentions.0.transformer_blocks.0"
    out = f"{place}.{layer}.net.2" if layer == "ff" else f"{place}.{layer}.to_out.0"
    (stream,), (hidden,) = (groups[f"{out}.weight"][dim] for dim in (0, 1))
    kept = stream.select(scores)
    gone = [i for i in range(teacher.get_submodule(out).in_features) if i not in hidden.select(scores)]
    teacher.get_submodule(out).weight.data[:, gone] = 0
    x, text = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    wide = torch.zeros(2, 5, 24).index_copy(2, kept, x)
    given = {"encoder_hidden_states": text} if layer == "attn2" else {}
    with torch.no_grad():
        expected = teacher.get_submodule(f"{place}.{layer}")(wide, **given)[..., kept]
        found = made.get_submodule(f"{place}.{layer}")(x, **given)
    assert len(gone) == len(hidden.select(scores)) * 2 and max_difference(found, expected) < 1e-5


@pytest.mark.parametrize("shift", [0, 1])
def test_time_frequencies_are_the_nearest(shift):
    """From sixteen to eight: each narrow frequency takes the weights of the nearest wide one."""
    wide = network((32, 32), freq_shift=shift)
    wide.time_embedding.linear_1.weight.data[:] = torch.arange(32.0)
    made = narrow_unet(wide, [16, 16])
    one = torch.ones(1)
    angles, fewer = (torch.arctan2(*net.time_proj(one)[0].view(2, -1).flip(0)) for net in (wide, made))
    nearest = (angles.log()[None] - fewer.log()[:, None]).abs().argmin(1)
    assert made.time_embedding.linear_1.weight[0].tolist() == torch.cat([nearest, 16 + nearest]).tolist()


SKIP = {f"{side}_block_types": ("UpBlock2D", "SkipUpBlock2D") for side in ("down", "up")}

SKIP["down_block_types"] = ("SkipDownBlock2D", "DownBlock2D")

REFUSED = [
    ({}, [8], "channels has 1 entries and the network 2 resolutions .8, 16.; give one for each"),
    ({}, [8, 10], "10 is not a multiple of .*norm_num_groups 4.*such as 8"),
    ({}, [8, 2], "2 is not a multiple of .*norm_num_groups 4.*such as 4"),
    ({}, [7, 16], "7 is odd"),
    ({}, [8, 20], "20 is out of range; the teacher has 16 there"),
    ({}, [0, 16], "channels 0"),
    ({"attention_head_dim": 8}, [8, 12], "12 is not a multiple of .*heads of 8 channels.*such as 8"),
    (
        {"attention_head_dim": 8, "attention": [True, False]},
        [4, 16],
        "4 is not a multiple of 8 .*norm_num_groups 4 and attention heads of 8 channels",
    ),
    ({"channels": (16, 32), "attn_norm_num_groups": 16}, [8, 24], "24 is not a multiple of .*16"),
    ({"channels": (16, 16)}, [8, 12], "12"),  # what ties them, the way around a resnet, is no layer
    ({"resnet_time_scale_shift": "scale_shift"}, [8, 8], "time_scale_shift default.*use drop_blocks"),
    ({"channels": (32, 32), **SKIP}, [16, 16], "has SkipDownBlock2D; use drop_blocks"),
    ({"downsample_type": "resnet"}, [8, 8], "has resnets; use drop_blocks"),
    ({"class_embed_type": "timestep"}, [8, 8], "class labels as numbers; use drop_blocks"),
]

REFUSED_PROMPTED = [
    ({"channels": (8, 24), "attention_head_dim": [2, 2]}, [8, 16], "16 is not .* 12 .*of 12 channels.*as 12"),
    ({"channels": (8,), "attention": (True,), "attention_head_dim": 3}, [4], "has 6 in 3 heads .*8 channels"),
    ({"attention_type": "gated"}, [4, 8], "does not support .*fuser.alpha_attn of this network; use drop"),
    ({"dual_cross_attention": True}, [4, 8], "does not support .*attentions.0.* of this network"),
    ({"addition_embed_type": "text"}, [4, 8], "does not support add_embedding.* of this network"),
]


@pytest.mark.parametrize(
    ("make", "config", "channels", "message"),
    [(network, *one) for one in REFUSED] + [(prompted, *one) for one in REFUSED_PROMPTED],
)
def test_channels_that_cannot_be_kept(make, config, channels, message):
    with pytest.raises(UserError, match=message) as caught:
        students.narrow(denoiser_of(make(**config)), channels)
    assert "\n" not in str(caught.value)


def test_a_lost_learned_shortcut_is_logged_once(caplog):
    """Widths that become one: what was a layer between them begins as the identity. Told once, as a run makes
    its student twice."""
    channels_module._warn_once.cache_clear()
    for _ in range(2):
        students.narrow(denoiser_of(network()), [8, 8])
    assert caplog.text.count("student.channels 8, 8 for 8, 16: equal widths lose the learned shortcuts") == 1


def test_without_attention_the_head_size_does_not_matter():
    """It counts only where there is attention."""
    made = narrow_unet(network(add_attention=False, attention_head_dim=16), [4, 12])
    assert made.config.block_out_channels == (4, 12)
