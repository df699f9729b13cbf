"""The path of consistency models (Song et al. 2023, appendix C): EDM's, above its least level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkd.core.edm_schedule import EDMSchedule, Preconditioning
from diffkd.core.noise_schedule import Schedule, Time
from diffkd.errors import UserError

_TIME_SCALE = 250.0  # of log(sigma), as their networks are given it
_TINY = 1e-44  # added to sigma there


@dataclass(frozen=True, eq=False)
class ConsistencySchedule(Schedule):
    """x_t = x0 + s(t) eps, s² = sigma(t)² - sigma_min², with the sigma of an EDMSchedule.

    The x0 of these models is a state at sigma_min, so that noise of width s takes it to sigma (algorithm 1).
    An even grid of N steps, N a divisor of T below T, is the stock scheduler's own; below 2 / T, where none
    of these begins a step, s is linear. Networks are given 250 log(sigma).
    """

    edm: EDMSchedule = EDMSchedule(num_train_timesteps=40)

    @property
    def num_train_timesteps(self) -> int:
        return self.edm.num_train_timesteps

    @property
    def width(self) -> float:
        return self.edm.width

    @property
    def zero_terminal_snr(self) -> bool:
        return False

    def content(self) -> bytes:
        return b"consistency " + self.edm.content()

    @property
    def _first(self) -> tuple[float, float]:
        """The time below which s is linear, and s there."""
        t = 2 / self.num_train_timesteps
        return t, math.sqrt(self.edm.numbers(t)[1] ** 2 - self.edm.sigma_min**2)

    def _level(self, t: Tensor) -> Tensor:
        """s at t, float64."""
        first, least = self._first
        t = t.double()
        above = (self.edm.squares(t)[1] - self.edm.sigma_min**2).clamp(min=0).sqrt()
        return torch.where(t < first, t * (least / first), above)

    def _time(self, level: Tensor) -> Tensor:
        first, least = self._first
        above = self.edm.time_of(-(level**2 + self.edm.sigma_min**2).log() / 2)
        return torch.where(level < least, level * (first / least), above).clamp(0, 1)

    def coefficients(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        level = self._level(t).to(dtype)
        return torch.ones_like(level), level

    def squares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, level = self.coefficients(t, torch.float64)
        return alpha, level**2

    def half_log_snr(self, t: Tensor) -> Tensor:
        return -self._level(t).log()

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        return self._time((-half_log_snr.double()).exp())

    def network_time(self, t: Time, like: Tensor) -> Tensor:
        """250 log(sigma)."""
        least = self.edm.sigma_min**2
        if isinstance(t, float):
            time = _TIME_SCALE * math.log(math.sqrt(self.numbers(t)[1] ** 2 + least) + _TINY)
            return torch.full((len(like),), time, dtype=torch.float32, device=like.device)
        return (_TIME_SCALE * ((self._level(t) ** 2 + least).sqrt() + _TINY).log()).float()

    def of_network_time(self, time: Tensor) -> Tensor:
        squared = (2 / _TIME_SCALE * time.double()).exp()
        return self._time((squared - self.edm.sigma_min**2).clamp(min=0).sqrt())

    def from_noise(self, noise: Tensor) -> Tensor:
        return noise * self.edm.sigma_max

    def preconditioning(self, time: Tensor) -> Preconditioning:
        """The coefficients at a network's time, in its dtype, with which x0 at sigma_min is x itself."""
        sigma, data = (time / _TIME_SCALE).exp(), self.edm.sigma_data
        above, total = sigma - self.edm.sigma_min, sigma**2 + data**2
        return Preconditioning(
            data**2 / (above**2 + data**2), above * data / total**0.5, 1 / total**0.5, time
        )  # fmt: skip

    def check_prediction(self, prediction: str) -> None:
        self.edm.check_prediction(prediction)

    def check_steps(self, steps: int, sampler: str = "ddim") -> None:
        """Raises UserError for a student that the stock scheduler would not draw: of a grid of its own, or of
        several steps by another sampler than renoise."""
        total = self.num_train_timesteps
        if steps < 1 or total % steps or steps == total:
            valid = [n for n in range(1, total) if total % n == 0]
            raise UserError(
                f"a student of {steps} steps does not fit a consistency model of {total} time steps, whose "
                f"stock scheduler would draw it on another grid; use one of {', '.join(map(str, valid[:12]))}"
            )
        if sampler != "renoise" and steps > 1:
            raise UserError(
                f"a student of {steps} steps drawn by {sampler} does not fit a consistency model: its stock "
                "scheduler draws by renoise alone; use 1 step, or a method that draws its students so"
            )
