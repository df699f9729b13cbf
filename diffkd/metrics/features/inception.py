"""The Inception v3 that FID and the Inception Score are defined with.

Network: Szegedy et al. 2016 (arXiv:1512.00567), as TensorFlow's graph of 2015-12-05 has it. It differs from
torchvision's: average pools do not count padding, the last block pools by maximum, inputs are
(value - 128) / 128, the classes are 1008.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.core.digest import digest
from diffkd.core.precision import full_float32
from diffkd.errors import UserError
from diffkd.metrics.features.inception_network import BLOCKS, STEM, add_network, run_chain
from diffkd.metrics.features.inception_weights import URL, find_weights, read_weights
from diffkd.metrics.features.resize import OLD, prepare
from diffkd.metrics.features.resize import check as check_resize

SIZE = 299
PART = 16  # images at a time on a CPU: as fast as more, and in half the memory
COUNTER = ".num_batches_tracked"  # optional in a file: inference does not use it


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items() if not name.endswith(COUNTER)}


class InceptionV3(nn.Module):
    """uint8 images (B, 1 or 3, H, W) -> the 2048 features of the last pool. Always in eval mode, without
    gradients or autocast.

    weights: a file (see read_weights), None for what find_weights finds, or a state dict.
    resize: how images come to 299x299 and are normalised, by the name of the tool that does it so: tf1
    (torch-fidelity and the original), clean (clean-fid), pytorch-fid, torchmetrics. dtype: of the arithmetic.
    weights_sha256: of the weights as float32, whatever kind of file they came in. weights_name: of that file,
    None for a state dict.
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
            self.weights_name: str | None = None
        else:
            path = find_weights(weights)
            source, tensors, self.weights_name = str(path), read_weights(path), path.stem
        tensors = _checked(tensors, shapes(self), source)
        self.weights_sha256 = digest(tensors)
        counters = {n: torch.tensor(0) for n in self.state_dict() if n.endswith(COUNTER)}
        self.load_state_dict({**counters, **tensors}, assign=True)
        # On a CPU this layout takes two thirds of the default one's time. (mypy does not know memory_format.)
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
        if images.device.type == "cpu" and len(images) > PART:
            parts = [self(images[i : i + PART]) for i in range(0, len(images) - PART + 1, PART)]
            rest = len(images) % PART  # in a part as large, since a smaller one is rounded otherwise
            return torch.cat([*parts, self(images[-PART:])[-rest:]] if rest else parts)
        x = prepare(images, SIZE, self.resize, dtype=self.fc.weight.dtype)
        return self.trunk(x.expand(-1, 3, -1, -1))

    @torch.no_grad()
    def trunk(self, x: Tensor) -> Tensor:
        """The network itself: normalised pixels, (B, 3, 299, 299) -> (B, 2048)."""
        with full_float32(x.device.type):
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
            "resize": OLD.get(self.resize, self.resize), "dtype": dtype,
            **({} if self.weights_name is None else {"weights": self.weights_name}),
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
    for fault, names in (("lacks tensors", missing), ("has tensors that Inception does not have", unknown)):
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(f"{source} {fault} ({len(names)}: {some}); {remedy}")
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise UserError(f"{source}: {name} is {tuple(given[name].shape)}, not {tuple(shape)}; {remedy}")
        if not given[name].isfinite().all():
            raise UserError(f"{source}: {name} has values that are not finite; {remedy}")
    # copies: what is left as it was read would keep the whole file in memory
    return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in given.items()}
