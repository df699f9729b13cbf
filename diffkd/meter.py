"""What a training run logs: sums of an interval, kept on the device until they are read."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffkd.base import UserError
from diffkd.method import Loss
from diffkd.runs import peak_rss

KEPT = 64  # updates whose losses wait to be added up
NOISE_BINS = 5  # equal bins of t in the log


class NonFinite(UserError):
    """A loss that is no number any more."""


class Meter:
    """What an interval of the log sums up. It is kept as it comes, on the device, and added up once read: an
    update costs nothing for it, and the host is not stopped."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bad = torch.full((2,), -1.0, dtype=torch.float64)  # update and t of the first bad loss
        self.sums: dict[str, Tensor] = {}
        self._restart()

    def _restart(self) -> None:
        self.sums = {}
        self.kept: list[tuple[int, list[Loss], Tensor | None]] = []
        self.started = time.perf_counter()
        self.updates = 0

    def add(self, losses: list[Loss], norm: Tensor | None, update: int) -> None:
        self.updates += losses[0].network == "student"
        losses = [Loss(loss.network, loss.value.detach(), loss.metrics) for loss in losses]
        self.kept.append((update, losses, None if norm is None else norm.detach()))
        if len(self.kept) >= KEPT:
            self._add_up()

    def _add_up(self) -> None:
        """The kept losses into the sums, those of one kind together. The one wait for the device."""
        kinds: dict[str, list[tuple[int, Loss]]] = {}
        for update, losses, norm in self.kept:
            prefix = "" if losses[0].network == "student" else f"{losses[0].network}_"
            if norm is not None:
                self._sum(f"{prefix}grad_norm", _total(norm[None]))
            for loss in losses:
                kinds.setdefault(prefix, []).append((update, loss))
        self.kept = []
        for prefix, found in kinds.items():
            values = torch.stack([loss.value for _, loss in found])
            self._sum(f"{prefix}loss", _total(values))
            for (update, loss), fine in zip(found, values.isfinite().tolist(), strict=True):
                if not fine and self.bad[0] < 0:
                    self.bad = torch.tensor([update + 1.0, _worst(loss)], dtype=torch.float64)
            for key in found[0][1].metrics:
                if key != "t":
                    metrics = [loss.metrics for _, loss in found]
                    t = torch.cat([m["t"] if "t" in m else torch.zeros_like(m[key]) for m in metrics])
                    self._sum(f"{prefix}{key}_by_noise", _binned(t, torch.cat([m[key] for m in metrics])))

    def _sum(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def read(self, accelerator: Accelerator, batch_size: int) -> dict[str, Any]:
        """The means of the interval, and a new one begins."""
        self._add_up()
        record: dict[str, Any] = {}
        for key, value in self.sums.items():
            total, count = accelerator.reduce(value, reduction="sum").cpu()
            means = (total / count).tolist()
            if key.endswith("_by_noise"):
                record[key] = [None if n == 0 else m for m, n in zip(means, count.tolist(), strict=True)]
                whole = key.removesuffix("_by_noise")
                record.setdefault(whole, float(total.sum() / count.sum()))
            else:
                record[key] = means
        seconds = time.perf_counter() - self.started
        record["images_per_second"] = self.updates * batch_size / max(seconds, 1e-9)
        record["peak_memory_gb"] = round(_peak_memory(self.device), 3)
        self._restart()
        return record

    def check(self, stage: str) -> None:
        self._add_up()
        update, t = self.bad.tolist()
        if update >= 0:
            raise NonFinite(
                f"the loss of stage {stage} became NaN or infinite at update {int(update)}, "
                f"noise level t = {t:.4g}; lower method.learning_rate (the last good checkpoint is kept)"
            )


def _total(values: Tensor) -> Tensor:
    """Sum and count, (2,) float64."""
    values = values.detach().double()
    return torch.stack([values.sum(), torch.ones_like(values).sum()])


def _binned(t: Tensor, values: Tensor) -> Tensor:
    """Sums and counts, (2, NOISE_BINS) float64, of values at noise levels t."""
    bins = ((t.double() * NOISE_BINS).ceil().long() - 1).clamp(0, NOISE_BINS - 1)
    binned = torch.zeros(2, NOISE_BINS, dtype=torch.float64, device=values.device)
    binned[0].index_add_(0, bins, values.detach().double())
    binned[1].index_add_(0, bins, torch.ones_like(values, dtype=torch.float64))
    return binned


def _worst(loss: Loss) -> float:
    """The noise level of a bad loss's worst example, 0 where it does not say."""
    t = loss.metrics.get("t")
    if t is None or len(t) == 0:
        return 0.0
    return float(t[int(loss.metrics.get("loss", t).nan_to_num(nan=torch.inf).argmax())])


def _peak_memory(device: torch.device) -> float:
    """GB: allocated on the device, or where that is this very machine's, of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_rss() / 1e9
