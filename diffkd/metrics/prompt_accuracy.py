"""How much of what its prompt asks for a picture shows, of the pictures of data kind shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from diffkd.data.shapes import Scene, read_caption
from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.metrics.base import Add, Batch, Inputs, Metric, Running, Value
from diffkd.metrics.features.shapes import asked


class Shown:
    """Adds up what is asked for, and how much of it is there: layout, kind, colour and size of each shape, as
    far as the prompts say them."""

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network = network
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # asked for, and shown

    def update(self, batch: Batch) -> None:
        """Images with their prompts."""
        assert batch.prompts is not None
        wanted = torch.tensor([asked(_scene(prompt)) for prompt in batch.prompts]).to(batch.features.device)
        said = wanted >= 0
        shown = (self.network.read(batch.features) == wanted) & said
        self.sums += torch.stack([said.sum(), shown.sum()]).to(self.sums)

    def merge_across(self, add: Add) -> None:
        """Adds up all processes, each of which must call it, with images or without."""
        self.sums = add(self.sums)


def _scene(prompt: str) -> Scene:
    scene = read_caption(prompt)
    if scene is None:
        raise UserError(
            "prompt_accuracy is of prompts about shapes, such as 'a red ring above a blue square', and one "
            f"is {quoted(prompt, 60)}; leave out the metric, or give other prompts"
        )
    return scene


class PromptAccuracy(Metric):
    """The share of the attributes that captions ask for which the shipped network reads in the pictures."""

    name: ClassVar[str] = "prompt_accuracy"
    values: ClassVar[tuple[Value, ...]] = (Value("prompt_accuracy", "prompt accuracy", ".3f"),)
    network: ClassVar[str] = "shapes"
    with_prompts: ClassVar[bool] = True
    with_reference: ClassVar[bool] = False

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            _scene(prompt)

    def running(self, network: nn.Module, count: int, device: torch.device) -> Running:
        return Shown(network, device)

    def compute(self, inputs: Inputs) -> dict[str, float | None]:
        wanted, shown = inputs.running.sums.tolist()
        return {"prompt_accuracy": shown / wanted}
