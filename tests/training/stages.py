"""One stage on random images, for tests of the trainer."""

import json

import torch
from accelerate import Accelerator
from torch import nn

from diffkd.core.schedules import Schedule
from diffkd.methods.progressive import Progressive
from diffkd.models import students
from diffkd.training.config import Training
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage
from tests.methods.conformance import images
from tests.tiny import student

COSINE = Schedule.cosine(64)


def run_one(
    folder,
    *,
    updates=12,
    training=None,
    method=None,
    stop_at=None,
    seed=0,
    learning_rate=1e-3,
    accelerator=None,
):
    """Trains one stage on random images; returns the student, the teacher and the log."""
    method = method or Progressive(steps=[4], updates=updates, learning_rate=learning_rate)
    training = training or Training(batch_size=8, log_every=1, checkpoint_every=5)
    teacher = student(3, "v_prediction", COSINE)
    pupil = students.copy_of(teacher)
    run = RunFolder(folder, {"seed": seed})
    done = []
    try:
        run_stage(
            accelerator or Accelerator(),
            method,
            method.stages(teacher)[0],
            {
                "student": pupil,
                "teacher": teacher.requires_grad_(False),
                **method.networks(teacher, pupil),
            },
            images(),
            training,
            run,
            seed=seed,
            stage_index=0,
            on_update=lambda n, record: done.append(n),
            should_stop=lambda: (done[-1] if done else 0) + 1 == stop_at,
        )
    finally:
        run.close()
    return pupil, teacher, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(denoiser):
    return torch.cat([p.detach().flatten() for p in denoiser.network.parameters()])


def untimed(records):
    measured = ("images_per_second", "cpu_seconds_per_update", "peak_memory_gb")
    return [{key: value for key, value in record.items() if key not in measured} for record in records]


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
