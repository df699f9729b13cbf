"""Stable Diffusion 3: the stock pipeline's prompts, latents and images; students that open in it."""

from __future__ import annotations

import diffusers
import pytest
import torch

from diffkd.core import samplers
from diffkd.core.flow_schedule import Shift
from diffkd.models import loading, saving
from diffkd.runs.reports import model_card
from tests import flow_pipelines

PROMPTS = ["a red cat", "two dogs, a house", ""]


def conditioned(denoiser, prompts=PROMPTS):
    denoiser.set_null(denoiser.conditioner.null())
    return denoiser.conditioner.embed(prompts)


def latents(count=3):
    shape = 1, flow_pipelines.CHANNELS, flow_pipelines.SIDE, flow_pipelines.SIDE
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(count)])


def assert_close(ours, theirs):
    assert theirs.std() > 0.1 and (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


@pytest.fixture(scope="module", params=["with T5", "without T5"])
def stock(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    made = flow_pipelines.pipeline(folder / "parts", "sd3", with_t5=request.param == "with T5")
    made.save_pretrained(folder / "teacher", safe_serialization=True)
    return made, folder / "teacher"


def test_prompts_are_the_pipelines(stock):
    pipeline, folder = stock
    denoiser = loading.load(folder)
    prompts = ["a red cat", "word " * 60]
    ours, null = denoiser.conditioner.embed(prompts), denoiser.conditioner.null("a dog")
    for key, value in denoiser.conditioner.example.items():
        assert value.shape == ours[key][:1].shape
    states, no_states, pooled, no_pooled = pipeline.encode_prompt(
        prompts, None, None, device="cpu", negative_prompt=["a dog"] * 2
    )
    with_t5 = pipeline.text_encoder_3 is not None
    assert ours["encoder_hidden_states"].shape == (2, 77 + (256 if with_t5 else 1), 48)
    if not with_t5:  # one token of zeros stands for all
        for cond in (ours, null):
            kept = cond["encoder_hidden_states"]
            cond["encoder_hidden_states"] = torch.cat([kept, kept[:, -1:].expand(-1, 255, -1)], 1)
    for found, wanted in (
        (ours["encoder_hidden_states"], states), (ours["pooled_projections"], pooled),
        (null["encoder_hidden_states"].expand(2, -1, -1), no_states),
        (null["pooled_projections"].expand(2, -1), no_pooled),
    ):  # fmt: skip
        assert_close(found, wanted)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_samplers_latents_are_the_pipelines(stock, steps, guidance):
    pipeline, folder = stock
    denoiser = loading.load(folder)
    assert denoiser.schedule.law == Shift(3.0)
    with torch.no_grad():
        ours = samplers.sample(denoiser, latents(), steps, guidance=guidance, **conditioned(denoiser))
    sigmas = [1 - i / steps for i in range(steps)]
    theirs = pipeline(
        PROMPTS, num_inference_steps=steps, sigmas=sigmas, guidance_scale=guidance, latents=latents(),
        output_type="latent",
    ).images  # fmt: skip
    assert_close(ours, theirs)


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_opens_in_stock(stock, tmp_path, sampler, steps):
    """At its card's arguments, with the card and without."""
    student = loading.load(stock[1])
    student.steps, student.sampler = steps, sampler
    saving.save(student, tmp_path / "student")
    card = model_card.describe(student)
    model_card.write(tmp_path / "student", card)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "student", **dict.fromkeys(student.conditioner.absent)
    )
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    assert card["call"] == {"guidance_scale": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        theirs = pipeline(
            PROMPTS, num_inference_steps=steps, generator=generators, output_type="latent", **card["call"]
        ).images
    again, rng = loading.load(tmp_path / "student"), torch.Generator().manual_seed(11)
    assert (again.steps, again.sampler, again.schedule.law) == (steps, sampler, Shift(3.0))
    with torch.no_grad():
        ours = samplers.sample(
            again, latents(), steps, sampler, fresh=lambda x: torch.randn(x.shape, generator=rng),
            **conditioned(again),
        )  # fmt: skip
    assert_close(ours, theirs)
