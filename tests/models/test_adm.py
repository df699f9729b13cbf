"""ADM as EDM's pickles have it: the stock network of the same operations, and students that stock draws."""

from __future__ import annotations

import math
import os

import diffusers
import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import UNet2DModel

import diffkd
from diffkd.core.samplers import sample
from diffkd.errors import UserError
from diffkd.models import adm, saving
from tests import edm, edm_pickles
from tests.edm_pickles import convert_edm, edm_reader

SIDE, WIDTH = edm.SIDE, 128  # the fewest channels of which stock has the same groups
SMALL = {"img_resolution": SIDE, "img_channels": 3, "model_type": "DhariwalUNet", "use_fp16": True,
         "label_dim": 0, "model_channels": WIDTH, "channel_mult": [1, 1], "num_blocks": 1,
         "attn_resolutions": [], "channel_mult_emb": 1, "dropout": 0.1}  # fmt: skip
WIDE = {**SMALL, "label_dim": 3, "augment_dim": 9, "channel_mult": [1, 2], "attn_resolutions": [4]}
LABELLED = {**SMALL, "label_dim": 3}
DEEP = {**SMALL, "num_blocks": 2, "attn_resolutions": [8, 4], "channel_mult_emb": 4}


def shapes(given):
    """Of each layer of a DhariwalUNet of these arguments: the shape of its weight."""
    base, found = given["model_channels"], {}
    embedded = base * given["channel_mult_emb"]

    def block(name, inner, outer, attention=False):
        found.update({
            f"{name}.norm0": (inner,), f"{name}.conv0": (outer, inner, 3, 3),
            f"{name}.affine": (2 * outer, embedded), f"{name}.norm1": (outer,),
            f"{name}.conv1": (outer, outer, 3, 3),
        })  # fmt: skip
        if inner != outer:
            found[f"{name}.skip"] = (outer, inner, 1, 1)
        if attention:
            found[f"{name}.norm2"] = (outer,)
            found.update({f"{name}.qkv": (3 * outer, outer, 1, 1), f"{name}.proj": (outer, outer, 1, 1)})

    found |= {"map_layer0": (embedded, base), "map_layer1": (embedded, embedded)}
    if given["label_dim"]:
        found["map_label"] = (embedded, given["label_dim"])
    if given.get("augment_dim"):
        found["map_augment"] = (base, given["augment_dim"])
    width = base * given["channel_mult"][0]
    found["enc.8x8_conv"] = (width, 3, 3, 3)
    kept = [width]
    for level, mult in enumerate(given["channel_mult"]):
        side = SIDE >> level
        if level:
            block(f"enc.{side}x{side}_down", width, width)
            kept.append(width)
        for i in range(given["num_blocks"]):
            block(f"enc.{side}x{side}_block{i}", width, base * mult, side in given["attn_resolutions"])
            kept.append(width := base * mult)
    block("dec.4x4_in0", width, width, True)
    block("dec.4x4_in1", width, width)
    for level, mult in reversed([*enumerate(given["channel_mult"])]):
        side = SIDE >> level
        if level < len(given["channel_mult"]) - 1:
            block(f"dec.{side}x{side}_up", width, width)
        for i in range(given["num_blocks"] + 1):
            block(
                f"dec.{side}x{side}_block{i}",
                width + kept.pop(),
                base * mult,
                side in given["attn_resolutions"],
            )
            width = base * mult
    return found | {"out_norm": (width,), "out_conv": (3, width, 3, 3)}


def network(given, seed=0):
    """Modules of random weights by their published names, with the filters of those that resample."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.nn.Module()
    for name, shape in shapes(given).items():
        place = root
        for part in name.split("."):
            if part not in place._modules:
                place.add_module(part, torch.nn.Module())
            place = place._modules[part]
        weight = torch.randn(shape, generator=generator)
        weight = 1 + 0.2 * weight if len(shape) == 1 else weight / math.prod(shape[1:]) ** 0.5
        place.weight = torch.nn.Parameter(weight)
        if name not in ("map_label", "map_augment"):
            place.bias = torch.nn.Parameter(0.2 * torch.randn(shape[0], generator=generator))
    for name, part in [*root.named_modules()]:
        if name.endswith(("_down", "_up")):
            part.add_module("skip", torch.nn.Module())  # without weights, as the width stays
            for one in (part.conv0, part.skip):
                one.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
    return root


def reference(weights, x, c_noise, labels, given):
    """The network by its names, as Karras et al.'s publication lays it out, one operation at a time."""
    half, base = WIDTH // 2, given["channel_mult"]
    angles = c_noise[:, None] * 10000 ** (-torch.arange(half, dtype=x.dtype) / half)
    linear = lambda name, v: F.linear(v, weights[f"{name}.weight"], weights.get(f"{name}.bias"))  # noqa: E731
    embedding = torch.cat([angles.cos(), angles.sin()], 1)
    embedding = linear("map_layer1", F.silu(linear("map_layer0", embedding)))
    if labels is not None:
        embedding = embedding + linear("map_label", F.one_hot(labels, given["label_dim"]).to(x.dtype))
    embedding = F.silu(embedding)

    def conv(name, v):
        kernel = weights[f"{name}.weight"]
        return F.conv2d(v, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)

    def norm(name, v):
        scale = weights[f"{name}.weight"]
        return F.group_norm(v, min(32, len(scale) // 4), scale, weights[f"{name}.bias"], 1e-5)

    def resampled(name, v):
        box = torch.full((v.shape[1], 1, 2, 2), 0.25, dtype=v.dtype)
        if name.endswith("_down"):
            return F.conv2d(v, box, stride=2, groups=v.shape[1])
        return F.conv_transpose2d(v, 4 * box, stride=2, groups=v.shape[1]) if name.endswith("_up") else v

    def block(name, v):
        h = conv(f"{name}.conv0", resampled(name, F.silu(norm(f"{name}.norm0", v))))
        scale, shift = linear(f"{name}.affine", embedding)[:, :, None, None].chunk(2, 1)
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h) * (scale + 1) + shift))
        v = conv(f"{name}.skip", v) if f"{name}.skip.weight" in weights else resampled(name, v)
        v = v + h
        if f"{name}.qkv.weight" in weights:
            b, c, height, width = v.shape
            heads = c // 64
            q, k, w = conv(f"{name}.qkv", norm(f"{name}.norm2", v)).reshape(b * heads, 64, 3, -1).unbind(2)
            share = torch.einsum("ncq,nck->nqk", q, k / 8).softmax(2)
            out = torch.einsum("nqk,nck->ncq", share, w).reshape(b, c, height, width)
            v = conv(f"{name}.proj", out) + v
        return v

    kept = [conv("enc.8x8_conv", x)]
    for level in range(len(base)):
        side = SIDE >> level
        for name in ["down"] * (level > 0) + [f"block{i}" for i in range(given["num_blocks"])]:
            kept.append(block(f"enc.{side}x{side}_{name}", kept[-1]))
    x = block("dec.4x4_in1", block("dec.4x4_in0", kept[-1]))
    for level in reversed(range(len(base))):
        side = SIDE >> level
        x = block(f"dec.{side}x{side}_up", x) if level < len(base) - 1 else x
        for i in range(given["num_blocks"] + 1):
            x = block(f"dec.{side}x{side}_block{i}", torch.cat([x, kept.pop()], 1))
    return conv("out_conv", F.silu(norm("out_norm", x)))


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """pickled(given, *positional) -> the network, and its pickle as EDM writes it."""
    edm_pickles.stand_in(monkeypatch)

    def make(given, *positional):
        made = network(given)
        path = tmp_path / "network.pkl"
        return made, edm_pickles.write(path, made, "EDMPrecond", "DhariwalUNet", given, *positional)

    return make


@torch.no_grad()
@pytest.mark.parametrize("given", [WIDE, DEEP], ids=["labels, widths", "two blocks, attention everywhere"])
def test_it_is_the_stock_network_of_the_same_operations(given):
    """In float64, but for the sines of the time, which stock has in float32."""
    made = network(given)
    weights = {key: value for key, value in made.state_dict().items() if "resample" not in key}
    stock = adm.network_of({**given, "in_channels": 3, "out_channels": 3}, weights).double().eval()
    x, c_noise = edm.noise().double(), torch.tensor([-1.5, 0.1, 1.1], dtype=torch.float64)
    labels = torch.tensor([2, 0, 1]) if given["label_dim"] else None
    theirs = stock(x, c_noise, class_labels=labels).sample
    ours = reference({key: value.double() for key, value in weights.items()}, x, c_noise, labels, given)
    assert ours.std() > 0.1 and (ours - theirs).abs().max() <= 1e-7 * ours.abs().max()


def test_a_pickle_becomes_a_stock_teacher(pickled, tmp_path):
    """Of whose file nothing is run; it is drawn beside the stock pipeline, and so are its students."""
    _, path = pickled(WIDE)
    convert_edm.convert(path, tmp_path / "teacher")
    assert "EDM_PICKLE_RAN" not in os.environ
    teacher = diffkd.load(tmp_path / "teacher")
    assert (teacher.num_classes, teacher.null_label, teacher.schedule.sigma_data) == (3, None, 0.6)
    assert isinstance(teacher.network, UNet2DModel) and teacher.network.config.dropout == 0.1
    labels = [2, 0, 1]
    for steps in (1, 4):
        teacher.steps = steps
        saving.save(teacher, tmp_path / f"{steps}")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / f"{steps}")
        assert type(pipeline).__name__ == "ConsistencyModelPipeline"
        theirs, _ = edm.stock(pipeline, steps, labels)
        with torch.no_grad():
            ours = sample(teacher, edm.noise(), steps, class_labels=torch.tensor(labels))
        assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_a_run_of_the_config(pickled, cli, tmp_path, monkeypatch):
    """configs/edm-imagenet64/progressive.yaml, an update of its last stage on a network of its layout; the
    student is a stock pipeline."""
    monkeypatch.chdir(tmp_path)
    _, path = pickled(LABELLED)
    convert_edm.convert(path, tmp_path / "models/edm-imagenet64")
    config = yaml.safe_load((edm.ROOT / "configs/edm-imagenet64/progressive.yaml").read_text())
    config |= {"evaluation": None, "pictures": 0, "spread_every": None}
    for label in range(3):
        edm.pictures(tmp_path / f"images/{label}", 2)
    config["data"] |= {"path": str(tmp_path / "images"), "size": SIDE}
    config["method"] |= {"steps": [1], "updates": [1], "warmup": 0}
    config["training"] |= {"batch_size": 2, "micro_batches": 1, "precision": "float32"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    folder = tmp_path / "runs/edm-imagenet64-progressive/students/1-steps"
    theirs, _ = edm.stock(diffusers.DiffusionPipeline.from_pretrained(folder), 1, [2, 0, 1])
    with torch.no_grad():
        ours = sample(diffkd.load(folder), edm.noise(), 1, class_labels=torch.tensor([2, 0, 1]))
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def weights():
    return {key: value for key, value in network(LABELLED).state_dict().items() if "resample" not in key}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label_dropout": 0.1}, "label_dropout 0.1; read so far is 0"),
        ({"encoder_type": "standard"}, "argument 'encoder_type', which is of no network read so far"),
        ({"channel_mult": [2, 2]}, r"channel_mult \[2, 2\]: .* those that begin with 1"),
        ({"model_channels": 96}, "96 channels .* multiples of 32 from 128"),
        ({"model_channels": 144}, "144 channels .* multiples of 32 from 128"),
        ({"model_channels": 160}, "attention of 160 channels: a UNet2DModel has heads of 64"),
        ({"num_blocks": 2}, "other weights than its arguments say .*Missing key"),
        ({"attn_resolutions": [8]}, "other weights than its arguments say .*Missing key.*attentions"),
        ({"label_dim": 4}, "other weights than its arguments say .*class_embedding"),
        ({"num_blocks": "2"}, "other weights than its arguments say"),
    ],
    ids=str,
)
def test_what_no_stock_network_stands_for(weights, changes, says, tmp_path):
    record, inner = edm_reader.Record(), edm_reader.Record()
    record.kind, inner.kind = "EDMPrecond", "DhariwalUNet"
    record.state = {"_init_kwargs": {**LABELLED, **changes}, "_modules": {"model": inner}}
    inner.state = {"_parameters": weights}
    with pytest.raises(UserError, match=says) as refused:
        convert_edm.network_of(record, tmp_path / "x.pkl")
    assert "\n" not in str(refused.value)


def test_arguments_without_names_are_refused(pickled):
    _, path = pickled(SMALL, 3)
    with pytest.raises(UserError, match="arguments without names"):
        convert_edm.network_of(edm_reader.read(path).network, path)
