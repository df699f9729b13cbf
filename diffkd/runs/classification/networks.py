"""Classifiers in and out: a network by its config, and the folder of a trained one, which runs none of its
own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import DDIMScheduler
from pydantic import AfterValidator, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from diffkd.core.classifier import Classifier
from diffkd.core.schedules import BetaSchedule, from_betas
from diffkd.errors import UserError
from diffkd.io import plugins
from diffkd.io.config import Strict, validation_message
from diffkd.io.text import a_or_an, quoted, reason
from diffkd.models import pipeline_files, validation
from diffkd.models.loading import CARD
from diffkd.runs.classification import cnn
from diffkd.runs.reports import model_card

BUILTIN_NETWORKS = {"cnn": cnn.Arguments}
WEIGHTS = "model.safetensors"
Side = Annotated[int, Field(ge=1, le=validation.MAX_SIDE)]


class Network(Strict):
    """A classifier's network: one of diffkd's, or an nn.Module of the user's own."""

    name: Annotated[str, AfterValidator(lambda name: plugins.in_config(name, BUILTIN_NETWORKS))] = Field(
        "cnn", description="cnn, or your own: a module with one nn.Module, or module.Class or module.function"
    )
    arguments: dict[str, Any] = Field({}, description="what it is made with; for cnn: channels")

    @property
    def builtin(self) -> bool:
        return self.name in BUILTIN_NETWORKS

    def build(self, shape: tuple[int, int, int], num_classes: int, *, timed: bool = False) -> nn.Module:
        """A new network from images (B, C, H, W), and time (B,) where timed, to logits (B, num_classes).

        Raises UserError for an unknown name, arguments that it does not take, and logits of another shape.
        """
        if self.builtin:
            network: nn.Module = self.parsed().build(shape[0], num_classes, timed=timed)
        else:
            network = self._imported()
        self._check_logits(network, shape, num_classes, timed)
        return network

    def parsed(self, where: str = "arguments") -> cnn.Arguments:
        """The arguments of a built-in network, checked."""
        kind = BUILTIN_NETWORKS[self.name]
        try:
            return kind.model_validate(self.arguments)
        except ValidationError as error:
            raise UserError(validation_message(error, kind, f"{where} of network {self.name},")) from error

    def _imported(self) -> nn.Module:
        """The user's own code, which only a config may name."""
        make = plugins.import_own(self.name, nn.Module, "network", list(BUILTIN_NETWORKS))
        try:
            made = make(**self.arguments)
        except Exception as error:  # whatever the user's code raises
            raise UserError(
                f"network {self.name!r} cannot be made: {plugins.failure(error)}; see its arguments"
            ) from error
        if not isinstance(made, nn.Module):
            raise UserError(
                f"network {self.name!r} makes {a_or_an(type(made).__name__)}; it must make an nn.Module"
            )
        return made

    def _check_logits(
        self, network: nn.Module, shape: tuple[int, int, int], num_classes: int, timed: bool
    ) -> None:
        """With two images: some layers, batch normalisation above all, do not take one."""
        time = (torch.zeros(2),) if timed else ()
        training = network.training
        try:
            with torch.no_grad():
                logits: Any = network.eval()(torch.zeros(2, *shape), *time)
        except Exception as error:  # whatever a network raises for images that it is not made for
            raise UserError(
                f"network {self.name!r} does not take images of {'x'.join(map(str, shape))}"
                f"{' with a time' * timed} ({reason(error)}); see its arguments"
            ) from error
        network.train(training)
        if getattr(logits, "shape", None) != (2, num_classes):
            what = f"gives {logits.shape[1]} logits" if getattr(logits, "ndim", 0) == 2 else "gives no logits"
            raise UserError(
                f"network {self.name!r} {what} and there are {num_classes} classes; see its arguments"
            )


# folders


class SavedClassifier(Strict):
    """The part of a classifier's diffkd.json that is needed to open it."""

    network: Network = Field(description="as a config names it")
    shape: tuple[Side, Side, Side] = Field(description="(C, H, W) of an image")
    num_classes: int = Field(ge=1, le=pipeline_files.MAX_NUMBER, description="K")
    schedule: dict[str, Any] | None = Field(
        description="of a noise-conditional one, as a diffusers scheduler has it"
    )


def save(classifier: Classifier, network: Network, folder: Path, **card: Any) -> None:
    """Writes model.safetensors, diffkd.json and README.md into an existing folder. card: more to record."""
    state = {key: value.contiguous() for key, value in classifier.network.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    model_card.write(folder, {
        "kind": "classifier",
        "network": network.model_dump(mode="json"),
        "shape": classifier.shape,
        "num_classes": classifier.num_classes,
        "schedule": None if classifier.schedule is None else dict(classifier.schedule.betas),
        "parameters": sum(p.numel() for p in classifier.network.parameters()),
        **card,
    })  # fmt: skip


def load(
    folder: str | Path, network: nn.Module | None = None, *, device: str | torch.device = "cpu"
) -> Classifier:
    """A classifier that `diffkd distill` saved, in eval mode.

    network: the module that takes the weights, needed where it is the user's own: a name in a folder imports
    nothing. Raises UserError for an incomplete folder, or weights that do not fit.
    """
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise UserError(
            f"{folder} is not a classifier's folder: it has no {CARD}; give the folder that has it"
        )
    content = pipeline_files.read_object(folder / CARD)
    if content.get("kind") != "classifier":
        raise UserError(f"{folder / CARD} does not describe a classifier; give the folder of one")
    fields = {key: content[key] for key in SavedClassifier.model_fields if key in content}
    try:
        saved = SavedClassifier.model_validate(fields)
    except ValidationError as error:
        raise UserError(validation_message(error, SavedClassifier, f"of {folder / CARD}:")) from error
    if network is None:
        network = _empty_network(saved, folder)
    _load_weights(network, folder / WEIGHTS)
    schedule = None if saved.schedule is None else _schedule(saved.schedule, folder)
    classifier = Classifier(network, saved.num_classes, shape=saved.shape, schedule=schedule)
    return classifier.to(device).eval()


def _empty_network(saved: SavedClassifier, folder: Path) -> nn.Module:
    """Made without memory first: a folder may ask for a network much larger than its weights are."""
    if not saved.network.builtin:
        raise UserError(
            f"{folder} needs the network {quoted(saved.network.name)}, code that a folder is not allowed to "
            "run; if it is yours, pass the module that takes its weights"
        )
    arguments = saved.network.parsed(f"{folder / CARD}: arguments")
    with torch.device("meta"):
        network = arguments.build(saved.shape[0], saved.num_classes, timed=saved.schedule is not None)
    sizes = sum(count for _, count in pipeline_files.tensor_sizes(folder / WEIGHTS))
    needed = sum(p.numel() for p in network.parameters())
    if needed != sizes:
        raise UserError(
            f"{folder}: {CARD} asks for {needed:,} parameters and the weights are {sizes:,}; is it complete?"
        )
    return network.to_empty(device="cpu")


def _load_weights(network: nn.Module, path: Path) -> None:
    try:
        network.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the weights in {path} cannot be loaded ({reason(error)}); are they this network's?"
        ) from error
    if not all(bool(p.isfinite().all()) for p in network.parameters()):
        raise UserError(f"the weights in {path} are not all finite numbers; train them again")


def _schedule(config: Mapping[str, Any], folder: Path) -> BetaSchedule:
    validation.check_scheduler(config, str(folder))
    try:
        return from_betas(DDIMScheduler.from_config(dict(config)))
    except Exception as error:  # whatever diffusers raises for nonsensical values
        raise UserError(f"{folder / CARD} has a schedule that cannot be built ({reason(error)})") from error
