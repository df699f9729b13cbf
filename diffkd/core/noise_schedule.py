"""What a noise schedule is, and the one of a table of betas; `flow_schedule` and `edm_schedule` have others.

Time runs from 0 (data) to 1 (noise). Index i of a T-step table is t = (i + 1) / T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from diffkd.core.scheduler_config import check_scheduler
from diffkd.errors import UserError

Time = Tensor | float  # (B,) float64, or one for the whole batch
_BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
_DDIM_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_NODE_TOLERANCE = 1e-6  # in units of the table's index; a time closer to a node than this is that node


@dataclass(frozen=True, eq=False)
class Schedule(ABC):
    """x_t = alpha(t) x0 + sigma(t) eps, with t in [0, 1] and sigma / alpha rising from 0.

    variance_preserving: whether alpha² + sigma² = 1. straight: whether alpha + sigma = 1, so that an Euler
    step along eps - x0 is a DDIM step of the state itself. bounded: the prediction type of which neither x0
    nor eps is an error enlarged at any time, which a network of another type becomes. tabled: whether models
    are trained at the times of a table alone.
    """

    variance_preserving: ClassVar[bool] = False
    straight: ClassVar[bool] = False
    bounded: ClassVar[str] = "flow"
    tabled: ClassVar[bool] = False
    _numbers: dict[tuple[float, torch.dtype], tuple[float, float]] = field(
        default_factory=dict, repr=False, init=False
    )

    @property
    @abstractmethod
    def num_train_timesteps(self) -> int:
        """T: training that draws times of a table takes i / T, i = 1, ..., T; no student has more steps."""

    @property
    @abstractmethod
    def zero_terminal_snr(self) -> bool:
        """Whether alpha(1) = 0."""

    @abstractmethod
    def coefficients(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, rounded to `dtype` where the stock scheduler rounds: (B,) -> two (B,)."""

    @abstractmethod
    def squares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha² and sigma² at t: (B,) -> two float64 (B,)."""

    @abstractmethod
    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """The t of this log(alpha / sigma), the inverse of `half_log_snr`: (B,) -> float64 (B,) in [0, 1].

        Below what the schedule ends with, it is 1.
        """

    @abstractmethod
    def network_time(self, t: Time, like: Tensor) -> Tensor:
        """The time that a network is given: float32 (B,), for the batch `like`."""

    @abstractmethod
    def of_network_time(self, time: Tensor) -> Tensor:
        """The t of a network's time, the inverse of `network_time`: (B,) -> float64 (B,)."""

    @abstractmethod
    def check_prediction(self, prediction: str) -> None:
        """Raises UserError for a prediction type that does not determine x0 everywhere on this schedule."""

    def check_steps(self, steps: int, sampler: str = "ddim") -> None:
        """Raises UserError for a step count that students of this schedule cannot have."""
        if not 1 <= steps <= self.num_train_timesteps:
            raise UserError(
                f"a student of {steps} steps does not fit a schedule of {self.num_train_timesteps} time "
                f"steps; use 1 to {self.num_train_timesteps}"
            )

    @property
    def width(self) -> float:
        """The standard deviation of the data that its networks are preconditioned for; 1 for none."""
        return 1.0

    @abstractmethod
    def content(self) -> bytes:
        """What tells it from other schedules."""

    @staticmethod
    def cosine(num_train_timesteps: int = 1024) -> BetaSchedule:
        """Cosine (Nichol & Dhariwal 2021, section 3.2), rescaled to zero terminal SNR (Lin et al. 2024,
        algorithm 1)."""
        from diffusers import DDIMScheduler

        return from_betas(
            DDIMScheduler(
                num_train_timesteps=num_train_timesteps,
                beta_schedule="squaredcos_cap_v2",
                rescale_betas_zero_snr=True,
            )
        )

    def from_noise(self, noise: Tensor) -> Tensor:
        """The state at t = 1 that sampling starts from, of standard normal noise: (B, ...) -> (B, ...)."""
        return noise

    def half_log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha / sigma): (B,) -> float64 (B,); +inf at t = 0, -inf at zero terminal SNR."""
        alpha2, sigma2 = self.squares(t)
        return (alpha2.log() - sigma2.log()) / 2

    def snr(self, t: Tensor) -> Tensor:
        """alpha² / sigma²: (B,) -> float64 (B,)."""
        alpha2, sigma2 = self.squares(t)
        return alpha2 / sigma2

    @overload
    def at(self, t: Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def at(self, t: Time, like: Tensor | None = None) -> tuple[Any, Any]: ...

    def at(self, t: Time, like: Tensor | None = None) -> tuple[Any, Any]:
        """alpha(t), sigma(t): (B,) -> float64 (B,), or in the dtype of `like` and shaped to multiply it.

        For one time shared by the batch they are cached numbers: a sampler on an even grid launches no
        kernels for them and never waits for the device.
        """
        dtype = torch.float64 if like is None else like.dtype
        if isinstance(t, float):
            return self.numbers(t, dtype)
        alpha, sigma = self.coefficients(t, dtype)
        if like is None:
            return alpha, sigma
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha.reshape(shape), sigma.reshape(shape)

    def numbers(self, t: float, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
        """alpha(t), sigma(t) of one time, rounded to `dtype`; cached."""
        if (t, dtype) not in self._numbers:
            alpha, sigma = self.coefficients(torch.tensor([t], dtype=torch.float64), dtype)
            self._numbers[t, dtype] = (alpha.item(), sigma.item())
        return self._numbers[t, dtype]

    def posterior_variance(self, alpha_t: Any, sigma_t: Any, alpha_s: Any, sigma_s: Any) -> Any:
        """Variance of x_s given x_t and x0, s < t, of their coefficients: numbers or tensors."""
        return sigma_s**2 * (1 - (alpha_t / alpha_s * (sigma_s / sigma_t)) ** 2)


@dataclass(frozen=True, eq=False)
class BetaSchedule(Schedule):
    """A variance-preserving noise schedule, x_t = alpha(t) x0 + sigma(t) eps with alpha² + sigma² = 1.

    alphas_cumprod: (T,) float64, alpha² at t = 1/T, 2/T, ..., 1. Between nodes the log-SNR is linear in t;
    below the first node sigma/alpha is linear and, where the last alpha is 0, alpha/sigma is linear above the
    last but one, so that both ends are reached exactly.
    betas: config keys with which a diffusers scheduler builds exactly this table.
    """

    variance_preserving: ClassVar[bool] = True
    bounded: ClassVar[str] = "v_prediction"
    tabled: ClassVar[bool] = True
    alphas_cumprod: Tensor
    betas: Mapping[str, Any]
    _tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, repr=False, init=False
    )

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def zero_terminal_snr(self) -> bool:
        return bool(self.alphas_cumprod[-1] == 0)

    def content(self) -> bytes:
        return self.alphas_cumprod.numpy().tobytes()

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(T + 1,) alpha², sigma² and half log-SNR at t = 0, 1/T, ..., 1, cached per device."""
        if device not in self._tables:
            alpha2 = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod]).to(device)
            sigma2 = 1 - alpha2
            self._tables[device] = (alpha2, sigma2, (alpha2.log() - sigma2.log()) / 2)
        return self._tables[device]

    def coefficients(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The squares are rounded before the root is taken, as in stock schedulers: in float32 the
        coefficients, and so a student's pixels, equal theirs bit for bit."""
        alpha2, sigma2 = self.squares(t)
        return alpha2.to(dtype).sqrt(), sigma2.to(dtype).sqrt()

    def squares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha2, sigma2, _ = self._table(t.device)
        index = t.double() * self.num_train_timesteps
        node = index.round()
        at_node = (index - node).abs() < _NODE_TOLERANCE
        nearest = node.long()
        if t.device.type == "cpu" and bool(at_node.all()):  # reading a value back would stall other devices
            return alpha2[nearest], sigma2[nearest]
        log_snr = 2 * self._interpolated(index)
        return (
            torch.where(at_node, alpha2[nearest], torch.sigmoid(log_snr)),
            torch.where(at_node, sigma2[nearest], torch.sigmoid(-log_snr)),
        )

    def _interpolated(self, index: Tensor) -> Tensor:
        """Half log-SNR at a fractional index, between its two nodes (meaningless at the nodes themselves)."""
        table = self._table(index.device)[2]
        low = index.floor().long().clamp(0, self.num_train_timesteps - 1)
        part = index - low
        below, above = table[low], table[low + 1]
        inner = below + part * (above - below)
        data_end = above - part.log()
        noise_end = below + torch.log1p(-part)
        return torch.where(below.isposinf(), data_end, torch.where(above.isneginf(), noise_end, inner))

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        table = self._table(half_log_snr.device)[2]
        value = half_log_snr.double()
        low = (torch.searchsorted(-table, -value, right=True) - 1).clamp(0, self.num_train_timesteps - 1)
        below, above = table[low], table[low + 1]
        inner = (below - value) / (below - above)
        part = torch.where(
            below.isposinf(),
            (above - value).exp(),
            torch.where(above.isneginf(), -torch.expm1(value - below), inner),
        )
        return ((low + part) / self.num_train_timesteps).clamp(0, 1)

    def network_time(self, t: Time, like: Tensor) -> Tensor:
        """The table index t T - 1, whole at the nodes."""
        if isinstance(t, float):
            index = t * self.num_train_timesteps - 1
            return torch.full((len(like),), index, dtype=torch.float32, device=like.device)
        return (t.double() * self.num_train_timesteps - 1).float()

    def of_network_time(self, time: Tensor) -> Tensor:
        return (time.double() + 1) / self.num_train_timesteps

    def posterior_variance(self, alpha_t: Any, sigma_t: Any, alpha_s: Any, sigma_s: Any) -> Any:
        """As the stock DDIM scheduler computes it, which rounds otherwise than the general form."""
        return (sigma_s / sigma_t) ** 2 * (1 - (alpha_t / alpha_s) ** 2)

    def check_prediction(self, prediction: str) -> None:
        if prediction == "epsilon" and self.zero_terminal_snr:
            raise UserError(
                f"an epsilon network cannot start from alpha = 0, where this schedule of "
                f"{self.num_train_timesteps} steps ends (zero terminal SNR); "
                "use prediction_type v_prediction, or a schedule without rescale_betas_zero_snr"
            )

    def valid_steps(self) -> list[int]:
        """Step counts at which the stock DDIM scheduler does not drift: the divisors of T."""
        total = self.num_train_timesteps
        return [n for n in range(1, total + 1) if total % n == 0]

    def check_steps(self, steps: int, sampler: str = "ddim") -> None:
        """Raises UserError for a student whose step count does not divide T, or is T if drawn by renoise."""
        if sampler == "renoise" and steps == self.num_train_timesteps:
            raise UserError(
                f"a student of {steps} steps drawn by renoise does not fit a teacher of {steps} time steps: "
                "the stock LCM scheduler would not denoise in its last step. Use fewer steps"
            )
        if steps < 1 or self.num_train_timesteps % steps:
            valid = self.valid_steps()
            listed = ", ".join(map(str, valid[:12])) + (", ..." if len(valid) > 12 else "")
            raise UserError(
                f"a student of {steps} steps does not fit a teacher of {self.num_train_timesteps} time "
                f"steps: the stock DDIM scheduler would drift. Use one of {listed}"
            )


def from_betas(scheduler: Any) -> BetaSchedule:
    """The schedule of a diffusers scheduler that has betas (DDPM, DDIM, DPM-Solver, ...).

    Beta schedules that DDIMScheduler has no name for are kept as `trained_betas`. Raises UserError for a
    scheduler that diffkd's samplers cannot stand for (`scheduler_config.check_scheduler`).
    """
    from diffusers import DDIMScheduler

    check_scheduler(scheduler)
    config = scheduler.config
    betas = {key: config[key] for key in _BETA_KEYS if key in config}
    if config.get("trained_betas") is not None:
        betas = {"trained_betas": [float(b) for b in config["trained_betas"]]}
    elif config.get("beta_schedule") not in _DDIM_BETA_SCHEDULES:
        betas = {"trained_betas": scheduler.betas.tolist()}
    if "trained_betas" in betas:
        betas["num_train_timesteps"] = len(betas["trained_betas"])
        if config.get("rescale_betas_zero_snr") and config.get("trained_betas") is not None:
            betas["rescale_betas_zero_snr"] = True
    return BetaSchedule(DDIMScheduler(**betas).alphas_cumprod.double(), betas)
