"""Pure functions of tensors: weightings over the noise level, distances, the knowledge-distillation loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffkd.core.noise_schedule import Schedule
from diffkd.errors import UserError

Direction = Literal["reverse", "forward"]
UNLABELLED = -100  # torch's ignore_index
Weighting = Literal["truncated_snr", "snr", "snr_plus_one", "min_snr", "flow", "edm", "constant"]


def weight(name: Weighting, snr: Tensor, *, gamma: float = 5.0, width: float = 1.0) -> Tensor:
    """Weight of a squared error in x0 at signal-to-noise ratio `snr`, shaped like snr.

    "snr" is the error in eps, "snr_plus_one" the error in v, "flow" = (1 + sqrt(snr))² the error in eps - x0,
    "edm" = snr + 1 / width² the error in the output of a network preconditioned for data of this width
    (Karras et al. 2022, table 1), "constant" the error in x0 itself. "truncated_snr" = max(snr, 1) keeps the
    largest of eps and x0 (Salimans & Ho 2022, section 4); "min_snr" = min(snr, gamma) is Hang et al. 2023,
    section 3.4.
    """
    if name == "truncated_snr":
        return snr.clamp(min=1)
    if name == "snr":
        return snr
    if name == "snr_plus_one":
        return snr + 1
    if name == "min_snr":
        return snr.clamp(max=gamma)
    if name == "flow":
        return (1 + snr.sqrt()) ** 2
    if name == "edm":
        return snr + 1 / width**2
    return torch.ones_like(snr)


def weight_at(name: Weighting, schedule: Schedule, t: Tensor, *, gamma: float = 5.0) -> Tensor:
    """The same at times (B,) of a schedule: (B,) float32."""
    return weight(name, schedule.snr(t), gamma=gamma, width=schedule.width).float()


def weighting_for(prediction: str) -> Weighting:
    """The weight that turns an error in x0 into an error in the output of this prediction type."""
    known: dict[str, Weighting] = {"epsilon": "snr", "v_prediction": "snr_plus_one", "flow": "flow"}
    return known.get(prediction, "constant")


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference per example: two (B, ...) -> (B,), whatever the size of an image."""
    return (x - y).square().flatten(1).mean(1)


def pseudo_huber(x: Tensor, y: Tensor, c: float) -> Tensor:
    """sqrt(|x - y|^2 + c^2) - c of each example, the norm over all its values: two (B, ...) -> (B,).

    Squared for differences below c, whose gradient grows with them, and the norm itself above, whose gradient
    does not. c = 0.00054 sqrt(d) for d values (Song & Dhariwal 2024); c = 0 is the norm.
    """
    squares = (x - y).square().flatten(1).sum(1)
    if c == 0:
        return squares.clamp(min=1e-20).sqrt()  # whose gradient is finite where x = y
    return squares / ((squares + c * c).sqrt() + c)


def relative_error(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 / |y|^2 of each example: two (B, ...) -> (B,). y: the target."""
    return squared_error(x, y) / y.square().flatten(1).mean(1).clamp(min=1e-12)


def knowledge_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    direction: Direction = "reverse",
    ignore_index: int = UNLABELLED,
) -> Tensor:
    """(1 - alpha) CE(softmax(S), Y) + alpha T^2 KL, a scalar: hard labels and softened teacher outputs.

    student_logits S, teacher_logits Z: (B, K), or dense (B, K, H, W). labels Y: class indices, (B,) or
    (B, H, W), or distributions shaped like S. "reverse" is KL(softmax(S / T) || softmax(Z / T)), "forward"
    KL(softmax(Z / T) || softmax(S / T)) (Hinton, Vinyals & Dean 2015, section 2). T^2 keeps the size of the
    soft targets' gradient as T grows. The loss is the mean over examples, and over pixels where dense; CE
    only counts those with a label, whose index is not ignore_index. Gradients go to S only. Raises UserError
    for values out of range and shapes that do not match.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha} is out of range; use 0 (labels only) to 1 (the teacher only)")
    labels = labels if labels.is_floating_point() else labels.long()  # uint8 cannot hold -100
    _check_labels(labels, student_logits, ignore_index)
    wide = _wide(student_logits)  # converted once, so that its gradient is rounded once
    hard = cross_entropy(wide, labels, ignore_index)
    count = torch.ones_like(hard) if labels.is_floating_point() else (labels != ignore_index).to(hard)
    soft = soft_kl(wide, teacher_logits, temperature, direction)
    mean = hard.sum() / count.sum().clamp(min=1)
    return ((1 - alpha) * mean + alpha * soft.mean()).to(student_logits.dtype)


def soft_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, direction: Direction = "reverse"
) -> Tensor:
    """T^2 KL of each example, (B,) or (B, H, W); float64, as large T makes it subtract near-equal numbers.

    direction: see `knowledge_distillation`. Gradients go to the student's logits only.
    """
    if not 0 < temperature < float("inf"):
        raise UserError(
            f"temperature {temperature} is out of range; use a finite number above 0: 1 leaves the logits "
            "as they are, 2 to 20 is usual"
        )
    if direction not in ("reverse", "forward"):
        raise UserError(f"direction {direction!r} is unknown; use reverse or forward")
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"the student's logits are {_shape(student_logits)} and the teacher's {_shape(teacher_logits)}; "
            "both must be of the same examples and classes"
        )
    log_s = torch.log_softmax(_wide(student_logits) / temperature, 1)
    log_z = torch.log_softmax(_wide(teacher_logits.detach()) / temperature, 1)
    first, second = (log_s, log_z) if direction == "reverse" else (log_z, log_s)
    return temperature**2 * (first.exp() * (first - second)).sum(1)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = UNLABELLED) -> Tensor:
    """Cross entropy of each example, (B,) or (B, H, W), float64; 0 where the label is ignore_index.

    labels: class indices below K, or distributions shaped like the logits; neither is checked here.
    """
    log_p = torch.log_softmax(_wide(logits), 1)
    if labels.is_floating_point():
        return -(labels.detach() * log_p).sum(1)
    ignored = labels == ignore_index
    known = labels.long().masked_fill(ignored, 0)
    return -log_p.gather(1, known[:, None])[:, 0].masked_fill(ignored, 0)


def _check_labels(labels: Tensor, logits: Tensor, ignore_index: int) -> None:
    """Kept apart from `cross_entropy`, since reading the values waits for the device."""
    if logits.ndim < 2:
        raise UserError(f"logits are {_shape(logits) or 'one number'}; give (B, K), or dense (B, K, H, W)")
    wanted = logits.shape if labels.is_floating_point() else logits.shape[:1] + logits.shape[2:]
    if labels.shape != wanted:
        raise UserError(
            f"labels are {_shape(labels)} for logits {_shape(logits)}; give a class index for each example, "
            "or a distribution"
        )
    if labels.is_floating_point():
        sums = labels.double().sum(1)
        wrong = torch.cat([labels[~(labels >= 0)].double(), sums[~((sums - 1).abs() < 1e-2)]])
        if wrong.numel():
            raise UserError(
                f"labels are not distributions: a value or a sum is {float(wrong[0]):g}; give values of at "
                "least 0 that sum to 1 over the classes"
            )
        return
    wrong = labels[((labels < 0) | (labels >= logits.shape[1])) & (labels != ignore_index)]
    if wrong.numel():
        raise UserError(
            f"label {int(wrong[0])} is out of range; with {logits.shape[1]} classes, labels are 0 to "
            f"{logits.shape[1] - 1} (or {ignore_index} for none)"
        )


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.device.type == "mps" else logits.double()


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
