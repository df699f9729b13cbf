"""Images that a diffusers pipeline draws by its own code and scheduler, as a stream to be measured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffkd.core.digest import digest
from diffkd.errors import UserError
from diffkd.generation.stock import generate_stock, scalars, stock_defaults
from diffkd.io.naming import called, in_config
from diffkd.io.places import expanded
from diffkd.io.text import a_or_an, log
from diffkd.metrics.base import Labelled
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_sources import subset
from diffkd.metrics.evaluation.image_stream import (
    ImageStream,
    Numbered,
    brought_to,
    class_names,
    default_count,
    numbered,
)
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.features import STANDARD_SAMPLES
from diffkd.models import loading

NO_CLASS = 1000  # the label that a DiTPipeline guides with, whatever its network's classes


def stock_option() -> str:
    """How the user at hand asks for a pipeline's own code."""
    return "stock: true" if in_config() else f"{called('evaluation.sampler')} stock"


class StockPipeline:
    """A pipeline as diffusers opens it. Its card, where diffkd saved it, knows its steps and classes."""

    def __init__(
        self, path: str, null_label: int | None, device: torch.device, variant: str | None = None
    ) -> None:
        self.path, self.null_label, self.variant = path, null_label, variant
        self.pipeline = loading.open_stock(path, variant).to(device)
        self.network = getattr(self.pipeline, "unet", None) or getattr(self.pipeline, "transformer", None)
        self.card = loading.card(expanded(path))

    @property
    def steps(self) -> int | None:
        steps: int | None = self.card.get("steps")
        return steps

    @property
    def size(self) -> dict[str, int]:
        if self.network is None:
            return {}
        return {"parameters": sum(p.numel() for p in self.network.parameters())}

    def identity(self, path: str) -> dict[str, Any]:
        """What a protocol says of it. path: to be found from anywhere."""
        where: dict[str, Any] = {"kind": "stock", "path": path}
        if self.network is not None:
            where["sha256"] = digest(self.network.state_dict())
        if self.null_label is not None:
            where["null_label"] = self.null_label
        if self.variant is not None:
            where["variant"] = self.variant
        return where

    def stream(self, config: Evaluation, reference: Reference, steps: int | None) -> ImageStream:
        """The images of so many steps, None for the pipeline's own default."""
        if not 0 <= config.seed < 2**63 - STANDARD_SAMPLES:
            raise UserError(f"seed {config.seed} is out of range; use 0 to {2**63 - STANDARD_SAMPLES - 1}")
        if steps and self.steps not in (None, steps):
            log.warning("%s was made for %d steps, and is drawn in %d", self.path, self.steps, steps)
        pipeline, count = self.pipeline, default_count(config, reference)
        call = {**self.card.get("call", {})}
        arguments = stock_defaults(pipeline) | call
        self._check_guided(arguments)
        said, labels = self._labels(config, reference, count)

        def drawn(rank: int, world: int) -> Numbered:
            images = generate_stock(
                pipeline, count, steps=steps, seed=config.seed, labels=labels, batch_size=config.batch_size,
                share=(rank, world), call=call,
            )  # fmt: skip
            return numbered(images, config.batch_size, rank, world)

        settings = scalars(dict(pipeline.scheduler.config))
        return ImageStream(count, brought_to(drawn, config.image_size), {
            **({"steps": steps} if steps else {}), "sampler": "stock",
            "scheduler": {"name": type(pipeline.scheduler).__name__, **settings},
            "pipeline": {"name": type(pipeline).__name__, **arguments},
            "labels": said, "seed": config.seed, "dtype": str(pipeline.dtype).removeprefix("torch."),
        }, labels=None if labels is None else Labelled(labels, class_names(self.card)))  # fmt: skip

    def _check_guided(self, arguments: Mapping[str, Any]) -> None:
        """Raises UserError for a DiTPipeline that guides a network of other classes than ImageNet's."""
        classes = getattr(self.network, "config", {}).get("num_embeds_ada_norm", NO_CLASS)
        if classes != NO_CLASS and arguments.get("guidance_scale", 1) > 1:
            raise UserError(
                f"{self.path} has {classes} classes, and {a_or_an(type(self.pipeline).__name__)} guides with "
                f"label {NO_CLASS} as no class; leave out {stock_option()}"
            )

    def _labels(self, config: Evaluation, reference: Reference, count: int) -> tuple[Any, Tensor | None]:
        """(what the protocol says of the labels, (count,)); None for a network without classes."""
        network_config = getattr(self.network, "config", {})
        total = network_config.get("num_class_embeds") or network_config.get("num_embeds_ada_norm")
        null = self.card.get("null_label", self.null_label)
        classes = self.card.get("num_classes") or (total - 1 if total and null == total - 1 else total)
        if not classes:
            if isinstance(config.labels, list):
                raise UserError("class labels were given, and this model is unconditional; leave them out")
            return None, None
        if "class_labels" not in inspect.signature(self.pipeline.__call__).parameters:
            raise UserError(
                f"{self.path} has {classes} classes, and {a_or_an(type(self.pipeline).__name__)} takes no "
                f"class labels; leave out {stock_option()}"
            )
        said: Any = config.labels
        names = class_names(self.card)
        if isinstance(config.labels, list):
            every = torch.tensor(config.labels)[torch.arange(count) % len(config.labels)]
        elif config.labels == "data" and (known := reference.labels_of(names)) is not None:
            every = known[subset(len(known), count)]
        else:
            said, every = "balanced", torch.arange(count) % classes
        if not 0 <= int(every.min()) <= int(every.max()) < classes:
            wrong = int(every.min()) if int(every.min()) < 0 else int(every.max())
            raise UserError(f"class label {wrong} is out of range; this model has labels 0 to {classes - 1}")
        return said, every
