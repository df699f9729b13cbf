"""Guidance distillation: the loss by hand, a weight of each example, embedded as stock pipelines do."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffkd.core.denoiser import GUIDANCE, Denoiser
from diffkd.core.noise import generator_for
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.guidance import Guidance
from diffkd.methods.lcm import LCM
from diffkd.models import guidance_input
from tests.methods.conformance import nets_of
from tests.tiny import student

COSINE = Schedule.cosine(64)


class Labels(torch.nn.Module):
    """v = x + the label, and w times what it is told of it."""

    def forward(self, x, time, class_labels, guidance_scale=None):
        told = 0 if guidance_scale is None else guidance_scale.to(x)
        return x + (class_labels.to(x) + told).reshape(-1, 1, 1, 1)


def denoiser(**options):
    return Denoiser(Labels(), COSINE, "v_prediction", shape=(1, 2, 2), num_classes=3, null_label=3, **options)


def test_a_weight_of_each_example_guides_where_it_is_no_input():
    """v of the label c is x + c, of none x + 3: guided with w it is x + 3 + w (c - 3)."""
    x, t = torch.randn(3, 1, 2, 2).double(), torch.full((3,), 0.5).double()
    labels, weights = torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 5.0]).double()
    guided = denoiser().output(x, t, class_labels=labels, guidance_scale=weights)
    assert torch.allclose(guided, x + (3 + weights * (labels - 3)).reshape(-1, 1, 1, 1))
    for label, weight in zip(labels, weights, strict=True):  # as one weight for the batch
        same = denoiser().output(x, t, class_labels=label.expand(3), guidance=weight.item())
        expected = denoiser().output(x, t, class_labels=label.expand(3), guidance_scale=weight.expand(3))
        assert torch.allclose(same, expected)
    told = denoiser(guidance_range=(1, 5)).output(x, t, class_labels=labels, guidance_scale=weights)
    assert torch.allclose(told, x + (labels + weights).reshape(-1, 1, 1, 1))


def test_the_loss_by_hand():
    method = Guidance(range=(1, 5))
    nets = nets_of(method)
    (stage,) = method.stages(nets["teacher"])
    assert (stage.guidance_range, stage.steps, stage.guidance) == ((1, 5), 4, 1.0)
    x0 = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels, w = torch.arange(6) % 3, torch.linspace(1, 5, 6)
    batch = Batch(x0, {"class_labels": labels, GUIDANCE: w})
    (loss,) = method.losses(nets, batch, Step(stage, 0), generator_for((0, 0, 0), 0))
    rng = generator_for((0, 0, 0), 0)
    t = torch.randint(1, 5, (6,), generator=rng).double() / 4
    alpha, sigma = (c.reshape(-1, 1, 1, 1).float() for c in COSINE.at(t))
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=rng)
    teacher, pupil = nets["teacher"], nets["student"]
    given = teacher.output(x_t, t, class_labels=labels)
    null = teacher.output(x_t, t, class_labels=torch.full_like(labels, 3))
    target = null + w.reshape(-1, 1, 1, 1) * (given - null)
    found = pupil.output(x_t, t, class_labels=labels, guidance_scale=w)
    assert torch.allclose(loss.value, (found - target).square().mean(), rtol=1e-4)


@pytest.mark.parametrize("width", [16, 256])
def test_the_weight_is_embedded_as_stock_pipelines_do(width):
    w = torch.tensor([1.0, 2.5, 7.5, 14.0])
    stock = StableDiffusionPipeline.get_guidance_scale_embedding(None, w - 1, embedding_dim=width)
    assert torch.allclose(guidance_input.embedded(w, width), stock, atol=1e-5)


def test_what_is_refused():
    start = student(4, "v_prediction", COSINE)
    with pytest.raises(UserError, match="no place for a guidance weight"):
        guidance_input.check(start.network)
    with pytest.raises(UserError, match="means no class"):
        Guidance().stages(start)
    with pytest.raises(ValueError, match="no range of weights"):
        Guidance(range=(3, 3))
    with pytest.raises(ValueError, match="no range of weights"):
        LCM(guidance=(15, 3))
    with pytest.raises(UserError, match="means no class"):
        LCM(guidance=(3, 15)).stages(student(4, "v_prediction", COSINE))
    start.null_label = 3
    for share in (0.1, None):  # None: it is not known
        start.label_dropout = share
        assert Guidance().stages(start) and LCM(guidance=(3, 15), skip=2).stages(start)
    start.label_dropout = 0
    with pytest.raises(UserError, match="without leaving out labels .label_dropout 0 in its diffkd.json"):
        Guidance().stages(start)


def test_lcm_bakes_one_in_or_takes_it_as_an_input():
    start = student(4, "v_prediction", COSINE)
    start.null_label = 3
    (baked,), (taken,) = (LCM(guidance=w, skip=2).stages(start) for w in (2, (3, 15)))
    assert (baked.guidance, baked.guidance_range) == (2.0, None)
    assert (taken.guidance, taken.guidance_range) == (1.0, (3.0, 15.0))
