"""Features of a network's blocks: which blocks there are, which of two networks' correspond, and which of the
tokens that a block outputs are the image's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.core.activations import capture_activations
from diffkd.core.conditioning import Cond
from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.models.masked_prompts import MASK
from diffkd.models.students.transformers import blocks_of, stock_name

LUMINA2, Z_IMAGE = "Lumina2Transformer2DModel", "ZImageTransformer2DModel"
JOINT, IMAGE = "layers.", "noise_refiner."  # of these two: what sees prompt and image, and the image alone
Z_IMAGE_PATCH = 2  # latents a side of a token


def blocks(denoiser: Denoiser) -> list[str]:
    """The blocks of a UNet or a transformer, from the first to the last; [] for a network that is neither."""
    network = getattr(denoiser.network, "module", denoiser.network)
    if counts := blocks_of(network):
        return [f"{name}.{i}" for name, count in counts.items() for i in range(count)]
    down = [f"down_blocks.{i}" for i in range(len(getattr(network, "down_blocks", ())))]
    up = [f"up_blocks.{i}" for i in range(len(getattr(network, "up_blocks", ())))]
    return [*down, *(["mid_block"] if getattr(network, "mid_block", None) is not None else []), *up]


def corresponding(teacher: Denoiser, student: Denoiser) -> dict[str, str]:
    """Which blocks correspond: the teacher's name -> the student's. Raises UserError for a UNet of more
    resolutions than its teacher's."""
    if counts := blocks_of(teacher.network):
        ours = blocks_of(student.network)
        return {
            f"{name}.{of_theirs}": f"{name}.{of_ours}"
            for name, count in counts.items()
            for of_theirs, of_ours in _at_equal_depth(count, ours.get(name, 0))
        }
    return _of_unets(blocks(teacher), blocks(student))


def _at_equal_depth(theirs: int, ours: int) -> list[tuple[int, int]]:
    """Blocks that end the same share of their lists, by number: of m and n <= m blocks the i-th of the n, and
    the one of the m that i m / n is rounded down to (Jiao et al. 2020, "TinyBERT", the uniform strategy). The
    last corresponds to the last, and in lists of equal length each to its own."""
    count = min(theirs, ours)
    return [(i * theirs // count - 1, i * ours // count - 1) for i in range(1, count + 1)]


def _of_unets(theirs: list[str], ours: list[str]) -> dict[str, str]:
    """Down blocks counted from the first, up blocks from the last."""
    levels, left = (sum(name.startswith("up") for name in names) for names in (theirs, ours))
    if left > levels:
        raise UserError(
            f"the student has {left} resolutions and the teacher {levels}; name the modules to match in "
            "method.blocks"
        )
    if left == levels:
        return {name: name for name in ours if name in theirs}
    # without the innermost resolutions the last down block does not downsample; the middle takes their place
    down = {f"down_blocks.{i}": f"down_blocks.{i}" for i in range(left - 1)}
    return down | {f"up_blocks.{i + levels - left}": f"up_blocks.{i}" for i in range(left)}


def of_image(network: nn.Module, name: str, output: Tensor, x_t: Tensor, cond: Cond) -> Tensor:
    """The image's tokens among those that this module outputs, (B, L, C) -> (B, N, C), where prompt and image
    are in one sequence; all else as it is. x_t, cond: what the network was called with, (B, ...).

    Of Lumina 2 an example has the tokens of its prompt, those of the image and padding; of Z-Image those of
    the image first. So L goes by the longest prompt of a batch, and N does not.
    """
    kind = stock_name(network)
    if kind not in (LUMINA2, Z_IMAGE) or output.ndim != 3:
        return output
    bare: Any = getattr(network, "module", network)
    patch = bare.config.patch_size if kind == LUMINA2 else Z_IMAGE_PATCH
    count = (x_t.shape[-2] // patch) * (x_t.shape[-1] // patch)
    if kind == LUMINA2 and name.startswith(JOINT):
        first = cond[MASK].to(output.device).sum(1).long()
        rows = first[:, None] + torch.arange(count, device=output.device)
        return output.gather(1, rows[..., None].expand(-1, -1, output.shape[2]))
    return output[:, :count]


def check_names(whose: str, denoiser: Denoiser, names: Iterable[str]) -> None:
    """Raises UserError for modules that are not there, or whose output is not of an image's tokens."""
    known = {name for name, _ in denoiser.network.named_modules()} - {""}
    for name in names:
        if name not in known:
            raise UserError(
                f"method.blocks names {name!r}, which the {whose} does not have; it has "
                f"{', '.join(blocks(denoiser))} and the modules inside them"
            )
        if stock_name(denoiser.network) in (LUMINA2, Z_IMAGE) and not name.startswith((JOINT, IMAGE)):
            raise UserError(
                f"method.blocks names {name!r}, which is not of the image's tokens; name {JOINT}0, {IMAGE}0, "
                "or others of these lists and the modules inside them"
            )


def shapes(denoiser: Denoiser, names: list[str]) -> dict[str, tuple[int, ...]]:
    """(C, H, W), or (N, C) of tokens, of what these modules output. Raises UserError for one that the network
    does not call."""
    x_t, t, cond = denoiser.example_inputs()
    with torch.no_grad(), torch.random.fork_rng(), capture_activations(denoiser.network, names) as found:
        denoiser(x_t, t, **cond)
    for name in names:
        if name not in found:
            raise UserError(
                f"method.blocks names {name!r}, which the network does not call; name a module inside it"
            )
    return {
        name: tuple(of_image(denoiser.network, name, value, x_t, cond).shape[1:])
        for name, value in found.items()
    }
