"""TCM: a loss by hand, what each network is asked, the exact student of a Gaussian teacher."""

import math

import pytest
import torch

from diffkd.core.consistency import earlier
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.consistency import Consistency
from diffkd.methods.tcm import TCM
from tests.gaussian import gaussian
from tests.trajectories import at_noise, data, exact, family, gradients, train

COSINE = Schedule.cosine(1024)


class Rough(torch.nn.Module):
    def forward(self, x, time):
        return torch.sin(3 * x + time.to(x).reshape(-1, 1, 1, 1) / 100)


def only(method):
    return method.stages(first())[0]


def first():
    """A consistency model: exact, and saved for renoise at one step."""
    denoiser = exact(COSINE)
    denoiser.steps = 1
    return denoiser


@pytest.mark.parametrize("mode", ["training", "distillation"])
def test_one_loss_by_hand(mode):
    method = TCM(
        mode=mode, truncation=1.5, boundary=0.4, boundary_weight=0.3, scale=0.8, closest=0.9, huber=0.01,
        steps=[1], substeps=2 if mode == "distillation" else 1,
    )  # fmt: skip
    student = Denoiser(Rough(), COSINE, "v_prediction", shape=(1, 4, 4))
    x0 = data(12, torch.Generator().manual_seed(1))
    teacher = gaussian(COSINE, "v_prediction")
    nets = {"student": student, "teacher": first()}
    if mode == "distillation":
        nets = {"student": student, "teacher": teacher, "first": first()}
    loss = next(method.losses(nets, Batch(x0, {}), Step(only(method), 3), torch.Generator().manual_seed(2)))
    rng = torch.Generator().manual_seed(2)
    quantile = torch.rand(12, generator=rng, dtype=torch.float64)
    at_boundary = torch.rand(12, generator=rng) < 0.4
    eps = torch.randn(x0.shape, generator=rng)
    log_kappa = math.log(1.5) + 0.8 * torch.tan(math.pi / 2 * quantile)  # half-Cauchy above the boundary
    log_kappa = torch.where(at_boundary, math.log(1.5), log_kappa)
    kappa = log_kappa.exp()
    tau = kappa / (1 + kappa)
    tau_s = tau - 0.1 * tau * (1 + 8 / (1 + kappa.exp()))
    t, s = at_noise(COSINE, log_kappa), at_noise(COSINE, (tau_s / (1 - tau_s)).log())

    def noised(tau):
        tau = tau.reshape(-1, 1, 1, 1)
        return ((1 - tau) * x0 + tau * eps) / (tau**2 + (1 - tau) ** 2).sqrt()

    x_t, x_s = noised(tau), noised(tau_s)
    if mode == "distillation":  # two steps of DDIM from t to s
        x_s = x_t
        for now, then in ((t, (t + s) / 2), ((t + s) / 2, s)):
            (alpha, sigma), (alpha_s, sigma_s) = COSINE.at(now, like=x0), COSINE.at(then, like=x0)
            denoised = teacher(x_s, now)
            x_s = alpha_s * denoised + sigma_s / sigma * (x_s - alpha * denoised)
    below = tau_s < 1.5 / 2.5
    assert below.any() and not below.all() and at_boundary.any() and below[at_boundary].all()
    target = torch.where(below.reshape(-1, 1, 1, 1), first()(x_s, s), student(x_s, s))
    square = (student(x_t, t) - target).square().sum((1, 2, 3))
    distance = ((square + 0.04**2).sqrt() - 0.04) / (tau - tau_s)
    assert torch.allclose(loss.metrics["loss"], distance.detach(), rtol=1e-4)
    # means over the two kinds of examples, whose expected shares are 0.4 and 0.6
    expected = (0.3 * distance[at_boundary].sum() / 0.4 + distance[~at_boundary].sum() / 0.6) / 12
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["training", "distillation"])
def test_the_exact_student_has_no_gradient_in_the_mean(mode):
    """With the exact first stage below; another student has one, and so has another first stage: in what
    moves it with x, and in what moves it everywhere."""
    exactly = {"sampler": "heun"} if mode == "distillation" else {}
    method = TCM(mode=mode, closest=0.999, huber=1.0, boundary_weight=1.0, steps=[1], **exactly)

    def found(student, before):
        nets = {"student": student, "teacher": before}
        if mode == "distillation":
            nets.update(teacher=gaussian(COSINE, "v_prediction"), first=before)
        each = torch.stack([gradients(method, nets, only(method), 0, 2048, seed) for seed in range(8)])
        return each.mean(0).abs(), each.std(0) / math.sqrt(8)

    mean, error = found(exact(COSINE), exact(COSINE))
    assert (mean < 5 * error + 1e-3).all()
    for index, off in enumerate([{"a": 0.1}, {"b": 0.1}]):
        for student, before in ((exact(COSINE, **off), exact(COSINE)), (exact(COSINE), exact(COSINE, **off))):
            mean, error = found(student, before)
            assert mean[index] > 10 * error[index] and mean[index] > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["training", "distillation"])
def test_a_small_student_finds_the_data_from_its_first_stage(mode):
    method = TCM(mode=mode, updates=150, learning_rate=2e-2, steps=[1], closest=0.999)
    student, nets = family(COSINE), {"teacher": first()}
    if mode == "distillation":
        nets = {"teacher": gaussian(COSINE, "v_prediction"), "first": first()}
    train(method, {"student": student, **nets}, only(method))
    assert student.network.mean.item() == pytest.approx(0.3, abs=0.03)
    assert student.network.std.item() == pytest.approx(0.5, abs=0.03)


def test_a_first_stage_that_is_none_is_refused():
    with pytest.raises(UserError, match="put consistency, scm or lcm before it"):
        TCM().stages(gaussian(COSINE, "v_prediction"))
    halved = first()
    halved.sampler = "ddim"
    with pytest.raises(UserError, match="put consistency, scm or lcm before it"):
        TCM().stages(halved)


def test_students_that_would_be_asked_below_the_boundary_are_refused():
    stage = TCM(steps=[2, 1]).stages(first())[0]
    assert (stage.name, stage.also, stage.drawn, stage.teacher) == ("1-steps", (2,), "renoise", "previous")
    with pytest.raises(UserError, match="4 steps is asked at sigma / alpha = 0.425, below.*truncation 1,"):
        TCM(steps=[4, 1]).stages(first())
    assert TCM(steps=[4, 1], truncation=0.4).stages(first())


def test_a_teacher_beside_the_first_stage():
    """In distillation the stage's teacher is the run's own, and the first stage a network that stays."""
    method = TCM(mode="distillation", steps=[1], substeps=3, guidance=1.5)
    start = first()
    start.null_label = 3
    stage = method.stages(start)[0]
    assert (stage.teacher, stage.sampler, stage.substeps, stage.guidance) == ("original", "ddim", 3, 1.5)
    networks = method.networks(gaussian(COSINE, "v_prediction"), start)
    assert [*networks] == ["first"] and not any(p.requires_grad for p in networks["first"].parameters())
    assert TCM().networks(start, start) == {} and not method.learns_what_data_is()
    with pytest.raises(ValueError, match="guidance 2 is the teacher's, whom mode: training does not ask"):
        TCM(guidance=2.0)
    for method in (TCM, Consistency):
        for given, says in (({"substeps": 2}, "substeps: 2"), ({"sampler": "heun"}, "sampler: heun")):
            with pytest.raises(ValueError, match=f"{says} is of the teacher's step, which mode: training d"):
                method(mode="training", **given)


@pytest.mark.parametrize("closest", [0.9, 0.5])
def test_a_network_is_asked_for_its_own_targets_alone(closest):
    """The student where x_s is above the boundary, the first stage where it is below, neither where the
    trajectory has begun; by eighths of a batch, and one at least."""
    student, before, asked = family(COSINE), first(), {"student": [], "first": []}
    for name, net in (("student", student), ("first", before)):
        net.network.register_forward_pre_hook(
            lambda module, args, own=asked[name]: (
                None if torch.is_grad_enabled() else own.append(len(args[0]))
            )
        )
    method = TCM(closest=closest, steps=[1])
    batch = Batch(data(160, torch.Generator().manual_seed(1)), {})
    nets = {"student": student, "teacher": before}
    loss = next(method.losses(nets, batch, Step(only(method), 0), torch.Generator().manual_seed(4)))
    s = earlier(COSINE, loss.metrics["t"], 1 - closest)
    least = at_noise(COSINE, torch.zeros(1, dtype=torch.float64))
    shares = ((s >= least).sum() / 20, ((s > 0) & (s < least)).sum() / 20)
    wanted = [20 * math.ceil(max(share.item(), 1e-9)) for share in shares]
    assert [asked["student"], asked["first"]] == [[count] for count in wanted]
    assert sum(wanted) <= 180 and (closest == 0.9 or wanted[0] == 20)
