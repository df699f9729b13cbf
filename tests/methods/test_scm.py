"""sCM: the tangent against differences along the trajectory, the exact student of a Gaussian teacher."""

import math

import pytest
import torch

from diffkd.core.consistency import tangent
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.methods.base import Batch, Step
from diffkd.methods.scm import SCM, TimeWeight
from tests.gaussian import gaussian
from tests.trajectories import at_noise, data, exact, family, train

COSINE, SHORT = Schedule.cosine(1024), Schedule.cosine(64)
T = [0.9995, 0.999, 0.753, 0.503, 0.253, 0.05, 0.0004]  # between nodes, where `Exact` has derivatives


class Rough(torch.nn.Module):
    def forward(self, x, time):
        return torch.sin(3 * x + time.to(x).reshape(-1, 1, 1, 1) / 10)


def states(times, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(len(times), 1, 4, 4, generator=rng, dtype=torch.float64), torch.tensor(times).double()


def v_of(denoiser, x_t, t):
    alpha, sigma = denoiser.schedule.at(t, like=x_t)
    x0, eps = denoiser.predict(x_t, t)
    return (alpha * eps - sigma * x0).detach()


def tangent_of(student, x_t, t, velocity, share=1.0, how="jvp", step=1e-3):
    return tangent(student, x_t, t, v_of(student, x_t, t), velocity, share, how, step)


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
@pytest.mark.parametrize("how", ["jvp", "difference"])
def test_the_tangent_is_the_derivative_along_the_trajectory(prediction, how):
    """g = cos df/da, f by two calls a little before and after in the angle."""
    student = Denoiser(Rough(), SHORT, prediction, shape=(1, 4, 4))
    x_t, t = states([0.96, 0.757, 0.503, 0.256, 0.05])
    velocity = torch.cos(2 * x_t)

    def f(h):
        alpha, sigma = SHORT.at(t)
        angle = torch.atan2(sigma, alpha) + h
        return student(x_t + h * velocity, at_noise(SHORT, angle.tan().log()))

    h = 1e-3
    expected = SHORT.at(t, like=x_t)[0] * (f(h) - f(-h)) / (2 * h)
    found = tangent_of(student, x_t, t, velocity, how=how, step=2e-4)
    assert not found.requires_grad
    assert torch.allclose(found, expected, atol=1e-4 if how == "jvp" else 1e-3)


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_the_exact_student_has_no_tangent_along_the_teacher(prediction):
    """Near zero terminal SNR and near the data too; another student has one."""
    x_t, t = states(T)
    velocity = v_of(gaussian(COSINE, "v_prediction"), x_t, t)
    student = exact(COSINE, prediction)
    assert tangent_of(student, x_t, t, velocity).abs().max() < 1e-5
    moved = tangent_of(exact(COSINE, prediction, a=0.1), x_t, t, velocity)
    assert moved.isfinite().all() and (moved[2:].abs().flatten(1).amax(1) > 1e-3).all()


@pytest.mark.parametrize("how", ["jvp", "difference"])
def test_at_zero_terminal_snr_the_tangent_is_zero(how):
    """There cos = 0, and the angle's tangent is infinite."""
    student, (x_t, t) = Denoiser(Rough(), COSINE, "v_prediction", shape=(1, 4, 4)), states([1.0, 1.0])
    assert torch.equal(tangent_of(student, x_t, t, torch.cos(x_t), how=how), torch.zeros_like(x_t))


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_a_wide_difference_is_of_second_order(t):
    """So the exact student's tangent is smaller by four, or more, at half the step."""
    x_t, times = states([t])
    velocity = v_of(gaussian(COSINE, "v_prediction"), x_t, times)
    wide, narrow = (
        tangent_of(exact(COSINE), x_t, times, velocity, how="difference", step=step).abs().mean().item()
        for step in (0.08, 0.04)
    )
    assert 3.7 < wide / narrow < 8 and 1e-6 < narrow < 2e-3


class Waves(torch.nn.Module):
    """A network that a table's whole indices never let see what it does between them."""

    def __init__(self, height):
        super().__init__()
        self.height = height

    def forward(self, x, time):
        index = time.to(x).reshape(-1, 1, 1, 1)
        return torch.sin(3 * x + index / 300) + self.height * torch.sin(2 * math.pi * index)


def test_a_wide_difference_does_not_follow_waves_between_the_entries_of_a_table():
    x_t, t = states([0.75, 0.5, 0.25])
    velocity = torch.cos(2 * x_t)

    def found(height, how):
        student = Denoiser(Waves(height), Schedule.cosine(1000), "v_prediction", shape=(1, 4, 4))
        return tangent_of(student, x_t, t, velocity, how=how, step=0.02)

    smooth = found(0.0, "jvp")
    assert (found(0.05, "difference") - smooth).abs().max() < 0.01 * smooth.abs().max() + 0.01
    assert (found(0.05, "jvp") - smooth).abs().max() > 10 * smooth.abs().max()


def test_a_difference_stays_within_the_times():
    """From a little above 0 to 1, whatever its step is."""
    asked = []

    class Asked(Rough):
        def forward(self, x, time):
            asked.append(time)
            return super().forward(x, time)

    student = Denoiser(Asked(), SHORT, "v_prediction", shape=(1, 4, 4))
    x_t, t = states([0.999, 0.9, 0.5, 0.1, 0.002])
    tangent(student, x_t, t, torch.zeros_like(x_t), torch.cos(x_t), how="difference", step=0.3)
    ahead, behind = asked
    assert ahead.max() <= 63 and behind.min() > -1  # at 0 a prediction says nothing
    assert torch.allclose(ahead - behind, 64 * torch.tensor([0.301, 0.4, 0.6, 0.4, 0.302]), atol=0.1)


def test_without_its_unstable_part_the_tangent_is_that_of_a_regression():
    student, (x_t, t) = Denoiser(Rough(), COSINE, "v_prediction", shape=(1, 4, 4)), states(T)
    velocity = torch.cos(x_t)
    alpha, _ = COSINE.at(t, like=x_t)
    expected = -(alpha**2) * (v_of(student, x_t, t) - velocity)
    assert torch.allclose(tangent_of(student, x_t, t, velocity, share=0.0), expected)


def test_in_training_the_exact_student_has_no_tangent_in_the_mean():
    """Along the velocity of each noised image, whose mean is the teacher's."""
    rng = torch.Generator().manual_seed(0)
    count = 20_000
    x0, eps = data(count, rng), torch.randn(count, 1, 4, 4, generator=rng, dtype=torch.float64)
    t = torch.full((count,), 0.6).double()
    cos, sin = COSINE.at(t, like=x0)
    x_t = cos * x0 + sin * eps
    for a, zero in ((0.0, True), (0.1, False)):
        g = tangent_of(exact(COSINE, a=a), x_t, t, cos * eps - sin * x0)
        for moment in (g, g * x_t):
            means = moment.flatten(1).mean(1)
            bound = 5 * means.std().item() / math.sqrt(count)
            assert (abs(means.mean().item()) < bound) == zero


@pytest.mark.parametrize("mode", ["distillation", "training"])
@pytest.mark.parametrize("update", [0, 5, 50])
def test_one_update_by_hand(mode, update):
    """Normalised tangents, their warm-up, the adaptive weight; the gradient is -2 e^w g / d."""
    method = SCM(mode=mode, updates=100, tangent_warmup=0.1, c=0.2, derivative="jvp")
    teacher, student = gaussian(COSINE, "v_prediction"), exact(COSINE, a=0.2, b=-0.1)
    weight = TimeWeight()
    weight.last.bias.data.fill_(0.7)
    nets = {"teacher": teacher, "student": student, "weight": weight}
    x0 = data(6, torch.Generator().manual_seed(1))
    step = Step(method.stages(teacher)[0], update)
    first, second = method.losses(nets, Batch(x0, {}), step, torch.Generator().manual_seed(2))
    rng = torch.Generator().manual_seed(2)
    kappa = torch.exp(-1.0 + 1.4 * torch.randn(6, generator=rng, dtype=torch.float64)).reshape(-1, 1, 1, 1)
    eps = torch.randn(x0.shape, generator=rng).double()
    angle, t = kappa.atan(), at_noise(COSINE, kappa.log().flatten())
    cos, sin = angle.cos(), angle.sin()
    x_t = cos * x0 + sin * eps
    velocity = v_of(teacher, x_t, t) if mode == "distillation" else cos * eps - sin * x0
    share = min(1, update / 10)
    g = tangent_of(student, x_t, t, velocity, share)  # proven above
    rms = g.square().mean((1, 2, 3))
    g = g / (rms.sqrt().reshape(-1, 1, 1, 1) + 0.2)
    error_ = g.square().mean((1, 2, 3))
    w = 0.7
    assert first.network == "student" and second.network == "weight"
    assert torch.allclose(first.metrics["tangent"], rms.sqrt(), rtol=1e-4)
    assert first.value.item() == pytest.approx(math.exp(w) * error_.mean().item(), rel=1e-4)
    assert second.value.item() == pytest.approx((math.exp(w) * error_ - w).mean().item(), rel=1e-4)
    b = torch.autograd.grad(first.value, student.network.b)[0]
    assert b.item() == pytest.approx(-2 * math.exp(w) * g.mean().item(), rel=1e-3)
    bias = torch.autograd.grad(second.value, weight.last.bias)[0]
    assert bias.item() == pytest.approx((math.exp(w) * error_ - 1).mean().item(), rel=1e-4)


def test_the_weight_of_the_same_for_all_times_needs_no_network():
    method = SCM(weighting="fixed")
    teacher = gaussian(COSINE, "v_prediction")
    assert method.networks(teacher, teacher) == {} and list(SCM().networks(teacher, teacher)) == ["weight"]
    nets = {"teacher": teacher, "student": exact(COSINE, a=0.1)}
    x0 = data(4, torch.Generator().manual_seed(1))
    losses = list(method.losses(nets, Batch(x0, {}), Step(method.stages(teacher)[0], 3), torch.Generator()))
    assert [loss.network for loss in losses] == ["student"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["distillation", "training"])
def test_a_small_student_finds_the_data(mode):
    method = SCM(mode=mode, updates=150, learning_rate=2e-2)
    teacher, student = gaussian(COSINE, "v_prediction"), family(COSINE)
    nets = {"student": student, "teacher": teacher, **method.networks(teacher, student)}
    train(method, nets, method.stages(teacher)[0])
    assert student.network.mean.item() == pytest.approx(0.3, abs=0.03)
    assert student.network.std.item() == pytest.approx(0.5, abs=0.03)


def test_one_stage_several_students():
    stage = SCM(steps=[4, 1]).stages(gaussian(COSINE, "v_prediction"))[0]
    assert (stage.name, stage.steps, stage.also, stage.drawn, stage.teacher) == (
        "1-steps", 1, (4,), "renoise", "original",
    )  # fmt: skip
    with pytest.raises(ValueError, match="mode: training"):
        SCM(mode="training", guidance=1.5)
