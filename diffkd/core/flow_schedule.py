"""The straight path of flow matching (Lipman et al. 2023): alpha = 1 - sigma, from data to noise alone.

Models differ in how sigma rises with t, and so in where an even grid of times puts a student's steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from diffkd.core.noise_schedule import Schedule, Time
from diffkd.errors import UserError

FITTING = 200  # rounds, of which few are needed


class Law(Protocol):
    """sigma as a function of t, rising from 0 at t = 0 to at most 1 at t = 1."""

    def sigma(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) float64 -> (B,) in `dtype`."""

    def time(self, sigma: Tensor) -> Tensor:
        """The inverse: (B,) float64 -> (B,) float64."""

    def check_steps(self, steps: int) -> None:
        """Raises UserError for a step count whose even grid of times is not one of the law's."""


@dataclass(frozen=True)
class Shift:
    """sigma = s t / (1 + (s - 1) t) (Esser et al. 2024, equation 23): s > 1 spends more steps near noise.

    It is computed in the precision that is asked for, in the stock scheduler's order: in float32 it is what
    that makes of an even grid, bit for bit.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not (type(self.shift) in (int, float) and 0 < self.shift < math.inf):
            raise UserError(f"a flow's shift of {self.shift!r} is out of range; use a finite number above 0")

    @staticmethod
    def dynamic(mu: float, kind: str = "exponential") -> Shift:
        """What diffusers calls a dynamic shift: s = e^mu, or of kind "linear" s = mu. See `mu_of`."""
        if kind not in ("exponential", "linear"):
            raise UserError(f"time_shift_type {kind!r} is unknown; use exponential or linear")
        return Shift(math.exp(mu) if kind == "exponential" else mu)

    def sigma(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        t = t.to(dtype)
        return torch.where(t < 1, self.shift * t / (1 + (self.shift - 1) * t), 1.0)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / (sigma + self.shift * (1 - sigma))

    def check_steps(self, steps: int) -> None:
        pass


@dataclass(frozen=True)
class Nodes:
    """The sigmas of one grid: sigmas[k] at t = (N - k) / N and 0 at t = 0, linear in t between them.

    sigmas: N of them, falling, the first at most 1, as a stock scheduler has them in float32; its last 0 may
    be there too.
    """

    sigmas: tuple[float, ...]
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, init=False, compare=False)

    def __post_init__(self) -> None:
        given = tuple(float(sigma) for sigma in self.sigmas)
        sigmas = given[:-1] if given[-1:] == (0.0,) else given
        falling = all(after < before for before, after in pairwise((*sigmas, 0.0)))
        if not sigmas or sigmas[0] > 1 or not falling:
            raise UserError(
                f"sigmas {list(given)} are no grid of a flow; use numbers that fall from at most 1 to above 0"
            )
        object.__setattr__(self, "sigmas", sigmas)

    def _table(self, device: torch.device) -> Tensor:
        """(N + 1,) float64, sigma at t = 0, 1/N, ..., 1."""
        if device not in self._tables:
            rising = torch.tensor([0.0, *reversed(self.sigmas)], dtype=torch.float64)
            self._tables[device] = rising.to(device)
        return self._tables[device]

    def sigma(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        table, index = self._table(t.device), t.double() * len(self.sigmas)
        low = index.floor().long().clamp(0, len(self.sigmas) - 1)
        return torch.lerp(table[low], table[low + 1], index - low).to(dtype)

    def time(self, sigma: Tensor) -> Tensor:
        table = self._table(sigma.device)
        low = (torch.searchsorted(table, sigma, right=True) - 1).clamp(0, len(self.sigmas) - 1)
        return ((sigma - table[low]) / (table[low + 1] - table[low]) + low) / len(self.sigmas)

    def check_steps(self, steps: int) -> None:
        total = len(self.sigmas)
        if total % steps:
            raise UserError(
                f"a student of {steps} steps does not fit a grid of {total} sigmas; use one of "
                f"{', '.join(str(n) for n in range(1, total + 1) if total % n == 0)}"
            )


def mu_of(
    tokens: int, base_tokens: int = 256, most_tokens: int = 4096, base: float = 0.5, most: float = 1.15
) -> float:
    """The mu of a dynamic shift that is linear in the number of image tokens, as Flux takes it.

    The others are a scheduler's base_image_seq_len, max_image_seq_len, base_shift and max_shift.
    """
    return base + (most - base) * (tokens - base_tokens) / (most_tokens - base_tokens)


def stretched(sigmas: Sequence[float], terminal: float) -> list[float]:
    """A falling grid stretched from its end at 1 so that the last sigma is `terminal` (`shift_terminal`)."""
    if not 0 < terminal < 1:
        raise UserError(f"shift_terminal {terminal!r} is out of range; use a number between 0 and 1")
    if sigmas[-1] >= 1:
        raise UserError(
            "a single step from pure noise has no last sigma to stretch; leave out shift_terminal"
        )
    scale = (1 - terminal) / (1 - sigmas[-1])
    return [1 - (1 - sigma) * scale for sigma in sigmas]


def even(steps: int) -> Tensor:
    """The times 1, (N - 1)/N, ..., 1/N of a student of N steps: (N,) float64."""
    return torch.arange(steps, 0, -1, dtype=torch.float64) / steps


def fitted(shift: float, steps: int, total: int = 1000) -> tuple[float, float | None]:
    """The `shift` and `shift_terminal` with which FlowMatchEulerDiscreteScheduler's own grid of so many steps
    is the even one of times at `shift`; its `shift` alone gives another.

    That grid is of u = 1 - v, v = 0, ..., 1 - e in even steps, e = shift(1 / T), shifted, and stretched so
    that it ends at `shift_terminal`. At f = `shift`, v = k w and c for the stretch it is c k w / (f - (f - 1)
    k w), and wanted is w / (s - (s - 1) w), w = i / N: (f - 1) k / f = (s - 1) / s. Raises UserError where no
    f is a shift.
    """
    if steps == 1:
        return shift, None
    found = shift
    for _ in range(FITTING):
        e = found / total / (1 + (found - 1) / total)
        k = (1 - e) / (1 - 1 / steps)
        slope = 1 - (shift - 1) / (shift * k)
        if slope <= 0:
            break
        found, last = 1 / slope, found
        if abs(found - last) <= 1e-15 * found:
            return found, shift / (steps + shift - 1)
    least = Shift(shift).sigma(even(total)[-1:], torch.float64).item()
    own = Shift(shift).sigma(torch.linspace(1, least, steps, dtype=torch.float64), torch.float64)
    raise UserError(
        f"FlowMatchEulerDiscreteScheduler has no grid of {steps} steps at a shift of {shift:g} that is even "
        f"in time; its own is {listed(own.tolist())}; use fewer steps, or a smaller shift"
    )


def listed(sigmas: Sequence[float]) -> str:
    """For messages: of many the first three and the last."""
    shown = [f"{sigma:.4g}" for sigma in sigmas]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "...", shown[-1]])


@dataclass(frozen=True, eq=False)
class FlowSchedule(Schedule):
    """x_t = (1 - sigma(t)) x0 + sigma(t) eps.

    law: sigma(t). num_train_timesteps: T; networks are given T sigma as time, from which a family's own
    `call` makes what its networks take, sigma or 1 - sigma. alpha is 1 less the rounded sigma, as in stock
    schedulers. handed: whether the stock pipeline hands its scheduler an even grid of times to shift, as
    Flux's does, and does not leave the grid to it, as Stable Diffusion 3's.
    """

    straight: ClassVar[bool] = True
    law: Law = Shift()
    num_train_timesteps: int = 1000
    handed: bool = True

    @property
    def zero_terminal_snr(self) -> bool:
        return self.numbers(1.0)[1] == 1

    def content(self) -> bytes:
        return f"flow {self.law!r} {self.num_train_timesteps}".encode()

    def coefficients(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        sigma = self.law.sigma(t, dtype)
        return 1 - sigma, sigma

    def squares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t, torch.float64)
        return alpha**2, sigma**2

    def half_log_snr(self, t: Tensor) -> Tensor:
        alpha, sigma = self.coefficients(t, torch.float64)
        return alpha.log() - sigma.log()

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        return self.law.time(torch.sigmoid(-half_log_snr.double())).clamp(0, 1)

    def network_time(self, t: Time, like: Tensor) -> Tensor:
        """T sigma, of the sigma in float32."""
        if isinstance(t, float):
            time = self.numbers(t, torch.float32)[1] * self.num_train_timesteps
            return torch.full((len(like),), time, dtype=torch.float32, device=like.device)
        return self.law.sigma(t, torch.float32) * self.num_train_timesteps

    def of_network_time(self, time: Tensor) -> Tensor:
        return self.law.time(time.double() / self.num_train_timesteps)

    def check_prediction(self, prediction: str) -> None:
        if prediction == "v_prediction" or (prediction == "epsilon" and self.zero_terminal_snr):
            why = (
                "v is of schedules that preserve variance"
                if prediction != "epsilon"
                else "alpha is 0 at t = 1"
            )
            raise UserError(
                f"prediction type {prediction} does not give x0 on a flow schedule ({why}); use flow or "
                "sample"
            )

    def check_steps(self, steps: int, sampler: str = "ddim") -> None:
        super().check_steps(steps, sampler)
        self.law.check_steps(steps)
        if not self.handed and sampler == "renoise" and isinstance(self.law, Shift):
            fitted(self.law.shift, steps, self.num_train_timesteps)
