"""The training section of a config, the same for every method."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffkd.errors import UserError
from diffkd.io.config import LARGEST_BATCH, Beta, Strict

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Training(Strict):
    """How a run's networks are trained, whatever the method."""

    batch_size: int = Field(
        128, ge=1, le=LARGEST_BATCH, description="images in one update, over all processes and micro-batches"
    )
    micro_batches: int | None = Field(
        None,
        ge=1,
        description="parts that a batch is split into, over all processes; default one for each process",
    )
    ema: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="decay of the moving average of the student's weights, which is what is saved",
    )
    ema_device: Literal["cpu"] | None = Field(
        None,
        description="where that average lies: cpu is the host's memory, which saves the GPU 4 bytes a weight "
        "and costs time; default beside the weights",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="adamw_8bit, by torchao (extra quant), keeps 2 bytes a weight where adamw keeps 8",
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="gradients are clipped to this norm; null for no clipping"
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32", description="autocast of the student, dtype of the teacher; float32 is TF32 on CUDA"
    )
    compile: bool = Field(
        False,
        description="torch.compile of a network's repeated blocks, or else of the whole network, and of "
        "adamw_8bit; on CUDA; takes minutes",
    )
    gradient_checkpointing: bool = Field(
        False, description="recomputes activations in the backward pass: less memory, more time"
    )
    log_every: int = Field(10, ge=1, description="updates between records of log.jsonl")
    trackers: list[TrackerName] = Field(
        [],
        description="what the log, the metrics and the pictures go to as well: tensorboard (in the run "
        "folder), wandb, mlflow, trackio (an extra of each name)",
    )
    checkpoint_every: int = Field(100, ge=1, description="updates between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints that are kept")
    max_skipped: int = Field(
        3,
        ge=0,
        description="updates in a row that may be skipped because a loss or gradient is NaN or infinite",
    )

    def parts(self, processes: int) -> int:
        """Micro-batches in one update. Raises UserError unless they divide evenly."""
        parts = self.micro_batches or processes
        if parts % processes or self.batch_size % parts:
            raise UserError(
                f"training.batch_size {self.batch_size} in {parts} micro-batches does not divide evenly "
                f"among {processes} processes; micro_batches must divide it and be a multiple of {processes}"
            )
        return parts
