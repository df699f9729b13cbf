"""What a run knows of its classifiers: measured, kept, told."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from diffkd.core.classifier import Classifier
from diffkd.core.noise import add_noise
from diffkd.data.images import Images
from diffkd.io.files import append_json, new_file, read_json
from diffkd.models import sizes
from diffkd.models.loading import card
from diffkd.runs.classification import report
from diffkd.runs.classification.config import Classify
from diffkd.runs.reports import tables
from diffkd.runs.session import Session

Record = dict[str, Any]
BATCH = 256
WARM, CALLS = 20, 100  # of a latency: calls before it is taken, and calls whose median it is


class ClassifierArtifacts:
    """What is done with a run's classifiers."""

    def __init__(self, session: Session, settings: Classify, held_out: Images) -> None:
        self.session, self.settings, self.held_out = session, settings, held_out
        self.main = session.accelerator.is_main_process
        self.place = session.run.folder / "metrics.json"

    def measured(self, classifier: Classifier) -> Record:
        """Accuracy over the images held out, size, and milliseconds of one image alone."""
        right = correct(classifier, self.held_out)
        x = torch.zeros(1, *self.held_out.shape, device=classifier.device, dtype=classifier.dtype)
        given = (x,) if classifier.schedule is None else (x, torch.zeros(1, device=x.device))
        size = sizes.network_size(classifier.network, *given)
        return {
            "accuracy": right / len(self.held_out), "correct": right, "held_out": len(self.held_out),
            "parameters": size.parameters, "macs": size.macs, "bytes": size.bytes,
            "milliseconds": round(latency(classifier.network, *given), 4),
        }  # fmt: skip

    def add_saved(self, folder: Path) -> None:
        """The record that an exported classifier has in its card into metrics.json, where it is not yet."""
        if self.main:
            self._append(card(folder)["record"])

    def add(self, record: Record, classifier: Classifier) -> None:
        """The same for one that another run made."""
        if self.main and record["name"] not in {known["name"] for known in self.records()}:
            self._append({**record, **self.measured(classifier.to(self.session.accelerator.device))})

    def _append(self, record: Record) -> None:
        if record["name"] in {known["name"] for known in self.records()}:
            return
        append_json(self.place, record)
        self.session.say(f"{record['name']}: {100 * record['accuracy']:.2f}%")

    def records(self) -> list[Record]:
        found: list[Record] = read_json(self.place, [])
        return found

    def finish(self) -> None:
        """The table, the learning curve, the page, and what there is to see."""
        if not self.main:
            return
        records, folder = self.records(), self.session.run.folder
        rows = report.table_rows(self.settings, records)
        note = self._note()
        tables.show(self.session.console, report.TITLES, rows)
        self.session.say(note)
        with new_file(folder / "classifier.md") as temporary:
            temporary.write_text(report.markdown(rows, note), encoding="utf-8")
        self.session.say(f"table:  {folder / 'classifier.md'}")
        try:
            if self.settings.sweep is not None:
                report.write_png(folder / "sweep.png", self.settings, records)
                self.session.say(f"sweep:  {folder / 'sweep.png'}")
            report.write_page(folder, self.settings, records, rows, note)
            self.session.say(f"report: {folder / 'report.html'}")
        except ImportError:
            self.session.say("no pictures and no report: they need matplotlib (pip install 'diffkd[report]')")

    def _note(self) -> str:
        settings = self.settings
        seeds = f"{settings.repeats} seed{'s' * (settings.repeats > 1)}"
        few = "all" if settings.labelled is None else f"{settings.labelled:,}"
        noisy = " at the lowest noise of the schedule" * settings.noisy
        return (
            f"Accuracy on {len(self.held_out):,} images held out{noisy}, mean and standard deviation over "
            f"{seeds}; students have {few} labels. Milliseconds are of one image at a time on "
            f"{self.session.accelerator.device.type}."
        )


@torch.no_grad()
def correct(classifier: Classifier, images: Images) -> int:
    """How many images are put into their class; of a noise-conditional one at its first time step."""
    assert images.labels is not None
    rng = torch.Generator().manual_seed(0)
    right = 0
    for start in range(0, len(images), BATCH):
        part = slice(start, start + BATCH)
        x = (images.uint8(part).float() / 127.5 - 1).to(classifier.device)
        if classifier.schedule is None:
            logits = classifier(x)
        else:
            first = 1 / classifier.schedule.num_train_timesteps
            t = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
            logits = classifier(add_noise(classifier.schedule, x, t, rng), t)
        right += int((logits.argmax(1).cpu() == images.labels[part]).sum())
    return right


@torch.no_grad()
def latency(network: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """Milliseconds of one call, the median of many after a warm-up."""
    found = []
    for _ in range(WARM + CALLS):
        started = time.perf_counter()
        network(*inputs)
        if inputs[0].device.type == "cuda":
            torch.cuda.synchronize(inputs[0].device)
        found.append(1000 * (time.perf_counter() - started))
    return statistics.median(found[WARM:])
