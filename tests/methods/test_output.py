"""Output matching: the loss of a student that is to predict something else than its teacher."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from diffkd.core.noise import generator_for
from diffkd.core.schedules import from_diffusers
from diffkd.methods.base import Batch, Step
from diffkd.methods.output import Output
from diffkd.models.students.copies import with_network
from tests.tiny import student

LINEAR = from_diffusers(DDPMScheduler())


def test_an_epsilon_teacher_is_matched_in_eps_by_a_student_that_predicts_v():
    teacher, pupil = (student(None, "epsilon", LINEAR, steps=None, seed=seed) for seed in (0, 1))
    method = Output(prediction="v_prediction")
    (stage,) = method.stages(teacher)
    assert (stage.steps, stage.drawn, stage.prediction) == (None, "ddim", "v_prediction")
    pupil = with_network(pupil, pupil.network, stage.prediction)
    x0 = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    nets, rng = {"teacher": teacher, "student": pupil}, generator_for((0, 0, 0), 0)
    (loss,) = method.losses(nets, Batch(x0, {}), Step(stage, 0), rng)

    rng = generator_for((0, 0, 0), 0)
    t = torch.randint(1, 1001, (6,), generator=rng).double() / 1000
    alpha, sigma = (c.reshape(-1, 1, 1, 1).float() for c in LINEAR.at(t))
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=rng)
    index = (1000 * t).round() - 1
    eps, v = teacher.network(x_t, index).sample, pupil.network(x_t, index).sample
    error = (sigma * x_t + alpha * v - eps).square().flatten(1).mean(1)  # eps of v, less the teacher's
    assert torch.allclose(loss.metrics["loss"], error, rtol=1e-3)
    assert loss.value.item() == pytest.approx(error.mean().item(), rel=1e-4)
