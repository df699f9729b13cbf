"""Students drawn by renoise: what they are in diffkd, and what stock diffusers makes of them."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, LCMScheduler

import diffkd
from diffkd.core import samplers
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.generation.generator import ImageGenerator, generate
from diffkd.generation.pixels import to_uint8
from diffkd.models import saving, students
from diffkd.runs.reports import model_card
from tests.stock import stock_pictures
from tests.tiny import student

LINEAR = from_diffusers(DDPMScheduler())
COSINE = Schedule.cosine(64)


def saved(folder, *args, **options):
    denoiser = student(*args, sampler="renoise", **options)
    saving.save(denoiser, folder)
    model_card.write(folder, model_card.describe(denoiser))
    return denoiser


def generators(n):
    return [torch.Generator().manual_seed(5 + i) for i in range(n)]


@pytest.mark.parametrize(
    ("classes", "prediction", "schedule", "clip"),
    [
        (None, "epsilon", LINEAR, None),
        (None, "v_prediction", COSINE, 1.0),
        (3, "v_prediction", Schedule.cosine(1024), None),
        (3, "sample", LINEAR, 0.5),
    ],
)
def test_the_stock_pipeline_draws_the_same_pixels(tmp_path, classes, prediction, schedule, clip):
    """Maximum difference 0 in float, in 1, 2 and 4 steps, each image from its own generator."""
    denoiser, n = saved(tmp_path, classes, prediction, schedule, clip=clip, channels=3), 6
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == ("ConsistencyModelPipeline" if classes else "DDPMPipeline")
    labels = [i % classes for i in range(n)] if classes else None
    cond = {"class_labels": torch.tensor(labels)} if classes else {}
    for steps in (1, 2, 4):
        stock = pipeline(
            batch_size=n, generator=generators(n), num_inference_steps=steps, output_type="np",
            **({"class_labels": labels} if classes else {}),
        ).images  # fmt: skip
        drawn = generators(n)
        noise = samplers.randn((n, *denoiser.shape), drawn, torch.empty(0))
        with torch.inference_mode():
            x0 = samplers.sample(denoiser, noise, steps, "renoise", generator=drawn, **cond)
        assert np.array_equal((x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), stock)
        ours = torch.cat(list(generate(denoiser, n, steps=steps, seed=5, labels=labels, batch_size=4)))
        assert torch.equal(ours, (torch.from_numpy(stock) * 255).round().to(torch.uint8))
        assert ours.float().std() > 10


@pytest.mark.slow
@pytest.mark.parametrize("classes", [None, 3])
def test_it_does_so_without_diffkd(tmp_path, classes):
    denoiser, n = saved(tmp_path / "student", classes, "v_prediction", COSINE), 6
    labels = [i % classes for i in range(n)] if classes else None
    (stock,) = stock_pictures([(tmp_path / "student", 4)], tmp_path, n, labels)
    ours = torch.cat(list(generate(denoiser, n, seed=5, labels=labels))).numpy()
    assert np.array_equal(ours, stock["pictures"])


@pytest.mark.parametrize("clip", [None, 0.5])
def test_it_comes_back_as_it_was(tmp_path, clip):
    denoiser = saved(tmp_path, 3, "v_prediction", COSINE, clip=clip)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    again = diffkd.load(tmp_path)
    assert (again.sampler, again.steps, again.clip, again.prediction, again.num_classes) == (
        "renoise", 4, clip, "v_prediction", 3,
    )  # fmt: skip
    assert torch.equal(again.schedule.alphas_cumprod, COSINE.alphas_cumprod)
    ours, theirs = (torch.cat(list(generate(d, 5, seed=3))) for d in (denoiser, again))
    assert torch.equal(ours, theirs)
    assert students.copy_of(again).sampler == "renoise"


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_the_stock_scheduler_has_the_same_table(schedule):
    scheduler = diffkd.schedules.to_diffusers(schedule, "sample", sampler="renoise")
    assert isinstance(scheduler, LCMScheduler)
    assert torch.equal(scheduler.alphas_cumprod.double(), schedule.alphas_cumprod)


def test_a_model_is_drawn_by_its_own_sampler_unless_another_is_named():
    denoiser = student(None, "v_prediction", COSINE, sampler="renoise")
    own, named = ImageGenerator(denoiser, 2), ImageGenerator(denoiser, 2, sampler="ddim")
    assert (own.sampler, own.noises_per_image, own.nfe) == ("renoise", 4, 4)
    assert (named.sampler, named.noises_per_image) == ("ddim", 1)
    pixels = to_uint8(samplers.sample(denoiser, torch.zeros(1, 1, 8, 8), 4))
    assert pixels.shape == (1, 8, 8, 1)


def test_a_step_of_per_image_times_is_that_of_numbers():
    """As a teacher's target calls it: one column of times per image, the last of them 0."""
    denoiser = student(None, "v_prediction", COSINE).double()
    x, times = torch.randn(3, 1, 8, 8, dtype=torch.float64), [1.0, 0.5, 0.0]
    fresh = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    columns = torch.tensor(times, dtype=torch.float64)[:, None].expand(-1, 3)
    with torch.no_grad():
        one, two = (samplers.renoise(denoiser, x, t, noise=lambda _: fresh) for t in (times, columns))
    assert torch.allclose(one, two, rtol=0, atol=1e-12)


def test_as_many_steps_as_time_steps_are_refused():
    """The stock scheduler's boundary condition at index 0 would return the state itself."""
    with pytest.raises(UserError, match="64 steps drawn by renoise .* Use fewer steps"):
        COSINE.check_steps(64, "renoise")
    COSINE.check_steps(64)
    COSINE.check_steps(32, "renoise")


def test_a_card_with_another_sampler_is_refused(tmp_path):
    saved(tmp_path, None, "v_prediction", COSINE)
    card = json.loads((tmp_path / "diffkd.json").read_text())
    (tmp_path / "diffkd.json").write_text(json.dumps({**card, "sampler": ["heun"]}))
    with pytest.raises(UserError, match="has sampler .'heun'., which is neither ddim nor renoise; repair it"):
        diffkd.load(tmp_path)
