"""Classifier guidance: in closed form, in the samplers' modes, and what it refuses."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from diffkd.core import samplers
from diffkd.core.classifier import Classifier, guided
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, from_diffusers, write_prediction
from diffkd.errors import UserError
from diffkd.generation.generator import generate
from diffkd.runs.classification.cnn import CNN
from tests.gaussian import gaussian
from tests.tiny import student

COSINE = Schedule.cosine(64)
LINEAR = from_diffusers(DDPMScheduler())
MEANS, STD, SHARES = torch.tensor([-0.6, 0.5], dtype=torch.float64), 0.3, torch.tensor([0.3, 0.7])


class Mixture(nn.Module):
    """Data of two Gaussians N(MEANS[k], STD^2 I), in proportions SHARES, for which everything is known
    exactly."""

    def __init__(self, schedule, prediction):
        super().__init__()
        self.schedule, self.prediction = schedule, prediction

    def parts(self, x_t, time):
        """(B, 2) log p(k, x_t) up to a constant, (B, 2, C, H, W) E[x0 | x_t, k], and the coefficients."""
        t = (time.double() + 1) / self.schedule.num_train_timesteps
        alpha, sigma = self.schedule.at(t, like=x_t)
        variance = alpha**2 * STD**2 + sigma**2
        means = MEANS.reshape(1, 2, 1, 1, 1)
        away = x_t[:, None] - alpha[:, None] * means
        log_p = SHARES.double().log() - (away.square() / (2 * variance[:, None])).flatten(2).sum(2)
        return log_p, means + (alpha * STD**2 / variance)[:, None] * away, alpha, sigma


class Posterior(Mixture):
    def forward(self, x_t, time):
        log_p, x0, alpha, sigma = self.parts(x_t, time)
        mean = (log_p.softmax(1)[:, :, None, None, None] * x0).sum(1)
        return write_prediction(self.prediction, x_t, mean, alpha, sigma)


class Exact(Mixture):
    def forward(self, x_t, time):
        return self.parts(x_t, time)[0]


def models(schedule, prediction):
    denoiser = Denoiser(Posterior(schedule, prediction), schedule, prediction, shape=(1, 4, 4))
    return denoiser, Classifier(Exact(schedule, prediction), 2, shape=(1, 4, 4), schedule=schedule)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_exact_models_give_the_exact_conditional_denoiser(prediction, mode):
    """E[x0 | x_t, y] of a Gaussian is known; guiding the mixture's posterior mean must give it."""
    schedule = LINEAR if prediction == "epsilon" else COSINE
    steps = schedule.num_train_timesteps
    denoiser, classifier = models(schedule, prediction)
    with mode():
        x_t = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        t = torch.linspace(1, steps - 1, 40, dtype=torch.float64).round() / steps
        y = torch.arange(40) % 2
        found = guided(denoiser, classifier, 1.0)(x_t, t, class_labels=y)
        exact = classifier.network.parts(x_t, schedule.network_time(t, x_t))[1][torch.arange(40), y]
        assert (found - exact).abs().max() < 1e-9
        assert (denoiser(x_t, t) - exact).abs().max() > 0.1


def test_the_scale_multiplies_the_shift_in_eps():
    """Equation 14: eps - scale sigma g, for any scale, with g by finite differences."""
    denoiser, classifier = models(LINEAR, "epsilon")
    x_t = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t, y = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), torch.tensor([0, 1, 1])
    step = torch.zeros_like(x_t)
    step[:, 0, 1, 2] = 1e-6
    log_p = [classifier(x_t + sign * step, t).log_softmax(1)[torch.arange(3), y] for sign in (1, -1)]
    slope = (log_p[0] - log_p[1]) / 2e-6
    plain = denoiser.predict(x_t, t).eps[:, 0, 1, 2]
    for scale in (0.0, 2.5):
        eps = guided(denoiser, classifier, scale).predict(x_t, t, class_labels=y).eps[:, 0, 1, 2]
        assert torch.allclose(eps, plain - scale * LINEAR.at(t)[1] * slope, rtol=0, atol=1e-7)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample", "flow"])
def test_pure_noise_is_not_shifted(prediction):
    denoiser, _ = models(COSINE, prediction)
    network = CNN(1, 2, [4], timed=True).double()  # which does not know that it can know nothing
    model = guided(denoiser, Classifier(network, 2, schedule=COSINE), 3.0)
    x_t, t = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1])
    assert torch.equal(model(x_t, t, class_labels=y), denoiser(x_t, t))
    assert not torch.equal(model(x_t, t / 2, class_labels=y), denoiser(x_t, t / 2))


def test_samplers_and_generate_work_unchanged():
    """The requested classes are drawn by every sampler, and in generate's inference mode."""
    denoiser, classifier = models(COSINE, "v_prediction")
    model = guided(denoiser, classifier)
    assert model.num_classes == 2
    noise = torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.arange(60) % 2
    for sampler in ("ddim", "heun", "dpmpp_2m"):
        x0 = samplers.sample(model, noise, 32, sampler, class_labels=y)
        middle = x0.mean((1, 2, 3))
        assert (middle[y == 0] < 0).all() and (middle[y == 1] > 0).all()
    images = torch.cat(list(generate(model, 20, steps=16, labels=[1, 0], batch_size=7))).double() / 127.5 - 1
    middle = images.mean((1, 2, 3))
    assert (middle[::2] > 0).all() and (middle[1::2] < 0).all()


def test_a_conditional_denoiser_is_given_the_labels_too():
    denoiser = student(3, "v_prediction", COSINE)
    denoiser.num_classes = 3
    network = CNN(1, 3, [4], timed=True)
    model = guided(denoiser, Classifier(network, 3, schedule=COSINE), 0.0)
    x_t, t, y = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5, dtype=torch.float64), torch.arange(3)
    assert torch.equal(model(x_t, t, class_labels=y), denoiser(x_t, t, class_labels=y))


def test_what_does_not_fit_is_refused():
    denoiser = gaussian(COSINE)
    network = CNN(1, 2, [4], timed=True)
    with pytest.raises(UserError, match="takes clean images"):
        guided(denoiser, Classifier(CNN(1, 2, [4], timed=False), 2))
    with pytest.raises(UserError, match="of 1000 steps, is not the denoiser's, of 64"):
        guided(denoiser, Classifier(network, 2, schedule=LINEAR))
    with pytest.raises(UserError, match="shape is"):
        guided(denoiser, Classifier(network, 2, schedule=COSINE, shape=(1, 8, 8)))
    denoiser.num_classes = 3
    with pytest.raises(UserError, match="num_classes is 2, and the denoiser's 3"):
        guided(denoiser, Classifier(network, 2, schedule=COSINE))
