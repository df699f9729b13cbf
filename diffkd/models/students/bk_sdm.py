"""BK-SDM's architectures by name: which blocks of a UNet they leave out (Kim et al. 2023)."""

from __future__ import annotations

from diffkd.errors import UserError
from diffkd.models.students.resolutions import of_each
from diffkd.models.unet import UNet

ARCHITECTURES = ("base", "small", "tiny")
LAYERS = 2  # of each down block in the UNets that the paper compresses


def check_name(name: str) -> None:
    """Raises UserError for one that is no architecture."""
    if name not in ARCHITECTURES:
        raise UserError(
            f"student.blocks is {name!r}, which is no architecture of BK-SDM; use "
            f"{', '.join(ARCHITECTURES)}, or a list of blocks"
        )


def dropped_by(name: str, network: UNet) -> list[str]:
    """The blocks that this architecture leaves out of a network.

    base: the second layer of every block, a resnet with the attention beside it; an up block keeps its first,
    which reads what comes from below, and its third, which takes the skip connection from the resolution
    before. small: the middle, too. tiny: the innermost resolution, too. Raises UserError for another name,
    and for networks that these do not describe.
    """
    check_name(name)
    resolutions = len(network.down_blocks)
    layers = {*of_each(network.config.layers_per_block, resolutions)}
    if layers != {LAYERS}:
        raise UserError(
            f"student.blocks {name} leaves out the second of {LAYERS} layers in each block, and this network "
            f"has {' or '.join(map(str, sorted(layers)))}; give a list of blocks"
        )
    dropped = ["down_blocks.*.resnets.1", "up_blocks.*.resnets.1"]
    if name == "base":
        return dropped
    if network.mid_block is None:
        raise UserError(f"student.blocks {name} leaves out mid_block, and this network has none; use base")
    if name == "small":
        return [*dropped, "mid_block"]
    return [*dropped, "mid_block", f"down_blocks.{resolutions - 1}"]
