"""What a run says of itself: what it read, what it ignores, what it measures, how long it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkd.core.schedules import Schedule
from diffkd.data.images import Images
from diffkd.io import progress
from diffkd.methods.base import Stage
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.models import loading
from diffkd.runs import announcement
from diffkd.runs.forecast import Forecast
from tests import tiny

NUMBERS = [str(n) for n in (0, 1, 10, 11, *range(2, 10))]  # as names are sorted


def images(classes=(), channels=3):
    labels = torch.arange(24) % len(classes) if classes else None
    pixels = np.zeros((24, channels, 16, 8), np.uint8)
    return Images("images", pixels, labels, list(classes))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (images(NUMBERS), "data: 24 images of 8x16, RGB (images); 12 classes: 0, 1, 10, 11, 2, 3, 4, 5, 6, "
                          "7, 8, 9 (data.class_order: number sorts them as numbers)"),
        (images(sorted(NUMBERS, key=int)), "classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"),
        (images(["cat"], 1), "data: 24 images of 8x16, grey (images); 1 class: cat"),
        (images([f"{n:03}" for n in range(20)]), "012, 013, 014, ..., 019"),
        (images(["a\x1b[31m", "b"]), "2 classes: a\\x1b[31m, b"),
        (images(), "(images); no classes"),
    ],
)  # fmt: skip
def test_data(given, said):
    assert announcement.data(given).endswith(said)


def test_a_teacher_that_ignores_the_labels(tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path, prediction="epsilon", scheduler="linear", pipeline="DDPMPipeline")
    denoiser = loading.load(folder)
    said = announcement.teacher(denoiser, str(folder), images(["a", "b"]))
    assert said.startswith(f"teacher: {folder}, a DDPMPipeline with DDPMScheduler, 0.0")
    assert said.endswith(
        "predicts epsilon, T = 1000, drawn by ddim, unconditional; the data's labels are ignored"
    )
    assert announcement.teacher(denoiser, str(folder), images()).endswith("unconditional")


def test_a_teacher_without_an_index_and_with_classes():
    denoiser = tiny.student(10, "v_prediction", Schedule.cosine(1024), steps=None)
    said = announcement.teacher(denoiser, "some/where", images())
    assert said.startswith("teacher: some/where, 0.0") and said.endswith("drawn by ddim, 10 classes")


def test_students():
    stages = [("progressive", Stage("4-steps", 1000, 1e-3)), ("output", Stage("output", 20, 1e-3))]
    assert announcement.students(stages) == (
        "students: 4-steps (progressive, 1,000), output (output, 20); 1,020 updates in all"
    )


def test_what_is_measured():
    def said(evaluation, students=False):
        return announcement.measured(evaluation, [100], 24, students=students)

    assert said(Evaluation(samples=5000, metrics=["fid", "kid"]), students=True) == (
        "measured: fid, kid by digits features, 5,000 images of each: the teacher at 100 steps, each "
        "student at its own steps"
    )
    assert said(Evaluation()).endswith(", 24 images of each: the teacher at 100 steps")
    assert "as many images of each as the reference has" in said(Evaluation(reference="digits"))
    assert said(None, students=True) == "measured: nothing (evaluation: null)"


def forecast(monkeypatch, seconds, later, measuring):
    """What is said over a stage of 1,000 updates, one each so many seconds."""
    now, said = [0.0], []
    monkeypatch.setattr(progress, "clock", lambda: now[0])
    told, pace = Forecast(said.append), progress.Pace()
    told.later, told.measuring = later, measuring
    for update in range(501, 1001):  # resumed at 500
        pace.reached(update)
        told.say(pace, 1000)
        now[0] += seconds
    return said


def test_how_long_it_takes_is_said_once(monkeypatch):
    assert forecast(monkeypatch, 0.5, 4539, 90.0) == [
        "about 42 min for the 4,998 updates that are left, at the rate so far (2 a second), and 2 min for "
        "measuring"
    ]
    assert forecast(monkeypatch, 60, None, None) == [
        "about 8 h 18 min for the 498 updates of this stage that are left, at the rate so far (0.017 a "
        "second)"
    ]


def test_what_is_over_soon_needs_no_forecast(monkeypatch):
    assert forecast(monkeypatch, 0.01, 0, None) == []


def test_models_of_prompts_and_their_data():
    captions = ["a star", "a star", "a ring"]
    three = Images("three", np.zeros((3, 3, 8, 8), np.uint8), captions=captions)
    assert announcement.data(three) == "data: 3 images of 8x8, RGB (three); 2 different captions"
    denoiser = tiny.student(None, "v_prediction", Schedule.cosine(64), steps=None)
    denoiser.conditioner, denoiser.guidance_range = object(), (1.0, 14.0)
    said = announcement.teacher(denoiser, "painter", three)
    assert said.endswith("drawn by ddim, takes guidance from 1 to 14, draws from prompts")
