"""Gradients against those of analytic divergences between Gaussians; inputs, times and weights."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import kl_divergence

from diffkd.core import samplers, scores
from diffkd.core.noise import add_noise
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from tests.gaussian import gaussian, marginal
from tests.tiny import student

COSINE = Schedule.cosine(1024)
LINEAR = from_diffusers(DDPMScheduler())
TIMES = [0.125, 0.5, 0.875]


def two(*values):
    """Of two pixels, (1, 1, 1, 2): each has its own, so that what mixes them up is seen."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, 2)


TEACHER, STUDENT = (two(0.3, -0.1), two(0.5, 0.6)), (two(0.0, 0.1), two(0.9, 1.0))  # mean and std
DIVERGENCES = {  # f, with the factor that the weight leaves out
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "squared_hellinger": lambda r: 4 * (1 - r.sqrt()),
    "jeffreys": lambda r: (r - 1) * r.log(),
}


def drawn(t, count=200_000, mean=STUDENT[0], std=STUDENT[1]):
    """z, the student's x, x_t and the exact predictions of teacher and fake network; two pixels each."""
    rng = torch.Generator().manual_seed(3)
    z = torch.randn(count, 1, 1, 2, generator=rng, dtype=torch.float64)
    x = (mean + std * z).requires_grad_(True)
    times = torch.full((count,), t, dtype=torch.float64)
    x_t = add_noise(COSINE, x, times, rng)
    real = gaussian(COSINE, "sample", *TEACHER)(x_t, times)
    fake = gaussian(COSINE, "sample", mean, std)(x_t, times)
    return z, x, x_t, real, fake


@pytest.fixture(scope="module", params=TIMES)
def drawn_at(request):
    """A time, and what is drawn there."""
    return request.param, drawn(request.param)


def gradient(losses, z, x):
    """Of the mean loss in (mean, std) of x = mean + std z, and the standard errors: each (2, 2), by pixel."""
    (by_x,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    each = torch.stack([by_x, by_x * z]).reshape(2, -1, 2)
    return each.mean(1), each.std(1) / math.sqrt(each.shape[1])


def exact_gradient(divergence):
    """Of a function of the student's (mean, std)."""
    at = [value.clone().requires_grad_(True) for value in STUDENT]
    return torch.stack(torch.autograd.grad(divergence(*at), at)).reshape(2, 2)


def f_divergence(t, f):
    """D_f of the teacher's noised images from the student's, by quadrature: a function of (mean, std)."""
    p = marginal(COSINE, t, *TEACHER)
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)

    def divergence(mean, std):
        q = marginal(COSINE, t, mean, std)
        log_p, log_q = (density.log_prob(x).sum(-1) for density in (p, q))
        return (log_q.exp() * f((log_p - log_q).exp().clamp(min=1e-280))).sum() * 0.04**2

    return divergence


def to_scores(t):
    """Predictions of x0 differ by sigma² / alpha times the scores, and x_t moves by alpha; a loss is a mean
    over the two pixels."""
    alpha, sigma = COSINE.numbers(t)
    return sigma**2 / alpha**2 / 2


# distribution matching


def test_the_direction_is_the_gradient_of_the_reverse_kl(drawn_at):
    t, (z, x, _, real, fake) = drawn_at
    found, error = gradient(scores.descent(x, fake - real), z, x)
    teacher = marginal(COSINE, t, *TEACHER)
    exact = exact_gradient(lambda *at: kl_divergence(marginal(COSINE, t, *at), teacher).sum()) * to_scores(t)
    assert ((found - exact).abs() < 3 * error).all() and (exact.abs() > 20 * error).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weighted_direction_is_the_gradient_of_the_f_divergence(name, drawn_at):
    """By the ratio of whole images, which no sum over their pixels gives."""
    t, (z, x, x_t, real, fake) = drawn_at
    p, q = marginal(COSINE, t, *TEACHER), marginal(COSINE, t, *STUDENT)
    ratio = (p.log_prob(x_t) - q.log_prob(x_t)).sum((1, 2, 3)).exp().detach()
    weight = scores.divergence_weight(name, ratio).reshape(-1, 1, 1, 1)
    found, error = gradient(scores.descent(x, weight * (fake - real)), z, x)
    exact = exact_gradient(f_divergence(t, DIVERGENCES[name])) * to_scores(t)
    assert ((found - exact).abs() < 3 * error).all() and (exact.abs() > 20 * error).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weight_is_that_of_its_divergence(name):
    """h(r) = r² f''(r)."""
    assert set(DIVERGENCES) == set(scores.WEIGHTS)
    r = torch.linspace(0.05, 20, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(DIVERGENCES[name](r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    assert torch.allclose(scores.divergence_weight(name, r.detach()), r.detach() ** 2 * curvature)


def test_nothing_moves_a_student_that_is_the_teacher():
    for alpha in (None, 0.0, 0.5, 1.0, 1.2):
        z, x, _, real, fake = drawn(0.5, 1000, *TEACHER)
        size = scores.error_size(x, real)
        if alpha is None:
            losses = scores.descent(x, (fake - real) / size)
        else:
            losses = scores.score_identity(x, real, fake, alpha, size)
        found, _ = gradient(losses, z, x)
        assert (found.abs() < 1e-12).all()


def test_a_descent_has_the_direction_as_its_gradient_and_half_its_square_as_value():
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    direction = torch.randn(3, 2, 4, 4)
    losses = scores.descent(x, direction)
    assert torch.allclose(losses, direction.square().flatten(1).mean(1) / 2)
    (found,) = torch.autograd.grad(losses.sum(), x)
    assert torch.allclose(found, direction / 32, rtol=1e-6)


# score identity


def expected_identity(t, alpha):
    """E of the loss by the moments of x and x_t, as a function of the student with both predictions fixed."""
    a, sigma = COSINE.numbers(t)

    def line(mean, std):  # the posterior mean, slope * x_t + offset
        slope = a * std**2 / (a**2 * std**2 + sigma**2)
        return slope, mean - slope * a * mean

    (real, real_at), (fake, fake_at) = line(*TEACHER), line(*STUDENT)
    u, v = real - fake, real_at - fake_at

    def loss(mean, std):
        variance = a**2 * std**2 + sigma**2
        delta, gap = u * a * mean + v, fake * a * mean + fake_at - mean  # the means of both factors
        product = u * fake * variance - u * a * std**2 + delta * gap
        return ((1 - alpha) * (u**2 * variance + delta**2) + product).mean()

    return loss


def squared_difference(t):
    """E |D - fake|² where the fake network follows the student: the Fisher divergence, in units of x0."""
    a, sigma = COSINE.numbers(t)
    slope_p = a * TEACHER[1] ** 2 / (a**2 * TEACHER[1] ** 2 + sigma**2)

    def divergence(mean, std):
        variance = a**2 * std**2 + sigma**2
        slope_q = a * std**2 / variance
        u, v = slope_p - slope_q, TEACHER[0] - slope_p * a * TEACHER[0] - (mean - slope_q * a * mean)
        return (u**2 * variance + (u * a * mean + v) ** 2).mean()

    return divergence


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_the_score_identity_has_the_expected_gradient(alpha, drawn_at):
    t, (z, x, _, real, fake) = drawn_at
    losses = scores.score_identity(x, real, fake, alpha, torch.ones(1, dtype=torch.float64))
    found, error = gradient(losses, z, x)
    exact = exact_gradient(expected_identity(t, alpha))
    assert ((found - exact).abs() < 3 * error).all() and (exact.abs() > 10 * error).any(1).all()


def test_the_score_identity_as_its_authors_write_it():
    """delta ((D - x) - alpha delta) / size, of mingyuanzhou/SiD's training/sid_loss.py."""
    x, real, fake = torch.randn(3, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    size = scores.error_size(x, real)
    expected = ((real - fake) * ((real - x) - 1.2 * (real - fake)) / size).mean((1, 2, 3))
    assert torch.allclose(scores.score_identity(x, real, fake, 1.2, size), expected)


@pytest.mark.parametrize("t", TIMES)
def test_at_one_half_the_score_identity_descends_the_fisher_divergence(t):
    half = exact_gradient(expected_identity(t, 0.5))
    assert torch.allclose(half, exact_gradient(squared_difference(t)) / 2, rtol=1e-9)


# the fake network


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_denoising_error_is_that_of_the_output(prediction):
    denoiser = student(None, prediction, COSINE)
    rng = torch.Generator().manual_seed(0)
    x0, t = torch.randn(4, 1, 8, 8, generator=rng), torch.tensor([0.25, 0.5, 0.75, 1.0]).double()
    eps = torch.randn(x0.shape, generator=rng)
    alpha, sigma = COSINE.at(t, like=x0)
    x_t = alpha * x0 + sigma * eps
    target = x0 if prediction == "sample" else alpha * eps - sigma * x0
    with torch.no_grad():
        found = scores.denoising_error(denoiser, denoiser(x_t, t), x0, t)
        expected = (denoiser.output(x_t, t) - target).square().mean((1, 2, 3))
    assert torch.allclose(found, expected, rtol=1e-4)


# inputs of the student


def test_models_without_an_x0_at_pure_noise_are_refused():
    scores.check_start(gaussian(COSINE), 4, 1.0)
    for schedule, prediction, steps, guidance, message in (
        (LINEAR, "epsilon", 1, 1.0, r"x0 at t = 1 is its output times 157.*; put .name: output"),
        (COSINE, "sample", 3, 1.0, "a student of 3 steps does not fit"),
        (COSINE, "sample", 1, 2.0, "guidance needs a label"),
    ):
        with pytest.raises(UserError, match=message):
            scores.check_start(gaussian(schedule, prediction), steps, guidance)


def test_simulated_inputs_are_states_of_the_students_own_sampling():
    net, rng = student(3, "v_prediction", COSINE), torch.Generator().manual_seed(1)
    like, labels = torch.empty(8, 1, 8, 8), torch.arange(8) % 3
    x_t, t = scores.student_inputs(net, like, 4, rng, simulated=True, class_labels=labels)
    assert t.tolist() == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    rng.manual_seed(1)
    noises = [torch.randn(8, 1, 8, 8, generator=rng)]
    torch.rand((), generator=rng, dtype=torch.float64)
    noises += [torch.randn(rows, 1, 8, 8, generator=rng) for rows in (6, 4, 2)]
    for row in range(8):
        # each noise was drawn for the last rows
        own = iter([noise[row - 8 : row - 7 or None] for noise in noises if len(noise) >= 8 - row])
        x = next(own)
        times = [1 - k / 4 for k in range(row // 2 + 1)]
        fresh = lambda _, own=own: next(own)  # noqa: E731
        x = samplers.renoise(net, x, times, noise=fresh, class_labels=labels[row : row + 1])
        assert torch.allclose(x_t[row], x[0], atol=1e-5), row


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_simulated_inputs_take_as_many_calls_whatever_is_drawn_and_every_time_as_often(count):
    net, like = gaussian(COSINE), torch.empty(count, 1, 2, 2)
    seen = torch.zeros(4)
    for seed in range(150):
        net.network.calls = 0
        _, t = scores.student_inputs(net, like, 4, torch.Generator().manual_seed(seed), simulated=True)
        assert net.network.calls == 3
        seen += torch.bincount((t * 4).round().long() - 1, minlength=4)
    assert ((seen / seen.sum() - 0.25).abs() < 0.08).all()


def test_noised_inputs_begin_with_pure_noise_on_any_schedule():
    net, x0 = gaussian(LINEAR), torch.full((64, 1, 2, 2), 100.0)
    x_t, t = scores.student_inputs(net, x0, 2, torch.Generator().manual_seed(0), simulated=False)
    assert set(t.tolist()) == {0.5, 1.0} and x_t[t == 1].abs().max() < 6 and x_t[t == 0.5].min() > 10


def test_one_step_takes_pure_noise():
    for simulated in (True, False):
        net = gaussian(COSINE)
        rng = torch.Generator().manual_seed(0)
        x_t, t = scores.student_inputs(net, torch.zeros(5, 1, 4, 4), 1, rng, simulated=simulated)
        assert (t == 1).all() and 0.7 < x_t.std() < 1.3 and net.network.calls == 0


def test_images_by_ddim_are_those_of_its_sampler_and_teach_every_step():
    """The gradient is that of finite differences of the whole sampler."""
    net, like = student(3, "v_prediction", COSINE).double(), torch.empty(2, 1, 8, 8, dtype=torch.float64)
    labels, weight = torch.tensor([0, 2]), net.network.conv_in.weight

    def images():
        rng = torch.Generator().manual_seed(5)
        return scores.draw(net, like, 4, rng, drawn="ddim", class_labels=labels)

    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(images(), samplers.ddim(net, noise, [1.0, 0.75, 0.5, 0.25, 0.0], class_labels=labels))
    (found,) = torch.autograd.grad(images().square().sum(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    sums = []
    for step in (1e-5, -2e-5):
        weight.data += step * direction
        sums.append(images().square().sum().item())
    assert (found * direction).sum().item() == pytest.approx((sums[0] - sums[1]) / 2e-5, rel=1e-6)


# times


@pytest.mark.parametrize("total", [16, 1000])
def test_noise_times_are_those_of_the_table_within_their_bounds(total):
    schedule, rng = Schedule.cosine(total), torch.Generator().manual_seed(0)
    t = scores.noise_times(20_000, schedule, 0.25, 0.5, rng, torch.device("cpu")) * total
    assert torch.equal(t, t.round()) and (t.min(), t.max()) == (total / 4, total / 2)
    everything = scores.noise_times(20_000, schedule, 0.0, 1.0, rng, torch.device("cpu")) * total
    assert (everything.min(), everything.max()) == (1, total)
    one = scores.noise_times(10, schedule, 0.01, 0.01, rng, torch.device("cpu"))
    assert len(set(one.tolist())) == 1 and one[0] > 0


# density ratios


def test_density_ratios_average_to_one_in_every_bin_and_keep_their_order():
    rng = torch.Generator().manual_seed(0)
    logits, t = 3 * torch.randn(500, 2, generator=rng), torch.rand(500, generator=rng).double()
    ratio = scores.density_ratio(logits, t, 5, 0.1, 20.0)
    for low in range(5):
        inside = (t > low / 5) & (t <= (low + 1) / 5)
        assert ratio[inside].mean() == pytest.approx(1, rel=1e-5)
        raw = logits[inside].mean(1).exp().clamp(0.1, 20)
        assert torch.allclose(ratio[inside], raw / raw.mean(), rtol=1e-5)
    assert scores.density_ratio(logits, torch.ones(500), 1, 0.1, 20.0).isfinite().all()
