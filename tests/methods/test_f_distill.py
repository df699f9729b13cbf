"""f-distill on Gaussians: one update by hand, its limit DMD2, where it stays and goes.

That its direction is the gradient of each f-divergence is in tests/core/test_scores.py.
"""

from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from diffkd.core.scores import Divergence
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.dmd2 import DMD2
from diffkd.methods.f_distill import FDistill
from tests.gaussian import gaussian, marginal
from tests.methods.matching import (
    COSINE,
    FAKE,
    STUDENT,
    TEACHER,
    BestHeads,
    Draws,
    losses_of,
    nets_of,
    noised,
    posterior,
    student_gradient,
    train,
)
from tests.saved import counted
from tests.tiny import student


def with_heads(nets):
    return {**nets, "heads": BestHeads(nets["teacher"].network, nets["fake"].network)}


@pytest.mark.parametrize(("bins", "low", "high", "count"), [(1, 1e-9, 1e9, 3), (4, 0.5, 2.0, 24)])
def test_one_update_by_hand(bins, low, high, count):
    """With one bin of noise levels and ratios as they are, or with several bins and both cuts."""
    nets, draws = with_heads(nets_of()), Draws(count=count)
    method = FDistill(
        divergence="forward_kl", gan=0, bins=bins, ratio_min=low, ratio_max=high, fake_updates=1
    )
    found = losses_of(method, nets, count=count)
    assert [loss.network for loss in found] == ["student", "fake", "heads"]
    z = draws.student_noise()
    x = STUDENT[0] + STUDENT[1] * z
    t = draws.times(2, 62)
    x_t = noised(x, t, draws.noise())
    log_ratio = torch.stack(
        [
            sum(
                sign * marginal(COSINE, time, *which).log_prob(image).sum()
                for sign, which in ((1, TEACHER), (-1, FAKE))
            )
            for image, time in zip(x_t, t.tolist(), strict=True)
        ]
    )
    ratio = log_ratio.exp().clamp(low, high)
    uncut = ((ratio > low) & (ratio < high)).sum().item()
    assert uncut == count if bins == 1 else ratio.min() == low and ratio.max() == high and uncut > 5
    of_bin = [[i for i, time in enumerate(t.tolist()) if k < bins * time <= k + 1] for k in range(bins)]
    assert all(len(rows) > 1 for rows in of_bin)
    weight = torch.empty(count).double()
    for rows in of_bin:
        weight[rows] = ratio[rows] / ratio[rows].mean()
    weight = weight / weight.mean()  # h(r) = r, of mean 1
    direction = posterior(x_t, t, FAKE) - posterior(x_t, t, TEACHER)
    direction = direction / (x - posterior(x_t, t, TEACHER)).abs().mean((1, 2, 3), keepdim=True)
    direction = weight.reshape(-1, 1, 1, 1) * direction
    expected = torch.stack([direction.mean(), (direction * z).mean()])
    assert torch.allclose(found[0].metrics["weight"], weight, rtol=1e-6)
    assert torch.allclose(student_gradient(found[0], nets), expected, rtol=1e-6)


def test_by_the_reverse_kl_it_is_dmd2():
    nets = with_heads(nets_of())
    settings = {"gan": 0.1, "fake_updates": 2, "r1": 3.0}
    found = losses_of(FDistill(divergence="reverse_kl", **settings), nets)
    same = losses_of(DMD2(**settings), nets)
    assert [loss.network for loss in found] == [loss.network for loss in same]
    for ours, theirs in zip(found, same, strict=True):
        assert ours.value.item() == pytest.approx(theirs.value.item(), rel=1e-9)


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_a_student_that_is_its_teacher_stays(divergence):
    nets = with_heads(nets_of(TEACHER, TEACHER))
    loss = losses_of(FDistill(divergence=divergence, gan=0), nets)[0]
    assert (student_gradient(loss, nets).abs() < 1e-12).all()
    assert torch.allclose(loss.metrics["weight"], torch.ones(3).double())


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
def test_the_student_becomes_the_teacher(divergence):
    found = train(FDistill(divergence=divergence, fake_updates=2), with_heads(nets_of()), 60)
    assert found == pytest.approx(TEACHER, abs=0.06)


def test_the_weight_prefers_images_that_are_likelier_for_the_teacher():
    nets = with_heads(nets_of())
    weights = {
        name: losses_of(FDistill(divergence=name), nets, count=32)[0].metrics["weight"]
        for name in ("forward_kl", "softened_reverse_kl", "reverse_kl")
    }
    order = weights["forward_kl"].argsort()
    assert weights["forward_kl"].mean() == pytest.approx(1) and weights["forward_kl"].std() > 0.1
    assert weights["softened_reverse_kl"][order[0]] > weights["softened_reverse_kl"][order[-1]]
    assert (weights["reverse_kl"] == 1).all()


def test_what_has_no_weight_keeps_nothing():
    """Of the passes of an update: student, and fake network to its middle; fake network, and on the data."""
    net, kept = student(None, "v_prediction", COSINE), {}
    x0 = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8)
    for name, weights in (("both", {}), ("ratio", {"gan": 0, "gan_fake": 0})):
        method = FDistill(fake_updates=1, **weights)
        nets = {"student": net, "teacher": net, **method.networks(net, net)}
        step = Step(method.stages(net)[0], 0)
        losses = method.losses(nets, Batch(x0, {}), step, torch.Generator().manual_seed(1))
        kept[name] = []
        for _ in range(2):
            with counted() as found:
                next(losses)
            kept[name].append(sum(found))
    alone = kept["ratio"][0]  # a pass of the student, that of the fake network has no more
    assert kept["ratio"][1] == pytest.approx(alone, rel=0.02)
    for with_weights in kept["both"]:
        assert 1.35 * alone < with_weights < 1.7 * alone


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="a student of 3 steps does not fit"):
        FDistill(steps=3).stages(gaussian(COSINE))
    with pytest.raises(UserError, match="guidance needs a label"):
        FDistill(guidance=2).stages(gaussian(COSINE))
    with pytest.raises(ValidationError, match=r"ratio_min 3\.0 is above ratio_max 2\.0; exchange them"):
        FDistill(ratio_min=3, ratio_max=2)
    with pytest.raises(ValidationError, match="divergence"):
        FDistill(divergence="kl")
    net = student(None, "v_prediction", COSINE)
    with pytest.raises(
        UserError, match=r"method\.blocks names 'time_embedding\.act', which outputs no features"
    ):
        FDistill(blocks=["time_embedding.act"]).networks(net, net)
