"""`diffkd.distill`: the run of `diffkd distill` from Python, and what it made."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_origin

import torch
from rich.console import Console

from diffkd import methods
from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io import naming
from diffkd.io.files import read_records
from diffkd.io.places import check_writable, expanded
from diffkd.io.processes import on_device
from diffkd.io.text import from_json, quoted
from diffkd.metrics.evaluation.image_sets import SETS
from diffkd.metrics.evaluation.targets import is_model
from diffkd.models import loading
from diffkd.runs import config_files
from diffkd.runs import distill as job
from diffkd.runs.callbacks import Given
from diffkd.runs.session import ResumeOptions, identity
from diffkd.training.run_files import LOG, RECORDS


@dataclass(frozen=True)
class Distilled:
    """A run folder of `diffkd distill`, and the students in it.

    students: their folders by number of steps; of several with as many, the one that was made last.
    """

    folder: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was measured of teacher and students, as metrics.json has it: model, steps, fid, protocol."""
        return [record for record in read_records(self.folder / RECORDS) if isinstance(record, dict)]

    @cached_property
    def models(self) -> dict[str, Path]:
        """The folders of all students by name, such as 4-steps or 4-steps-dmd2, in the order of stages."""
        cards = {path: loading.card(path) for path in (self.folder / "students").glob("*") if path.is_dir()}
        stages = self._stages()
        order = {path: stages.get(str(card.get("stage")), -1) for path, card in cards.items()}
        steps = {path: card.get("steps") or 0 for path, card in cards.items()}
        return {path.name: path for path in sorted(cards, key=lambda path: (order[path], -steps[path]))}

    @cached_property
    def students(self) -> dict[int, Path]:
        found = {loading.card(path).get("steps"): path for path in self.models.values()}
        return {steps: found[steps] for steps in sorted(filter(None, found), reverse=True)}

    def load(
        self,
        student: int | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Denoiser:
        """The student of that many steps, or of that name. Raises UserError where there is none."""
        found = self.students.get(student) if isinstance(student, int) else self.models.get(student)
        if found is None:
            there = self.students if isinstance(student, int) else self.models
            raise UserError(
                f"{self.folder} has no student {quoted(student)}; there are "
                f"{', '.join(map(str, there)) or 'none'}"
            )
        return loading.load(found, device=device, dtype=dtype)

    @property
    def best(self) -> Denoiser:
        """The student of the lowest FID. Raises UserError where none was measured."""
        measured = [record for record in self.records if record.get("model") in self.models]
        measured = [record for record in measured if isinstance(record.get("fid"), int | float)]
        if not measured:
            raise UserError(f"no student of {self.folder} was measured; load one by its number of steps")
        return self.load(str(min(measured, key=lambda record: record["fid"])["model"]))

    def _stages(self) -> dict[str, int]:
        """The place of each stage in the run, by its log."""
        path, found = self.folder / LOG, dict[str, int]()
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with suppress(ValueError, AttributeError):  # torn by a kill
                record = from_json(line)
                found[str(record.get("stage"))] = int(record.get("stage_index", -1))
        return found


def distill(
    teacher: str | Path | Denoiser | Mapping[str, Any],
    data: str | Path | Mapping[str, Any] | None,
    *,
    method: str | Mapping[str, Any] | Sequence[Mapping[str, Any]] = "progressive",
    steps: int | Sequence[int] | None = None,
    out: str | Path,
    seed: int = 0,
    callbacks: Sequence[Given] = (),
    device: torch.device | str | None = None,
    allow: bool = False,
    quiet: bool = False,
    **config: Any,
) -> Distilled:
    """Distils a diffusion model into students of fewer steps: what `diffkd distill` does with a config of
    these values. The same call resumes a run that was stopped, and the command does, too.

    teacher: a pipeline's folder or hub id, a Denoiser that `diffkd.load` read and nobody changed, or the
    config's mapping. data: "digits", "shapes", a folder of images or a data set of the hub (brought to the
    teacher's size), None for methods that need no images, or the config's mapping. method: a name, the
    mapping of its settings, or a list of these, which run one after another. steps: of the students, for one
    method. callbacks: objects of `diffkd.Callback`, or functions of (update, values). device: default
    accelerate's choice. allow: resume with a config that differs in logging, checkpoints or evaluation.
    quiet: nothing is printed. config: other keys of the config, such as training={"batch_size": 64}.

    Ctrl-C (a notebook's "interrupt") saves a checkpoint and raises diffkd.errors.Interrupted. Raises
    UserError where the command would end with exit status 2.

    >>> import diffkd
    >>> from diffkd.models.unet import UNet2D
    >>> network = UNet2D(channels=[8, 16], norm_groups=4, mid_attention=False).build((1, 8, 8), None)
    >>> teacher = diffkd.Denoiser(network, diffkd.schedules.Schedule.cosine(1024), "v_prediction")
    >>> diffkd.save(teacher, "teacher")
    >>> run = diffkd.distill(
    ...     "teacher", "digits", method={"name": "progressive", "updates": 2}, steps=[2, 1], out="run",
    ...     training={"batch_size": 8}, evaluation={"samples": 16, "teacher_steps": [2]}, quiet=True,
    ... )
    >>> sorted(run.students), [record["model"] for record in run.records]
    ([1, 2], ['teacher', '2-steps', '1-steps'])
    >>> next(diffkd.generate(run.load(1), 4)).shape
    torch.Size([4, 8, 8, 1])
    """
    given = {
        "out": out, "seed": seed, "teacher": _teacher(teacher), "data": _data(data, teacher),
        "method": _methods(method, steps), **config,
    }  # fmt: skip
    settings = config_files.distill_of(given)
    if device is not None and os.environ.get("RANK"):
        raise UserError(f"device {device} is for one process; the launcher gives each its own")
    with naming.spoken("config"), on_device(device):
        check_writable(settings.out, "out", folder=True)
        if isinstance(teacher, Denoiser):
            _check_unchanged(teacher, settings.teacher.load())
        job.distill(settings, Console(quiet=quiet), ResumeOptions(allow), callbacks)
    return Distilled(settings.out)


def _teacher(given: str | Path | Denoiser | Mapping[str, Any]) -> Mapping[str, Any]:
    """As a config has it."""
    if isinstance(given, Mapping):
        return given
    if not isinstance(given, Denoiser):
        return {"path": os.fspath(given)}
    if is_model(given.name):
        return {"path": given.name, **given.opened_with}
    raise UserError(
        f"the teacher is a Denoiser that lies in no folder ({given.name}); write it by diffkd.save(teacher, "
        "folder), and give the folder"
    )


def _check_unchanged(given: Denoiser, saved: Denoiser) -> None:
    """Raises UserError where a Denoiser is not what lies in its folder, which is what a run reads."""
    if identity(given) != identity(saved):
        raise UserError(
            f"the teacher is not what {given.name} holds: it was changed since it was read; write it by "
            "diffkd.save(teacher, folder), and give the folder"
        )


def _data(given: Any, teacher: Any) -> Mapping[str, Any]:
    """As a config has it. Images of files are brought to the size of the teacher's."""
    if given is None:
        return {"kind": "none"}
    if isinstance(given, Mapping):
        return given
    name = os.fspath(given)
    if name in SETS:
        return {"kind": name}
    kind = "folder" if os.path.isdir(expanded(name)) else "datasets"
    if kind == "datasets" and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(
            f"data {quoted(name)} is no folder; give one, {', '.join(SETS)}, a data set (owner/name), or a "
            "mapping as in a config"
        )
    as_mapping = f"give a mapping: {{'kind': {kind!r}, 'path': {name!r}, 'size': ...}}"
    if isinstance(teacher, Mapping):
        raise UserError(f"data {quoted(name)} and a teacher that is a mapping say no size; {as_mapping}")
    opened = teacher if isinstance(teacher, Denoiser) else loading.load(teacher)
    channels, height, width = opened.shape or (0, 0, 1)
    if height != width:
        raise UserError(f"data {quoted(name)} is to be of the teacher's size, not a square; {as_mapping}")
    codec = opened.codec
    if codec is not None:
        channels, height = codec.image_channels, height * codec.factor
    return {"kind": kind, "path": name, "size": height, "channels": channels}


def _methods(given: Any, steps: int | Sequence[int] | None) -> Any:
    """As a config has them. steps: of the one method, where it is given apart from its settings."""
    several = [given] if isinstance(given, str | Mapping) else list(given)
    several = [{"name": one} if isinstance(one, str) else one for one in several]
    if steps is None:
        return several
    if len(several) != 1 or not isinstance(several[0], Mapping) or "steps" in several[0]:
        raise UserError(
            f"steps {steps} is for one method; give each its own as {{'name': ..., 'steps': ...}}"
        )
    name = str(several[0].get("name", "progressive"))
    field = methods.find(name).model_fields.get("steps")
    if field is None:
        raise UserError(f"steps {steps} is for methods that end at a number of them; leave it out of {name}")
    if isinstance(steps, int) and get_origin(field.annotation) is list:
        steps = [steps]
    return [{**several[0], "steps": steps}]
