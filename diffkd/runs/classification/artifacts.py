"""Export and measure a run's classifiers."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from diffkd.core.classifier import Classifier
from diffkd.core.noise import add_noise
from diffkd.data.images import Images
from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models import sizes
from diffkd.models.loading import CARD, card
from diffkd.runs.classification import networks
from diffkd.runs.classification.config import DistillClassifier
from diffkd.runs.classification.networks import Network
from diffkd.runs.config_files import resolved
from diffkd.runs.session import Session
from diffkd.training.run_files import RECORDS

BATCH_SIZE = 256
WARM_UP_CALLS, TIMED_CALLS = 20, 100  # a latency is the median of the timed ones


ROLES = ("teacher", "labels", "distilled")
NUMBERS = ("accuracy", "parameters", "macs", "milliseconds")  # of a run's own records


class ClassifierArtifacts:
    """What a run of classifiers makes of each beside its weights. held_out: the images for its accuracy."""

    def __init__(self, session: Session, config: DistillClassifier, held_out: Images) -> None:
        self.session, self.config, self.held_out = session, config, held_out
        if session.main:
            session.run.check_records(ROLES, NUMBERS)

    def export(
        self, classifier: Classifier, network: Network, folder: Path, training: dict[str, Any]
    ) -> None:
        """The classifier's folder, whose card has its record. training: what the record says of that."""

        def write(place: Path) -> None:
            record = {**training, **self._measured(classifier)}
            self.session.say(_line(record))  # before it is written: a full disk does not lose it
            networks.save(
                classifier, network, place, classes=self.held_out.classes, data=self.held_out.name,
                record=record, config=resolved(self.config),
            )  # fmt: skip

        self.session.export(folder, write)

    def add(self, folder: Path) -> None:
        """Copies an exported classifier's record into metrics.json, once. Raises UserError where its card has
        lost it, or metrics.json has another one."""
        if not self.session.main:
            return
        record: Any = card(folder).get("record")
        named = ("name", "model", "role")
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in named):
            raise UserError(
                f"{folder / CARD} has lost the record of its accuracy; delete {folder}, and it is trained "
                "again"
            )
        known = self._known(record["name"])
        if known is None:
            self.session.add_record(record)
        elif known != record:
            raise UserError(
                f"{self.session.run.folder / RECORDS} and {folder / CARD} have different records of "
                f"{quoted(record['name'])}; remove the one in {RECORDS}"
            )

    def add_teacher(self, teacher: Classifier) -> None:
        """The same for the teacher that another run trained, which is measured here."""
        named = {"name": "teacher", "model": "teacher", "role": "teacher"}
        if self.session.main and self._known("teacher") is None:
            record = {**named, **self._measured(teacher.to(self.session.accelerator.device))}
            self.session.add_record(record, _line(record))

    def _known(self, name: str) -> dict[str, Any] | None:
        return next((record for record in self.session.records() if record.get("name") == name), None)

    def _measured(self, classifier: Classifier) -> dict[str, Any]:
        """Accuracy over the images held out, size, and milliseconds for one image alone."""
        correct = count_correct(classifier, self.held_out)
        x = torch.zeros(1, *self.held_out.shape, device=classifier.device, dtype=classifier.dtype)
        inputs = (x,) if classifier.schedule is None else (x, torch.zeros(1, device=x.device))
        size = sizes.network_size(classifier.network, *inputs)
        return {
            "accuracy": correct / len(self.held_out), "correct": correct, "held_out": len(self.held_out),
            **size.recorded(), "milliseconds": round(latency(classifier.network, *inputs), 4),
        }  # fmt: skip


def _line(record: dict[str, Any]) -> str:
    return f"{record['name']}: {100 * record['accuracy']:.2f}%"


@torch.no_grad()
def count_correct(classifier: Classifier, images: Images) -> int:
    """How many images are classified correctly; a noise-conditional one sees them at its first time step."""
    assert images.labels is not None
    rng = torch.Generator().manual_seed(0)
    correct = 0
    for start in range(0, len(images), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        x = (images.uint8(part).float() / 127.5 - 1).to(classifier.device)
        if classifier.schedule is None:
            logits = classifier(x)
        else:
            first = 1 / classifier.schedule.num_train_timesteps
            t = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
            logits = classifier(add_noise(classifier.schedule, x, t, rng), t)
        correct += int((logits.argmax(1).cpu() == images.labels[part]).sum())
    return correct


@torch.no_grad()
def latency(network: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """Milliseconds of one call, the median of many after a warm-up."""
    times = []
    for _ in range(WARM_UP_CALLS + TIMED_CALLS):
        started = time.perf_counter()
        network(*inputs)
        if inputs[0].device.type == "cuda":
            torch.cuda.synchronize(inputs[0].device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[WARM_UP_CALLS:])
