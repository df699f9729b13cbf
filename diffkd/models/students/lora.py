"""Students by adapters (LoRA, Hu et al. 2022): networks that share a base, each with weights BA of its own.

Every network is a tree of modules of its own around the same tensors, not one tree whose adapters are
switched: a call cannot find another's adapter on, nor can a block that is computed again for its gradients.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffkd.core import adapters, interval
from diffkd.core.adapters import DOWN, UP, Adapter
from diffkd.core.noise import derived_seed
from diffkd.errors import UserError
from diffkd.io.text import a_or_an
from diffkd.models import guidance_input

NAME = "default"  # of the adapter, in peft
SHOWN = 12  # names of layers in a message


def check_installed() -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "student.kind lora needs peft, and it is not installed; install it with pip install peft "
            "(extra lora), or use kind: copy"
        )


def takes_adapter(module: Any) -> bool:
    """Whether W + BA is what a layer becomes: of a stock class, and all of its inputs in every output."""
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


def layers(network: nn.Module, targets: Collection[str]) -> dict[str, nn.Module]:
    """The layers of a network that get an adapter, by name. Raises UserError where a target matches none,
    listing what there is."""
    able = {name: module for name, module in network.named_modules() if takes_adapter(module)}
    if missed := [target for target in targets if not any(_matches(name, target) for name in able)]:
        kind = type(network).__name__.removeprefix("Fast")
        raise UserError(
            f"student.targets has {', '.join(missed)}, which no layer of {a_or_an(kind)} is called or ends "
            f"in; there are {_ends(able)}"
        )
    return {name: module for name, module in able.items() if any(_matches(name, t) for t in targets)}


def matching(network: nn.Module, targets: Collection[str]) -> list[str]:
    """Those of the targets that match a layer; all of them where none does."""
    able = [name for name, module in network.named_modules() if takes_adapter(module)]
    return [t for t in targets if any(_matches(name, t) for name in able)] or [*targets]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _ends(names: Iterable[str]) -> str:
    """What layers are called at the end of their names: the parts that no number stands behind."""
    ends = dict.fromkeys(_end(name) for name in names)
    shown = [*ends][:SHOWN]
    return ", ".join(shown) + (f" and {len(ends) - SHOWN} more" if len(ends) > SHOWN else "")


def _end(name: str) -> str:
    parts = name.split(".")
    first = len(parts) - 1
    while first and parts[first].isdigit():
        first -= 1
    return ".".join(parts[first:])


def check_rank(found: Mapping[str, nn.Module], rank: int) -> None:
    """Raises UserError where a product BA of this rank is no smaller than the weight it is added to."""
    for name, layer in found.items():
        weight: Any = layer.weight
        most = min(len(weight), weight[0].numel())
        if rank > most:
            raise UserError(
                f"student.rank {rank} is above the size of layer {name}, whose weight is of rank {most} at "
                f"most; use student.rank {most} or less, or leave that layer out of student.targets"
            )


def copied(network: nn.Module, adapter: Adapter, seed: int = 0) -> nn.Module:
    """A network that shares the base of this one, with an adapter of its own: a copy of this one's, or where
    it has none a new one that changes nothing yet. seed: of the new one's A."""
    made = _sharing(network)
    if not adapters.own(made):
        found = layers(made, adapter.targets)
        check_rank(found, adapter.rank)
        _inject(made, found, adapter.rank, seed)
    return made


def _sharing(network: nn.Module) -> nn.Module:
    """A copy of the modules around the same weights, but for those of adapters, which are copied."""
    own = {id(p) for p in adapters.own(network).values()}
    shared = [t for t in (*network.parameters(), *network.buffers()) if id(t) not in own]
    for tensor in shared:
        tensor.requires_grad_(False)
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def _inject(network: nn.Module, names: Iterable[str], rank: int, seed: int) -> None:
    check_installed()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[*names])
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed))
        inject_adapter_in_model(config, network, NAME)
    vars(network).pop("peft_config", None)


# the weights of an adapter, by peft's names without that of the adapter


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A and B of each layer: LAYER.lora_A.weight (rank, in, ...), LAYER.lora_B.weight (out, rank, ...)."""
    named = {name: p.detach() for name, p in network.named_parameters() if adapters.is_factor(name)}
    return {name.replace(f".{NAME}.", "."): p for name, p in named.items()}


@torch.no_grad()
def with_weights(base: nn.Module, adapter: Adapter, weights: Mapping[str, Tensor]) -> nn.Module:
    """A network that shares this base, with an adapter of these weights, as `weights_of` gives them."""
    made = copied(base, adapter)
    for name, parameter in adapters.own(made).items():
        parameter.copy_(weights[name.replace(f".{NAME}.", ".")])
    return made


def take_guidance(network: nn.Module, adapter: Adapter | None) -> None:
    """Gives a network an embedding of the guidance weight, in place. Where it has an adapter, whose base has
    no such layer, that is one of zeros with an adapter of its own. Raises UserError as
    `guidance_input.attach` does."""
    guidance_input.attach(network)
    if adapter is None:
        return
    embedding: Any = network.get_submodule(guidance_input.EMBEDDING)
    _inject(network, [guidance_input.EMBEDDING], min(adapter.rank, *embedding.weight.shape), seed=0)


def takes_guidance_alone(network: nn.Module) -> bool:
    """Whether `take_guidance` was called on it."""
    found = (module for name, module in network.named_modules() if name == guidance_input.EMBEDDING)
    base = getattr(next(found, None), "base_layer", None)
    return base is not None and not bool(base.weight.any())


def is_more(network: nn.Module) -> bool:
    """Whether a network with an adapter took a number that its base does not, so that it is saved merged: the
    length of its steps, or a guidance weight."""
    return interval.attached(network) is not None or takes_guidance_alone(network)


@torch.no_grad()
def rebased(network: nn.Module, base: nn.Module, adapter: Adapter) -> nn.Module:
    """A network that shares this base, with all that learned in the given one."""
    made = copied(base, adapter)
    if interval.attached(network) is not None:
        interval.attach(made)
    if takes_guidance_alone(network):
        take_guidance(made, adapter)
    learned = adapters.own(network)
    for name, parameter in adapters.own(made).items():
        parameter.copy_(learned[name])
    return made


@torch.no_grad()
def merged(network: nn.Module) -> nn.Module:
    """The network of the stock class whose weights are W + BA; those of other layers are shared. An embedding
    of its steps' length stays."""
    made = _sharing(network)
    weights = weights_of(made)
    for name in sorted({key.rpartition(DOWN)[0] for key in weights if DOWN in key}):
        layer: Any = made.get_submodule(name)
        parent, _, last = name.rpartition(".")
        setattr(made.get_submodule(parent), last, layer.get_base_layer())
    add(made, weights)
    return made


@torch.no_grad()
def add(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives the layers of a stock network the weights W + BA, in new tensors. weights: as `weights_of` gives
    them, of layers that the network has."""
    for key, down in weights.items():
        if DOWN not in key:
            continue
        layer: Any = network.get_submodule(key.rpartition(DOWN)[0])
        up = weights[key.replace(DOWN, UP)]
        weight = layer.weight
        change = (up.flatten(1).float() @ down.flatten(1).float()).reshape(weight.shape)
        changed = (weight.float() + change.to(weight.device)).to(weight.dtype)
        layer.weight = nn.Parameter(changed, requires_grad=weight.requires_grad)
