"""`diffkd train`: a teacher from images."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import derived_seed
from diffkd.data.images import Images
from diffkd.models import loading
from diffkd.runs import config, session
from diffkd.runs.artifacts import RunArtifacts
from diffkd.runs.session import NO_OPTIONS, ResumeOptions
from diffkd.training import launch


def train(settings: config.Train, console: Console, terms: ResumeOptions = NO_OPTIONS) -> Path:
    """Trains a teacher, or goes on where it stopped; the folder of its pipeline."""
    images = settings.data.load()
    accelerator = launch.make_accelerator(settings.training)
    fresh = untrained_teacher(settings, images)
    method, folder = settings.denoising, settings.out / "teacher"
    with session.open_run(settings, accelerator, images, console, terms) as job:
        results = RunArtifacts(job, settings, images)
        if not folder.exists():
            denoiser = fresh.to(accelerator.device).train()
            job.run_stage(method, method.stages(denoiser)[0], {"student": denoiser}, images, 0)
            results.export(
                denoiser.eval(), folder, data=images.name, classes=images.classes,
                class_counts=images.class_counts,
            )  # fmt: skip
        denoiser = loading.load(folder, device=accelerator.device)
        for steps in results.teacher_steps(denoiser):
            results.measure("teacher", "teacher", denoiser, steps, folder)
        steps = max(results.teacher_steps(denoiser))
        results.preview(f"teacher-{steps}-steps", denoiser, steps)
        results.finish()
    return folder


def untrained_teacher(settings: config.Train, images: Images) -> Denoiser:
    """A newly initialised teacher, the same for the same seed."""
    conditional = settings.classes and images.num_classes is not None
    classes = images.num_classes if conditional else None
    null_label = classes if classes is not None and settings.denoising.label_dropout > 0 else None
    total = None if classes is None else classes + (null_label is not None)
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(settings.seed))
        network = settings.model.build(images.shape, total)
    return Denoiser(
        network, settings.schedule.build(), settings.prediction, num_classes=classes, null_label=null_label
    )
