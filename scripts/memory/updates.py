"""What one update of a method takes beside a pass of its student: more networks, and more activations."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import stages
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffkd import methods
from diffkd.methods.base import Method, Stage
from diffkd.training.config import Training
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage
from memory.live import Live
from memory.networks import SMALL, Layout
from memory.passes import passed

GUIDANCE = 7.5
UNGUIDED = ("adversarial", "imm")  # which by default ask their teacher for no prediction
FEW, MORE = 32, 64  # images, of which the activations of one follow
OTHERS = ("logits", "denoising")  # of classifiers; of a teacher alone


class Latents:
    """Random latents of a layout with conditions, and noises where there are pairs."""

    def __init__(self, layout: Layout, stage: Stage) -> None:
        self.layout, self.stage = layout, stage

    def indices(self, size: int, rng: torch.Generator) -> Tensor:
        return torch.randint(MORE, (size,), generator=rng)

    def batch(self, size: int, rng: torch.Generator) -> Any:
        x0 = torch.randn(size, *self.layout.shape, generator=rng)
        cond = self.layout.cond(size)
        if self.stage.pairs is None:
            return x0, cond
        return x0, cond, torch.randn(x0.shape, generator=rng)


@dataclass(frozen=True)
class Networks:
    """Parameters of those beside the teacher: that learn, the student's included, of the largest of these,
    that only follow, and that have a moving average."""

    learn: int
    largest: int
    follow: int
    averaged: int

    @classmethod
    def of(cls, name: str, layout: Layout, parameters: int) -> Networks:
        """parameters: of the student."""
        if not methods.find(name).needs.networks:
            return cls(parameters, parameters, 0, parameters)
        _, stage, nets = _prepared(name, layout, "meta")
        del nets["teacher"]
        count = {key: sum(p.numel() for p in net.parameters()) for key, net in nets.items()}
        learn = {key: count[key] for key, net in nets.items() if _learns(net)}
        averaged = [key for key in learn if key == "student" or stage.optimization(key).ema is not None]
        return cls(
            sum(learn.values()), max(learn.values()), sum(count.values()) - sum(learn.values()),
            sum(count[key] for key in averaged),
        )  # fmt: skip


@dataclass(frozen=True)
class Graphs:
    """The most activations that an update holds at a time, as multiples of those of a pass of the student.

    all: without checkpointing. plain: of these, what stays as large with it, such as feature maps that a
    method keeps.
    """

    all: float
    plain: float

    @classmethod
    def of(cls, name: str) -> Graphs:
        """Counted while a small network is trained."""
        alone, again = _alone(False), _alone(True)
        every = _of_image(lambda size: _most(name, size, False)) / alone
        checked = _of_image(lambda size: _most(name, size, True))
        return cls(every, max(0.0, (checked - every * again) / (alone - again)))

    def bytes(self, alone: float, again: float, *, checkpointing: bool) -> float:
        """Of an image. alone, again: of a pass without checkpointing and with it."""
        if not checkpointing:
            return self.all * alone
        return (self.all - self.plain) * again + self.plain * alone


def _of_image(most: Callable[[int], int]) -> float:
    return (most(MORE) - most(FEW)) / (MORE - FEW)


@cache
def _alone(checkpointing: bool) -> float:
    network = SMALL.network().train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    return _of_image(lambda size: passed(network, SMALL, size, half=False).most)


def _most(name: str, size: int, checkpointing: bool) -> int:
    method, stage, nets = _prepared(name, SMALL, "cpu")
    training = Training(batch_size=size, gradient_checkpointing=checkpointing)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder), {})
        try:
            with Live() as live:
                run_stage(
                    Accelerator(cpu=True), method, replace(stage, updates=1), nets, Latents(SMALL, stage),
                    training, run, seed=0, stage_index=0,
                )  # fmt: skip
        finally:
            run.close()
    return live.most


def _prepared(name: str, layout: Layout, device: str) -> tuple[Method, Stage, dict[str, Any]]:
    """The method by its defaults but for guidance, its first stage, and that one's networks."""
    teacher = layout.denoiser(device)
    teacher.steps, teacher.sampler = 4, "renoise"  # as a stage that goes on from a student needs it
    kind = methods.find(name)
    guided = "guidance" in kind.model_fields and name not in UNGUIDED
    method = kind(guidance=GUIDANCE) if guided else kind()
    stage = method.stages(teacher)[0]
    return method, stage, stages.networks_of(method, stage, teacher)


def _learns(net: nn.Module) -> bool:
    return any(p.requires_grad for p in net.parameters())
