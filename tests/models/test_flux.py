"""Flux: the stock pipeline's prompts, latents and images; its guidance as an input, or baked in."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from diffkd.core import samplers
from diffkd.core.flow_schedule import Shift, mu_of
from diffkd.errors import UserError
from diffkd.generation.generator import ImageGenerator
from diffkd.models import guidance_input, loading, packing, saving, students
from diffkd.runs.reports import model_card
from tests import flow_pipelines
from tests.models.test_sd3 import assert_close, conditioned, latents

PROMPTS = ["a red cat", "two dogs, a house", ""]
SIZE = {"height": 32, "width": 32}
OF_32 = Shift(math.exp(mu_of(16)))  # of the 16 tokens of such an image


@pytest.fixture(scope="module", params=["dev", "schnell"])
def stock(request, tmp_path_factory):
    """With and without guidance embeddings: and a dynamic shift, or none at all."""
    folder, dev = tmp_path_factory.mktemp("flux"), request.param == "dev"
    noise = None if dev else flow_pipelines.scheduler("flux", shift=1.0, use_dynamic_shifting=False)
    made = flow_pipelines.pipeline(folder / "parts", "flux", guidance_embeds=dev, noise=noise)
    made.save_pretrained(folder / "teacher", safe_serialization=True)
    return made, folder / "teacher"


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dev")
    made = flow_pipelines.pipeline(folder / "parts", "flux")
    made.save_pretrained(folder / "teacher", safe_serialization=True)
    return made, folder / "teacher"


def fitted(folder):
    """For images of 32x32, in latents of 8x8."""
    denoiser = loading.load(folder)
    denoiser.fit((flow_pipelines.CHANNELS, flow_pipelines.SIDE, flow_pipelines.SIDE))
    return denoiser


def drawn(pipeline, steps, **call):
    """Latents (B, C, H, W) of the pipeline's own call, unpacked."""
    call = {"latents": packing.pack(latents())} | call
    if "generator" in call:
        del call["latents"]
    tokens = pipeline(PROMPTS, num_inference_steps=steps, output_type="latent", **SIZE, **call).images
    return packing.unpack(tokens, flow_pipelines.SIDE, flow_pipelines.SIDE)


def test_packing_is_the_pipelines():
    x = torch.randn(2, 4, 6, 8)
    packed = diffusers.FluxPipeline._pack_latents(x, 2, 4, 6, 8)
    assert torch.equal(packing.pack(x), packed) and torch.equal(packing.unpack(packed, 6, 8), x)
    wanted = diffusers.FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32)
    assert torch.equal(packing.places(6, 8, x), wanted)


def test_prompts_are_the_pipelines(stock):
    pipeline, folder = stock
    denoiser = loading.load(folder)
    prompts = ["a red cat", "word " * 120]
    ours = denoiser.conditioner.embed(prompts)
    states, pooled, _ = pipeline.encode_prompt(prompts, None, device="cpu")
    assert ours["encoder_hidden_states"].shape == (2, 512, 24)
    assert_close(ours["encoder_hidden_states"], states)
    assert_close(ours["pooled_projections"], pooled)
    for key, value in denoiser.conditioner.example.items():
        assert value.shape == ours[key][:1].shape


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_samplers_latents_are_the_pipelines(stock, steps):
    """At two weights, where they are an input."""
    pipeline, folder = stock
    denoiser = fitted(folder)
    takes = denoiser.guidance_range is not None
    assert takes == pipeline.transformer.config.guidance_embeds
    assert denoiser.schedule.law == (OF_32 if takes else Shift(1.0))
    found = []
    for weight in (3.5, 1.5) if takes else (1.0,):
        with torch.no_grad():
            cond = {**conditioned(denoiser, PROMPTS), **denoiser.guided_by(weight, 3)}
            found.append(samplers.sample(denoiser, latents(), steps, **cond))
        assert_close(found[-1], drawn(pipeline, steps, guidance_scale=weight))
    assert not takes or (found[0] - found[1]).abs().max() > 1e-3


def test_guidance_by_a_second_pass_is_stocks_with_an_empty_negative_prompt(stock):
    """Of a network that does not take the weight; one that does is refused."""
    pipeline, folder = stock
    denoiser = fitted(folder)
    cond = conditioned(denoiser, PROMPTS)
    if denoiser.guidance_range is None:
        with torch.no_grad():
            ours = samplers.sample(denoiser, latents(), 4, guidance=3.0, **cond)
        assert_close(ours, drawn(pipeline, 4, negative_prompt=[""] * 3, true_cfg_scale=3.0))
        return
    with pytest.raises(UserError, match="takes its guidance as an input and is not guided by a second pass"):
        denoiser(latents(), 0.5, guidance=3.0, **cond, **denoiser.guided_by(3.5, 3))


def test_a_dynamic_shift_is_that_of_the_size(dev):
    """The own images of the model are of 4096 tokens, whatever the scale of its autoencoder; an image that is
    asked for at another size has its own, and the model stays what it is."""
    denoiser = loading.load(dev[1])
    assert denoiser.shape == (4, 128, 128)
    assert denoiser.schedule.law == Shift(math.exp(1.15))
    generator = ImageGenerator(denoiser, 1, steps=2, prompts=["a"], size=(32, 32))
    assert generator.denoiser.schedule.law == OF_32 and generator.denoiser.network is denoiser.network
    assert denoiser.schedule.law == Shift(math.exp(1.15))


@pytest.mark.parametrize("sampler", ["ddim", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_opens_in_stock(stock, tmp_path, sampler, steps):
    """At its card's arguments, which name its size; its shift is static, that of its size."""
    student = fitted(stock[1])
    student.steps, student.sampler = steps, sampler
    saving.save(student, tmp_path / "student")
    card = model_card.describe(student)
    model_card.write(tmp_path / "student", card)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    assert card["call"] == SIZE
    with torch.random.fork_rng():
        torch.manual_seed(11)
        theirs = drawn(pipeline, steps, generator=[torch.Generator().manual_seed(i) for i in range(3)])

    def noise(x):  # stock draws that of renoise for the packed latents
        return packing.unpack(torch.randn(packing.pack(x).shape, generator=rng), *x.shape[2:])

    again, rng = loading.load(tmp_path / "student"), torch.Generator().manual_seed(11)
    assert (again.steps, again.sampler, again.shape) == (steps, sampler, (4, 8, 8))
    assert (again.schedule.law, again.schedule_of) == (student.schedule.law, None)
    takes = {} if again.guidance_range is None else again.guided_by(again.usual_guidance, 3)
    with torch.no_grad():
        ours = samplers.sample(
            again, latents(), steps, sampler, fresh=noise, **conditioned(again, PROMPTS), **takes
        )
    assert_close(ours, theirs)


@pytest.mark.parametrize("weight", [1.0, 3.5])
def test_a_weight_is_baked_in(dev, tmp_path, weight):
    """The same outputs without an input; the student's images are those of the weight, whatever is asked."""
    teacher, folded = fitted(dev[1]), fitted(dev[1])
    guidance_input.fold(folded, weight)
    assert (folded.guidance_range, folded.guidance_baked_in) == (None, weight)
    cond = conditioned(teacher, PROMPTS)
    with torch.no_grad():
        given = teacher(latents(), 0.6, **cond, **teacher.guided_by(weight, 3))
        assert (folded(latents(), 0.6, **cond) - given).abs().max() <= 1e-5 * given.abs().max()
        other = teacher(latents(), 0.6, **cond, **teacher.guided_by(weight + 2, 3))
    assert (other - given).abs().max() > 1e-3
    student = students.copy_of(folded)
    student.steps = 4
    saving.save(student, tmp_path / "student")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.transformer.config.guidance_embeds is False
    assert_close(drawn(pipeline, 4, guidance_scale=9.0), drawn(dev[0], 4, guidance_scale=weight))


def test_no_weight_is_baked_into_a_network_that_takes_none(stock):
    denoiser = loading.load(stock[1])
    if denoiser.guidance_range is None:
        with pytest.raises(
            UserError, match="does not take its guidance as an input, so none can be baked in"
        ):
            guidance_input.fold(denoiser, 3.5)
