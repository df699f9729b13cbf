"""Smaller students of transformers: what runs in them, and what stock diffusers makes of their configs."""

from pathlib import Path

import diffusers
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.models import sizes, students
from diffkd.models.joint_attention import LastRepeated, repeat_last
from diffkd.models.students import hidden, transformers
from diffkd.models.students.config import Student
from tests.models.unets import config_of, denoiser_of, untouched
from tests.models.unets import network as unet
from tests.transformers import KINDS, LISTS, cond_of, denoiser, network, output

ROOT = Path(__file__).parents[2]
FIRST, LAST = "transformer_blocks.0", "transformer_blocks.3"
STAYS = {"dit": FIRST, "sd3": LAST}


@pytest.fixture(scope="module")
def teachers():
    """Of every kind."""
    return {kind: denoiser(kind, network(kind)) for kind in KINDS}


def names_of(kind):
    return [f"{name}.{i}" for name, count in LISTS[kind].items() for i in range(count)]


def build(teacher, seed=0, **config):
    return TypeAdapter(Student).validate_python(config).build(teacher, seed)


def bypassed(made, kind, names):
    """The output of a denoiser where these blocks hand on what they are given."""

    def hook(module, args, given, result):
        if isinstance(result, tuple):  # two streams
            return given["encoder_hidden_states"], given["hidden_states"]
        return args[0] if args else given["hidden_states"]

    hooks = [made.network.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name in names]
    found = output(made, kind)
    for one in hooks:
        one.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_is_bypassed(teachers, kind, tmp_path):
    """To the bit, alone and in pairs; stock diffusers makes the same network of its config and weights."""
    teacher, before = teachers[kind], output(teachers[kind], kind)
    free = [name for name in names_of(kind) if name != STAYS.get(kind)]
    for dropped in [*([name] for name in free), free[::2][:2]]:
        made = students.drop_blocks(teacher, dropped)
        found = output(made, kind)
        assert torch.equal(found, bypassed(teacher, kind, dropped))
        assert not torch.allclose(found, before, atol=1e-3)
        for name, count in LISTS[kind].items():
            left = count - sum(one.startswith(f"{name}.") for one in dropped)
            assert len(getattr(made.network, name)) == left
    made.network.save_pretrained(tmp_path)
    again = type(teacher.network).from_pretrained(tmp_path).eval()
    assert torch.equal(output(denoiser(kind, again), kind), found)
    assert torch.equal(output(teacher, kind), before)  # itself unchanged
    held = {p.data_ptr() for p in teacher.network.parameters()}
    assert not held & {p.data_ptr() for p in made.network.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_with_everything_kept_it_is_the_teacher(teachers, kind):
    teacher = teachers[kind]
    made = [students.drop_blocks(teacher, []), students.keep_spread(teacher, 1.0)]
    if kind in LAYERS:
        made.append(students.narrow_hidden(teacher, 1.0))
    for one in made:
        assert torch.equal(output(one, kind), output(teacher, kind))
        assert config_of(one.network) == config_of(teacher.network)
        assert one.network is not teacher.network
        assert not one.network.training and type(one.network) is type(teacher.network)


def test_blocks_that_attend_twice_keep_their_place():
    """Stable Diffusion 3.5 names them by number."""
    teacher = denoiser("sd3", network("sd3", num_layers=6, dual_attention_layers=[0, 2, 3]))
    made = students.drop_blocks(teacher, ["transformer_blocks.1", "transformer_blocks.3"]).network
    assert made.config.dual_attention_layers == [0, 1] and made.config.num_layers == 4
    assert [block.use_dual_attention for block in made.transformer_blocks] == [True, True, False, False]
    assert [block.context_pre_only for block in made.transformer_blocks] == [False] * 3 + [True]


@pytest.mark.parametrize("kind", ["dit", "sd3", "z_image"])
def test_a_share_is_spread_evenly(kind):
    """The first and the last stay, and distances between those that stay differ by one at most."""
    (name, field), *_ = transformers.LISTS[transformers.stock_name(network(kind))].items()
    for count in (1, 2, 3, 7, 12):
        with torch.device("meta"):
            made = network(kind, **{field: count}, **({"dual_attention_layers": ()} if kind == "sd3" else {}))
        for share in (0.05, 0.3, 0.5, 0.75, 1.0):
            gone = {int(one.removeprefix(f"{name}.")) for one in transformers.spread(made, share)}
            stay = [i for i in range(count) if i not in gone]
            assert len(stay) == max(1, int(share * count + 0.5))
            assert len(stay) == 1 or (stay[0], stay[-1]) == (0, count - 1)
            assert len(stay) > 1 or stay == [count - 1 if kind == "sd3" else 0]
            gaps = {b - a for a, b in zip(stay, stay[1:], strict=False)}
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_share_of_both_lists_of_flux(teachers):
    made = students.keep_spread(teachers["flux"], 0.5).network
    assert (made.config.num_layers, made.config.num_single_layers) == (1, 2)
    theirs = teachers["flux"].network.single_transformer_blocks
    for mine, number in zip(made.single_transformer_blocks, (0, 2), strict=True):
        assert torch.equal(mine.proj_out.weight, theirs[number].proj_out.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_cost_is_counted(teachers, kind):
    """A student is smaller by the parameters and the operations of what it lost."""
    teacher = teachers[kind]
    name = [*LISTS[kind]][-1]
    lost = [f"{name}.1"], [f"{name}.2"], [f"{name}.1", f"{name}.2"]
    whole, *made = map(sizes.denoiser_size, (teacher, *(students.drop_blocks(teacher, one) for one in lost)))
    for one, names in zip(made, lost, strict=True):
        blocks = map(teacher.network.get_submodule, names)
        assert whole.parameters - one.parameters == sum(p.numel() for b in blocks for p in b.parameters())
    macs = [whole.macs - one.macs for one in made]
    assert macs[0] > 0 and macs[1] > 0 and macs[2] == macs[0] + macs[1]


SD3_5 = {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
SD3 = {
    "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192
}  # fmt: skip
PUBLISHED = {
    "DiT-XL/2": ("DiT", {}),
    "PixArt-Sigma": ("PixArt", {"caption_channels": 4096}),
    "Stable Diffusion 3 medium": ("SD3", SD3),
    "Stable Diffusion 3.5 medium": (
        "SD3",
        {**SD3, **SD3_5},
    ),
    "FLUX.1-dev": ("Flux", {"guidance_embeds": True}),
    "SANA 1.6B": ("Sana", {}),
    "Lumina 2": ("Lumina2", {"cap_feat_dim": 2304}),
    "Z-Image": ("ZImage", {}),
    "Qwen-Image": ("QwenImage", {}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_half_of_the_published_networks(name):
    """The table of the page, on networks without weights."""
    stock, config = PUBLISHED[name]
    kind = getattr(diffusers, f"{stock}Transformer2DModel", None)
    if kind is None:
        pytest.skip("this diffusers has no such network")
    with torch.device("meta"):
        whole = kind(**config)
    half = transformers.without(whole, transformers.spread(whole, 0.5))
    counts = [f"{sum(p.numel() for p in one.parameters()) / 1e6:,.0f} M" for one in (whole, half)]
    page = (ROOT / "docs/methods/knowledge-distillation.md").read_text()
    assert f"| {name} | {' | '.join(counts)} |" in page


@pytest.mark.parametrize("kind", ["dit", "sd3"])
def test_new_weights_depend_on_the_seed_alone(teachers, kind):
    """What a family changed of its modules stays."""
    teacher = teachers[kind]
    if kind == "sd3":
        teacher = students.copy_of(teacher)
        repeat_last(teacher.network, 3)
    first, again, other = (
        untouched(lambda s=s: build(teacher, s, kind="drop_blocks", keep=0.5, weights="random")).network
        for s in (1, 1, 2)
    )
    kept = students.keep_spread(teacher, 0.5).network
    assert config_of(first) == config_of(kept)
    weights = [dict(one.named_parameters()) for one in (first, again, other, kept)]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])
        if weights[0][name].ndim > 1:
            assert not torch.equal(weights[0][name], weights[2][name])
            assert not torch.equal(weights[0][name], weights[3][name])
    if kind == "sd3":
        for one in (first, kept):
            assert all(isinstance(block.attn.processor, LastRepeated) for block in one.transformer_blocks)


# hidden channels ------------------------------------------------------------------------------------------

LAYERS = {
    "sana": ("ff", ("conv_inverted", "conv_depth", "conv_point"), 2.5 * 16),
    "lumina2": ("feed_forward", ("linear_1", "linear_3", "linear_2"), 4 * 16),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_without_hidden_channels_is_with_them_silenced(teachers, kind, tmp_path):
    """Those of the lowest norms; what reads them is set to zero in the teacher, by hand."""
    teacher = students.copy_of(teachers[kind])
    name, parts, width = LAYERS[kind]
    kept = int(width) // 2
    made = students.narrow_hidden(teacher, 0.5)
    layers = [one for key, one in teacher.network.named_modules() if key.endswith(f".{name}")]
    assert len(layers) == (4 if kind == "sana" else 6)  # the refiners', too
    for layer in layers:
        *writers, reader = (getattr(layer, part) for part in parts)
        rows = [
            p.detach().double().reshape(-1, int(width), p[0].numel())
            for one in writers
            for p in one.parameters()
        ]
        scores = sum(row.square().sum((0, 2)) for row in rows)
        reader.weight.data[:, scores.argsort()[: int(width) - kept]] = 0
    assert torch.allclose(output(made, kind), output(teacher, kind), atol=1e-5)
    assert not torch.allclose(output(made, kind), output(teachers[kind], kind), atol=1e-3)
    made.network.save_pretrained(tmp_path)
    again = type(teacher.network).from_pretrained(tmp_path).eval()
    assert torch.equal(output(denoiser(kind, again), kind), output(made, kind))
    assert sizes.denoiser_size(made).macs < sizes.denoiser_size(teacher).macs


def test_importance_by_gradients_chooses_others(teachers):
    teacher = teachers["sana"]
    config = TypeAdapter(Student).validate_python({"kind": "narrow", "ratio": 0.5, "importance": "taylor"})
    x0 = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    found = config.build(teacher, 0, [(x0, cond_of("sana", 2))]).network
    other = students.narrow_hidden(teacher, 0.5).network
    assert config_of(found) == config_of(other)
    assert not torch.equal(output(denoiser("sana", found), "sana"), output(denoiser("sana", other), "sana"))


def test_a_number_of_hidden_channels_is_what_its_factor_makes():
    """Whatever the width: the product is rounded down."""
    for width in (7, 48, 1152, 2240, 2304):
        for wanted in range(1, 3 * width, 11):
            assert int(hidden._factor(wanted, width) * width) == wanted


# what is refused ------------------------------------------------------------------------------------------

DROP, NARROW = {"kind": "drop_blocks"}, {"kind": "narrow"}
REFUSED = [
    ("dit", {**DROP, "blocks": [FIRST]}, f"drops {FIRST}, which has to stay in a DiT.*; drop another"),
    ("sd3", {**DROP, "blocks": ["*.3"]}, f"drops {LAST}, which has to stay in an SD3.*; drop another"),
    ("flux", {**DROP, "blocks": ["transformer_blocks.*"]}, "drops every block of transformer_blocks; leave"),
    ("flux", {**DROP, "blocks": ["mid_block"]},
     "'mid_block', which this network does not have; it has transformer_blocks.0 to transformer_blocks.1 and "
     "single_transformer_blocks.0 to single_transformer_blocks.2"),
    ("lumina2", {**DROP, "blocks": ["noise_refiner.0"]}, "does not have; it has layers.0 to layers.3"),
    ("sana", {**DROP, "blocks": "base"}, "blocks base is of UNets.*SanaTransformer2DModel; use keep"),
    ("qwen_image", {**NARROW, "ratio": 0.5}, "does not support a QwenImage.*one width.*use drop_blocks"),
    ("sana", {**NARROW, "channels": [8]}, "channels are of a UNet's resolutions.*; give ratio"),
    ("sana", {**NARROW, "ratio": 0.33}, "0.33 of 40 hidden channels is 13.2, which is no integer .* 0.325$"),
    ("lumina2", {**NARROW, "ratio": 0.3125}, "is 20, which is no multiple of 8 .*, such as 0.25$"),
    ("z_image", {"kind": "from_config", "model": {}}, "makes a UNet2DModel.*ZImage.*; use drop_blocks"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "message"), REFUSED)
def test_what_a_transformer_cannot_lose(teachers, kind, config, message):
    with pytest.raises(UserError, match=message) as caught:
        build(teachers[kind], **config)
    assert "\n" not in str(caught.value)


def test_a_share_is_of_transformers():
    with pytest.raises(UserError, match="student.keep is of the blocks of a transformer.*student.blocks"):
        build(denoiser_of(unet()), **DROP, keep=0.5)
    plain = Denoiser(torch.nn.Conv2d(1, 1, 1), denoiser_of(unet()).schedule, "sample", shape=(1, 8, 8))
    with pytest.raises(UserError, match="smaller students of a Conv2d are not supported; use kind: copy"):
        build(plain, **DROP, keep=0.5)
    for given in ({}, {"blocks": ["mid_block"], "keep": 0.5}):
        with pytest.raises(ValidationError, match="needs either blocks .* or keep"):
            build(plain, **DROP, **given)
