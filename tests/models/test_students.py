"""Students made from their teacher: what must not change, and what a config makes of it."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from pydantic import TypeAdapter, ValidationError

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.generation.generator import generate
from diffkd.models import saving, students
from diffkd.models.students.blocks import drop_layers
from diffkd.models.students.channels import narrow_unet
from diffkd.models.students.config import Narrow, Student
from diffkd.models.unet import UNet2D
from tests.models.unets import COSINE, XL, config_of, denoiser_of, network, outputs, prompted, untouched

VARIANTS = [
    {},
    {"channels": (8, 8, 16), "layers_per_block": 2, "num_class_embeds": 4},
    {"attention": [True, True], "attention_head_dim": 8, "layers_per_block": 3},
    {"attention": [False, True], "attention_head_dim": None, "time_embedding_dim": 24},
    {"channels": (12,), "attention": [True], "mid_block_type": None, "num_class_embeds": 3},
    {"channels": (8, 8), "add_attention": False, "freq_shift": 1, "flip_sin_to_cos": False},
]

PROMPTED = [
    {"channels": (8, 16, 16), "attention": (True, True, False), "attention_head_dim": 2},
    {"attention": (False, True), "transformer_layers_per_block": [1, 2], "layers_per_block": 2, **XL},
    {"mid_block_type": None, "layers_per_block": [1, 2], "time_cond_proj_dim": 6},
    {"channels": (8,), "attention": (True,), "mid_block_type": "UNetMidBlock2D", "time_embedding_dim": 24},
    {
        "layers_per_block": 2, "transformer_layers_per_block": [1, [2, 1]], "mid_block_type": None,
        "reverse_transformer_layers_per_block": [[1, 2, 1], 1],
    },
]  # fmt: skip

KINDS = {
    "drop": lambda net: drop_layers(net, []),
    "narrow": lambda net: narrow_unet(net, net.config.block_out_channels),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("make", "config"), [(network, one) for one in VARIANTS] + [(prompted, one) for one in PROMPTED]
)
def test_with_everything_kept_it_is_the_teacher(kind, make, config):
    for training in (False, True):
        teacher = make(**config).train(training)
        made = KINDS[kind](teacher)
        assert torch.equal(outputs(made), outputs(teacher)) and made.training is training
        assert config_of(made) == config_of(teacher)
        held = {parameter.data_ptr() for parameter in teacher.parameters()}
        assert not held & {parameter.data_ptr() for parameter in made.parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_has_the_dtype_of_its_teacher(dtype):
    teacher = network().to(dtype)
    for made in (drop_layers(teacher, ["mid_block"]), narrow_unet(teacher, [4, 8])):
        assert {p.dtype for p in made.parameters()} == {dtype}
    assert students.reinitialized(denoiser_of(teacher), 0).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_weights_draws_no_random_numbers(kind):
    teacher = network()
    untouched(lambda: KINDS[kind](teacher))


def test_new_weights_depend_on_the_seed_alone():
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
    return TypeAdapter(Student).validate_python(config).build(teacher, seed, batches)


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_a_stock_pipeline(name, classes, tmp_path):
    """Opened by diffusers, its network has the same outputs and it draws the same images."""
    teacher = whole(classes)
    teacher.steps = 4
    made = build(STUDENTS[name], teacher)
    for key in ("prediction", "shape", "num_classes", "null_label", "clip", "steps"):
        assert getattr(made, key) == getattr(teacher, key)
    assert torch.equal(made.schedule.alphas_cumprod, teacher.schedule.alphas_cumprod)
    made.network.save_pretrained(tmp_path / "network")
    again = UNet2DModel.from_pretrained(tmp_path / "network").eval()
    assert torch.equal(outputs(again), outputs(made.network))
    saving.save(made, tmp_path / "pipeline")
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


@pytest.mark.parametrize("ratio", [0.3, 0.01, 0.7])
def test_a_ratio_that_does_not_give_integers(ratio):
    with pytest.raises(UserError, match="channels"):
        build({"kind": "narrow", "ratio": ratio}, denoiser_of(network((8, 16))))


def test_configs_that_say_too_little_or_too_much():
    for given in ({}, {"channels": [8, 8], "ratio": 0.5}):
        with pytest.raises(ValidationError, match="either channels .a list. or ratio"):
            Narrow(kind="narrow", **given)
    for given in ({"kind": "drop_blocks", "blocks": []}, {"kind": "narrow", "ratio": 1.5}, {"kind": "none"}):
        with pytest.raises(ValidationError):
            TypeAdapter(Student).validate_python(given)
    plain = Denoiser(torch.nn.Conv2d(1, 1, 1), COSINE, "sample", shape=(1, 8, 8))
    for name in ("drop", "narrow", "taylor", "new"):
        with pytest.raises(UserError, match="smaller students of a Conv2d are not supported; use kind: copy"):
            TypeAdapter(Student).validate_python(STUDENTS[name]).build(plain, 0)
