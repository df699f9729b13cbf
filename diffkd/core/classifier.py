"""Any network read as class logits, of clean or of noised images; classifier guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffkd.core.autoencoder import ImageAutoencoder
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import BetaSchedule, Schedule, Time, write_prediction
from diffkd.errors import UserError


class Classifier(nn.Module):
    """A network read as logits: (B, C, H, W) -> (B, K), or noise-conditional, (B, C, H, W), (B,) -> (B, K).

    network: called as network(x), or with a schedule as network(x_t, time), time (B,) as the schedule gives
    it to networks (`Schedule.network_time`). num_classes: K. shape: (C, H, W) of an image.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        *,
        shape: tuple[int, int, int] | None = None,
        schedule: BetaSchedule | None = None,
    ) -> None:
        super().__init__()
        self.network, self.num_classes, self.shape, self.schedule = network, num_classes, shape, schedule

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype; float64 for a network without weights, such as a closed form."""
        return next((p.dtype for p in self.network.parameters()), torch.float64)

    def forward(self, x: Tensor, t: Time | None = None) -> Tensor:
        """Logits (B, K), float32, or float64 where the network is.

        t: (B,) in (0, 1], for a noise-conditional network, whose x is x_t.
        """
        x = x.to(self.dtype)
        if self.schedule is None:
            assert t is None
            logits: Tensor = self.network(x)
        else:
            assert t is not None
            logits = self.network(x, self.schedule.network_time(t, x))
        return logits if logits.dtype == torch.float64 else logits.float()


Model = Denoiser | Classifier | ImageAutoencoder  # what a method's teacher and student are


class _Guided(nn.Module):
    """A denoiser's network whose output is shifted along the gradient of a classifier's log p(y | x_t)."""

    def __init__(self, denoiser: Denoiser, classifier: Classifier, scale: float) -> None:
        super().__init__()
        self.denoiser, self.classifier, self.scale = denoiser, classifier, scale

    def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        """time: (B,), as networks are given it."""
        denoiser, schedule = self.denoiser, self.denoiser.schedule
        t = schedule.of_network_time(time)
        cond: dict[str, Any] = {} if denoiser.num_classes is None else {"class_labels": class_labels}
        output = denoiser.output(x_t, t, **cond)
        alpha, sigma = schedule.at(t, like=x_t)
        # eps - scale sigma g is x0 + scale (sigma^2 / alpha) g, and every output is linear in x0
        per_gradient = torch.where(alpha > 0, self.scale * sigma**2 / alpha, 0)
        shift = per_gradient * self.gradient(x_t, t, class_labels)
        shifted: Tensor = output + write_prediction(
            denoiser.prediction, torch.zeros_like(shift), shift, alpha, sigma
        )
        return shifted

    def gradient(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """g = d log p(y | x_t) / d x_t, (B, C, H, W). Samplers run without gradients, or in inference mode,
        whose tensors autograd refuses: hence the copies."""
        with torch.inference_mode(False), torch.enable_grad():
            x, t, labels = x_t.detach().clone().requires_grad_(), t.clone(), labels.clone()
            log_p = torch.log_softmax(self.classifier(x, t), 1).gather(1, labels[:, None])
            return torch.autograd.grad(log_p.sum(), x)[0]


def guided(denoiser: Denoiser, classifier: Classifier, scale: float = 1.0) -> Denoiser:
    """Classifier guidance: the denoiser of eps - scale sigma grad log p(y | x_t), y the class_labels of each
    call (Dhariwal & Nichol 2021, equation 14 and algorithm 2). With exact models scale 1 is exact.

    classifier: noise-conditional, on the denoiser's schedule. A denoiser that takes labels itself is given
    them too. At alpha = 0 the shift is zero: x_t is pure noise there and p(y | x_t) does not depend on it, so
    a sampler's first step from zero terminal SNR is unguided. Raises UserError for models that do not match.
    """
    if classifier.schedule is None:
        raise UserError(
            "the classifier takes clean images, and guidance needs one for noised images; distil one with "
            "method.noisy: true and the denoiser's schedule"
        )
    ours, theirs = _levels(denoiser.schedule), _levels(classifier.schedule)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=0, atol=1e-6):
        raise UserError(
            f"the classifier's noise schedule, of {theirs.shape[1]} steps, is not the denoiser's, of "
            f"{ours.shape[1]}; distil one with the denoiser's schedule"
        )
    for name in ("shape", "num_classes"):
        ours, theirs = getattr(denoiser, name), getattr(classifier, name)
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"the classifier's {name} is {theirs}, and the denoiser's {ours}; they must match"
            )
    return Denoiser(
        _Guided(denoiser, classifier, scale),
        denoiser.schedule,
        denoiser.prediction,
        shape=denoiser.shape or classifier.shape,
        num_classes=classifier.num_classes,
        clip=denoiser.clip,
        steps=denoiser.steps,
    )


def _levels(schedule: Schedule) -> Tensor:
    """alpha² and sigma² at the T times of a schedule's table: (2, T) float64."""
    total = schedule.num_train_timesteps
    return torch.stack(schedule.squares(torch.arange(1, total + 1, dtype=torch.float64) / total))
