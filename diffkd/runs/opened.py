"""The models of a distillation as it opens them: its teacher, and the students that it has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffkd.core.denoiser import Denoiser
from diffkd.data.latents import Conditions
from diffkd.models import loading, lora_files, students
from diffkd.models.students import lora
from diffkd.models.students.config import Lora
from diffkd.runs import latents
from diffkd.runs.config import Distill, Teacher


class Opened:
    """Opens models for one run, on its device and at the size of its data.

    Where students are adapters, all share the teacher's weights, which are in memory once. They are read
    again after a stage in half precision, for which they were rounded. One that is saved merged is a base of
    its own, from which the stages behind it go on.
    """

    def __init__(
        self, config: Distill, source: Teacher, cached: Conditions | None, device: torch.device
    ) -> None:
        self.source, self.cached, self.device = source, cached, device
        self.students = (config.out / "students").absolute()
        self.lora = config.student if isinstance(config.student, Lora) else None
        self._base: Denoiser | None = None

    def begin(self, teacher: Denoiser) -> Denoiser:
        """The teacher, which was opened before: made ready for this run."""
        teacher = self._ready(teacher)
        if self.lora is not None:
            self._base = teacher
        return teacher

    def _ready(self, whole: Denoiser) -> Denoiser:
        """Where students are adapters, the base of those that are made of it."""
        whole = latents.fit(whole.to(self.device), self.cached)
        if self.lora is not None:
            self.lora.mark(whole)
        return whole

    def teacher(self) -> Denoiser:
        if self._base is not None and self._base.dtype == torch.float32:
            return self._base
        self._base = None  # before another is read
        return self.begin(self.source.load(self.device))

    def student(self, folder: Path) -> Denoiser:
        """One that was made before, with its adapter, if it has one, beside the weights that it shares."""
        said = loading.card(folder).get("lora")
        if self.lora is None or said is None:
            return self._ready(loading.load(folder, device=self.device))
        settings, base = loading.load(folder), self._base_at(said["base"])
        assert base.adapter is not None
        weights = lora_files.read(folder, settings.network, base.adapter.rank)
        network = lora.with_weights(base.network, base.adapter, weights)
        made = students.with_network(settings, network.train(settings.network.training))
        made.name, made.adapter = settings.name, base.adapter
        return latents.fit(made, self.cached)

    def _base_at(self, place: str) -> Denoiser:
        """What adapters of this base share: a student of this run that is saved merged, or the teacher."""
        if Path(place).absolute().parent == self.students:
            return self._ready(loading.load(place))
        return self.teacher()

    def as_exported(self, student: Denoiser) -> Denoiser:
        """A trained student with its adapter on weights that no training has rounded."""
        if student.adapter is None:
            return student
        network: Any = student.network
        base = self._base_at(student.adapter.base)
        made = lora.rebased(network, base.network, student.adapter)
        return students.with_network(student, made.train(network.training))
