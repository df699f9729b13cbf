"""SiD on Gaussians: one update by hand, where it stays and goes; what it refuses.

That its gradient is the expected one, the Fisher divergence's at 1/2, is in tests/core/test_scores.py.
"""

import pytest
import torch
from pydantic import ValidationError

from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.sid import SiD
from tests.gaussian import gaussian
from tests.methods.matching import (
    COSINE,
    FAKE,
    STUDENT,
    TEACHER,
    Draws,
    batch_of,
    losses_of,
    nets_of,
    noised,
    posterior,
    student_gradient,
    train,
)


def slope(t, which):
    """d E[x0 | x_t] / d x_t."""
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in COSINE.at(t))
    return alpha * which[1] ** 2 / (alpha**2 * which[1] ** 2 + sigma**2)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_one_update_by_hand(alpha):
    nets, draws = nets_of(), Draws()
    found = losses_of(SiD(alpha=alpha), nets)
    assert [loss.network for loss in found] == ["student", "fake"]
    z = draws.student_noise()
    x = STUDENT[0] + STUDENT[1] * z
    t = draws.times(2, 62)
    x_t = noised(x, t, draws.noise())
    real, fake = posterior(x_t, t, TEACHER), posterior(x_t, t, FAKE)
    size = (x - real).abs().mean((1, 2, 3), keepdim=True)
    # as published code has it: delta * ((real - x) - alpha * delta)
    delta = real - fake
    value = (delta * ((real - x) - alpha * delta) / size).mean()
    assert found[0].value.item() == pytest.approx(value.item(), rel=1e-9)
    # the derivative in x, by hand: of both predictions through x_t, and of x itself
    scale = COSINE.at(t)[0].reshape(-1, 1, 1, 1)
    of_real, of_fake = scale * slope(t, TEACHER), scale * slope(t, FAKE)
    of_delta = of_real - of_fake
    by_x = (of_delta * ((real - x) - alpha * delta) + delta * ((of_real - 1) - alpha * of_delta)) / size
    expected = torch.stack([by_x.mean(), (by_x * z).mean()])
    assert torch.allclose(student_gradient(found[0], nets), expected, rtol=1e-9)
    t = draws.times(1, 64)
    error = posterior(noised(x, t, draws.noise()), t, FAKE) - x
    assert found[1].value.item() == pytest.approx(error.square().mean().item(), rel=1e-9)


def test_a_student_that_is_its_teacher_stays():
    nets = nets_of(TEACHER, TEACHER)
    assert (student_gradient(losses_of(SiD(), nets)[0], nets).abs() < 1e-12).all()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_student_becomes_the_teacher(alpha):
    assert train(SiD(alpha=alpha, fake_updates=2), nets_of()) == pytest.approx(TEACHER, abs=0.03)


def test_it_takes_nothing_of_the_images_but_their_shape():
    nets, method = nets_of(), SiD()
    step = Step(method.stages(nets["student"])[0], 0)
    values = [
        [loss.value.item() for loss in method.losses(nets, batch, step, torch.Generator().manual_seed(0))]
        for batch in (batch_of(), Batch(torch.full((3, 1, 4, 4), torch.nan, dtype=torch.float64), {}))
    ]
    assert values[0] == values[1] and not SiD.needs.data


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="a student of 3 steps does not fit"):
        SiD(steps=3).stages(gaussian(COSINE))
    with pytest.raises(UserError, match="guidance needs a label"):
        SiD(guidance=2).stages(gaussian(COSINE))
    with pytest.raises(ValidationError, match=r"t_min 0\.99 is above t_max 0\.97; exchange them"):
        SiD(t_min=0.99)
