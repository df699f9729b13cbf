"""Guidance in its forms: pure functions of what a network predicts with its condition and without it.

A weight w is a number, or (B, 1, ...) for a batch; w = 1 is the prediction with the condition in every form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkd.core.noise_schedule import Schedule, Time
from diffkd.errors import UserError

Weight = float | Tensor
Guide = Callable[[Tensor, Tensor, Weight], Tensor]
TOKEN = 2  # pixels of latents a side that a transformer of packed latents takes for one


def plain(null: Tensor, given: Tensor, w: Weight) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6, whose weight is w - 1): (B, ...) each."""
    return null + w * (given - null)


def from_given(null: Tensor, given: Tensor, w: Weight) -> Tensor:
    """The same counted from the condition, as Z-Image's pipeline rounds it: its guidance_scale is w - 1."""
    return given + (w - 1) * (given - null)


def row_norms(null: Tensor, given: Tensor, w: Weight) -> Tensor:
    """`plain`, each row of width brought to the norm that it has with the condition: Lumina2's
    cfg_normalization. (B, C, H, W) each."""
    guided = plain(null, given, w)
    return guided * (torch.norm(given, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True))


def token_norms(null: Tensor, given: Tensor, w: Weight) -> Tensor:
    """`plain`, each token of 2x2 latents in all channels brought to the norm that it has with the condition,
    as Qwen-Image's pipeline does. (B, C, H, W) each, H and W even."""
    guided = plain(null, given, w)
    ratio = _of_tokens(given) / _of_tokens(guided)
    return guided * ratio.repeat_interleave(TOKEN, 1).repeat_interleave(TOKEN, 2)[:, None]


def _of_tokens(x: Tensor) -> Tensor:
    """Norms of the tokens: (B, C, H, W) -> (B, H / 2, W / 2)."""
    tokens = x.unflatten(3, (-1, TOKEN)).unflatten(2, (-1, TOKEN)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return torch.norm(tokens, dim=-1)


def rescaled(guided: Tensor, given: Tensor, phi: float) -> Tensor:
    """A share phi of what is guided brought to the deviation that an image has with the condition, against
    overexposure (Lin et al. 2024, section 3.4; diffusers' guidance_rescale). (B, ...) each."""
    others = list(range(1, given.ndim))
    ratio = given.std(dim=others, keepdim=True) / guided.std(dim=others, keepdim=True)
    return phi * (guided * ratio) + (1 - phi) * guided


@dataclass(frozen=True)
class Kind:
    """What kind of guidance a model has beside its weight; the default is the plain kind.

    interval: least and largest noise level, sigma / alpha, EDM's sigma, at which there is guidance; elsewhere
    w is 1 (Kynkäänniemi et al. 2024; here both ends are inside). None: at every level. At alpha = 0
    the level is infinite, beyond every interval. rescale: phi of `rescaled`.

    Raises UserError for values that are no interval and no share.
    """

    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.interval is not None:
            least, largest = self.interval
            if not 0 <= least < largest < float("inf"):
                raise UserError(
                    f"guidance interval {least:g} to {largest:g} is no range of noise levels sigma / alpha; "
                    "give the least, from 0 on, then a larger one"
                )
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance rescale {self.rescale:g} is no share; use 0 (none) to 1")

    def check_levels(self, schedule: Schedule) -> None:
        """Raises UserError for an interval that a schedule does not have."""
        alpha, sigma = schedule.numbers(1.0)
        if self.interval is not None and self.interval[1] * alpha > sigma:
            least, largest = self.interval
            raise UserError(
                f"guidance interval {least:g} to {largest:g} leaves the noise levels of the model, whose "
                f"sigma / alpha ends at {sigma / alpha:.4g}; "
                + (f"end it at {sigma / alpha:.4g} or below" if least * alpha < sigma else "use lower ones")
            )

    def inside(self, schedule: Schedule, t: Time) -> bool | Tensor:
        """Whether there is guidance at t: one answer for a number, (B,) of booleans for a batch of times."""
        if self.interval is None:
            return True
        least, largest = self.interval
        alpha, sigma = schedule.at(t)
        if isinstance(t, float):
            return bool(least * alpha <= sigma <= largest * alpha)
        found: Tensor = (least * alpha <= sigma) & (sigma <= largest * alpha)
        return found

    def combined(
        self, guide: Guide, null: Tensor, given: Tensor, w: Weight, inside: bool | Tensor = True
    ) -> Tensor:
        """Guided where `inside`, else `given`. guide: the form. null, given: (B, ...)."""
        guided = guide(null, given, w)
        if self.rescale:
            guided = rescaled(guided, given, self.rescale)
        if isinstance(inside, Tensor):
            guided = torch.where(inside.reshape(-1, *[1] * (given.ndim - 1)), guided, given)
        return guided
