"""What is compared: the configs of a folder, all on its data and of its teacher, each with several seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffkd.core.denoiser import Denoiser
from diffkd.errors import UserError
from diffkd.io.strict_yaml import read_yaml
from diffkd.methods.base import Stage
from diffkd.runs import config_files, plans
from diffkd.runs.config import Distill, Teacher, Train
from diffkd.training.run_files import check_config

ROOT = Path(__file__).resolve().parents[2]
DIFFKD = (sys.executable, "-m", "diffkd.cli")
TRIAL_UPDATES, TRIAL_IMAGES = 3, 200  # of a stage, and of a measurement, where only the path is tried


@dataclass(frozen=True)
class Features:
    """A feature network. name: as `diffkd evaluate --features` takes it. weights: what the file of that name
    writes when it is run; None for a network that ships."""

    title: str
    name: str
    weights: Path | None = None


@dataclass(frozen=True)
class Comparison:
    """folder: of the configs, one a method, with the teacher's. guidance: that the methods bake in. features:
    the reported ones, then those that the settings were chosen by. make: the command that makes the data.
    overrides: of the teacher's config."""

    folder: Path
    methods: tuple[str, ...]
    features: tuple[Features, ...]
    guidance: float
    make: tuple[str, ...] = ()
    teacher_steps: tuple[int, ...] = (64, 32, 16, 8, 4, 2, 1)
    overrides: tuple[str, ...] = ()

    @cached_property
    def training(self) -> Train:
        """Of the teacher."""
        return config_files.load(self.folder / "teacher.yaml", Train, self.overrides)

    @property
    def teacher(self) -> Path:
        return self.training.out / "teacher"

    def prepare(self) -> None:
        """Makes what is missing of data, feature networks and teacher. Raises CalledProcessError."""
        if self.make and not Path(self.make[-1]).exists():
            subprocess.run([sys.executable, *self.make], check=True)
        for one in self.features:
            if one.weights is not None and not one.weights.exists():
                subprocess.run([sys.executable, one.name], check=True)
        if not self.teacher.exists():
            subprocess.run([*DIFFKD, "train", self.folder / "teacher.yaml", *self.overrides], check=True)

    def runs(self, methods: Sequence[str], seeds: Sequence[int], out: Path, *, trial: bool) -> list[Run]:
        """Seed by seed, so that a table is whole as early as it can be. Raises UserError for a method without
        a config."""
        for method in methods:
            if not self.config_of(method).exists():
                raise UserError(f"{self.config_of(method)} does not exist; leave out the method {method}")
        return [Run(self, method, seed, out, trial) for seed in seeds for method in methods]

    def tried(self, out: Path) -> Comparison:
        """The same with a teacher of a few updates, where only the path is tried."""
        brief = {"out": str(out / "teacher"), "denoising.updates": TRIAL_UPDATES, "evaluation": None}
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in brief.items())
        return replace(self, teacher_steps=(8, 1), overrides=overrides)

    def config_of(self, method: str) -> Path:
        return self.folder / f"{method}.yaml"


DIGITS = Comparison(
    ROOT / "configs/digits",
    (
        "progressive", "consistency", "scm", "tcm", "lcm", "meanflow", "shortcut", "imm", "dmd2", "f_distill",
        "sid", "adversarial", "reflow", "regression", "best",
    ),
    (
        Features("digits", "digits"),
        Features(
            "second", str(ROOT / "scripts/second_features.py"), ROOT / "runs/second_features.safetensors"
        ),
    ),
    guidance=1.1,
)  # fmt: skip
COLOUR = Comparison(
    ROOT / "configs/colour",
    ("progressive", "consistency", "dmd2", "meanflow", "best"),
    (
        Features(
            "shapes", str(ROOT / "scripts/shapes_features.py"), ROOT / "runs/shapes_features.safetensors"
        ),
    ),
    guidance=1.0,
    make=(str(ROOT / "scripts/shapes_folder.py"), "data/shapes-32"),
)
COMPARISONS = {"digits": DIGITS, "colour": COLOUR}


@dataclass(frozen=True)
class Run:
    """One training: a method with a seed. trial: of a few updates."""

    comparison: Comparison
    method: str
    seed: int
    out: Path
    trial: bool

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def overrides(self) -> list[str]:
        """Measuring is not part of the run: it is neither to be paid for nor done with one network alone."""
        given = {
            "out": str(self.folder), "seed": self.seed, "pictures": 0, "evaluation": None,
            "teacher": {"path": str(self.comparison.teacher.resolve())},
        }  # fmt: skip
        if self.trial:
            given["method"] = shortened(read_yaml(self.comparison.config_of(self.method))["method"])
        return [f"{key}={json.dumps(value)}" for key, value in given.items()]

    @property
    def command(self) -> list[str]:
        return [*DIFFKD, "distill", str(self.comparison.config_of(self.method)), *self.overrides]

    @cached_property
    def config(self) -> Distill:
        return config_files.load(self.comparison.config_of(self.method), Distill, self.overrides)

    def plan(self, teacher: Denoiser) -> plans.Plan:
        return plans.plan(self.config, teacher)

    def finished(self, students: Sequence[Stage]) -> bool:
        """Raises UserError where the folder holds a run of other settings."""
        check_config(self.folder, config_files.resolved(self.config), None)
        return all((self.folder / "students" / one.name).exists() for one in students)


def opened(comparison: Comparison) -> Denoiser:
    return Teacher(path=str(comparison.teacher)).load()


def students_of(plan: plans.Plan) -> list[Stage]:
    """Stage by stage, those of most steps first."""
    return [
        one
        for _, stage in plan
        for one in sorted(stage.students, key=lambda one: one.steps or 0, reverse=True)
    ]


def shortened(method: Any) -> Any:
    """A config's method, or list of methods, with few updates and pairs."""
    if isinstance(method, list):
        return [shortened(one) for one in method]
    fewer = {key: TRIAL_UPDATES for key in ("updates", "distilling") if key in method}
    if isinstance(method.get("updates"), list):
        fewer["updates"] = [TRIAL_UPDATES] * len(method["updates"])
    return {**method, **fewer, **({"pairs": 256} if "pairs" in method else {})}
