"""The architecture of FID's Inception v3, as tables, and the modules that they are built into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The architecture, as tables.


@dataclass(frozen=True)
class Conv:
    """A convolution of `width` outputs. Padding keeps the size where stride is 1, unless `valid`."""

    name: str
    width: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    valid: bool = False


def mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def max_halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


Pool = Callable[[Tensor], Tensor]
Chain = Sequence[Conv | Pool | tuple[Conv, ...]]  # a tuple is a fork: all see the same input
Branches = Sequence[Chain]
STEM: Chain = [
    Conv("Conv2d_1a_3x3", 32, 3, stride=2),
    Conv("Conv2d_2a_3x3", 32, 3, valid=True),
    Conv("Conv2d_2b_3x3", 64, 3),
    max_halve,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, 3, valid=True),
    max_halve,
]


def block_a(pool_width: int) -> Branches:
    return [
        [Conv("branch1x1", 64)],
        [Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)],
        [Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)],
        [mean_pool, Conv("branch_pool", pool_width)],
    ]


def block_b() -> Branches:
    return [
        [Conv("branch3x3", 384, 3, stride=2)],
        [Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, stride=2)],
        [max_halve],
    ]


def block_c(width: int) -> Branches:
    row, column = (1, 7), (7, 1)
    return [
        [Conv("branch1x1", 192)],
        [Conv("branch7x7_1", width), Conv("branch7x7_2", width, row), Conv("branch7x7_3", 192, column)],
        [
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, column),
            Conv("branch7x7dbl_3", width, row),
            Conv("branch7x7dbl_4", width, column),
            Conv("branch7x7dbl_5", 192, row),
        ],
        [mean_pool, Conv("branch_pool", 192)],
    ]


def block_d() -> Branches:
    return [
        [Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, stride=2)],
        [
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, 3, stride=2),
        ],
        [max_halve],
    ]


def block_e(pool: Pool) -> Branches:
    row, column = (1, 3), (3, 1)
    return [
        [Conv("branch1x1", 320)],
        [Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, row), Conv("branch3x3_2b", 384, column))],
        [
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, 3),
            (Conv("branch3x3dbl_3a", 384, row), Conv("branch3x3dbl_3b", 384, column)),
        ],
        [pool, Conv("branch_pool", 192)],
    ]


BLOCKS: dict[str, Branches] = {
    "Mixed_5b": block_a(32),
    "Mixed_5c": block_a(64),
    "Mixed_5d": block_a(64),
    "Mixed_6a": block_b(),
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": block_d(),
    "Mixed_7b": block_e(mean_pool),
    "Mixed_7c": block_e(max_pool),
}


# The modules.


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm of the running statistics, ReLU."""

    def __init__(self, inputs: int, spec: Conv) -> None:
        super().__init__()
        rows, columns = spec.kernel if isinstance(spec.kernel, tuple) else (spec.kernel, spec.kernel)
        padding = (0, 0) if spec.valid or spec.stride > 1 else (rows // 2, columns // 2)
        self.conv = nn.Conv2d(inputs, spec.width, (rows, columns), spec.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(spec.width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        # The norm goes into the convolution's weights: one pass less over the activations, which on a CPU
        # is 10 to 20% of the network's time, and the weights are small beside a batch.
        assert self.bn.running_var is not None and self.bn.running_mean is not None
        scale = self.bn.weight * (self.bn.running_var + self.bn.eps).rsqrt()
        weight = self.conv.weight * scale.view(-1, 1, 1, 1)
        bias = self.bn.bias - self.bn.running_mean * scale
        return F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding).relu_()


class Block(nn.Module):
    """Branches side by side on the same input; their outputs are concatenated."""

    def __init__(self, inputs: int, branches: Branches) -> None:
        super().__init__()
        self.branches = branches
        self.width = sum(add_chain(self, chain, inputs) for chain in branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([run_chain(self, chain, x) for chain in self.branches], 1)


def add_chain(module: nn.Module, chain: Chain, width: int) -> int:
    """Gives `module` the chain's convolutions under their names. From `width` channels to those returned."""
    for step in chain:
        if isinstance(step, Conv):
            step = (step,)
        if isinstance(step, tuple):
            for spec in step:
                module.add_module(spec.name, ConvUnit(width, spec))
            width = sum(spec.width for spec in step)
    return width


def run_chain(module: nn.Module, chain: Chain, x: Tensor) -> Tensor:
    for step in chain:
        if isinstance(step, Conv):
            x = getattr(module, step.name)(x)
        elif isinstance(step, tuple):
            x = torch.cat([getattr(module, spec.name)(x) for spec in step], 1)
        else:
            x = step(x)
    return x


def add_network(module: nn.Module) -> None:
    """Gives `module` the whole network on the meta device: its weights come from elsewhere, so 24 M random
    numbers would be wasted, and would move the global generator of whoever measures."""
    with torch.device("meta"):
        width = add_chain(module, STEM, 3)
        for name, branches in BLOCKS.items():
            block = Block(width, branches)
            module.add_module(name, block)
            width = block.width
        module.add_module("fc", nn.Linear(width, 1008))
