"""Students made from their teacher: what must not change when layers or channels go, and what is refused."""

import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from pydantic import TypeAdapter, ValidationError

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from diffkd.generation.drawing import generate
from diffkd.models import loading, students
from diffkd.models.families.unet2d import UNet2D
from diffkd.models.students import unet2d_drop, unet2d_narrow

COSINE = Schedule.cosine(64)


def network(channels=(8, 16), attention=None, *, seed=0, **config):
    """Far from its initialisation, every bias and norm too. attention: of each resolution."""
    attends = attention or [False] * len(channels)
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 4, "block_out_channels": tuple(channels),
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)), **config,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = UNet2DModel(**config).eval()
        for parameter in found.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return found


def denoiser_of(net):
    classes = net.config.num_class_embeds
    null = {} if classes is None else {"num_classes": classes - 1, "null_label": classes - 1}
    return Denoiser(net, COSINE, "v_prediction", **null).train(net.training)


@torch.no_grad()
def says(net):
    """Its outputs for some images, times and labels."""
    rng = torch.Generator().manual_seed(7)
    x, t = torch.randn(3, 1, 8, 8, generator=rng).to(net.dtype), torch.tensor([0.0, 17.0, 63.0])
    labels = None if net.config.num_class_embeds is None else torch.tensor([0, 1, 2])
    return net(x, t, class_labels=labels).sample


def apart(x, y):
    return (x - y).abs().max().item()


def config_of(net):
    return {key: value for key, value in net.config.items() if not key.startswith("_")}


def untouched(make):
    """What `make` gives; the global random numbers go on as if it had not been called."""
    before = torch.get_rng_state()
    found = make()
    assert torch.equal(torch.get_rng_state(), before)
    return found


VARIANTS = [
    {},
    {"channels": (8, 8, 16), "layers_per_block": 2, "num_class_embeds": 4},
    {"attention": [True, True], "attention_head_dim": 8, "layers_per_block": 3},
    {"attention": [False, True], "attention_head_dim": None, "time_embedding_dim": 24},
    {"channels": (12,), "attention": [True], "mid_block_type": None, "num_class_embeds": 3},
    {"channels": (8, 8), "add_attention": False, "freq_shift": 1, "flip_sin_to_cos": False},
]
KINDS = {
    "drop": lambda net: unet2d_drop.drop(net, []),
    "narrow": lambda net: unet2d_narrow.narrow(net, net.config.block_out_channels),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", VARIANTS)
def test_with_all_that_it_has_it_is_the_teacher(kind, config):
    for training in (False, True):
        teacher = network(**config).train(training)
        made = KINDS[kind](teacher)
        assert torch.equal(says(made), says(teacher)) and made.training is training
        assert config_of(made) == config_of(teacher)
        held = {parameter.data_ptr() for parameter in teacher.parameters()}
        assert not held & {parameter.data_ptr() for parameter in made.parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_in_the_dtype_of_its_teacher(dtype):
    teacher = network().to(dtype)
    for made in (unet2d_drop.drop(teacher, ["mid_block"]), unet2d_narrow.narrow(teacher, [4, 8])):
        assert {p.dtype for p in made.parameters()} == {dtype}
    assert students.reinitialized(denoiser_of(teacher), 0).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_of_the_teacher_draws_no_random_numbers(kind):
    teacher = network()
    untouched(lambda: KINDS[kind](teacher))


# layers that go -------------------------------------------------------------------------------------------

SIDES = {"d": "down_blocks", "u": "up_blocks"}


def pass_through(net, name):
    """Makes a resnet, and the attention beside it, hand on what it is given (of two, the first)."""
    resnet = net.get_submodule(name)
    silence(resnet.conv2)
    if resnet.conv_shortcut is not None:
        silence(resnet.conv_shortcut)
        resnet.conv_shortcut.weight.data[:, : resnet.out_channels, 0, 0] = torch.eye(resnet.out_channels)
    block, _, j = name.rpartition(".resnets.")
    if j and hasattr(net.get_submodule(block), "attentions"):
        silence(net.get_submodule(block).attentions[int(j)].to_out[0])


def silence(layer):
    layer.weight.data.zero_()
    layer.bias.data.zero_()


HANDING_ON = [  # channels, layers, what is named, and the layers that it is
    ((8, 16), 2, ["down_blocks.*.resnets.1", "up_blocks.*.resnets.1"], "d01 d11 u01 u11"),
    ((8, 16), 2, ["*.resnets.1"], "d01 d11 u01 u11"),
    ((8, 16), 2, ["down_blocks.0.resnets.0", "*.1.resnets.1", "up_blocks.0.resnets.1"], "d00 d11 u01 u11"),
    ((8, 8), 2, ["down_blocks.*.resnets.0", "up_blocks.*.resnets.1"], "d00 d10 u01 u11"),
    ((16, 16), 3, ["*.resnets.[12]"], "d01 d02 d11 d12 u01 u02 u11 u12"),
    ((8, 8), 3, ["down_blocks.*.resnets.2", "up_blocks.*.resnets.0"], "d02 d12 u00 u10"),
]


@pytest.mark.parametrize("attention", [None, [True, True]])
@pytest.mark.parametrize(("channels", "layers", "patterns", "goes"), HANDING_ON)
def test_without_layers_that_hand_on_it_says_the_same(attention, channels, layers, patterns, goes):
    teacher = network(channels, attention, layers_per_block=layers, num_class_embeds=4)
    before = says(teacher)
    for side, block, layer in goes.split():
        pass_through(teacher, f"{SIDES[side]}.{block}.resnets.{layer}")
    expected = says(teacher)
    made = unet2d_drop.drop(teacher, patterns)
    assert made.config.layers_per_block == layers - goes.count("d0")
    assert apart(says(made), expected) < 1e-5 and apart(expected, before) > 1e-2


QUIET = [  # what is named, the blocks' types after it, and whether the middle attends or is there at all
    (["mid_block"], "AA", "AA", None),
    (["mid_block.attentions"], "AA", "AA", False),
    (["down_blocks.0.attentions"], "DA", "AA", True),
    (["up_blocks.0.attentions", "down_blocks.1.attentions"], "AD", "UA", True),
    (["*.attentions"], "DD", "UU", False),
    (["mid_block*", "down_blocks.*.attentions"], "DD", "AA", None),
]


@pytest.mark.parametrize(("patterns", "down", "up", "middle"), QUIET)
def test_without_attention_or_a_middle_that_hands_on_it_says_the_same(patterns, down, up, middle):
    teacher = network((8, 16), [True, True], layers_per_block=2)
    for block, letter in zip([*teacher.down_blocks, *teacher.up_blocks], down + up, strict=True):
        for attention in block.attentions if letter != "A" else ():
            silence(attention.to_out[0])
    if middle is not True:
        silence(teacher.mid_block.attentions[0].to_out[0])
    if middle is None:
        for resnet in teacher.mid_block.resnets:
            silence(resnet.conv2)
    made = unet2d_drop.drop(teacher, patterns)
    assert apart(says(made), says(teacher)) < 1e-5
    blocks = [*made.down_blocks, *made.up_blocks]
    assert [type(b).__name__[0] for b in blocks] == list(down + up)
    assert (made.mid_block is None) == (middle is None)
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in teacher.parameters())


@pytest.mark.parametrize("channels", [(8, 8), (8, 16, 16)])
def test_without_the_innermost_resolution_the_middle_follows_the_one_before(channels):
    """The teacher's own modules, called in the order that is left: no halving before the middle."""
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
    made = unet2d_drop.drop(teacher, [f"down_blocks.{last}"])
    with torch.no_grad():
        assert torch.equal(made(x, t, class_labels=labels).sample, replayed(teacher, x, t, labels))
    assert made.config.block_out_channels == channels[:-1]
    fewer = unet2d_drop.drop(teacher, [f"down_blocks.{last}", "*.resnets.1"])
    assert torch.equal(says(fewer), says(unet2d_drop.drop(made, ["*.resnets.1"])))


def test_the_layers_that_stay_keep_their_weights():
    teacher = network((16, 16), [False, True], layers_per_block=3)
    names = ["down_blocks.0.resnets.0", "down_blocks.1.resnets.1", "*0.resnets.3", "up_blocks.1.resnets.0"]
    made = unet2d_drop.drop(teacher, names).state_dict()
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


# channels that go -----------------------------------------------------------------------------------------


def layout(net, many, name):
    """Of one parameter's rows and columns, [(width, copies, channels that stay together)]."""
    last, layers, widths = len(many) - 1, net.config.layers_per_block, net.config.block_out_channels
    shape, (kind, *rest) = net.get_parameter(name).shape, name.split(".")
    level = {"down_blocks": 0, "up_blocks": last, "mid_block": last}.get(kind, 0)
    if kind != "mid_block" and rest[0].isdigit():
        level = abs(level - int(rest[0]))
    head = net.config.attention_head_dim or shape[0]
    rows = [(shape[0], many[level], head if re.search("to_[qkv]", name) else 1)]
    columns = [(shape[-3 if len(shape) == 4 else -1], many[level], head if "to_out" in name else 1)]
    if "time_emb_proj.weight" in name:
        columns = [(shape[1], many[0], 1)]
    if re.search("norm1|conv1|shortcut", name) and kind != "mid_block":
        j = int(rest[2])
        if kind == "down_blocks":
            into = [max(level - (j == 0), 0)]
        else:
            into = [min(level + (j == 0), last), max(level - (j == layers), 0)]
        columns = [(widths[i], many[i], 1) for i in into]
    if "norm1" in name and kind != "mid_block":
        rows = columns
    if kind in ("conv_out", "class_embedding"):
        rows = [(shape[0], 1, 1)]
    return rows, [(shape[1], 1, 1)] if name == "conv_in.weight" else columns


def repeated(value, dim, segments, *, empty=False):
    """Every channel, or head of channels, so many times in a row; empty: all but the first are 0."""
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
    wide, scores, found = UNet2DModel(**config).eval(), {}, {}
    for name, value in small.named_parameters():
        rows, columns = layout(small, many, name)
        found[name] = repeated(value.data, 0, rows)
        if value.ndim > 1:
            found[name] = repeated(found[name], 1, columns, empty=not name.startswith("class_embedding"))
        first = repeated(torch.ones(len(value)), 0, rows, empty=True).double()
        group = torch.arange(len(first)) * config["norm_num_groups"] // len(first)
        free = re.search(r"time_embedding|to_[qkv]", name)  # chosen among all
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


@pytest.mark.parametrize(("many", "config"), REPEATED)
def test_of_repeated_channels_the_first_copies_are_the_network(many, config):
    small = network(**config)
    wide, scores = widened(small, many)
    assert apart(says(wide), says(small)) < 1e-5 or len(set(many)) > 1
    made = unet2d_narrow.narrow(wide, small.config.block_out_channels, scores)
    assert config_of(made) == config_of(small)
    for name, value in made.state_dict().items():
        assert torch.equal(value, small.state_dict()[name]), name
    assert torch.equal(says(made), says(small))


@pytest.mark.parametrize("head", [1, 4, None])
def test_heads_stay_whole_with_what_they_look_at(head):
    """Of what scores alone would choose, each differently. A head's queries, keys and values go together;
    where there is one head of any width, queries go with keys, and values with what reads them."""
    teacher = network((16,), [True], attention_head_dim=head)
    attention = teacher.mid_block.attentions[0]
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.bias.data = torch.arange(16.0)
    attention.to_out[0].weight.data[:] = torch.arange(16.0)
    rng = torch.Generator().manual_seed(3)
    scores = {n: torch.rand(len(p), generator=rng).double() for n, p in teacher.named_parameters()}
    made = unet2d_narrow.narrow(teacher, [8], scores).mid_block.attentions[0]
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


def best(scores, groups, count):
    """By NumPy: indices of the highest of each group, in order."""
    parts = np.asarray(scores).reshape(groups, -1)
    chosen = np.sort(np.argsort(-parts, 1)[:, : count // groups], 1)
    return (chosen + np.arange(groups)[:, None] * parts.shape[1]).flatten()


def test_channels_are_chosen_by_the_norms_of_what_writes_them():
    """A channel of a residual stream by all layers that write into it; a hidden one by its own."""
    teacher = network((16,), add_attention=False)
    by_name = {n: p.detach().double().numpy().reshape(len(p), -1) for n, p in teacher.named_parameters()}
    norms = {name: (value**2).sum(1) for name, value in by_name.items()}
    found = unet2d_narrow.norm_scores(teacher)
    assert found.keys() == norms.keys()
    assert all(np.allclose(found[name].numpy(), norms[name], rtol=1e-12) for name in norms)
    made = unet2d_narrow.narrow(teacher, [8]).state_dict()

    def chosen(*layers):
        return best(sum(norms[f"{layer}.{what}"] for layer in layers for what in ("weight", "bias")), 4, 8)

    down = "down_blocks.0.resnets.0"
    stream = chosen("conv_in", f"{down}.conv2", "mid_block.resnets.0.conv2", "mid_block.resnets.1.conv2")
    hidden = chosen(f"{down}.conv1", f"{down}.time_emb_proj")
    up = chosen("up_blocks.0.resnets.1.conv2", "up_blocks.0.resnets.1.conv_shortcut")
    assert len({tuple(stream), tuple(hidden), tuple(up)}) == 3
    assert np.array_equal(made["conv_in.bias"], by_name["conv_in.bias"][stream, 0])
    old = teacher.state_dict()
    assert torch.equal(made[f"{down}.conv1.weight"], old[f"{down}.conv1.weight"][hidden][:, stream])
    assert torch.equal(made[f"{down}.conv2.weight"], old[f"{down}.conv2.weight"][stream][:, hidden])
    assert torch.equal(made["conv_out.weight"], old["conv_out.weight"][:, up])
    first = chosen("up_blocks.0.resnets.0.conv2", "up_blocks.0.resnets.0.conv_shortcut")
    both, norm = np.concatenate([first, stream + 16]), "up_blocks.0.resnets.1.norm1.weight"
    assert torch.equal(made[norm], old[norm][both])  # of what is joined: the stream, and the way around


@pytest.mark.parametrize("shift", [0, 1])
def test_frequencies_of_the_time_are_the_nearest(shift):
    """Of sixteen, eight: each narrow one reads the wide one that is nearest to it."""
    wide = network((32, 32), freq_shift=shift)
    wide.time_embedding.linear_1.weight.data[:] = torch.arange(32.0)
    made = unet2d_narrow.narrow(wide, [16, 16])
    one = torch.ones(1)
    angles, fewer = (torch.arctan2(*net.time_proj(one)[0].view(2, -1).flip(0)) for net in (wide, made))
    nearest = (angles.log()[None] - fewer.log()[:, None]).abs().argmin(1)
    assert made.time_embedding.linear_1.weight[0].tolist() == torch.cat([nearest, 16 + nearest]).tolist()


def test_taylor_scores_are_what_the_loss_changes_by():
    """In float64: the loss of v with a row scaled by 1 - e and 1 + e; the sum over two batches."""
    net = network((4, 4), [False, True], norm_num_groups=2, num_class_embeds=4).double()
    teacher = denoiser_of(net)
    rng = torch.Generator().manual_seed(1)
    batches = [
        (torch.rand(3, 1, 8, 8, generator=rng).double() * 2 - 1, {"class_labels": torch.tensor([0, 2, 1])})
        for _ in range(2)
    ]
    before = {name: p.clone() for name, p in net.named_parameters()}
    found = untouched(lambda: students.taylor_scores(teacher, batches, torch.Generator().manual_seed(5)))
    assert found.keys() == before.keys()

    @torch.no_grad()
    def losses():
        rng, values = torch.Generator().manual_seed(5), []
        for x0, cond in batches:
            t = torch.randint(1, 65, (3,), generator=rng).double() / 64
            eps = torch.randn(x0.shape, generator=rng).double()
            alpha, sigma = COSINE.at(t, like=x0)
            v = net(alpha * x0 + sigma * eps, 64 * t - 1, **cond).sample
            values.append((v - (alpha * eps - sigma * x0)).square().mean().item())
        return np.array(values)

    for name, parameter in list(net.named_parameters())[::3]:
        row, sides = len(parameter) // 2, []
        for scale in (1 - 1e-3, 1 + 1e-3):
            parameter.data[row] = before[name][row] * scale
            sides.append(losses())
        parameter.data[row] = before[name][row]
        slope = (sides[1] - sides[0]) / 2e-3
        assert found[name][row].item() == pytest.approx((slope**2).sum(), rel=1e-3, abs=1e-12), name
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in net.named_parameters())


# from scratch, and what a config says ---------------------------------------------------------------------


def test_fresh_weights_are_of_the_seed_alone():
    teacher = denoiser_of(network((8, 16), [False, True], num_class_embeds=4, layers_per_block=2))
    first, again, other = (untouched(lambda s=s: students.reinitialized(teacher, s)) for s in (1, 1, 2))
    weights = [dict(d.network.named_parameters()) for d in (first, again, other, teacher)]
    assert config_of(first.network) == config_of(teacher.network)
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])
        if weights[0][name].ndim > 1:
            assert not torch.equal(weights[0][name], weights[2][name])
            assert not torch.equal(weights[0][name], weights[3][name])


STUDENTS = {
    "copy": {"kind": "copy"},
    "drop": {"kind": "drop_blocks", "blocks": ["mid_block.attentions", "*.resnets.1"]},
    "innermost": {"kind": "drop_blocks", "blocks": ["down_blocks.2", "mid_block"]},
    "narrow": {"kind": "narrow", "channels": [8, 12, 12]},
    "taylor": {"kind": "narrow", "ratio": 0.5, "importance": "taylor"},
    "scratch": {"kind": "narrow", "ratio": 0.5, "weights": "random"},
    "new": {"kind": "from_config", "model": {"channels": [8, 8], "norm_groups": 4}},
}


def whole(classes=4):
    return denoiser_of(network((16, 24, 24), layers_per_block=2, num_class_embeds=classes))


def build(config, teacher, seed=0):
    rng = torch.Generator().manual_seed(2)
    cond = {} if teacher.num_classes is None else {"class_labels": torch.tensor([0, 1])}
    batches = [(torch.rand(2, *teacher.shape, generator=rng), cond)]
    return TypeAdapter(students.Student).validate_python(config).build(teacher, seed, batches)


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_a_stock_pipeline(name, classes, tmp_path):
    """Opened by diffusers, its network says the same and it draws the same pictures."""
    teacher = whole(classes)
    teacher.steps = 4
    made = build(STUDENTS[name], teacher)
    for key in ("prediction", "shape", "num_classes", "null_label", "clip", "steps"):
        assert getattr(made, key) == getattr(teacher, key)
    assert torch.equal(made.schedule.alphas_cumprod, teacher.schedule.alphas_cumprod)
    made.network.save_pretrained(tmp_path / "network")
    again = UNet2DModel.from_pretrained(tmp_path / "network").eval()
    assert torch.equal(says(again), says(made.network))
    loading.save(made, tmp_path / "pipeline")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(3)]
    cond = {} if classes is None else {"class_labels": [0, 1, 2]}
    given = {"batch_size": 3, "generator": generators, "num_inference_steps": 4, "output_type": "np", **cond}
    theirs = (pipeline(**given).images * 255).round().astype(np.uint8)
    ours = torch.cat(list(generate(made, 3, seed=5))).numpy()
    assert np.array_equal(ours, theirs) and ours.std() > 10


def test_what_a_config_builds():
    teacher = whole()
    made = {name: build(config, teacher).network for name, config in STUDENTS.items()}
    first = {name: net.conv_in.weight for name, net in made.items()}
    old = teacher.network.conv_in.weight
    assert torch.equal(first["copy"], old) and first["copy"] is not old
    assert torch.equal(first["drop"], old) and made["drop"].config.layers_per_block == 1
    assert made["narrow"].config.block_out_channels == made["taylor"].config.block_out_channels == (8, 12, 12)
    for name in ("narrow", "taylor"):
        assert all(row in old.tolist() for row in first[name].tolist())
    assert not torch.equal(first["narrow"], first["taylor"])
    again = [build(STUDENTS["scratch"], teacher, seed).network.conv_in.weight for seed in (0, 1)]
    assert torch.equal(again[0], first["scratch"]) and not torch.equal(again[1], first["scratch"])
    expected = UNet2D(channels=[8, 8], norm_groups=4).build((1, 8, 8), 4)
    assert config_of(made["new"]) == config_of(expected)
    untouched(lambda: build(STUDENTS["new"], teacher))


# what is refused ------------------------------------------------------------------------------------------

LAYERS = {"layers_per_block": 2}
STUCK = [
    ({}, ["mid"], "names 'mid'.*it has down_blocks.0.resnets.0, down_blocks.1.resnets.0, up_blocks.0.res"),
    ({"channels": (8,)}, ["down_blocks.0"], "names 'down_blocks.0', which this network has not"),
    ({"add_attention": False}, ["mid_block.attentions"], "which this network has not"),
    ({"mid_block_type": None}, ["mid_block"], "which this network has not"),
    ({}, ["down_blocks.0.attentions"], "which this network has not"),
    ({}, ["*.resnets.0"], "drops 1 resnets of blocks that have 1; one has to stay"),
    ({}, ["*"], "drop as many of each block"),
    (LAYERS, ["down_blocks.*.resnets.1"], "1 resnets of some.*0 of up_blocks.0.*drop as many"),
    (LAYERS, ["*.resnets.[01]"], "one has to stay"),
    (LAYERS, ["*.resnets.0"], "down_blocks.1.resnets.1 does not fit.*16 for 8.*changes no width"),
    ({}, ["down_blocks.1"], "down_blocks.1 has 16 channels and down_blocks.0 has 8.*use from_config"),
]


@pytest.mark.parametrize(("config", "blocks", "message"), STUCK)
def test_layers_that_cannot_go(config, blocks, message):
    with pytest.raises(UserError, match=message) as caught:
        students.drop_blocks(denoiser_of(network(**config)), blocks)
    assert "\n" not in str(caught.value)


SKIP = {f"{side}_block_types": ("UpBlock2D", "SkipUpBlock2D") for side in ("down", "up")}
SKIP["down_block_types"] = ("SkipDownBlock2D", "DownBlock2D")
UNFIT = [
    ({}, [8], "channels has 1 entries and the network 2 resolutions .8, 16.; give one for each"),
    ({}, [8, 10], "10 is not divided by norm_num_groups 4.*such as 8"),
    ({}, [8, 2], "2 is not divided by norm_num_groups 4.*such as 4"),
    ({}, [7, 16], "7 is odd"),
    ({}, [8, 20], "20 is out of range; the teacher has 16 there"),
    ({}, [0, 16], "channels 0"),
    ({"attention_head_dim": 8}, [8, 12], "12 is not divided by attention_head_dim 8.*such as 8"),
    ({"attention_head_dim": 8, "attention": [True, False]}, [4, 16], "4 is not divided by attention_head"),
    ({"channels": (16, 32), "attn_norm_num_groups": 16}, [8, 24], "24 is not divided by .*16"),
    ({"channels": (16, 16)}, [8, 12], "12"),  # what ties them, the way around a resnet, is no layer
    ({"resnet_time_scale_shift": "scale_shift"}, [8, 8], "time_scale_shift default.*use drop_blocks or from"),
    ({"channels": (32, 32), **SKIP}, [16, 16], "has SkipDownBlock2D; use drop_blocks or from_config"),
    ({"downsample_type": "resnet"}, [8, 8], "has resnets; use drop_blocks or from_config"),
    ({"class_embed_type": "timestep"}, [8, 8], "class labels as numbers; use drop_blocks"),
]


@pytest.mark.parametrize(("config", "channels", "message"), UNFIT)
def test_channels_that_cannot_be(config, channels, message):
    with pytest.raises(UserError, match=message) as caught:
        students.narrow(denoiser_of(network(**config)), channels)
    assert "\n" not in str(caught.value)


def test_a_learned_shortcut_that_is_lost_is_told(caplog):
    """Widths that become one: what was a layer between them begins as the identity. Told once, as a run makes
    its student twice."""
    unet2d_narrow._warn_once.cache_clear()
    for _ in range(2):
        students.narrow(denoiser_of(network()), [8, 8])
    assert caplog.text.count("student.channels 8, 8 for 8, 16: one width where there were two") == 1


def test_no_head_is_there_to_be_divided():
    """Head size counts only where there is attention."""
    made = unet2d_narrow.narrow(network(add_attention=False, attention_head_dim=16), [4, 12])
    assert made.config.block_out_channels == (4, 12)


@pytest.mark.parametrize("ratio", [0.3, 0.01, 0.7])
def test_a_ratio_that_gives_no_width(ratio):
    with pytest.raises(UserError, match="channels"):
        build({"kind": "narrow", "ratio": ratio}, denoiser_of(network((8, 16))))


def test_configs_that_say_too_little_or_too_much():
    for given in ({}, {"channels": [8, 8], "ratio": 0.5}):
        with pytest.raises(ValidationError, match="either channels .a list. or ratio"):
            students.Narrow(kind="narrow", **given)
    for given in ({"kind": "drop_blocks", "blocks": []}, {"kind": "narrow", "ratio": 1.5}, {"kind": "none"}):
        with pytest.raises(ValidationError):
            TypeAdapter(students.Student).validate_python(given)
    plain = Denoiser(torch.nn.Conv2d(1, 1, 1), COSINE, "sample", shape=(1, 8, 8))
    for name in ("drop", "narrow", "taylor", "new"):
        with pytest.raises(UserError, match="a smaller student of a Conv2d is not known; use kind: copy"):
            TypeAdapter(students.Student).validate_python(STUDENTS[name]).build(plain, 0)
