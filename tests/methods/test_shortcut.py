"""Shortcut models: two steps in one on a flow in closed form, an update by hand, a student that converges."""

import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError
from torch import nn

from diffkd.core import flow
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.shortcut import Shortcut, target
from tests.gaussian import FlowMap, gaussian, linear
from tests.methods.flow_maps import trained

COSINE = Schedule.cosine(1024)
# of data whose pixels differ
MEAN = torch.linspace(-0.4, 0.4, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
STD = torch.linspace(0.3, 0.7, 16, dtype=torch.float64).reshape(1, 1, 4, 4).flip(3)


class Curved(nn.Module):
    """A student that is no flow; it keeps the lengths that it was given."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def forward(self, x, time, interval):
        self.lengths.append(interval)
        t, length = (v.to(x).reshape(-1, 1, 1, 1) for v in (time / 1024, interval))
        return torch.sin(2 * x + t) + length * torch.cos(x - 3 * length * t)


def curved():
    return Denoiser(Curved(), COSINE, "v_prediction", shape=(1, 4, 4))


class Off(FlowMap):
    """The exact student plus `by` times the length of its step; it keeps the lengths that it was given."""

    def __init__(self, by):
        super().__init__(COSINE, mean=MEAN, std=STD)
        self.by, self.lengths = nn.Parameter(torch.tensor(by).double()), []

    def forward(self, x, time, interval):
        self.lengths.append(interval)
        exact = super().forward(x, time, interval.clamp(min=1e-3))  # of length 0: that of a short step
        return exact + self.by * interval.reshape(-1, 1, 1, 1)


def off(by):
    return Denoiser(Off(by), COSINE, "flow", shape=(1, 4, 4))


def velocity_of(denoiser, x_t, t, length):
    with torch.no_grad():
        return flow.velocity(denoiser.predict(x_t, t, interval=length))


def states():
    x_t = torch.randn(4, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([1.0, 1.0, 0.5, 0.25]).double(), torch.tensor([0.0, 0.5, 0.0, 0.125]).double()


def test_two_steps_of_the_exact_student_are_its_one():
    x_t, t, s = states()
    found = target(off(0.0), x_t, t, s, (t - s) / 2)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert torch.allclose(found, velocity_of(off(0.0), x_t, t, t - s), atol=1e-9)
    # of an error that grows with the length the two have half, give or take where the first of them leads
    gap = velocity_of(off(0.1), x_t, t, t - s) - target(off(0.1), x_t, t, s, (t - s) / 2)
    assert ((gap / (0.1 * (t - s) / 2).reshape(-1, 1, 1, 1) - 1).abs() < 0.25).all()


def test_the_exact_student_has_no_loss_and_no_gradient_and_another_has():
    """At every length. Two steps of the finest grid count as velocities: their error halves with the grid."""
    finest, found = {}, {}
    for grid, by in ((64, 0.0), (128, 0.0), (128, 0.1)):
        method, student = Shortcut(steps=[1], finest=grid, share=1.0, mode="training"), off(by)
        rng = torch.Generator().manual_seed(1)
        x0 = MEAN + STD * torch.randn(256, 1, 4, 4, dtype=torch.float64, generator=rng)
        step = Step(method.stages(student)[0], 0)
        loss = next(method.losses({"student": student}, Batch(x0, {}), step, rng))
        (gradient,) = torch.autograd.grad(loss.value, student.network.by)
        length, gap = student.network.lengths[0], loss.metrics["gap"]
        last = length == 2 / grid
        assert {*length.tolist()} == {2.0**-i for i in range(grid.bit_length() - 1)}
        finest[grid, by], found[grid, by] = gap[last].mean(), gradient
        expected = by * length[~last] / 2
        assert (gap[~last] >= 0.9 * expected).all() and (gap[~last] <= 1.2 * expected + 1e-9).all()
    assert finest[128, 0.0] < 0.6 * finest[64, 0.0] < 0.006
    assert found[128, 0.0].abs() < 1e-3 * found[128, 0.1] and found[128, 0.1] > 0.01


def test_the_target_by_hand():
    """s(x, t, 2d) = (s(x, t, d) + s(x', t', d)) / 2, where the halves are equal in the flow's time."""
    x_t, t, s = states()
    student = curved()
    half = (t - s) / 2
    tau, middle, end = (flow.flow_time(COSINE, time).reshape(-1, 1, 1, 1) for time in (t, (t + s) / 2, s))
    z = x_t / flow.scale(COSINE, t, like=x_t)
    first = velocity_of(student, x_t, t, half)
    z_m = z - (tau - middle) * first
    x_m = z_m * flow.scale(COSINE, (t + s) / 2, like=x_t)
    second = velocity_of(student, x_m, (t + s) / 2, half)
    weights = (tau - middle) / (tau - end), (middle - end) / (tau - end)
    expected = weights[0] * first + weights[1] * second
    assert torch.allclose(target(student, x_t, t, s, half), expected, atol=1e-9)
    symmetric = 0  # from 1 to 0 in the flow's time the middle is a half
    assert weights[0][symmetric].item() == pytest.approx(0.5, abs=0.01)


def test_an_update_by_hand():
    """Two steps in one for a share, the teacher's velocity for the rest, from the same random numbers."""
    teacher, student = gaussian(COSINE, "v_prediction"), curved()
    method = Shortcut(steps=[2, 1], finest=8, share=0.5)
    x0 = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    stage = method.stages(teacher)[0]
    nets = {"student": student, "teacher": teacher}
    loss = next(method.losses(nets, Batch(x0, {}), Step(stage, 0), torch.Generator().manual_seed(2)))

    rng = torch.Generator().manual_seed(2)
    torch.rand((), generator=rng, dtype=torch.float64)  # 3 of 6, exactly
    counts = torch.tensor([1, 2, 4]).double()[torch.randint(3, (6,), generator=rng)]
    i = (torch.rand(6, generator=rng, dtype=torch.float64) * counts).floor()
    fine = torch.randint(1, 9, (6,), generator=rng).double() / 8
    eps = torch.randn(x0.shape, generator=rng).double()
    t, s = torch.cat([((i + 1) / counts)[:3], fine[3:]]), (i / counts)[:3]
    alpha, sigma = COSINE.at(t, like=eps)
    x_t = alpha * x0 + sigma * eps
    length = torch.cat([t[:3] - s, torch.zeros(3)])
    half = torch.tensor([0.0 if n == 4 else 1 / (2 * n) for n in counts[:3].tolist()]).double()
    expected = torch.cat(
        [target(student, x_t[:3], t[:3], s, half), flow.velocity(teacher.predict(x_t[3:], t[3:]))]
    )
    error = (velocity_of(student, x_t, t, length) - expected).square().mean((1, 2, 3))
    assert torch.allclose(loss.metrics["gap"].double(), error.sqrt(), rtol=1e-4)
    assert loss.value.item() == pytest.approx(error.mean().item(), rel=1e-4)
    assert torch.equal(loss.metrics["t"], t)


def test_lengths_are_those_of_halved_grids():
    student, teacher = curved(), gaussian(COSINE, "v_prediction")
    x0 = torch.rand(400, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for share, lengths in ((1.0, [{1, 1 / 2, 1 / 4}, {1 / 2, 1 / 4, 0}, {1 / 2, 1 / 4, 0}]), (0.0, [{0}])):
        method = Shortcut(steps=[1], finest=8, share=share, mode="training")
        student.network.lengths.clear()
        step = Step(method.stages(teacher)[0], 0)
        next(method.losses({"student": student}, Batch(x0, {}), step, torch.Generator().manual_seed(2)))
        assert [{*called.tolist()} for called in student.network.lengths] == lengths


def test_an_average_takes_the_two_steps():
    """Of length 0 on a finest grid of two; the student is asked for its one alone."""
    student, average, teacher = curved(), curved(), gaussian(COSINE, "v_prediction")
    method = Shortcut(steps=[1], finest=2, share=1.0, target_decay=0.9)
    nets = {"student": student, "teacher": teacher, "target": average}
    step = Step(method.stages(teacher)[0], 0)
    rng = torch.Generator().manual_seed(2)
    loss = next(method.losses(nets, Batch(torch.zeros(3, 1, 4, 4), {}), step, rng))
    assert [called.tolist() for called in student.network.lengths] == [[1.0] * 3]
    assert [called.tolist() for called in average.network.lengths] == [[0.0] * 3] * 2
    one, nought = torch.ones(3).double(), torch.zeros(3).double()
    rng = torch.Generator().manual_seed(2)
    torch.rand((), generator=rng, dtype=torch.float64)
    torch.randint(1, (3,), generator=rng)
    torch.rand(3, generator=rng, dtype=torch.float64)
    torch.randint(1, 3, (3,), generator=rng)
    eps = torch.randn(3, 1, 4, 4, generator=rng)
    student.network.lengths.clear()
    error = velocity_of(student, eps.double(), one, one) - target(average, eps, one, nought, nought)
    assert torch.allclose(loss.metrics["gap"].double(), error.square().mean((1, 2, 3)).sqrt(), rtol=1e-4)


def test_the_average_follows_the_student():
    method, student = Shortcut(target_decay=0.75), linear(COSINE)
    average = method.networks(student, student)["target"]
    assert not any(p.requires_grad for p in average.parameters())
    student.network.weights.data += 1
    method.after_update({"student": student, "target": average}, Step(method.stages(student)[0], 0))
    assert torch.equal(average.network.weights, torch.full((2, 3), 0.25).double())
    assert not Shortcut().networks(student, student)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "decay"), [("distillation", 0.0), ("training", 0.0), ("training", 0.9)])
def test_a_linear_student_converges_to_the_flow(mode, decay):
    """Trained by the method's own losses, its one step and its two carry noise where the flow does."""
    method = Shortcut(mode=mode, steps=[2, 1], finest=64, share=0.5, target_decay=decay, updates=300)
    before, after = trained(method, COSINE, method.updates)
    assert max(after) < 0.1 * min(before), (before, after)


def test_one_training_gives_students_of_every_step_count():
    (stage,) = Shortcut(steps=[8, 4, 1]).stages(gaussian(COSINE, "v_prediction"))
    assert (stage.name, stage.also, stage.interval, stage.drawn) == ("1-steps", (8, 4), True, "ddim")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValidationError, match="steps 3 is not a power of two below finest 64"):
        Shortcut(steps=[3])
    with pytest.raises(ValidationError, match="steps 64 is not a power of two below finest 64"):
        Shortcut(steps=[64])
    with pytest.raises(ValidationError, match="finest 48 is not a power of two"):
        Shortcut(finest=48)
    with pytest.raises(ValidationError, match="mode: training does not ask"):
        Shortcut(mode="training", guidance=2.0)
    with pytest.raises(UserError, match="x0 at t = 1 is its output times 157.*put .name: output"):
        Shortcut().stages(gaussian(from_diffusers(DDPMScheduler()), "epsilon"))
