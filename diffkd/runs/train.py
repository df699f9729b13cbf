"""`diffkd train`: a teacher from images."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from diffkd.core.denoiser import Denoiser
from diffkd.core.denoiser import call as plain
from diffkd.core.noise import derived_seed
from diffkd.core.schedules import EDMSchedule, Preconditioned
from diffkd.data.images import Images
from diffkd.models import loading
from diffkd.runs import announcement
from diffkd.runs.artifacts import RunArtifacts
from diffkd.runs.config import Train
from diffkd.runs.session import ResumeOptions, open_run
from diffkd.training import launch


def train(config: Train, console: Console, options: ResumeOptions = ResumeOptions()) -> Path:
    """Trains a teacher, or resumes its training; the folder of its pipeline."""
    images = config.data.load()
    accelerator = launch.make_accelerator(config.training)
    untrained = untrained_teacher(config, images)
    method, folder = config.denoising, config.out / "teacher"
    with open_run(config, accelerator, images, console, options) as session:
        artifacts = RunArtifacts(session, config, images)
        session.say(announcement.data(images))
        session.say(announcement.teacher(untrained, str(folder), images))
        artifacts.announce_measuring(untrained)
        stage = method.stages(untrained)[0]
        if folder.exists():
            session.update += stage.updates
        else:
            denoiser = untrained.to(accelerator.device).train()
            session.run_stage(method, stage, {"student": denoiser}, images, 0)
            artifacts.export(
                denoiser.eval(), folder, data=images.name, classes=images.classes,
                class_counts=images.class_counts,
            )  # fmt: skip
        denoiser = loading.load(folder, device=accelerator.device)
        steps = artifacts.teacher_steps(denoiser)
        for count in steps:
            artifacts.measure("teacher", "teacher", denoiser, count, folder)
        artifacts.preview(f"teacher-{max(steps)}-steps", denoiser, max(steps))
        artifacts.finish()
    return folder


def untrained_teacher(config: Train, images: Images) -> Denoiser:
    """A newly initialised teacher, the same for the same seed."""
    conditional = config.classes and images.num_classes is not None
    classes = images.num_classes if conditional else None
    null_label = classes if classes is not None and config.denoising.label_dropout > 0 else None
    total = None if classes is None else classes + (null_label is not None)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(config.seed))
        network = config.model.build(images.shape, total)
    schedule = config.schedule.build()
    made = Denoiser(
        network, schedule, config.prediction, num_classes=classes, null_label=null_label,
        call=Preconditioned(schedule) if isinstance(schedule, EDMSchedule) else plain,
    )  # fmt: skip
    made.label_dropout = None if classes is None else config.denoising.label_dropout
    return made
