"""Kinds of guidance on Gaussians in closed form: where a model is guided, and what it is led away from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffkd.core import guidance, samplers
from diffkd.core.denoiser import GUIDANCE, Denoiser
from diffkd.core.guidance_kinds import described, in_words, set_kind
from diffkd.core.schedules import EDMSchedule, FlowSchedule, Shift
from diffkd.errors import UserError
from diffkd.generation.generator import ImageGenerator
from diffkd.methods import progressive
from diffkd.models.students.copies import with_network
from tests.guided import COSINE, LINEAR, MEANS, NULL, Classes, by_hand, level, model, posterior

FLOW, EDM = FlowSchedule(Shift(3.0)), EDMSchedule()


def states(count=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 2, 2, generator=rng, dtype=torch.float64)
    return x, torch.arange(count) % 3


# within an interval


@pytest.mark.parametrize("schedule", [COSINE, LINEAR, FLOW, EDM], ids=["cosine", "linear", "flow", "edm"])
def test_one_time_for_the_batch_is_two_calls_inside_and_one_outside(schedule):
    teacher = model(schedule, "sample")
    set_kind(teacher, interval=(0.28, 5.42))
    x, labels = states()
    for t in (0.02, 0.3, 0.5, 0.6, 0.9, 1.0):
        teacher.network.calls.clear()
        found = teacher(x, t, guidance=3.0, class_labels=labels)
        inside = 0.28 <= level(schedule, t) <= 5.42
        assert teacher.network.calls == [10 if inside else 5]
        assert teacher.calls(t, 3.0) == 1 + inside and teacher.calls(t) == 1
        expected = by_hand(schedule, x, t, labels, 3.0 if inside else 1.0)
        assert torch.allclose(found, expected, atol=1e-6)  # a network's time is float32
    assert 0.28 <= level(COSINE, 0.5) <= 5.42 and level(COSINE, 0.02) < 0.28 and level(COSINE, 1.0) > 5.42


def test_a_batch_of_times_inside_and_outside():
    teacher = model()
    set_kind(teacher, interval=(0.28, 5.42))
    x, labels = states(6)
    t = torch.tensor([2, 10, 32, 50, 63, 64], dtype=torch.float64) / 64
    inside = torch.tensor([0.28 <= level(COSINE, time) <= 5.42 for time in t.tolist()])
    assert inside.any() and not inside.all()
    w = torch.where(inside, 3.0, 1.0).reshape(-1, 1, 1, 1)
    found = teacher(x, t, guidance=3.0, class_labels=labels)
    assert torch.allclose(found, by_hand(COSINE, x, t, labels, w), atol=1e-6)
    outside = teacher(x, t, class_labels=labels)[~inside]
    assert torch.equal(found[~inside], outside)  # the plain prediction itself
    for i, time in enumerate(t.tolist()):  # as one time for the batch
        alone = teacher(x[i : i + 1], time, guidance=3.0, class_labels=labels[i : i + 1])
        assert torch.allclose(found[i : i + 1], alone, atol=1e-12)


def test_a_weight_of_each_example_within_an_interval():
    teacher = model()
    set_kind(teacher, interval=(0.28, 5.42))
    x, labels = states(3)
    t = torch.tensor([2, 32, 32], dtype=torch.float64) / 64
    given = {GUIDANCE: torch.tensor([9.0, 2.0, 4.0]), "class_labels": labels}
    w = torch.tensor([1.0, 2.0, 4.0]).reshape(-1, 1, 1, 1)
    assert torch.allclose(teacher(x, t, **given), by_hand(COSINE, x, t, labels, w), atol=1e-6)


def test_both_ends_are_inside():
    kind = guidance.Kind(interval=(level(FLOW, 0.25), level(FLOW, 0.5)))
    times = [0.25 - 1e-9, 0.25, 0.4, 0.5, 0.5 + 1e-9]
    expected = [False, True, True, True, False]
    assert [kind.inside(FLOW, t) for t in times] == expected
    assert kind.inside(FLOW, torch.tensor(times, dtype=torch.float64)).tolist() == expected


def test_an_interval_of_every_level_is_plain_guidance():
    x, labels = states()
    t = torch.linspace(0.01, 1, 5, dtype=torch.float64)
    plain, within = model(LINEAR, "epsilon"), model(LINEAR, "epsilon")
    set_kind(within, interval=(0.0, level(LINEAR, 1.0) * (1 - 1e-12)))
    for time in (t[:4], 0.5):
        a, b = (m(x[:4], time, guidance=2.5, class_labels=labels[:4]) for m in (plain, within))
        assert torch.equal(a, b)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "ancestral"])
def test_evaluations_of_a_sampling_run_are_counted(sampler):
    teacher = model()
    set_kind(teacher, interval=(0.28, 5.42))
    generator = ImageGenerator(teacher, 3, steps=8, sampler=sampler, guidance=2.0)
    teacher.network.calls.clear()
    list(generator.batches())
    assert generator.nfe == sum(teacher.network.calls) / 3
    assert samplers.nfe(sampler, 8) < generator.nfe < 2 * samplers.nfe(sampler, 8)


# against a worse model

OTHERS = [
    (COSINE, "v_prediction", COSINE, "v_prediction"),
    (COSINE, "v_prediction", FLOW, "flow"),
    (FLOW, "flow", COSINE, "sample"),
    (LINEAR, "epsilon", COSINE, "v_prediction"),
    (LINEAR, "epsilon", LINEAR, "sample"),
    (LINEAR, "epsilon", FLOW, "sample"),
    (EDM, "sample", FLOW, "flow"),
]


@pytest.mark.parametrize(("schedule", "prediction", "its_schedule", "its_prediction"), OTHERS)
def test_autoguidance_by_hand_whatever_the_worse_models_schedule(
    schedule, prediction, its_schedule, its_prediction
):
    """Given with the same label, its data wider and its classes nearer: worse + w (given - worse)."""
    means, std = 0.5 * MEANS, 0.8
    teacher, worse = model(schedule, prediction), model(its_schedule, its_prediction, means=means, std=std)
    set_kind(teacher, worse=worse)
    x, labels = states()
    of_label = means[labels].reshape(-1, 1, 1, 1)
    t = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64)
    for time in (t, 0.5, 1.0):
        teacher.network.calls.clear()
        worse.network.calls.clear()
        found = teacher(x, time, guidance=2.5, class_labels=labels)
        expected = by_hand(schedule, x, time, labels, 2.5, posterior(schedule, x, time, of_label, std))
        assert torch.allclose(found, expected, atol=2e-5)  # networks' times are float32
        assert teacher.network.calls == worse.network.calls == [5]


def test_a_worse_model_that_is_as_good_leaves_the_teacher_unguided():
    teacher = model()
    set_kind(teacher, worse=model())
    x, labels = states()
    t = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    unguided = teacher(x, t, class_labels=labels)
    for w in (0.0, 1.5, 7.0):
        assert torch.allclose(teacher(x, t, guidance=w, class_labels=labels), unguided, atol=1e-12)


def test_its_null_is_not_needed():
    teacher, worse = model(), model(means=0.5 * MEANS)
    teacher.null_label = worse.null_label = None
    x, labels = states()
    with pytest.raises(UserError, match="means no class"):
        teacher(x, 0.5, guidance=2.0, class_labels=labels)
    set_kind(teacher, worse=worse)
    teacher.check_guidance()
    assert teacher(x, 0.5, guidance=2.0, class_labels=labels).isfinite().all()


class Unlabelled(Classes):
    """What the data of no class has, and no label is given."""

    def forward(self, x_t, time):
        return super().forward(x_t, time, torch.full((len(x_t),), NULL))


def test_a_worse_model_without_labels_is_a_null_label():
    """Classifier-free guidance by a network of its own, as EDM2 has it."""
    teacher = model()
    unlabelled = Unlabelled(COSINE, "v_prediction")
    set_kind(teacher, worse=Denoiser(unlabelled, COSINE, "v_prediction", shape=(1, 2, 2)))
    x, labels = states()
    for t in (torch.linspace(0.1, 1, 5, dtype=torch.float64), 0.5):
        found = teacher(x, t, guidance=2.5, class_labels=labels)
        assert torch.allclose(found, by_hand(COSINE, x, t, labels, 2.5), atol=1e-6)
    with pytest.raises(UserError, match="takes labels of 3 classes, and small takes no class labels"):
        set_kind(changed(num_classes=None), worse=model())


def test_a_worse_model_within_an_interval_rescaled():
    """Outside it is not even asked; inside the deviation of an image is that of the given prediction."""
    teacher, worse = model(), model(means=0.5 * MEANS, std=0.8)
    set_kind(teacher, interval=(0.28, 5.42), rescale=1.0, worse=worse)
    x, labels = states()
    assert torch.equal(
        teacher(x, 1.0, guidance=3.0, class_labels=labels), teacher(x, 1.0, class_labels=labels)
    )
    assert worse.network.calls == []
    found = teacher.output(x, 0.5, guidance=3.0, class_labels=labels)
    given = teacher.output(x, 0.5, class_labels=labels)
    its = worse.output(x, 0.5, class_labels=labels)
    guided = its + 3.0 * (given - its)
    ratio = given.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    assert worse.network.calls == [5, 5] and torch.allclose(found, guided * ratio, atol=1e-12)


class Sum(nn.Module):
    """A multiple of the state, plus the label."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x, time, class_labels):
        return self.factor * x + class_labels.to(x).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("schedule", [COSINE, FLOW], ids=["its own", "another"])
def test_a_run_is_one_graph(schedule):
    """As captured and compiled runs need it, which one call prepares: no value is read back."""
    options = {"shape": (1, 2, 2), "num_classes": 3, "null_label": NULL}
    teacher = Denoiser(Sum(0.5), COSINE, "v_prediction", **options)
    set_kind(
        teacher, interval=(0.28, 5.42), rescale=0.5, worse=Denoiser(Sum(0.1), schedule, "sample", **options)
    )

    def draw(x, labels):
        return samplers.sample(teacher, x, 4, guidance=2.0, class_labels=labels)

    x, labels = states()
    expected = draw(x, labels)
    assert torch.allclose(torch.compile(draw, backend="eager", fullgraph=True)(x, labels), expected)


def test_it_moves_with_the_model_and_learns_nothing():
    teacher, worse = model(), model()
    worse.requires_grad_(True)
    set_kind(teacher, worse=worse)
    teacher.to(torch.float32)
    assert worse.dtype == torch.float32 and not any(p.requires_grad for p in teacher.parameters())


# forms of a family, and what copies keep


def test_a_form_of_a_family_is_kept_by_copies_and_a_kind_is_not():
    teacher = Denoiser(
        Classes(COSINE, "sample"), COSINE, "sample", shape=(1, 2, 2), num_classes=3, null_label=NULL,
        guide=guidance.row_norms,
    )  # fmt: skip
    set_kind(teacher, rescale=0.5)
    x, labels = states()
    given, null = (teacher(x, 0.5, class_labels=c) for c in (labels, torch.full_like(labels, NULL)))
    rows = guidance.row_norms(null, given, 2.0)
    found = teacher(x, 0.5, guidance=2.0, class_labels=labels)
    assert torch.allclose(found, guidance.rescaled(rows, given, 0.5), atol=1e-12)
    copied = with_network(teacher, teacher.network)
    assert torch.allclose(copied(x, 0.5, guidance=2.0, class_labels=labels), rows, atol=1e-12)


def test_a_kind_is_taken_back():
    teacher = model()
    set_kind(teacher, interval=(0.28, 5.42), worse=model())
    set_kind(teacher)
    assert teacher.guidance_kind == guidance.Kind() and teacher.worse is None and described(teacher) == {}


def test_what_is_said_of_it():
    teacher = model()
    set_kind(teacher, interval=(0.28, 5.42), rescale=0.7, worse=model(std=0.8))
    found = described(teacher)
    assert (
        found["interval"] == [0.28, 5.42] and found["rescale"] == 0.7 and len(found["worse"]["sha256"]) == 64
    )
    words = in_words({**found, "worse": {"path": "small"}})
    assert words == "where sigma / alpha is 0.28 to 5.42, rescaled by 0.7, against 'small'"


# what a target of distillation is


def test_the_target_of_progressive_distillation_by_hand():
    """Two DDIM steps of the teacher: the first outside the interval, unguided, the second within."""
    teacher = model()
    t, s = torch.tensor([60 / 64], dtype=torch.float64), torch.tensor([20 / 64], dtype=torch.float64)
    middle = (t + s) / 2
    assert level(COSINE, t.item()) > 5.42 > level(COSINE, middle.item()) > 0.28
    set_kind(teacher, interval=(0.28, 5.42))
    x, labels = states(1)
    found = progressive.target(teacher, x, t, s, guidance=3.0, class_labels=labels)
    first = samplers.ddim_step(COSINE, x, by_hand(COSINE, x, t, labels, 1.0), t, middle)
    last = samplers.ddim_step(COSINE, first, by_hand(COSINE, first, middle, labels, 3.0), middle, s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = COSINE.at(t, like=x), COSINE.at(s, like=x)
    ratio = sigma_s / sigma_t
    assert torch.allclose(found, (last - ratio * x) / (alpha_s - ratio * alpha_t), atol=1e-5)


# refusals


def part(key):
    """A codec or a conditioner, by the key of its weights."""
    return SimpleNamespace(key=key)


def changed(**values):
    made = model()
    made.name = "small"
    for name, value in values.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("worse", "says"),
    [
        (
            {"shape": (1, 4, 4)},
            "small makes 1x4x4, and the model makes 1x2x2; autoguidance needs a worse model",
        ),
        ({"num_classes": 4}, "small takes labels of 4 classes, and the model takes labels of 3 classes"),
        (
            {"example": {"encoder_hidden_states": torch.zeros(1, 7, 16)}},
            "encoder_hidden_states of 7x16, and the",
        ),
        ({"codec": part("a")}, "small makes latents of 1x2x2"),
        ({"conditioner": part("a")}, "small is given the embeddings of other encoders than the model"),
        ({"steps": 4}, "small is a student of 4 steps, which knows no other noise levels; for a worse model"),
        ({"guidance_baked_in": 2.0}, "small has guidance baked in; for a worse model take a smaller teacher"),
        ({"guidance_range": (1.0, 5.0)}, "small takes its weight as an input"),
    ],
)
def test_worse_models_of_something_else(worse, says):
    with pytest.raises(UserError, match=says):
        set_kind(model(), worse=changed(**worse))


def test_worse_models_of_other_latents_and_of_fewer_noise_levels():
    teacher = changed(codec=part("a"))
    with pytest.raises(UserError, match="small works in the latents of other encoders than small"):
        set_kind(teacher, worse=changed(codec=part("b")))
    short = model(LINEAR, "epsilon")
    short.name = "short"
    with pytest.raises(
        UserError, match="short cannot stand beside the model: a schedule whose sigma / alpha"
    ):
        set_kind(model(), worse=short)
    teacher = model()
    with pytest.raises(UserError, match="against itself, which does nothing"):
        set_kind(teacher, worse=teacher)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"guidance_baked_in": 3.0},
            "small has guidance 3 baked in, .*take the model that it was distilled from",
        ),
        (
            {"guidance_range": (1.0, 5.0)},
            "small takes its guidance weight as an input.*distilled from, or leave",
        ),
        ({"null_label": None}, "means no class"),
    ],
)
def test_models_that_are_no_teacher_to_guide(values, says):
    with pytest.raises(UserError, match=says):
        set_kind(changed(**values), interval=(0.28, 5.42))


def test_intervals_that_the_schedule_does_not_have():
    end = level(LINEAR, 1.0)
    for interval, says in (((0.3, end + 1), "end it at 157.4 or below"), ((end, 900.0), "use lower ones")):
        with pytest.raises(UserError, match=f"whose sigma / alpha ends at 157.4; {says}"):
            set_kind(model(LINEAR, "epsilon"), interval=interval)
