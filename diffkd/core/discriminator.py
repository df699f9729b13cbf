"""Discriminators: small heads on what the blocks of a diffusion network make of a noised image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffkd.core.activations import capture_activations, no_gradients_after
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from diffkd.io.prefetch import to_device

WIDTH = 256  # of a head, at most
SMALLEST = 4  # a head halves a feature map while it is larger


def block_shapes(denoiser: Denoiser, names: Sequence[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes, without the batch, of what these modules of the network output, in the order of their calls.

    names: by default every block that sees the image: of the modules of its lists, and one called mid_block.
    Raises UserError for names that are not there or that are not called, and for outputs that are no features
    of an image, such as those of blocks that see the prompt alone.
    """
    network = getattr(denoiser.network, "module", denoiser.network)
    blocks = _blocks(network)
    known = {name for name, _ in network.named_modules()} - {""}
    for name in names or ():
        if name not in known:
            raise UserError(
                f"method.blocks names {name!r}, which the network does not have; it has "
                f"{', '.join(blocks) or 'no lists of blocks'} and the modules inside them"
            )
    chosen = list(names or blocks)
    if not chosen:
        raise UserError("this network has no lists of blocks; name its modules in method.blocks")
    found, of_another = _outputs(denoiser, chosen)
    for name in chosen:
        if name not in found:
            raise UserError(
                f"method.blocks names {name!r}, which the network does not call; name a module inside it"
            )
    blind = [name for name in chosen if _equal(found[name], of_another[name])]
    for name in chosen:
        if found[name].ndim not in (3, 4) or (names and name in blind):
            raise UserError(f"method.blocks names {name!r}, which outputs no features of an image")
    return {name: tuple(value.shape[1:]) for name, value in found.items() if name not in blind}


@torch.no_grad()
def _outputs(denoiser: Denoiser, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """What these modules output of an image, in the order of their calls, and what of another."""
    x_t, t, cond = denoiser.example_inputs()
    another = torch.linspace(-1, 1, x_t.numel(), device=x_t.device).reshape(x_t.shape)
    outputs = []
    with torch.random.fork_rng():
        for x in (x_t, another):
            with capture_activations(denoiser.network, names) as found:
                denoiser(x, t, **cond)
            outputs.append(found)
    return outputs


def _equal(one: Tensor, another: Tensor) -> bool:
    """Not on the meta device, where no network is told what it sees."""
    return not one.is_meta and torch.equal(one, another)


def middle(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The one in the middle, a UNet's bottleneck."""
    name = list(shapes)[len(shapes) // 2]
    return {name: shapes[name]}


def _blocks(network: nn.Module) -> list[str]:
    lists = {name: child for name, child in network.named_children() if isinstance(child, nn.ModuleList)}
    listed = [f"{name}.{i}" for name, child in lists.items() for i in range(len(child))]
    return [*listed, *(["mid_block"] if getattr(network, "mid_block", None) is not None else [])]


class Heads(nn.Module):
    """A head for each of some features: (B, C, H, W) or tokens (B, L, C) -> logits (B, heads).

    shapes: of the features, by the names of their blocks. A logit is high for real images. Each head halves
    its feature map until it is small, and averages what is left.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.blocks = list(shapes)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same in every process
            self.heads = nn.ModuleList(_head(*_map_shape(shape)) for shape in shapes.values())

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        logits = [
            head(_as_map(feature)).flatten(1).mean(1)
            for head, feature in zip(self.heads, features, strict=True)
        ]
        return torch.stack(logits, 1)


def seen(
    denoiser: Denoiser,
    heads: Heads | None,
    x_t: Tensor,
    t: Tensor,
    *,
    guidance: float = 1.0,
    learns: bool = False,
    **cond: Any,
) -> tuple[Tensor, list[Tensor]]:
    """The denoiser's prediction of x0 at x_t, and what the heads take of that call, without its guidance.

    heads: a `Heads`, or None, which takes nothing. learns: whether gradients pass through the prediction;
    else they do through the features alone, and nothing is kept for them of what the network does after.
    """
    blocks = [] if heads is None else heads.blocks
    with capture_activations(denoiser.network, blocks) as found, ExitStack() as stack:
        if not learns:
            after = no_gradients_after(denoiser.network, blocks[-1]) if blocks else torch.no_grad()
            stack.enter_context(after)
        denoised = denoiser(x_t, t, guidance=guidance, **cond)
    # the first half of a guided batch is conditional
    return denoised, [found[name][: len(x_t)].to(x_t.dtype) for name in blocks]


def nudged(schedule: Schedule, x_t: Tensor, t: Tensor, noise: float, rng: torch.Generator) -> Tensor:
    """x_t as it is where the images have a noise of this deviation on them, for `finite_r1`: (B, C, H, W)."""
    change = noise * torch.randn(x_t.shape, generator=rng, dtype=x_t.dtype)
    alpha, _ = schedule.at(t, like=x_t)
    moved: Tensor = x_t + alpha * to_device(change, x_t.device)
    return moved


def _head(channels: int, size: int) -> nn.Sequential:
    width = min(channels, WIDTH)
    layers: list[nn.Module] = []
    for k in range(max(1, math.ceil(math.log2(size / SMALLEST)))):
        layers += [
            nn.Conv2d(width if k else channels, width, 3, stride=2, padding=1),
            nn.GroupNorm(math.gcd(width, max(1, width // 8)), width),
            nn.SiLU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 1))


def _map_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Channels and the longer side of the map that the features are seen as."""
    if len(shape) == 3:
        return shape[0], max(shape[1:])
    return shape[1], shape[0] // _rows(shape[0])


def _as_map(feature: Tensor) -> Tensor:
    """Tokens as a feature map: square where their number is, a line where it is prime."""
    if feature.ndim == 4:
        return feature
    rows = _rows(feature.shape[1])
    return feature.transpose(1, 2).unflatten(2, (rows, -1))


def _rows(tokens: int) -> int:
    return next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)


# losses, each (B,) from logits (B, K) of real and of drawn images: sums over both kinds, means over the heads


def hinge(real: Tensor, drawn: Tensor) -> Tensor:
    """The discriminator's hinge loss (Lim & Ye 2017); the student's is `minus_logit`."""
    return (functional.relu(1 - real) + functional.relu(1 + drawn)).mean(1)


def minus_logit(drawn: Tensor) -> Tensor:
    return -drawn.mean(1)


def logistic(real: Tensor, drawn: Tensor) -> Tensor:
    """The discriminator's cross entropy (Goodfellow et al. 2014), least at the log of the density ratio; the
    student's is `non_saturating`."""
    return (functional.softplus(-real) + functional.softplus(drawn)).mean(1)


def non_saturating(drawn: Tensor) -> Tensor:
    return functional.softplus(-drawn).mean(1)


def finite_r1(logits: Tensor, moved: Tensor) -> Tensor:
    """|D(x) - D(x + noise)|² at real images, (B, K) each -> (B,): R1 without a second derivative (Lin et al.
    2025). For little noise, of deviation s, it is s² |grad D|² on average."""
    return (logits - moved).square().mean(1)


def accuracy(real: Tensor, drawn: Tensor) -> Tensor:
    """Shares of heads that tell the i-th real image for real and the i-th drawn one for drawn, (B,)."""
    return ((real > 0).float() + (drawn < 0).float()).mean(1).detach() / 2
