"""LCM: a loss by hand, its target network, the exact student of a Gaussian teacher."""

import pytest
import torch

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import FlowSchedule, Schedule, Shift
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.lcm import LCM
from tests.gaussian import gaussian
from tests.trajectories import data, exact, family, gradients, train

COSINE = Schedule.cosine(1024)


class Labelled(torch.nn.Module):
    """Curved in x and t, with a shift for each class; 3 is no class."""

    def forward(self, x, time, class_labels):
        shift = class_labels.to(x).reshape(-1, 1, 1, 1) - 1
        return torch.sin(3 * x + shift + time.to(x).reshape(-1, 1, 1, 1) / 100)


def labelled(scale=1.0):
    denoiser = Denoiser(Labelled(), COSINE, "v_prediction", shape=(1, 4, 4), num_classes=3, null_label=3)
    denoiser.network.register_forward_hook(lambda module, args, output: scale * output)
    return denoiser


def only(method, start=None):
    return method.stages(start or gaussian(COSINE, "v_prediction"))[0]


@pytest.mark.parametrize("decay", [0.95, 0.0])
def test_one_loss_by_hand(decay):
    method = LCM(skip=300, guidance=2.5, huber=0.05, target_decay=decay)
    nets = {"teacher": labelled(), "student": labelled(0.8)}
    if decay:
        nets["target"] = labelled(0.7)
    x0, labels = data(8, torch.Generator().manual_seed(1)), torch.arange(8) % 3
    step = Step(only(method, nets["teacher"]), 0)
    batch = Batch(x0, {"class_labels": labels})
    loss = next(method.losses(nets, batch, step, torch.Generator().manual_seed(3)))
    rng = torch.Generator().manual_seed(3)
    index = torch.randint(1, 1025, (8,), generator=rng)
    eps = torch.randn(x0.shape, generator=rng)
    t, s = index.double() / 1024, (index - 300).clamp(min=0).double() / 1024
    assert (s == 0).any() and not (s == 0).all()
    alpha, sigma = COSINE.at(t, like=x0)
    alpha_s, sigma_s = COSINE.at(s, like=x0)
    x_t = alpha * x0 + sigma * eps
    v, v_null = (nets["teacher"].network(x_t, t * 1024 - 1, class_labels=c) for c in (labels, labels * 0 + 3))
    v = v_null + 2.5 * (v - v_null)
    x_s = alpha_s * (alpha * x_t - sigma * v) + sigma_s * (alpha * v + sigma * x_t)
    scale = 0.7 if decay else 0.8
    target = alpha_s * x_s - sigma_s * scale * nets["teacher"].network(x_s, s * 1024 - 1, class_labels=labels)
    denoised = alpha * x_t - sigma * 0.8 * nets["teacher"].network(x_t, t * 1024 - 1, class_labels=labels)
    expected = (((denoised - target) ** 2 + 0.05**2).sqrt() - 0.05).mean((1, 2, 3))
    assert torch.allclose(loss.metrics["loss"], expected, rtol=1e-5)
    assert loss.value.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    assert torch.allclose(loss.metrics["t"], t)


def test_the_target_network_follows_and_does_not_learn():
    method, student = LCM(target_decay=0.9), exact(COSINE, a=0.3)
    nets = {"student": student, **method.networks(student, student)}
    assert list(nets) == ["student", "target"] and not any(
        p.requires_grad for p in nets["target"].parameters()
    )
    student.network.a.data.fill_(0.5)
    method.after_update(nets, Step(only(method), 0))
    assert nets["target"].network.a.item() == pytest.approx(0.9 * 0.3 + 0.1 * 0.5)
    assert student.network.a.item() == 0.5
    alone = LCM(target_decay=0)
    assert alone.networks(student, student) == {}
    alone.after_update({"student": student}, Step(only(alone), 0))


def test_the_exact_student_has_no_gradient_and_another_has():
    """Up to one DDIM step's error, which falls with its square; in what moves it with x (a), and in what
    moves it everywhere (b), where that error has no mean."""
    teacher, found = gaussian(COSINE, "v_prediction"), {}
    for skip, a, b in ((64, 0.0, 0.0), (16, 0.0, 0.0), (4, 0.0, 0.0), (4, 0.1, 0.0), (4, 0.0, 0.1)):
        method = LCM(skip=skip, huber=10.0, target_decay=0)
        nets = {"student": exact(COSINE, a=a, b=b), "teacher": teacher}
        found[skip, a, b] = gradients(method, nets, only(method), 0, 512).abs()
    exactly = found[4, 0.0, 0.0]
    assert found[16, 0.0, 0.0][0] < 0.1 * found[64, 0.0, 0.0][0]
    assert exactly[0] < 0.05 * found[4, 0.1, 0.0][0] and exactly[1] < 0.05 * found[4, 0.0, 0.1][1]


def test_more_exact_steps_leave_the_exact_student_less_gradient():
    """By the error of the teacher's stride, which falls with its sub-steps, and with their order."""
    teacher, found = gaussian(COSINE, "v_prediction"), {}
    for sampler, substeps in (("ddim", 1), ("ddim", 2), ("ddim", 4), ("dpmpp_2m", 4)):
        method = LCM(skip=64, huber=10.0, target_decay=0, sampler=sampler, substeps=substeps, times="strides")
        nets = {"student": exact(COSINE), "teacher": teacher}
        found[sampler, substeps] = gradients(method, nets, only(method), 0, 512)[0].abs().item()
    assert found["ddim", 2] == pytest.approx(found["ddim", 1] / 2, rel=0.1)
    assert found["ddim", 4] == pytest.approx(found["ddim", 1] / 4, rel=0.1)
    assert found["dpmpp_2m", 4] < 0.7 * found["ddim", 4]


def test_strides_from_pure_noise():
    """t = 1 and what lies whole strides below it, evenly, so that every target is made at a time that is
    learned or at 0; and no student is asked between them."""
    for skip, count in ((256, 4), (300, 4)):
        method = LCM(skip=skip, times="strides", steps=[1])
        nets = {"teacher": labelled(), "student": labelled(0.8), "target": labelled(0.7)}
        batch = Batch(data(400, torch.Generator().manual_seed(1)), {"class_labels": torch.arange(400) % 3})
        stage = only(LCM(steps=[1]))
        loss = next(method.losses(nets, batch, Step(stage, 0), torch.Generator().manual_seed(3)))
        times, often = (loss.metrics["t"] * 1024).unique(return_counts=True)
        assert times.tolist() == [1024 - skip * k for k in reversed(range(count))]
        assert often.min() > 70  # of 100, with a deviation of 9
    assert only(LCM(skip=64, times="strides", substeps=2, sampler="dpmpp_2m")).substeps == 2
    with pytest.raises(UserError, match="4 steps is asked at every 256th time step of 1024"):
        only(LCM(skip=96, times="strides"))
    flow = gaussian(FlowSchedule(Shift(1.0)), "flow")  # where step counts need not divide the table
    assert only(LCM(skip=50, times="strides"), flow) and only(LCM(skip=83, times="strides", steps=[1]), flow)
    with pytest.raises(UserError, match="3 steps is asked at every 333.333th time step of 1000"):
        only(LCM(skip=3, times="strides", steps=[3]), flow)


@pytest.mark.slow
def test_a_small_student_finds_the_data():
    """As far as DDIM steps of this length do: 16 of them draw with a width of 0.453, not 0.5."""
    method = LCM(skip=64, updates=300, learning_rate=2e-2, target_decay=0.5)
    teacher, student = gaussian(COSINE, "v_prediction"), family(COSINE)
    nets = {"student": student, "teacher": teacher, **method.networks(teacher, student)}
    train(method, nets, only(method))
    assert student.network.mean.item() == pytest.approx(0.3, abs=0.03)
    assert student.network.std.item() == pytest.approx(0.453, abs=0.03)


def test_what_does_not_fit():
    stage = only(LCM(steps=[8, 4]))
    assert (stage.name, stage.also, stage.drawn, stage.teacher) == ("4-steps", (8,), "renoise", "original")
    with pytest.raises(UserError, match="skip 2000 is more than the teacher's 1024"):
        only(LCM(skip=2000))
    with pytest.raises(UserError, match="null_label"):
        only(LCM(guidance=8))
