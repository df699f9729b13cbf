"""Teachers in closed form: data from N(mean, std² I)."""

from torch import Tensor, nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, write_prediction


class Gaussian(nn.Module):
    """The exact posterior mean E[x0 | x_t], as any prediction type. Its time is a table index."""

    def __init__(self, schedule: Schedule, prediction: str, mean: float = 0.3, std: float = 0.5) -> None:
        super().__init__()
        self.schedule, self.prediction, self.mean, self.std = schedule, prediction, mean, std
        self.calls = 0

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        self.calls += 1
        t = (time.double() + 1) / self.schedule.num_train_timesteps
        alpha, sigma = self.schedule.at(t, like=x_t)
        x0 = self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (x_t - alpha * self.mean)
        return write_prediction(self.prediction, x_t, x0, alpha, sigma)


def gaussian(schedule: Schedule, prediction: str = "sample", mean: float = 0.3, std: float = 0.5) -> Denoiser:
    return Denoiser(Gaussian(schedule, prediction, mean, std), schedule, prediction, shape=(1, 4, 4))


def flow(
    schedule: Schedule, x_t: Tensor, t: Tensor, s: Tensor, mean: float = 0.3, std: float = 0.5
) -> Tensor:
    """Where the probability-flow ODE carries x_t from t to s, exactly: in units of its width it stays."""
    alpha_t, sigma_t = schedule.at(t, like=x_t)
    alpha_s, sigma_s = schedule.at(s, like=x_t)
    width_t = (alpha_t**2 * std**2 + sigma_t**2).sqrt()
    width_s = (alpha_s**2 * std**2 + sigma_s**2).sqrt()
    return alpha_s * mean + width_s / width_t * (x_t - alpha_t * mean)
