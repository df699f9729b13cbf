"""Students with fewer blocks of a transformer: the same stock class, whose config counts fewer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from diffkd.errors import UserError
from diffkd.io.text import a_or_an

LISTS = {  # of each stock class the lists of its blocks in the order of their calls, and their number's field
    "DiTTransformer2DModel": {"transformer_blocks": "num_layers"},
    "FluxTransformer2DModel": {
        "transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers",
    },
    "Lumina2Transformer2DModel": {"layers": "num_layers"},
    "PixArtTransformer2DModel": {"transformer_blocks": "num_layers"},
    "QwenImageTransformer2DModel": {"transformer_blocks": "num_layers"},
    "SD3Transformer2DModel": {"transformer_blocks": "num_layers"},
    "SanaTransformer2DModel": {"transformer_blocks": "num_layers"},
    "ZImageTransformer2DModel": {"layers": "n_layers"},
}  # fmt: skip
STAYS = {  # the block that has to, and why
    "DiTTransformer2DModel": (0, "the last layer is told time and class by the first block"),
    "SD3Transformer2DModel": (-1, "the last block alone is made without an output for the prompt"),
}
DUAL = "dual_attention_layers"  # of Stable Diffusion 3.5: which blocks attend twice


def stock_name(network: nn.Module) -> str:
    """The name of a transformer's stock class; "" for what is none of these. FSDP has classes of its own,
    which come from the stock ones, and DDP a module around them."""
    bare = getattr(network, "module", network)
    return next((kind.__name__ for kind in type(bare).__mro__ if kind.__name__ in LISTS), "")


def blocks_of(network: nn.Module) -> dict[str, int]:
    """How many blocks each list has, in the order of their calls; {} for what is no known transformer."""
    bare = getattr(network, "module", network)
    return {name: len(getattr(bare, name)) for name in LISTS.get(stock_name(network), ())}


def spread(network: nn.Module, share: float) -> list[str]:
    """The blocks to drop so that this share of each list stays, rounded to a number of at least one: the
    first, the last, and between them as evenly as they can."""
    dropped = []
    for name, count in blocks_of(network).items():
        kept = max(1, int(share * count + 0.5))
        if kept > 1:
            stay = {(2 * i * (count - 1) + kept - 1) // (2 * (kept - 1)) for i in range(kept)}
        else:
            stay = {STAYS.get(stock_name(network), (0, ""))[0] % count}
        dropped += [f"{name}.{i}" for i in range(count) if i not in stay]
    return dropped


def without(network: nn.Module, patterns: Iterable[str]) -> nn.Module:
    """A new network without these blocks, which shares nothing with it: what runs is the old one in which
    they hand on what they are given. Its config describes it.

    patterns: such as transformer_blocks.3, in which * matches anything. Raises UserError for a name that the
    network does not have, for a block that has to stay, and where none would stay of a list.
    """
    names = _matching(network, list(patterns))
    _check_stays(network, names)
    changes: dict[str, Any] = {}
    memo: dict[int, Any] = {}  # what stands for the lists when the rest is copied
    for name, field in LISTS[stock_name(network)].items():
        blocks = getattr(network, name)
        stay = [i for i in range(len(blocks)) if f"{name}.{i}" not in names]
        if not stay:
            raise UserError(f"student.blocks drops every block of {name}; leave one")
        shorter = nn.ModuleList(copy.deepcopy(blocks[i], memo) for i in stay)
        shorter.training = blocks.training
        memo[id(blocks)] = shorter
        changes[field] = len(stay)
        config: Any = network.config
        if config.get(DUAL):
            changes[DUAL] = type(config[DUAL])(stay.index(i) for i in config[DUAL] if i in stay)
    smaller: Any = copy.deepcopy(network, memo)
    smaller.register_to_config(**changes)
    made: nn.Module = smaller
    return made


def made_like(network: Any, **changes: Any) -> Any:
    """A freshly initialised network of the same class and config but for `changes`, on the same device, in
    the same dtype and mode. torch's global generators are left as they were."""
    parameter = next(network.parameters())
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    with torch.random.fork_rng(), torch.device("meta") if parameter.is_meta else nullcontext():
        made = type(network).from_config({**config, **changes})
    nn.Module.to(made, parameter.device, parameter.dtype)  # diffusers' own override would warn
    return made.train(network.training)


def renewed(network: nn.Module) -> nn.Module:
    """The same with new random weights. What a family changed of its modules stays."""
    made = copy.deepcopy(network)
    made.load_state_dict(made_like(network).state_dict())
    return made


def _matching(network: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The names of blocks that the patterns match."""
    counts = blocks_of(network)
    known = [f"{name}.{i}" for name, count in counts.items() for i in range(count)]
    names: set[str] = set()
    for pattern in patterns:
        matched = [name for name in known if fnmatchcase(name, pattern)]
        if not matched:
            has = " and ".join(f"{name}.0 to {name}.{count - 1}" for name, count in counts.items())
            raise UserError(
                f"student.blocks names {pattern!r}, which this network does not have; it has {has}"
            )
        names.update(matched)
    return names


def _check_stays(network: nn.Module, names: set[str]) -> None:
    if stock_name(network) not in STAYS:
        return
    place, why = STAYS[stock_name(network)]
    ((name, count),) = blocks_of(network).items()
    if (block := f"{name}.{place % count}") in names:
        raise UserError(
            f"student.blocks drops {block}, which has to stay in {a_or_an(stock_name(network))}: {why}; "
            "drop another"
        )
