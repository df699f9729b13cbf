"""MeanFlow: its identity on a flow in closed form, an update by hand, a student that converges to it."""

import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError
from torch import nn

from diffkd.core import flow
from diffkd.core.denoiser import Denoiser, Predicted
from diffkd.core.derivative import STEP
from diffkd.core.flow import average_velocity
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.meanflow import MeanFlow
from tests.gaussian import flow_map, gaussian
from tests.methods.flow_maps import trained

COSINE = Schedule.cosine(1024)
LINEAR = from_diffusers(DDPMScheduler())


def states(count=64, seed=0, schedule=COSINE):
    """x_t of Gaussian data, and t > r, neither on the table's nodes."""
    generator = torch.Generator().manual_seed(seed)
    t, r = torch.rand(2, count, generator=generator, dtype=torch.float64).sort(0, descending=True).values
    x0, eps = torch.randn(2, count, 1, 4, 4, generator=generator, dtype=torch.float64)
    alpha, sigma = schedule.at(t, like=x0)
    return alpha * (0.3 + 0.5 * x0) + sigma * eps, t, r


def velocity_of(denoiser, x_t, t, r):
    with torch.no_grad():
        return flow.velocity(denoiser.predict(x_t, t, interval=t - r))


class Curved(nn.Module):
    """A student that is no average velocity: curved in x, t and the step's length."""

    def forward(self, x, time, interval):
        t, length = (v.to(x).reshape(-1, 1, 1, 1) for v in (time / 1024, interval))
        return torch.sin(2 * x + t) + length * torch.cos(x - 3 * length * t)


@pytest.mark.parametrize(("how", "error"), [("jvp", 1e-4), ("difference", 5e-3)])
@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_the_target_of_the_exact_student_is_itself(schedule, how, error):
    """The identity holds for the flow's own average velocity, and so its loss is zero."""
    x_t, t, r = states(schedule=schedule)
    inside = t < 1 - STEP
    x_t, t, r = x_t[inside], t[inside], r[inside]
    student = flow_map(schedule)
    predicted = gaussian(schedule).predict(x_t, t)
    found = average_velocity(student, x_t, t, r, predicted, how)
    expected = velocity_of(student, x_t, t, r)
    far = (t - r > 0.02) & (r > 0.01)  # closer, the closed form divides rounding by a small length
    assert far.sum() > 40 and (found - expected)[far].abs().max() < error * expected.abs().max()
    # and of none other
    off = flow_map(schedule, off=0.1)
    gap = average_velocity(off, x_t, t, r, predicted, how) - velocity_of(off, x_t, t, r)
    assert (gap[far] + 0.1).abs().max() < 0.01


def test_the_target_is_linear_in_the_velocity():
    """So in the mean over the data of x_t, that of each image's own velocity is that of the teacher's."""
    x_t, t, r = states(8)
    student = Denoiser(Curved(), COSINE, "v_prediction", shape=(1, 4, 4))
    alpha, sigma = COSINE.at(t, like=x_t)
    shift = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x0 = gaussian(COSINE).predict(x_t, t).x0
    parts = [Predicted(x, (x_t - alpha * x) / sigma) for x in (x0 + shift, x0 - shift)]
    mean = sum(average_velocity(student, x_t, t, r, part) for part in parts) / 2
    whole = average_velocity(student, x_t, t, r, Predicted(x0, (x_t - alpha * x0) / sigma))
    assert torch.allclose(mean, whole, atol=1e-6)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow"])
def test_the_target_is_the_total_derivative(prediction):
    """dz/dtau = v, dtau = 1, r kept: by a small step along the flow, from whatever a network predicts."""
    x_t, t, r = states(16, seed=3)
    t = t * 0.9 + 0.05
    student = Denoiser(Curved(), COSINE, prediction, shape=(1, 4, 4))
    predicted = gaussian(COSINE).predict(x_t, t)
    v, tau = flow.velocity(predicted), flow.flow_time(COSINE, t)
    z = x_t / flow.scale(COSINE, t, like=x_t)

    def u(h):
        later = flow.time_at(COSINE, tau + h)
        return velocity_of(student, (z + h * v) * flow.scale(COSINE, later, like=z), later, r)

    h = 3e-4  # large beside the rounding of the time to float32
    du = (u(h) - u(-h)) / (2 * h)
    length = (tau - flow.flow_time(COSINE, r)).reshape(-1, 1, 1, 1)
    found = average_velocity(student, x_t, t, r, predicted)
    assert torch.allclose(found, v - length * du, rtol=5e-3, atol=5e-3)


def test_an_update_by_hand():
    """Algorithm 1 with the adaptive weight, in float64, from the same random numbers."""
    method = MeanFlow(steps=[4, 2], ratio=1.0, power=0.75, mode="training", derivative="jvp")
    student = Denoiser(Curved(), COSINE, "v_prediction", shape=(1, 4, 4))
    x0 = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    stage = method.stages(gaussian(COSINE, "v_prediction"))[0]
    nets = {"student": student, "teacher": None}
    loss = next(method.losses(nets, Batch(x0, {}), Step(stage, 0), torch.Generator().manual_seed(2)))

    rng = torch.Generator().manual_seed(2)
    torch.rand((), generator=rng, dtype=torch.float64)
    laws = [
        mean + std * torch.randn(6, generator=rng, dtype=torch.float64)
        for mean, std in ((-0.6, 1.6), (-4, 1.6))
    ]
    tau, rho = torch.maximum(*laws).sigmoid(), torch.minimum(*laws).sigmoid()
    torch.rand(6, generator=rng)
    torch.randint(2, (6,), generator=rng)
    torch.rand(6, generator=rng, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=rng).double()
    t, r = flow.time_at(COSINE, tau), flow.time_at(COSINE, rho)
    v = eps - x0.double()

    def u(tau):
        time = flow.time_at(COSINE, tau)
        shaped = tau.reshape(-1, 1, 1, 1)
        x = ((1 - shaped) * x0 + shaped * eps) * flow.scale(COSINE, time, like=eps)
        return velocity_of(student, x, time, r)

    h = 1e-6
    du = (u(tau + h) - u(tau - h)) / (2 * h)
    error = (u(tau) - v + (tau - rho).reshape(-1, 1, 1, 1) * du).square().mean((1, 2, 3))
    assert torch.allclose(loss.metrics["gap"].double(), error.sqrt(), rtol=1e-3)
    assert loss.value.item() == pytest.approx((error / (error + 1e-3) ** 0.75).mean().item(), rel=1e-3)
    assert torch.allclose(loss.metrics["t"], t, atol=1e-12)


def test_a_ratio_of_zero_learns_the_velocity_alone():
    teacher = gaussian(COSINE, "v_prediction")
    method = MeanFlow(ratio=0.0, power=0.0)
    student = Denoiser(Curved(), COSINE, "v_prediction", shape=(1, 4, 4))
    x0 = torch.rand(16, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    nets, rng = {"student": student, "teacher": teacher}, torch.Generator().manual_seed(2)
    loss = next(method.losses(nets, Batch(x0, {}), Step(method.stages(teacher)[0], 0), rng))
    rng = torch.Generator().manual_seed(2)
    t, r, k = method._times(student, 16, rng, x0.device)
    alpha, sigma = COSINE.at(t, like=x0)
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=rng)
    error = velocity_of(student, x_t, t, r) - flow.velocity(teacher.predict(x_t, t))
    assert k == 0 and torch.equal(t, r)
    assert loss.value.item() == pytest.approx(error.square().mean().item(), rel=1e-5)


def test_times_follow_their_laws():
    student = gaussian(COSINE)
    cpu, rng = torch.device("cpu"), torch.Generator().manual_seed(0)
    t, r, k = MeanFlow(ratio=0.25, grid=0.0)._times(student, 4000, rng, cpu)
    assert k in (1000, 1001) and (r[:k] <= t[:k]).all() and torch.equal(r[k:], t[k:])
    logit = flow.flow_time(COSINE, t).logit()
    drawn = torch.randn(2, 100_000, generator=rng, dtype=torch.float64)
    expected = torch.maximum(-0.6 + 1.6 * drawn[0], -4 + 1.6 * drawn[1])
    assert logit.mean().item() == pytest.approx(expected.mean().item(), abs=0.1)
    assert logit.std().item() == pytest.approx(expected.std().item(), rel=0.05)
    # the share of an example comes out in the mean, however small the batch
    counts = [MeanFlow(ratio=0.3)._times(student, 1, rng, cpu)[2] for _ in range(2000)]
    assert sum(counts) / 2000 == pytest.approx(0.3, abs=0.05)
    # steps of the students' grids
    t, r, _ = MeanFlow(steps=[2, 1], grid=1.0, ratio=1.0)._times(student, 100, rng, cpu)
    assert {*zip(t.tolist(), r.tolist(), strict=True)} == {(1.0, 0.5), (0.5, 0.0), (1.0, 0.0)}


def test_at_pure_noise_everything_is_finite():
    """t = 1, where alpha = 0."""
    student = Denoiser(Curved(), COSINE, "v_prediction", shape=(1, 4, 4))
    x_t = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, r = torch.ones(2).double(), torch.tensor([0.0, 0.5]).double()
    predicted = gaussian(COSINE, "v_prediction").predict(x_t, t)
    found = average_velocity(student, x_t, t, r, predicted)
    before = gaussian(COSINE, "v_prediction").predict(x_t, t - 1e-4)
    near = average_velocity(student, x_t, t - 1e-4, r, before)
    assert found.isfinite().all() and (found - near).abs().max() < 0.02 * found.abs().max()
    # a difference has no room ahead there
    behind = average_velocity(student, x_t, t, r, predicted, "difference", 1e-3)
    assert (found - behind).abs().max() < 0.02 * found.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["distillation", "training"])
def test_a_linear_student_converges_to_the_flow(mode):
    """Trained by the method's own losses, its one step and its two carry noise where the flow does."""
    method = MeanFlow(mode=mode, steps=[2, 1], grid=0.2, t_law=(0.5, 1.2), r_law=(-1.0, 1.2), updates=300)
    before, after = trained(method, COSINE, method.updates)
    assert max(after) < 0.05 * min(before), (before, after)


def test_one_training_gives_students_of_every_step_count():
    teacher = gaussian(COSINE, "v_prediction")
    (stage,) = MeanFlow(steps=[8, 4, 1], updates=7, teacher="previous").stages(teacher)
    assert (stage.name, stage.steps, stage.also, stage.interval) == ("1-steps", 1, (8, 4), True)
    assert (stage.drawn, stage.teacher, stage.updates) == ("ddim", "previous", 7)
    assert [(s.name, s.steps, s.also) for s in stage.students] == [
        ("8-steps", 8, ()), ("4-steps", 4, ()), ("1-steps", 1, ())
    ]  # fmt: skip


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="x0 at t = 1 is its output times 157.*put .name: output"):
        MeanFlow().stages(gaussian(LINEAR, "epsilon"))
    with pytest.raises(UserError, match="student of 3 steps does not fit"):
        MeanFlow(steps=[3]).stages(gaussian(COSINE, "v_prediction"))
    with pytest.raises(UserError, match="guidance needs a label"):
        MeanFlow(guidance=2.0).stages(gaussian(COSINE, "v_prediction"))
    with pytest.raises(ValidationError, match="mode: training does not ask"):
        MeanFlow(mode="training", guidance=2.0)
