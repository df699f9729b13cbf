"""What training a text-to-image student takes in memory, by arithmetic (docs/memory.md):

    python scripts/memory_table.py                       # about half an hour on one slow core
    python scripts/memory_table.py --networks sd15 --methods progressive dmd2

Networks at full size are run as fake tensors, whose storages are counted as torch makes and frees them. What
a method adds is counted in one update of a small network of the same kind. Nothing of it was measured on a
GPU: kernels' own workspaces and the allocator's gaps are the share of a card that is left free.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass

import diffusers
import torch
from machine import describe
from memory.networks import SD15, SDXL, Layout
from memory.passes import Pass, size_of
from memory.updates import OTHERS, Graphs, Networks

from diffkd import methods
from diffkd.models.sizes import Size

LAYOUTS = {"sd15": SD15, "sdxl": SDXL}
METHODS = [name for name in methods.names() if name not in OTHERS]
CARDS = (24, 48, 80)  # GiB
USED = 0.9  # share of a card that tensors may take
GB = 1e9


@dataclass(frozen=True)
class Settings:
    """moments, average: bytes that the optimizer and the moving average keep of each weight on the GPU."""

    name: str
    moments: float
    average: int
    checkpointing: bool


SETTINGS = (
    Settings("as it is", 8, 4, False),
    Settings("`gradient_checkpointing`", 8, 4, True),
    Settings("that, `adamw_8bit`, `ema_device: cpu`", 2 + 2 * 4 / 256, 0, True),
)


def fixed_bytes(settings: Settings, parameters: int, one: Pass, networks: Networks) -> float:
    """Without activations of images: teacher in bf16, weights and moments of all that learn, gradients of one
    at a time, averages, followers, and the casts of weights to bf16."""
    return (
        2 * parameters
        + (4 + settings.moments) * networks.learn
        + 4 * networks.largest
        + settings.average * networks.averaged
        + 4 * networks.follow
        + one.fixed * networks.learn / parameters
    )


def largest_batch(card: int, fixed: float, image: float) -> int:
    """Images of a micro-batch that fit."""
    return max(0, int((USED * card * 2**30 - fixed) / image))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    given = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    for name in ("torch", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(describe(torch.device("cpu")))
    chosen = [LAYOUTS[name] for name in given.networks]
    sizes = {layout.name: size_of(layout) for layout in chosen}
    passes = {
        layout.name: [Pass.of(layout, checkpointing=again) for again in (False, True)] for layout in chosen
    }
    print_networks(chosen, sizes, passes)
    graphs = {name: Graphs.of(name) for name in given.methods}
    for layout in chosen:
        print_methods(layout, sizes[layout.name].parameters, passes[layout.name], graphs)


def print_networks(layouts: list[Layout], sizes: dict[str, Size], passes: dict[str, list[Pass]]) -> None:
    print("\n| UNet | image | parameters | MACs | activations of an image | with `gradient_checkpointing` |")
    print("|---|---|---|---|---|---|")
    for layout in layouts:
        size, (plain, again) = sizes[layout.name], passes[layout.name]
        print(
            f"| {layout.name} | {layout.size} px | {size.parameters:,} | {size.macs / 1e9:,.0f} G "
            f"| {plain.image / GB:.2f} GB | {again.image / GB:.2f} GB |", flush=True,
        )  # fmt: skip


def print_methods(layout: Layout, parameters: int, passes: list[Pass], graphs: dict[str, Graphs]) -> None:
    """A row for each method: GB without images, then images that fit on each card, for all settings."""
    titles = " | ".join(f"{s.name}: GB, images at {', '.join(map(str, CARDS))} GB" for s in SETTINGS)
    print(f"\n| {layout.name}, {layout.size} px | more networks | activations | {titles} |")
    print("|---|---|---|" + "---|" * len(SETTINGS))
    for name, multiple in graphs.items():
        networks = Networks.of(name, layout, parameters)
        cells = []
        for settings in SETTINGS:
            one = passes[settings.checkpointing]
            fixed = fixed_bytes(settings, parameters, one, networks)
            image = multiple.bytes(passes[0].image, passes[1].image, checkpointing=settings.checkpointing)
            fit = [str(largest_batch(card, fixed, image)) for card in CARDS]
            cells.append(f"{fixed / GB:.1f}: {', '.join(fit)}")
        more = networks.learn - parameters + networks.follow
        said = f"{more / 1e6:,.0f} M" if more > 1e6 else ""
        print(f"| `{name}` | {said} | {multiple.all:.1f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
