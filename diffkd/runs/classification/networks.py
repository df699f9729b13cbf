"""Classifiers in and out: a network by its config, a folder of one that was trained, opened with no code of
the folder's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import DDIMScheduler
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffkd.core.classifier import Classifier
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.io.config import Strict, validation_message
from diffkd.io.files import write_json
from diffkd.io.plugins import import_user_module
from diffkd.io.text import quoted, reason
from diffkd.models import validation
from diffkd.models.loading import CARD
from diffkd.runs.classification import cnn
from diffkd.runs.reports.model_card import escaped

BUILTIN_NETWORKS = {"cnn": cnn.Arguments}
WEIGHTS = "model.safetensors"
Side = Annotated[int, Field(ge=1, le=validation.LONGEST_SIDE)]


class Network(Strict):
    """A classifier's network: one of diffkd's, or an nn.Module of the user's own."""

    name: str = Field(
        "cnn",
        description="cnn, or the dotted path of a class or function of your own that makes an nn.Module",
    )
    arguments: dict[str, Any] = Field({}, description="what it is made with; of cnn: channels")

    def build(self, shape: tuple[int, int, int], num_classes: int, *, timed: bool = False) -> nn.Module:
        """A new network from images (B, C, H, W), and time (B,) where timed, to logits (B, num_classes).

        Raises UserError for an unknown name, arguments that it does not take, and another shape of logits.
        """
        network = (
            self._own() if self.name not in BUILTIN_NETWORKS else self._ours(shape[0], num_classes, timed)
        )
        _check_logits(network, self.name, shape, num_classes, timed)
        return network

    def _ours(self, in_channels: int, num_classes: int, timed: bool) -> nn.Module:
        return _arguments(self.name, self.arguments).build(in_channels, num_classes, timed=timed)

    def _own(self) -> nn.Module:
        """Code of the user's, which only a config may name."""
        module_name, dot, attribute = self.name.rpartition(".")
        ours = ", ".join(BUILTIN_NETWORKS)
        if not dot:
            raise UserError(f"network {self.name!r} is unknown; use {ours}, or the dotted path of your own")
        try:
            made = getattr(import_user_module(module_name), attribute)(**self.arguments)
        except Exception as error:  # whatever the user's module raises
            raise UserError(
                f"network {self.name!r} cannot be made ({reason(error)}); "
                f"use {ours}, or the dotted path and the arguments of your own"
            ) from error
        if not isinstance(made, nn.Module):
            raise UserError(f"network {self.name!r} makes a {type(made).__name__}; it has to be an nn.Module")
        return made


def _arguments(name: str, given: Mapping[str, Any], where: str = "arguments") -> cnn.Arguments:
    try:
        return BUILTIN_NETWORKS[name].model_validate(dict(given))
    except ValidationError as error:
        raise UserError(
            validation_message(error, BUILTIN_NETWORKS[name], f"{where} of network {name},")
        ) from error


def _check_logits(
    network: nn.Module, name: str, shape: tuple[int, int, int], num_classes: int, timed: bool
) -> None:
    """By two images: some layers, and batch normalisation first of all, do not take one."""
    time = (torch.zeros(2),) if timed else ()
    training = network.training
    try:
        with torch.no_grad():
            found: Any = network.eval()(torch.zeros(2, *shape), *time)
    except Exception as error:  # whatever a network raises for images that it is not made for
        raise UserError(
            f"network {name!r} does not take images of {'x'.join(map(str, shape))}"
            f"{' with a time' * timed} ({reason(error)}); see its arguments"
        ) from error
    network.train(training)
    if getattr(found, "shape", None) != (2, num_classes):
        what = f"gives {found.shape[1]} logits" if getattr(found, "ndim", 0) == 2 else "gives no logits"
        raise UserError(f"network {name!r} {what} and there are {num_classes} classes; see its arguments")


# folders


class Saved(Strict):
    """What diffkd.json says of a classifier, as far as it is needed to open one."""

    network: Network
    shape: tuple[Side, Side, Side] = Field(description="(C, H, W) of an image")
    num_classes: int = Field(ge=1, le=validation.LARGEST, description="K")
    schedule: dict[str, Any] | None = Field(
        description="of a noise-conditional one, as a diffusers scheduler has it"
    )


def save(classifier: Classifier, network: Network, folder: Path, **card: Any) -> None:
    """Writes model.safetensors, diffkd.json and README.md into a folder that is there. card: more to say."""
    state = {key: value.contiguous() for key, value in classifier.network.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    content = {
        "kind": "classifier",
        "network": network.model_dump(mode="json"),
        "shape": classifier.shape,
        "num_classes": classifier.num_classes,
        "schedule": None if classifier.schedule is None else dict(classifier.schedule.betas),
        "parameters": sum(p.numel() for p in classifier.network.parameters()),
        **card,
    }
    (folder / "README.md").write_text(_readme(content), encoding="utf-8")
    write_json(folder / CARD, content)


def load(
    folder: str | Path, network: nn.Module | None = None, *, device: str | torch.device = "cpu"
) -> Classifier:
    """A classifier that `diffkd distill` saved, in eval mode.

    network: one to take the weights, needed where it is of the user's own making: a name in a folder imports
    nothing. Raises UserError for a folder that is not whole, or weights that do not fit.
    """
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise UserError(f"{folder} is no classifier's folder: it has no {CARD}; give the folder that has it")
    content = validation.read_object(folder / CARD)
    if content.get("kind") != "classifier":
        raise UserError(f"{folder / CARD} is not a classifier's; give the folder of one")
    try:
        saved = Saved.model_validate({key: content[key] for key in Saved.model_fields if key in content})
    except ValidationError as error:
        raise UserError(validation_message(error, Saved, f"of {folder / CARD}:")) from error
    if network is None:
        network = _ours(saved, folder)
    _fill(network, folder)
    schedule = None if saved.schedule is None else _schedule(saved.schedule, folder)
    classifier = Classifier(network, saved.num_classes, shape=saved.shape, schedule=schedule)
    return classifier.to(device).eval()


def _ours(saved: Saved, folder: Path) -> nn.Module:
    """Made without memory first: a folder may ask for a network much larger than its weights are."""
    name = saved.network.name
    if name not in BUILTIN_NETWORKS:
        raise UserError(
            f"{folder} is of the network {quoted(name)}, code that a folder does not get to run; where it is "
            "yours, give the module that takes its weights"
        )
    arguments = _arguments(name, saved.network.arguments, f"{folder / CARD}: arguments")
    with torch.device("meta"):
        network = arguments.build(saved.shape[0], saved.num_classes, timed=saved.schedule is not None)
    sizes = sum(validation.sizes(folder))
    needed = sum(p.numel() for p in network.parameters())
    if needed != sizes:
        raise UserError(
            f"{folder}: {CARD} is of {needed:,} parameters and the weights are {sizes:,}; is it complete?"
        )
    return network.to_empty(device="cpu")


def _fill(network: nn.Module, folder: Path) -> None:
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the weights in {folder / WEIGHTS} cannot be had ({reason(error)}); are they this network's?"
        ) from error
    if not all(bool(p.isfinite().all()) for p in network.parameters()):
        raise UserError(f"the weights in {folder / WEIGHTS} are not all numbers; train them anew")


def _schedule(config: dict[str, Any], folder: Path) -> Schedule:
    validation.check_scheduler(config, str(folder))
    try:
        return from_diffusers(DDIMScheduler.from_config(config))
    except Exception as error:  # whatever diffusers makes of numbers that are none
        raise UserError(f"{folder / CARD} has a schedule that cannot be made ({reason(error)})") from error


def _readme(card: Mapping[str, Any]) -> str:
    """How to open it, and what it is."""
    shape = "x".join(map(str, card["shape"]))
    timed = card["schedule"] is not None
    own = card["network"]["name"] not in BUILTIN_NETWORKS
    call = "classifier(x_t, t)  # t: (B,) float64 in (0, 1]" if timed else "classifier(x)"
    what = "A classifier of noised images" if timed else "A classifier"
    lines = [
        f"# {what}, {card['num_classes']} classes",
        "",
        f"Made by [diffkd](https://pypi.org/project/diffkd/). It takes images of {shape} in [-1, 1]:",
        "",
        "```python",
        "from diffkd import classifiers",
        "",
        f'classifier = classifiers.load("path/to/this/folder"{", network=your_module" * own})',
        f"logits = {call}",
        "```",
        "",
        "| | |",
        "|---|---|",
    ]
    record = card.get("record", {})
    facts = {"parameters": card["parameters"], **record, **record.get("method", {})}
    for key in ("role", "accuracy", "held_out", "parameters", "alpha", "temperature", "direction", "seed"):
        if facts.get(key) is not None:
            lines.append(f"| {key.replace('_', ' ')} | {escaped(facts[key])} |")
    return "\n".join(lines) + "\n"
