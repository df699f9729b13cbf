import pytest
import torch
from diffusers import DDPMScheduler

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.progressive import Progressive, target
from tests.gaussian import flow, gaussian

COSINE = Schedule.cosine(1024)
LINEAR = from_diffusers(DDPMScheduler())
COUNTS = [1, 2, 4, 8, 32, 128, 1024, 4096, 8192]


class Rough(torch.nn.Module):
    """A teacher that is not a posterior mean: curved in x and t, so that no error cancels."""

    def forward(self, x, time):
        return torch.sin(3 * x + time.to(x).reshape(-1, 1, 1, 1) / 100)


def rough(schedule=COSINE):
    return Denoiser(Rough(), schedule, "sample", shape=(1, 4, 4))


def states(steps, count=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    i = torch.randint(1, steps + 1, (count,), generator=generator).double()
    i[0], i[1] = 1, steps
    return x_t, i / steps, (i - 1) / steps


def salimans_ho(teacher, z_t, t, steps):
    """Salimans & Ho 2022, algorithm 2, line by line, for a teacher that predicts x."""

    def coefficients(time):
        return teacher.schedule.at(time, like=z_t)

    alpha_t, sigma_t = coefficients(t)
    middle, end = t - 0.5 / steps, t - 1 / steps
    end = torch.where(end.abs() < 1e-12, 0.0, end)
    alpha_1, sigma_1 = coefficients(middle)
    alpha_2, sigma_2 = coefficients(end)
    x = teacher(z_t, t)
    z_1 = alpha_1 * x + sigma_1 / sigma_t * (z_t - alpha_t * x)
    x = teacher(z_1, middle)
    z_2 = alpha_2 * x + sigma_2 / sigma_1 * (z_1 - alpha_1 * x)
    return (z_2 - sigma_2 / sigma_t * z_t) / (alpha_2 - sigma_2 / sigma_t * alpha_t)


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize(
    "teacher", [rough(), rough(LINEAR), gaussian(COSINE), gaussian(COSINE, "v_prediction")]
)
def test_the_target_is_that_of_salimans_and_ho(teacher, steps):
    x_t, t, s = states(steps)
    ours = target(teacher, x_t, t, s)
    assert ours.dtype == torch.float64
    assert (ours - salimans_ho(teacher, x_t, t, steps)).abs().max() < 1e-10


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("substeps", [1, 2, 3, 5])
def test_the_target_is_a_convex_combination(steps, substeps):
    """sum_j w_j denoised_j, w_j = (a_{j+1} - a_j) / (a_k - a_0), a = alpha / sigma: DDIM sub-steps."""
    teacher = rough()
    x_t, t, s = states(steps)
    x, predictions, a = x_t, [], []
    for j in range(substeps + 1):
        time = t + (s - t) * j / substeps if j < substeps else s
        alpha, sigma = COSINE.at(time, like=x)
        a.append(alpha / sigma)
        if j < substeps:
            after = t + (s - t) * (j + 1) / substeps if j + 1 < substeps else s
            predictions.append(teacher(x, time))
            x = samplers.ddim_step(COSINE, x, predictions[-1], time, after)
    inside = (s > 0).reshape(-1, 1, 1, 1)
    weights = [
        torch.where(inside, (a[j + 1] - a[j]) / (a[-1] - a[0]), float(j == substeps - 1))
        for j in range(substeps)
    ]
    assert all((w >= 0).all() for w in weights) and torch.allclose(sum(weights), torch.ones(1).double())
    combined = sum(w * p for w, p in zip(weights, predictions, strict=True))
    assert (target(teacher, x_t, t, s, substeps) - combined).abs().max() < 1e-10


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
@pytest.mark.parametrize("substeps", [1, 2, 4])
def test_one_ddim_step_towards_the_target_lands_where_the_teacher_does(sampler, substeps):
    teacher, steps = rough(), 8
    x_t, t, s = states(steps)
    draw = torch.Generator().manual_seed(5)
    noise = lambda x: torch.randn(x.shape, generator=draw, dtype=x.dtype)  # noqa: E731
    options = {"eta": 0.5} if sampler == "ancestral" else {}
    x0_target = target(teacher, x_t, t, s, substeps, sampler, noise=noise, **options)
    draw.manual_seed(5)
    times = torch.stack([t + (s - t) * j / substeps for j in range(substeps)] + [s])
    landed = samplers.find(sampler)(teacher, x_t, times, clip=None, noise=noise, **options)
    assert torch.allclose(samplers.ddim_step(COSINE, x_t, x0_target, t, s), landed, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_a_gaussian_teachers_exact_student(sampler):
    """With many sub-steps the one-step student's target is the flow to the data, known in closed form."""
    teacher = gaussian(COSINE)
    x_t = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    t, s = torch.ones(4).double(), torch.zeros(4).double()
    errors = [
        (target(teacher, x_t, t, s, substeps, sampler) - flow(COSINE, x_t, t, s)).abs().max()
        for substeps in (8, 64, 512)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 6e-3


# mistakes that other implementations made: each test fails on the mistaken formula


def test_mistake_second_prediction():
    """The teacher's second prediction is not the target, except at s = 0."""
    teacher, steps = rough(), 8
    x_t, t, s = states(steps)
    middle = (t + s) / 2
    second = teacher(samplers.ddim_step(COSINE, x_t, teacher(x_t, t), t, middle), middle)
    ours = target(teacher, x_t, t, s)
    inside = s > 0
    assert ((ours - second)[inside].abs().flatten(1).amax(1) > 1e-2).all()
    assert torch.allclose(ours[~inside], second[~inside])


def test_mistake_dividing_by_sigma_at_the_last_step():
    x_t, t, s = states(1)
    assert (s == 0).all()
    assert target(rough(), x_t, t, s).isfinite().all()
    x_t, t, s = states(8192)
    assert target(rough(), x_t, t, s, 2).isfinite().all()


def test_mistake_clipping_inside_the_target():
    """A teacher far outside [-1, 1] keeps its target there, whatever its own sampling clips to."""
    teacher = gaussian(COSINE, mean=3.0)
    teacher.clip = 1.0
    x_t, t, s = states(4)
    clipped = target(teacher, x_t, t, s)
    teacher.clip = None
    assert torch.equal(clipped, target(teacher, x_t, t, s)) and clipped.abs().max() > 2


def test_mistake_single_precision():
    """At 4096 steps the same subtraction in float32 is far less accurate than in float64."""
    teacher, steps = rough(), 4096
    x_t, t, s = states(steps, 256)
    exact = salimans_ho(teacher, x_t, t, steps)
    single = salimans_ho(teacher, x_t.float(), t, steps)
    assert (single - exact).abs().max() > 1e-4
    assert (
        target(teacher, x_t.float(), t, s) - salimans_ho(teacher, x_t.float().double(), t, steps)
    ).abs().max() < 1e-10


def test_mistake_teacher_with_gradients():
    teacher = Denoiser(torch.nn.Conv2d(1, 1, 1), COSINE, "sample")
    teacher.network.forward = lambda x, time, f=teacher.network.forward: f(x)
    x_t, t, s = states(4)
    assert not target(teacher, x_t, t, s).requires_grad
    assert teacher.network.weight.requires_grad  # though nobody froze it


# stages


def stage_list(steps, start=None, **fields):
    return Progressive(steps=steps, **fields).stages(start or rough())


def test_substeps_follow_from_the_list_of_steps():
    stages = stage_list([16, 4, 1], substeps=3, updates=10)
    assert [(s.name, s.steps, s.substeps, s.updates) for s in stages] == [
        ("16-steps", 16, 3, 10),
        ("4-steps", 4, 4, 10),
        ("1-steps", 1, 4, 20),
    ]
    assert [s.substeps for s in Progressive(steps=[5, 1]).stages(rough(LINEAR))] == [2, 5]
    assert [s.updates for s in stage_list([4, 2, 1], updates=7)] == [7, 14, 14]
    assert [s.updates for s in stage_list([4, 2, 1], updates=[7, 5, 9])] == [7, 5, 9]


def test_only_the_first_target_uses_the_teachers_sampler():
    """A student's step is a DDIM step: other samplers would take its prediction for a posterior mean."""
    assert [s.sampler for s in stage_list([4, 2, 1], sampler="heun")] == ["heun", "ddim", "ddim"]
    stages = stage_list([20, 10], gaussian(LINEAR, "epsilon"), sampler="dpmpp_2m")
    assert [s.sampler for s in stages] == ["ddim", "dpmpp_2m", "ddim"]


def test_an_epsilon_teacher_gets_a_stage_of_its_own():
    start = gaussian(LINEAR, "epsilon")
    stages = stage_list([20, 10, 5, 1], start, updates=10, updates_v=30)
    assert [(s.steps, s.substeps, s.prediction, s.updates) for s in stages] == [
        (40, 1, "v_prediction", 30),
        (20, 2, None, 10),
        (10, 2, None, 10),
        (5, 2, None, 10),
        (1, 5, None, 20),
    ]
    # its target, of one sub-step, is the teacher's own prediction
    x_t, t, s = states(40)
    assert torch.allclose(target(start, x_t, t, s, 1), start(x_t, t), atol=1e-9)


def test_stage_0_matches_the_epsilon_teacher_in_eps():
    """Its loss is the mean squared difference of eps, the student read as v."""
    teacher = gaussian(LINEAR, "epsilon")
    student = Denoiser(Rough(), LINEAR, "v_prediction", shape=(1, 4, 4))
    method = Progressive(steps=[20])
    x0 = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    nets = {"student": student, "teacher": teacher}
    rng = torch.Generator().manual_seed(2)
    loss = next(method.losses(nets, Batch(x0, {}), Step(method.stages(teacher)[0], 0), rng))
    rng = torch.Generator().manual_seed(2)
    t = torch.randint(1, 41, (6,), generator=rng).double() / 40
    eps = torch.randn(x0.shape, generator=rng)
    alpha, sigma = LINEAR.at(t, like=x0)
    x_t = (alpha * x0 + sigma * eps).double()
    difference = student.predict(x_t, t).eps - teacher.predict(x_t, t).eps
    assert loss.value.item() == pytest.approx(difference.square().mean().item(), rel=1e-3)


def test_guidance_is_baked_in_once():
    start = rough()
    start.null_label = 3
    assert [s.guidance for s in stage_list([4, 2, 1], start, guidance=2.0)] == [2.0, 1.0, 1.0]
    with pytest.raises(UserError, match="null_label"):
        stage_list([4, 2], guidance=2.0)


def test_more_substeps_than_the_table_has_are_refused():
    with pytest.raises(UserError, match="512 steps of 4 sub-steps each are more than the teacher's 1024"):
        stage_list([512], substeps=4)


@pytest.mark.parametrize("steps", [[6, 3], [2048, 1024]])
def test_steps_that_the_stock_scheduler_cannot_take(steps):
    with pytest.raises(UserError, match="does not fit a teacher of 1024 time steps.*Use one of 1, 2, 4, 8"):
        stage_list(steps)


# the loss


def test_the_loss_is_the_weighted_error_of_both_targets():
    """(1 - alpha) denoising + alpha distillation, weighted by noise level, a mean over pixels."""
    teacher, student = gaussian(COSINE), rough()
    x0 = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    method = Progressive(steps=[8], alpha=0.3, weight="truncated_snr")
    stage = method.stages(teacher)[0]
    loss = next(
        method.losses(
            {"student": student, "teacher": teacher},
            Batch(x0, {}),
            Step(stage, 0),
            torch.Generator().manual_seed(2),
        )
    )
    rng = torch.Generator().manual_seed(2)
    i = torch.randint(1, 9, (6,), generator=rng)
    eps = torch.randn(x0.shape, generator=rng)
    t = i.double() / 8
    alpha, sigma = COSINE.at(t, like=x0.double())
    x_t = (alpha * x0 + sigma * eps).float()
    x0_target = salimans_ho(teacher, x_t.double(), t, 8)
    denoised = student(x_t, t).double()
    w = (alpha**2 / sigma**2).clamp(min=1)
    expected = 0.3 * w * (denoised - x0_target) ** 2 + 0.7 * w * (denoised - x0) ** 2
    assert abs(loss.value.item() / expected.mean().item() - 1) < 1e-4
    gap = (denoised - x0_target).square().mean((1, 2, 3)).sqrt()
    assert torch.allclose(loss.metrics["gap"].double(), gap, rtol=1e-3) and torch.equal(loss.metrics["t"], t)


def test_a_student_that_predicts_its_target_has_no_loss():
    teacher = gaussian(COSINE)
    method = Progressive(steps=[512], substeps=1)
    nets = {"student": teacher, "teacher": teacher}
    loss = next(
        method.losses(
            nets, Batch(torch.rand(8, 1, 4, 4), {}), Step(method.stages(teacher)[0], 0), torch.Generator()
        )
    )
    assert loss.value < 1e-7
