"""The Inception v3 that FID and the Inception Score are defined with.

Network: Szegedy et al. 2016 (arXiv:1512.00567), as TensorFlow's graph of 2015-12-05 has it. It differs from
torchvision's: average pools do not count padding, the last block pools by maximum, inputs are
(value - 128) / 128, the classes are 1008.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkd.base import UserError
from diffkd.metrics.exact import exact
from diffkd.metrics.inception_weights import URL, find_weights, read_weights
from diffkd.metrics.resize import check as check_resize
from diffkd.metrics.resize import resize as resized
from diffkd.metrics.weights import digest

SIZE = 299
COUNTER = ".num_batches_tracked"  # optional in a file: inference does not use it


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


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items() if not name.endswith(COUNTER)}


class InceptionV3(nn.Module):
    """uint8 images (B, 1 or 3, H, W) -> the 2048 features of the last pool. Always in eval mode, without
    gradients or autocast.

    weights: a file (see read_weights), None for what find_weights finds, or a state dict.
    resize: how images come to 299x299, one of diffkd.metrics.resize.RESIZES. dtype: of the arithmetic.
    weights_sha256: of the weights as float32, whatever kind of file they came in.
    """

    num_features = 2048
    fc: nn.Linear

    def __init__(
        self,
        weights: str | Path | Mapping[str, Tensor] | None = None,
        *,
        resize: str = "tf1",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_resize(resize)
        self.resize = resize
        add_network(self)
        if isinstance(weights, Mapping):
            source, tensors = "the state dict", weights
        else:
            path = find_weights(weights)
            source, tensors = str(path), read_weights(path)
        tensors = _checked(tensors, shapes(self), source)
        self.weights_sha256 = digest(tensors)
        counters = {n: torch.tensor(0) for n in self.state_dict() if n.endswith(COUNTER)}
        self.load_state_dict({**counters, **tensors}, assign=True)
        # On a CPU this layout takes two thirds of the usual one's time. (mypy knows no memory_format.)
        self.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)
        super().train(False)

    @classmethod
    def untrained(
        cls, *, resize: str = "tf1", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> InceptionV3:
        """Random weights that keep activations of order one: for tests and timings."""
        return cls(random_weights(seed), resize=resize, dtype=dtype)

    def train(self, mode: bool = True) -> InceptionV3:
        return self  # locked: a metric that is put in train mode keeps its features

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 1 or 3, H, W) -> (B, 2048). Grey is repeated to three channels."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"images of {images.dtype} {tuple(images.shape)} are not what Inception takes; "
                "give uint8 (B, 1 or 3, H, W), rounded"
            )
        x = resized(images, SIZE, self.resize, dtype=self.fc.weight.dtype)
        return self.trunk(x.sub_(128).div_(128).expand(-1, 3, -1, -1))

    @torch.no_grad()
    def trunk(self, x: Tensor) -> Tensor:
        """The network itself: pixels after (value - 128) / 128, (B, 3, 299, 299) -> (B, 2048)."""
        with exact(x.device.type):
            x = run_chain(self, STEM, x.contiguous(memory_format=torch.channels_last))
            for name in BLOCKS:
                x = getattr(self, name)(x)
            return x.mean((2, 3))

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """(B, 2048) -> (B, 1008), in float64, where neither autocast nor TF32 reaches."""
        return features.double() @ self.fc.weight.double().T + self.fc.bias.double()

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """(B, 2048) -> (B, 1008), in float64. Without the bias, which the code of the Inception Score
        (Salimans et al. 2016) leaves out; scores of the literature have it so."""
        return (features.double() @ self.fc.weight.double().T).softmax(1)

    def describe(self) -> dict[str, Any]:
        """What a protocol says of this network."""
        dtype = str(self.fc.weight.dtype).removeprefix("torch.")
        return {
            "name": "inception", "sha256": self.weights_sha256, "num_features": self.num_features,
            "resize": self.resize, "dtype": dtype,
        }  # fmt: skip


def random_weights(seed: int) -> dict[str, Tensor]:
    """Weights of He et al. 2015 (variance 2 / fan in), batch norms at the identity."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Module()
    add_network(network)
    weights = {}
    for name, shape in shapes(network).items():
        if len(shape) > 1:
            weights[name] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        else:
            ones = name.endswith(("bn.weight", "bn.running_var"))
            weights[name] = torch.ones(shape) if ones else torch.zeros(shape)
    return weights


def _checked(
    tensors: Mapping[str, Tensor], expected: dict[str, torch.Size], source: str
) -> dict[str, Tensor]:
    """The tensors as float32 on the CPU, if they are finite and have the expected names and shapes."""
    given = {name: value for name, value in tensors.items() if not name.endswith(COUNTER)}
    remedy = f"use the weights of {URL}, or others under the same names"
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    for fault, names in (("lacks tensors", missing), ("has tensors that Inception has not", unknown)):
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{source} {fault} ({len(names)}: {some}); {remedy}")
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise UserError(f"{source}: {name} is {tuple(given[name].shape)}, not {tuple(shape)}; {remedy}")
        if not given[name].isfinite().all():
            raise UserError(f"{source}: {name} has values that are not finite; {remedy}")
    return {name: value.detach().cpu().float() for name, value in given.items()}
