"""Methods on schedules that do not preserve variance, which they need not know of."""

import pytest
import torch
from diffusers import DDPMScheduler

from diffkd import methods
from diffkd.core import samplers, scores
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import (
    EDMSchedule,
    FlowSchedule,
    Nodes,
    Preconditioned,
    Shift,
    from_diffusers,
)
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.progressive import Progressive, target
from diffkd.methods.reflow import Reflow, line
from diffkd.methods.regression import Regression
from diffkd.models import students
from tests.gaussian import gaussian
from tests.methods.conformance import losses_of, nets_of
from tests.parallel import method_of

SCHEDULES = {"flow": FlowSchedule(Shift(2.0)), "edm": EDMSchedule(num_train_timesteps=64)}
OF_DENOISERS = [name for name in methods.names() if methods.find(name).kind is Denoiser]


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def nets_on(schedule, method):
    """Those of the conformance test, read as velocities of another path."""
    nets = nets_of(method)
    for net in nets.values():
        if isinstance(net, Denoiser):
            net.schedule, net.prediction = schedule, "flow"
    return nets


def fitting(name, schedule):
    """The method; of EDM's kind a student drawn by renoise has one step, as no stock scheduler adds noise."""
    method = method_of(name)
    one = isinstance(schedule, EDMSchedule) and name in ("consistency", "lcm", "tcm")
    return method.model_copy(update={"steps": [1]}) if one else method


@pytest.mark.parametrize("name", [name for name in OF_DENOISERS if name != "scm"])
def test_losses_and_gradients_are_finite(name, schedule):
    method = fitting(name, schedule)
    nets = nets_on(schedule, method)
    for stage in method.stages(nets["teacher"]):
        for loss in losses_of(method, nets, stage, 11):
            own = [p for p in nets[loss.network].parameters() if p.requires_grad]
            loss.value.backward(inputs=own)
            grads = [p.grad for p in own if p.grad is not None]
            assert loss.value.isfinite() and all(g.isfinite().all() for g in grads)
            assert any(g.abs().sum() > 0 for g in grads)
            nets[loss.network].zero_grad()
        method.after_update(nets, Step(stage, 0))


EPSILON = {"flow": FlowSchedule(Nodes((0.99, 0.6, 0.3, 0.1))), "edm": SCHEDULES["edm"]}


@pytest.mark.parametrize("path", EPSILON)
@pytest.mark.parametrize("name", ["progressive", "reflow", "regression"])
def test_an_epsilon_teacher_becomes_a_velocity(path, name):
    """v is of schedules that preserve variance alone; the students' x0 is its teacher's when it is learnt."""
    schedule = EPSILON[path]
    method = Progressive(steps=[2, 1], substeps=2) if name == "progressive" else method_of(name)
    if name == "reflow":
        method = Reflow(steps=[2, 1])
    teacher = gaussian(schedule, "epsilon")
    first = method.stages(teacher)[0]
    assert first.prediction == "flow"
    student = students.with_network(gaussian(schedule, "flow"), gaussian(schedule, "flow").network, "flow")
    for start in ("flow", "sample"):
        assert method.stages(gaussian(schedule, start))[0].prediction is None
    if name == "progressive":  # by the error in eps, of which a teacher's own predictions leave none
        x0 = torch.randn(6, 1, 4, 4, dtype=torch.float64)
        nets = {"teacher": teacher, "student": student}
        (loss,) = method.losses(nets, Batch(x0, {}), Step(first, 0), seeded())
        student.network.std = 0.7
        (off,) = method.losses(nets, Batch(x0, {}), Step(first, 0), seeded())
        assert loss.value < 1e-9 < 1e-4 < off.value
        expected = schedule.snr(off.metrics["t"]) * off.metrics["gap"] ** 2
        assert torch.allclose(off.metrics["loss"], expected.to(off.metrics["loss"]), rtol=1e-4)


def test_a_preconditioned_network_predicts_x0_and_nothing_else():
    schedule = EDMSchedule()
    raw = gaussian(schedule, "flow").network
    denoiser = Denoiser(raw, schedule, "sample", call=Preconditioned(schedule))
    for name in ("progressive", "reflow", "regression"):
        assert {stage.prediction for stage in method_of(name).stages(denoiser)} == {None}
    with pytest.raises(UserError, match="preconditioned: what is made of its output is sample, not flow"):
        students.with_network(denoiser, raw, "flow")


def test_a_preconditioned_network_is_a_consistency_model():
    """It returns its input at no noise, which a network that predicts x0 itself does not."""
    schedule = EDMSchedule()

    class Network(torch.nn.Module):
        def forward(self, x, time):
            return torch.sin(3 * x) + time.reshape(-1, 1, 1, 1)

    denoiser = Denoiser(Network(), schedule, "sample", call=Preconditioned(schedule), shape=(1, 4, 4))
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    t = torch.full((3,), 1e-7, dtype=torch.float64)
    assert torch.allclose(denoiser(x, t), x, atol=1e-5)
    method = fitting("consistency", schedule)
    assert [stage.steps for stage in method.stages(denoiser)] == [1]
    with pytest.raises(UserError, match="prediction type sample.*{name: output, prediction: flow}"):
        method.stages(gaussian(schedule, "sample"))


def test_the_remedy_for_pure_noise_names_what_the_schedule_has():
    with pytest.raises(UserError, match="prediction: flow"):
        gaussian(SCHEDULES["edm"], "epsilon").check_from_noise()
    with pytest.raises(UserError, match="prediction: v_prediction"):
        gaussian(from_diffusers(DDPMScheduler()), "epsilon").check_from_noise()


def test_scm_says_that_its_angle_is_of_another_kind(schedule):
    with pytest.raises(UserError, match="scm's angle is of a schedule that preserves variance"):
        method_of("scm").stages(gaussian(schedule, "flow"))


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_the_target_of_progressive_lands_where_the_teacher_does(schedule, sampler):
    """One step of the student to s, three of the teacher: the same state, at s = 0 and from t = 1 too."""
    teacher = gaussian(schedule, "flow")
    x_t = schedule.from_noise(torch.randn(3, 1, 4, 4, dtype=torch.float64))
    t = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    s = torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64)
    x0 = target(teacher, x_t, t, s, 3, sampler)
    times = torch.stack([t, (2 * t + s) / 3, (t + 2 * s) / 3, s])
    landed = samplers.find(sampler)(teacher, x_t, times, clip=None, noise=None)
    assert torch.allclose(samplers.ddim_step(schedule, x_t, x0, t, s), landed, rtol=1e-9, atol=1e-9)


def test_a_line_of_reflow_ends_at_what_noise_stands_for(schedule):
    x0, noise = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64)
    x_1, eps = line(schedule, x0, noise, torch.ones(4, dtype=torch.float64))
    assert torch.allclose(x_1, schedule.from_noise(noise), atol=1e-12)
    t = torch.rand(4, dtype=torch.float64)
    alpha, sigma = schedule.at(t, like=x0)
    assert torch.allclose(line(schedule, x0, noise, t)[0], alpha * x0 + sigma * eps, atol=1e-12)


def test_students_are_asked_at_what_noise_stands_for(schedule):
    """Inputs of later steps, images by ddim and the pairs of regression, from the noise of the same seed."""
    student, x0 = gaussian(schedule, "flow"), torch.randn(8, 1, 4, 4, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=seeded(), dtype=x0.dtype)
    first = schedule.from_noise(noise)
    x_t, t = scores.student_inputs(student, x0, 1, seeded(), simulated=True)
    assert (t == 1).all() and torch.equal(x_t, first)
    x_t, t = scores.student_inputs(student, x0, 1, rng := seeded(), simulated=False)
    assert (t == 1).all()
    rng.manual_seed(3)
    torch.randint(1, 2, (8,), generator=rng)  # the times come first
    drawn = torch.randn(x0.shape, generator=rng, dtype=x0.dtype)
    assert torch.equal(x_t, schedule.from_noise(drawn))
    images = scores.draw(student, x0, 5, seeded(), drawn="ddim")
    assert torch.equal(images, samplers.sample(student, noise, 5))

    method = Regression()
    batch, step = Batch(student(first, torch.ones(8).double()), {}, noise), Step(method.stages(student)[0], 0)
    (loss,) = method.losses({"student": student}, batch, step, seeded())
    assert loss.metrics["gap"].abs().max() < 1e-6


def seeded():
    return torch.Generator().manual_seed(3)
