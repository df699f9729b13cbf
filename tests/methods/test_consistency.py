"""Consistency: a loss by hand, the exact student of a Gaussian teacher, a small student that finds it."""

import math
from itertools import pairwise

import pytest
import torch

from diffkd.core.consistency import earlier
from diffkd.core.denoiser import Denoiser
from diffkd.core.flow import flow_time
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.consistency import Consistency
from tests.gaussian import gaussian
from tests.trajectories import at_noise, data, exact, family, gradients, train

COSINE = Schedule.cosine(1024)


class Rough(torch.nn.Module):
    """Curved in x and t, so that no error cancels."""

    def forward(self, x, time):
        return torch.sin(3 * x + time.to(x).reshape(-1, 1, 1, 1) / 100)


def only(method):
    return method.stages(gaussian(COSINE, "v_prediction"))[0]


@pytest.mark.parametrize("mode", ["distillation", "training"])
@pytest.mark.parametrize("update, gap", [(0, 1 / 2), (25, 1 / 8), (99, 0.03)])
def test_one_loss_by_hand(mode, update, gap):
    """In the coordinate kappa = sigma / alpha, where the paper writes it, as far as that goes."""
    method = Consistency(mode=mode, updates=100, closest=0.97, huber=0.01)
    teacher = gaussian(COSINE, "v_prediction")
    student = Denoiser(Rough(), COSINE, "v_prediction", shape=(1, 4, 4))
    x0 = data(6, torch.Generator().manual_seed(1))
    nets = {"student": student, "teacher": teacher}
    loss = next(
        method.losses(nets, Batch(x0, {}), Step(only(method), update), torch.Generator().manual_seed(2))
    )
    rng = torch.Generator().manual_seed(2)
    kappa = torch.exp(-1.1 + 2.0 * torch.randn(6, generator=rng, dtype=torch.float64))
    eps = torch.randn(x0.shape, generator=rng)
    tau = kappa / (1 + kappa)
    tau_s = (tau - gap * tau * (1 + 8 / (1 + kappa.exp()))).clamp(min=0)
    shaped = (kappa, tau, tau_s)
    kappa_, tau_, tau_s_ = (each.reshape(-1, 1, 1, 1) for each in shaped)
    # x = x0 + kappa eps, scaled to the schedule's unit norm, and the same at s
    t, s = at_noise(COSINE, kappa.log()), at_noise(COSINE, (tau_s / (1 - tau_s)).log())
    x_t = (x0 + kappa_ * eps) / (1 + kappa_**2).sqrt()
    z_s = (1 - tau_s_) * x0 + tau_s_ * eps  # straight in flow coordinates
    if mode == "distillation":
        predicted = teacher.predict(x_t, t)
        z_t = (1 - tau_) * x0 + tau_ * eps
        z_s = z_t + (tau_s_ - tau_) * (predicted.eps - predicted.x0)  # Euler
    x_s = z_s / (tau_s_**2 + (1 - tau_s_) ** 2).sqrt()
    target = torch.where(tau_s_ > 0, student(x_s, s.clamp(min=1e-9)), z_s)
    square = (student(x_t, t) - target).square().sum((1, 2, 3))
    c = 0.01 * 4
    expected = ((square + c**2).sqrt() - c) / (tau - tau_s)
    assert torch.allclose(loss.metrics["loss"], expected, rtol=1e-4)
    assert loss.value.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    assert torch.allclose(loss.metrics["t"], t) and torch.allclose(loss.metrics["gap"], (square / 16).sqrt())


@pytest.mark.parametrize("part", range(8))
def test_the_exact_student_has_no_gradient_and_another_has(part):
    """At every part of the curriculum, along the exact trajectory: in what moves it with x and in what moves
    it everywhere."""
    method = Consistency(sampler="heun", substeps=32 if part else 128, huber=1.0, updates=8)
    teacher, stage = gaussian(COSINE, "v_prediction"), only(method)
    assert method.gap(Step(stage, part).progress) == 2.0 ** -(part + 1)
    found = {
        (a, b): gradients(
            method, {"student": exact(COSINE, a=a, b=b), "teacher": teacher}, stage, part, 32
        ).abs()
        for a, b in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1))
    }
    for index, moved in enumerate([(0.1, 0.0), (0.0, 0.1)]):
        assert found[0.0, 0.0][index] < 5e-3 * found[moved][index] and found[moved][index] > 0.1


def test_in_training_the_exact_student_has_the_gradient_of_its_noise_which_goes_with_t_minus_s():
    """x_s keeps the noise of x_t and so leaves the trajectory. Of a squared distance the mean gradient is by
    the moments of both, at every part of the curriculum, and falls towards 0 with the gap."""
    c = 1e3 * 4  # a distance of (difference)^2 / 2c
    method = Consistency(mode="training", huber=1e3, updates=8)
    stage, teacher = only(method), gaussian(COSINE, "v_prediction")
    expected = []
    for part in range(8):
        apart, exactly = [], []
        for seed in range(16):
            rng, nets = torch.Generator().manual_seed(seed), {"student": exact(COSINE), "teacher": teacher}
            loss = next(method.losses(nets, Batch(data(512, rng), {}), Step(stage, part), rng))
            network = nets["student"].network
            found = c * torch.stack(torch.autograd.grad(loss.value, [network.a, network.b]))
            t = loss.metrics["t"]
            exactly.append(gradient_of_noise(t, earlier(COSINE, t, method.gap(part / 8))))
            apart.append(found - exactly[-1])
        each, of_noise = torch.stack(apart), torch.stack(exactly).mean(0)
        assert (each.mean(0).abs() < 3 * each.std(0) / 4 + 1e-3 * of_noise.abs()).all(), part
        expected.append(of_noise[0].abs())
    ratios = [after / before for before, after in pairwise(expected)]
    assert expected[-1] < 0.02 * expected[0] and max(ratios[1:]) < 0.5


def gradient_of_noise(t, s, mean=0.3, std=0.5):
    """Of |f(x_t, t) - f(x_s, s)|^2 / 2 (t - s) of 16 numbers in a and b of the exact student, f = mean + std
    (x - alpha mean) / width, where x_t and x_s have one noise: their covariance is less than their widths'
    product. a moves f by -sigma x_t, b by -sigma."""
    (alpha, sigma), (alpha_s, sigma_s) = COSINE.at(t), COSINE.at(s)
    width, width_s = ((a**2 * std**2 + b**2).sqrt() for a, b in ((alpha, sigma), (alpha_s, sigma_s)))
    covariance = alpha * alpha_s * std**2 + sigma * sigma_s
    tau, tau_s = (flow_time(COSINE, time) for time in (t, s))
    by_a = -16 * sigma * std * (width - covariance / width_s) / (tau - tau_s)
    return torch.stack([by_a.mean(), torch.zeros(()).double()])


def test_in_training_another_student_has_a_gradient():
    method = Consistency(mode="training", closest=0.999, huber=1.0, doublings=12, updates=100)
    stage, teacher = only(method), gaussian(COSINE, "v_prediction")
    for index, nets in enumerate([{"student": exact(COSINE, a=0.1)}, {"student": exact(COSINE, b=0.1)}]):
        nets["teacher"] = teacher
        each = torch.stack([gradients(method, nets, stage, 99, 2048, seed) for seed in range(8)])[:, index]
        assert each.mean().abs() > 10 * each.std() / math.sqrt(8) and each.mean().abs() > 0.02


def test_gradients_go_through_the_prediction_at_t_alone():
    """The target is a constant: with the target's gradient too, that of a consistent move would vanish."""
    method = Consistency(huber=1.0)
    student, teacher = exact(COSINE, a=0.1), gaussian(COSINE, "v_prediction")
    x0 = data(8, torch.Generator().manual_seed(1))
    nets = {"student": student, "teacher": teacher}
    loss = next(
        method.losses(nets, Batch(x0, {}), Step(only(method), 1900), torch.Generator().manual_seed(2))
    )
    calls = []
    student.network.register_forward_hook(lambda module, args, output: calls.append(output.requires_grad))
    next(method.losses(nets, Batch(x0, {}), Step(only(method), 1900), torch.Generator().manual_seed(2)))
    assert calls == [False, True] and loss.value.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("times", ["log_normal", "uniform"])
@pytest.mark.parametrize("mode", ["distillation", "training"])
def test_a_small_student_finds_the_data(mode, times):
    method = Consistency(mode=mode, times=times, updates=150, learning_rate=2e-2)
    teacher, student = gaussian(COSINE, "v_prediction"), family(COSINE)
    train(method, {"student": student, "teacher": teacher}, only(method))
    assert student.network.mean.item() == pytest.approx(0.3, abs=0.03)
    assert student.network.std.item() == pytest.approx(0.5, abs=0.03)


def test_the_curriculum():
    method = Consistency(doublings=4, closest=0.95)
    assert [method.gap(p) for p in (0, 0.24, 0.25, 0.5, 0.75, 0.99)] == [
        0.5,
        0.5,
        0.25,
        0.125,
        0.0625,
        0.0625,
    ]
    assert Consistency().gap(0.999) == 1 / 256 and Consistency(doublings=20).gap(0.999) == pytest.approx(
        0.001
    )


def test_one_stage_several_students():
    stage = only(Consistency(steps=[8, 2, 1], sampler="heun", substeps=3))
    assert (stage.name, stage.steps, stage.also, stage.drawn) == ("1-steps", 1, (8, 2), "renoise")
    assert (stage.sampler, stage.substeps, stage.teacher) == ("heun", 3, "original")
    previous = only(Consistency(teacher="previous"))
    assert previous.teacher == "previous" and only(Consistency(mode="training")).sampler is None
    with pytest.raises(UserError, match="1024 steps drawn by renoise"):
        only(Consistency(steps=[1024]))
    with pytest.raises(ValueError, match="mode: training"):
        Consistency(mode="training", guidance=1.5)
    with pytest.raises(ValueError, match="teacher: previous is not asked in mode: training"):
        Consistency(mode="training", teacher="previous")
