"""Adversarial distillation on Gaussians: one update by hand, where it stays and goes; its blocks.

What the student descends against the best discriminator is in tests/core/test_discriminator.py.
"""

import pytest
import torch

from diffkd.errors import UserError
from diffkd.methods.adversarial import Adversarial
from tests.gaussian import gaussian
from tests.methods.matching import (
    COSINE,
    STUDENT,
    TEACHER,
    BestHeads,
    Draws,
    batch_of,
    losses_of,
    nets_of,
    noised,
    posterior,
    student_gradient,
    train,
)
from tests.tiny import student


def with_heads(nets):
    """The best discriminator of the student's images as they are."""
    return {**nets, "heads": BestHeads(nets["teacher"].network, nets["student"].network)}


def logits(nets, x_t, t):
    feature = torch.cat([x_t, (64 * t - 1).reshape(-1, 1, 1, 1).expand(x_t.shape)], 1)
    return nets["heads"]([feature])[:, 0]


def level(draws):
    """The time at which log(sigma / alpha) is normal(1, 1)."""
    return COSINE.time_of(-(1 + torch.randn(3, generator=draws.rng, dtype=torch.float64)))


def test_one_update_by_hand():
    nets, draws = with_heads(nets_of()), Draws()
    method = Adversarial(r1=10, r1_noise=0.2, distance=2.5)
    found = losses_of(method, nets)
    assert [loss.network for loss in found] == ["student", "heads"]
    # the student: E -logit, and alpha_t |x - D(x_t)|²
    z = draws.student_noise()
    x = STUDENT[0] + STUDENT[1] * z
    t = level(draws)
    x_t = noised(x, t, draws.noise())
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in COSINE.at(t))
    restored = posterior(x_t, t, TEACHER)
    value = -logits(nets, x_t, t).mean() + 2.5 * (alpha * (x - restored).square()).mean()
    assert found[0].value.item() == pytest.approx(value.item(), rel=1e-6)
    # -log p / q of one value falls by the difference of two scores of normal distributions
    score_p, score_q = (
        (alpha * mean - x_t) / (alpha**2 * std**2 + sigma**2) for mean, std in (TEACHER, STUDENT)
    )
    by_x = alpha * (score_q - score_p) / 3 + 2 * 2.5 * alpha * (x - restored) / (3 * 16)
    expected = torch.stack([by_x.sum(), (by_x * z).sum()])
    assert torch.allclose(student_gradient(found[0], nets), expected, rtol=1e-6)
    # the heads: the hinge at other noise levels, and how the logits of real images change
    t = level(draws)
    drawn = logits(nets, noised(x, t, draws.noise()), t)
    t = level(draws)
    x_t = noised(batch_of().x0, t, draws.noise())
    real = logits(nets, x_t, t)
    alpha, _ = (c.reshape(-1, 1, 1, 1) for c in COSINE.at(t))
    moved = logits(nets, x_t + alpha * 0.2 * draws.noise(torch.float64), t)
    value = (1 - real).clamp(min=0).mean() + (1 + drawn).clamp(min=0).mean()
    value = value + 10 * (real - moved).square().mean()
    assert found[1].value.item() == pytest.approx(value.item(), rel=1e-6)


def test_a_student_that_is_its_teacher_stays():
    nets = with_heads(nets_of(TEACHER))
    assert (student_gradient(losses_of(Adversarial(), nets)[0], nets).abs() < 1e-12).all()


def test_against_the_best_discriminator_the_student_becomes_the_teacher():
    nets = with_heads(nets_of())
    del nets["fake"]
    assert train(Adversarial(noise_mean=0), nets, 50) == pytest.approx(TEACHER, abs=0.04)


def test_the_distance_alone_pulls_images_to_where_the_teacher_restores_them():
    """Where the discriminator says nothing an image moves along D(x_t) - x: the spread shrinks."""
    nets = with_heads(nets_of(TEACHER))
    (loss, _) = losses_of(Adversarial(distance=2.5), nets, count=256)
    mean, std = student_gradient(loss, nets)
    assert std > 0.01 and abs(mean) < std


def test_it_has_heads_on_every_block_of_its_teacher_or_on_those_named():
    net = student(None, "v_prediction", COSINE)
    assert Adversarial().networks(net, net)["heads"].blocks == [
        "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"
    ]  # fmt: skip
    assert Adversarial(blocks=["mid_block"]).networks(net, net)["heads"].blocks == ["mid_block"]
    with pytest.raises(UserError, match=r"method\.blocks names 'middle', which the network does not have"):
        Adversarial(blocks=["middle"]).networks(net, net)


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.5, 0.9), None])
def test_student_and_heads_learn_without_momentum_or_by_the_betas_that_are_given(betas):
    given = {} if betas == (0.0, 0.99) else {"betas": betas}
    (stage,) = Adversarial(learning_rate=1e-3, critic_learning_rate=2e-3, **given).stages(gaussian(COSINE))
    assert [stage.optimization(name).betas for name in ("student", "heads")] == [betas, betas]
    assert stage.rate(100) == stage.rate(100, "student") == stage.rate(100, "heads") / 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="a student of 3 steps does not fit"):
        Adversarial(steps=3).stages(gaussian(COSINE))
    with pytest.raises(UserError, match="guidance needs a label"):
        Adversarial(guidance=2, distance=1).stages(gaussian(COSINE))
    with pytest.raises(ValueError, match="guidance 2 is of the teacher's prediction, which distance: 0"):
        Adversarial(guidance=2)
