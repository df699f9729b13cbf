"""Noise schedules in float64, converted from and to diffusers schedulers; prediction types.

Time runs from 0 (data) to 1 (noise). Index i of a T-step table is t = (i + 1) / T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from diffkd.core.scheduler_config import check_scheduler
from diffkd.errors import UserError

if TYPE_CHECKING:  # to import it takes seconds, and images are measured without it
    from diffusers import DDIMScheduler, LCMScheduler

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Time = Tensor | float  # (B,) float64, or one for the whole batch
PREDICTIONS: tuple[str, ...] = ("epsilon", "v_prediction", "sample", "flow")
_BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
_DDIM_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_NODE_TOLERANCE = 1e-6  # in units of the table's index; a time closer to a node than this is that node


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving noise schedule, x_t = alpha(t) x0 + sigma(t) eps with alpha² + sigma² = 1.

    alphas_cumprod: (T,) float64, alpha² at t = 1/T, 2/T, ..., 1. Between nodes the log-SNR is linear in t;
    below the first node sigma/alpha is linear and, where the last alpha is 0, alpha/sigma is linear above the
    last but one, so that both ends are reached exactly.
    betas: config keys with which a diffusers scheduler builds exactly this table.
    """

    alphas_cumprod: Tensor
    betas: Mapping[str, Any]
    _tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _numbers: dict[tuple[float, torch.dtype], tuple[float, float]] = field(default_factory=dict, repr=False)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def zero_terminal_snr(self) -> bool:
        return bool(self.alphas_cumprod[-1] == 0)

    @staticmethod
    def cosine(num_train_timesteps: int = 1024) -> Schedule:
        """Cosine (Nichol & Dhariwal 2021, section 3.2), rescaled to zero terminal SNR (Lin et al. 2024,
        algorithm 1)."""
        from diffusers import DDIMScheduler

        return from_diffusers(
            DDIMScheduler(
                num_train_timesteps=num_train_timesteps,
                beta_schedule="squaredcos_cap_v2",
                rescale_betas_zero_snr=True,
            )
        )

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(T + 1,) alpha², sigma² and half log-SNR at t = 0, 1/T, ..., 1, cached per device."""
        if device not in self._tables:
            alpha2 = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod]).to(device)
            sigma2 = 1 - alpha2
            self._tables[device] = (alpha2, sigma2, (alpha2.log() - sigma2.log()) / 2)
        return self._tables[device]

    def squares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha² and sigma² at t: (B,) -> two float64 (B,)."""
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

    def half_log_snr(self, t: Tensor) -> Tensor:
        """lambda(t) = log(alpha / sigma): (B,) -> float64 (B,); +inf at t = 0, -inf at zero terminal SNR."""
        alpha2, sigma2 = self.squares(t)
        return (alpha2.log() - sigma2.log()) / 2

    @overload
    def at(self, t: Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def at(self, t: Time, like: Tensor | None = None) -> tuple[Any, Any]: ...

    def at(self, t: Time, like: Tensor | None = None) -> tuple[Any, Any]:
        """alpha(t), sigma(t): (B,) -> float64 (B,), or in the dtype of `like` and shaped to multiply it.

        For one time shared by the batch they are cached numbers: a sampler on an even grid launches no
        kernels for them and never waits for the device. The squares are rounded before the root is taken, as
        in stock
        schedulers: in float32 the coefficients, and so a student's pixels, equal theirs bit for bit.
        """
        if isinstance(t, float):
            return self.numbers(t, torch.float64 if like is None else like.dtype)
        alpha2, sigma2 = self.squares(t)
        if like is not None:
            shape = (-1,) + (1,) * (like.ndim - 1)
            alpha2 = alpha2.to(like.dtype).reshape(shape)
            sigma2 = sigma2.to(like.dtype).reshape(shape)
        return alpha2.sqrt(), sigma2.sqrt()

    def numbers(self, t: float, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
        """alpha(t), sigma(t) of one time, rounded to `dtype`; cached."""
        if (t, dtype) not in self._numbers:
            alpha, sigma = self.at(torch.tensor([t], dtype=torch.float64), torch.empty(0, dtype=dtype))
            self._numbers[t, dtype] = (alpha.item(), sigma.item())
        return self._numbers[t, dtype]

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """The t of this log(alpha / sigma), the inverse of `half_log_snr`: (B,) -> float64 (B,) in [0, 1].

        Below what the table ends with, it is 1.
        """
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

    def snr(self, t: Tensor) -> Tensor:
        """alpha² / sigma²: (B,) -> float64 (B,)."""
        alpha2, sigma2 = self.squares(t)
        return alpha2 / sigma2

    def network_time(self, t: Time, like: Tensor) -> Tensor:
        """The time that a network is given: the table index t T - 1, float32 (B,), whole at the nodes."""
        if isinstance(t, float):
            index = t * self.num_train_timesteps - 1
            return torch.full((len(like),), index, dtype=torch.float32, device=like.device)
        return (t.double() * self.num_train_timesteps - 1).float()

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


def from_diffusers(scheduler: Any) -> Schedule:
    """The Schedule of a diffusers scheduler that has betas (DDPM, DDIM, DPM-Solver, ...).

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
    return Schedule(DDIMScheduler(**betas).alphas_cumprod.double(), betas)


def to_diffusers(
    schedule: Schedule, prediction: str, clip: float | None = None, sampler: str = "ddim"
) -> DDIMScheduler | LCMScheduler:
    """The stock scheduler that draws the same images from a student of this schedule as `samplers.sample`.

    clip: bound on the predicted x0 while sampling, None for none. sampler: ddim or renoise.
    """
    from diffusers import DDIMScheduler, LCMScheduler

    if prediction not in PREDICTIONS[:3]:
        raise UserError(
            f"DDIMScheduler does not support prediction {prediction!r}; "
            f"use one of {', '.join(PREDICTIONS[:3])}"
        )
    options: dict[str, Any] = {
        **schedule.betas, "prediction_type": prediction, "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else clip,
    }  # fmt: skip
    if sampler == "renoise":
        # The scaling makes its boundary conditions c_skip = 0 and c_out = 1, and so x0 the prediction itself.
        return LCMScheduler(
            **options, original_inference_steps=schedule.num_train_timesteps, timestep_scaling=1e10
        )
    return DDIMScheduler(**options, timestep_spacing="trailing", set_alpha_to_one=True)


def read_prediction(prediction: str, x_t: Any, output: Any, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """Any network output as (x0, eps), each shaped like x_t: tensors, or numbers for linear coefficients.

    v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D); flow: u = eps - x0 (Liu et al. 2022).
    """
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha, output
    if prediction == "v_prediction":
        return alpha * x_t - sigma * output, alpha * output + sigma * x_t
    if prediction == "sample":
        return output, (x_t - alpha * output) / sigma
    if prediction == "flow":
        x0 = (x_t - sigma * output) / (alpha + sigma)
        return x0, x0 + output
    raise UserError(f"prediction type {prediction!r} is unknown; use one of {', '.join(PREDICTIONS)}")


def write_prediction(prediction: str, x_t: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The network output that stands for x0 at x_t: the inverse of `read_prediction` (sigma > 0)."""
    if prediction == "sample":
        return x0
    eps = (x_t - alpha * x0) / sigma
    if prediction == "epsilon":
        return eps
    if prediction == "v_prediction":
        return alpha * eps - sigma * x0
    if prediction == "flow":
        return eps - x0
    raise UserError(f"prediction type {prediction!r} is unknown; use one of {', '.join(PREDICTIONS)}")
