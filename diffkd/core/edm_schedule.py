"""The path of EDM (Karras et al. 2022), alpha = 1, and how its networks are preconditioned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffkd.core.conditioning import Cond
from diffkd.core.noise_schedule import Schedule, Time
from diffkd.errors import UserError


class Preconditioning(NamedTuple):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) (table 1), each shaped like sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class HasPreconditioning(Protocol):
    """A schedule that says how a network is preconditioned at the times that it gives it."""

    def preconditioning(self, time: Tensor) -> Preconditioning: ...


@dataclass(frozen=True, eq=False)
class EDMSchedule(Schedule):
    """x_t = x0 + sigma(t) eps, sigma(t) = (a + (1 - t) T / (T - 1) (b - a))^rho (equation 5).

    a, b: sigma_max and sigma_min to the power of 1 / rho. So t = 1/T, 2/T, ..., 1 is EDM's own grid of T
    steps; below 1/T sigma is linear, to 0 at t = 0. sigma_data: standard deviation of the data, of which the
    preconditioning is made. Networks are given sigma as time, and c_noise by `preconditioned`.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        rises = 0 < self.sigma_min < self.sigma_max < math.inf
        if not (rises and 0 < self.rho < math.inf and 0 < self.sigma_data < math.inf):
            raise UserError(
                f"sigma {self.sigma_min} to {self.sigma_max}, rho {self.rho}, sigma_data {self.sigma_data} "
                "make no EDM schedule; use 0 < sigma_min < sigma_max, and the others above 0"
            )
        if self.num_train_timesteps < 2:
            raise UserError(f"{self.num_train_timesteps} time steps make no EDM schedule; use 2 or more")

    @property
    def zero_terminal_snr(self) -> bool:
        return False

    def content(self) -> bytes:
        return repr(self).encode()

    @property
    def width(self) -> float:
        return self.sigma_data

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)

    def _sigma(self, t: Tensor) -> Tensor:
        (most, least), total = self._ends, self.num_train_timesteps
        t = t.double()
        ramp = ((1 - t) * (total / (total - 1))).clamp(max=1)
        return torch.where(
            t * total < 1, t * total * self.sigma_min, (most + ramp * (least - most)) ** self.rho
        )

    def _time(self, sigma: Tensor) -> Tensor:
        (most, least), total = self._ends, self.num_train_timesteps
        ramp = (most - sigma.clamp(min=self.sigma_min) ** (1 / self.rho)) / (most - least)
        inner = 1 - ramp * ((total - 1) / total)
        return torch.where(sigma < self.sigma_min, sigma / (self.sigma_min * total), inner).clamp(0, 1)

    def coefficients(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sigma = self._sigma(t).to(dtype)
        return torch.ones_like(sigma), sigma

    def squares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t, torch.float64)
        return alpha, sigma**2

    def half_log_snr(self, t: Tensor) -> Tensor:
        return -self._sigma(t).log()

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        return self._time((-half_log_snr.double()).exp())

    def network_time(self, t: Time, like: Tensor) -> Tensor:
        """sigma."""
        if isinstance(t, float):
            time = self.numbers(t, torch.float32)[1]
            return torch.full((len(like),), time, dtype=torch.float32, device=like.device)
        return self._sigma(t).float()

    def of_network_time(self, time: Tensor) -> Tensor:
        return self._time(time.double())

    def from_noise(self, noise: Tensor) -> Tensor:
        """As wide as data of width 1 noised to sigma_max, which is what stock schedulers begin with."""
        return noise * (self.sigma_max**2 + 1) ** 0.5

    def preconditioning(self, sigma: Tensor) -> Preconditioning:
        """The coefficients at sigma, in its dtype."""
        data, total = self.sigma_data, sigma**2 + self.sigma_data**2
        return Preconditioning(
            data**2 / total, sigma * data / total**0.5, 1 / total**0.5, 0.25 * torch.log(sigma)
        )

    def shortened(self, steps: int) -> EDMSchedule:
        """The schedule whose own grid of so many steps, from sigma_max to sigma_min, is the even one here:
        what a stock scheduler has to be told, which knows no other grid."""
        if steps == 1:
            return self
        return replace(self, sigma_min=self.numbers(1 / steps)[1])

    def extended(self, steps: int) -> EDMSchedule:
        """The inverse of `shortened`. Raises UserError where no schedule is the longer one."""
        if steps == 1:
            return self
        (most, least), total = self._ends, self.num_train_timesteps
        end = most + (least - most) * (steps / (steps - 1)) * ((total - 1) / total)
        if end <= 0 or steps > total:
            raise UserError(
                f"sigma_min {self.sigma_min:g} is not the last level of {steps} steps of a schedule of "
                f"{total} time steps; repair it, or the number of steps"
            )
        return replace(self, sigma_min=end**self.rho)

    def check_steps(self, steps: int, sampler: str = "ddim") -> None:
        """Raises UserError for a student that no stock scheduler draws: of several steps by renoise."""
        super().check_steps(steps, sampler)
        if sampler == "renoise" and steps > 1:
            raise UserError(
                f"a student of {steps} steps drawn by renoise does not fit an EDM schedule, whose stock "
                "scheduler adds no noise; use 1 step, or a method that draws its students by ddim"
            )

    def check_prediction(self, prediction: str) -> None:
        if prediction == "v_prediction":
            raise UserError(
                "prediction type v_prediction does not give x0 on an EDM schedule (v is of schedules that "
                "preserve variance); use sample, with the network preconditioned, or flow"
            )


@dataclass(frozen=True)
class Preconditioned:
    """A denoiser's `call` of a raw network F, of EDM's kind, whose answer is D, x0 (prediction type sample).

    negated: the network outputs -F, as those whose stock scheduler says v_prediction: v = -F for data in
    units of sigma_data.
    """

    prediction: ClassVar[str] = "sample"
    schedule: HasPreconditioning
    negated: bool = False

    def __call__(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Any:
        c_skip, c_out, c_in, c_noise = self.schedule.preconditioning(time)
        wide = (-1,) + (1,) * (x_t.ndim - 1)
        output: Any = network((c_in.reshape(wide) * x_t).to(x_t.dtype), c_noise, **cond)
        found = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        signed = -c_out if self.negated else c_out
        return c_skip.reshape(wide) * x_t + signed.reshape(wide) * found
