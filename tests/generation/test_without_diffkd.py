"""Text-to-image students where diffkd is not installed: stock diffusers draws what `diffkd sample` does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from diffkd.core import samplers
from diffkd.models import guidance_input, loading, saving
from diffkd.runs.reports import model_card
from tests import text_to_image
from tests.stock import Prompted, stock_pictures_of_prompts

PROMPT, STEPS, SEED, WEIGHT = "a small red ring above a large blue square", 4, 5, 4.0
STUDENTS = [
    f"{family}-{guidance}-{sampler}"
    for family in ("sd", "xl")
    for guidance in ("baked", "weight")
    for sampler in ("ddim", "renoise")
]
STRENGTHS = (1.0, 0.5)  # of image to image: all steps, half of them


class Drawn(NamedTuple):
    """Of one student in stock: its folder, and what each way of opening it gave."""

    folder: Path
    usual: Any
    automatic: Any
    from_image: dict[float, Any]


def save_student(teacher: Path, folder: Path, guidance: str, sampler: str) -> None:
    """A student that its weights make differ from its teacher."""
    student = loading.load(teacher)
    student.steps, student.sampler, student.clip = STEPS, sampler, None
    if guidance == "weight":
        guidance_input.attach(student.network)
        torch.nn.init.normal_(student.network.time_embedding.cond_proj.weight, std=0.2)
        student.guidance_range = (1.0, 9.0)
    saving.save(student, folder)
    baked = {"guidance_baked_in": 3.0} if guidance == "baked" else {}
    model_card.write(folder, model_card.describe(student, **baked))


def image() -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """drawn[student]; all of them drawn by one process, which cannot import diffkd."""
    work = tmp_path_factory.mktemp("students")
    for family in ("sd", "xl"):
        made = text_to_image.pipeline(work / "parts", xl=family == "xl", prediction="v_prediction")
        made.save_pretrained(work / family, safe_serialization=True)
    asked = []
    for name in STUDENTS:
        family, guidance, sampler = name.split("-")
        with torch.random.fork_rng():
            torch.manual_seed(2)
            save_student(work / family, work / name, guidance, sampler)
        call: dict[str, Any] = {"num_inference_steps": STEPS}
        if guidance == "weight":
            call["guidance_scale"] = WEIGHT
        given = work / name, PROMPT, SEED
        asked += [
            Prompted(*given, call, opened) for opened in ("DiffusionPipeline", "AutoPipelineForText2Image")
        ]
        asked += [
            Prompted(*given, {**call, "strength": strength}, "AutoPipelineForImage2Image", image())
            for strength in STRENGTHS
        ]
    found = iter(stock_pictures_of_prompts(asked, work))
    return {
        name: Drawn(work / name, next(found), next(found), {strength: next(found) for strength in STRENGTHS})
        for name in STUDENTS
    }


def opened(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The student in diffkd, and what it is conditioned on."""
    student = loading.load(folder)
    student.set_null(student.conditioner.null())
    cond = student.conditioner.embed([PROMPT], size=(32, 32))
    if student.guidance_range is not None:
        cond["guidance_scale"] = torch.tensor([WEIGHT])
    return student, cond


def assert_close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    assert (ours - torch.from_numpy(theirs)).abs().max() <= 1e-5 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_draws_the_same_at_default_arguments(drawn, tmp_path, cli, name):
    """Its latents, and the image of the command; opened as any pipeline, or by its task."""
    one = drawn[name]
    kind = "StableDiffusionXLPipeline" if name.startswith("xl") else "StableDiffusionPipeline"
    scheduler = "LCMScheduler" if name.endswith("renoise") else "DDIMScheduler"
    student, cond = opened(one.folder)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    latents = samplers.sample(student, noise, STEPS, student.sampler, generator=generator, **cond)
    weight = ("-w", WEIGHT) if "weight" in name else ()
    out = tmp_path / "out.npz"
    outcome = cli("sample", one.folder, "--out", out, "--prompt", PROMPT, "-n", 1, "--seed", SEED, *weight)
    assert (outcome.code, outcome.stderr) == (0, "")
    with np.load(out) as content:
        picture = content["arr_0"][0].astype(int)
    for stock in (one.usual, one.automatic):
        assert (str(stock["kind"]), str(stock["scheduler"])) == (kind, scheduler)
        assert_close(latents, stock["latents"])
        assert stock["picture"].shape == (32, 32, 3)
        assert np.abs(picture - stock["picture"]).max() <= 1


def test_the_students_draw_different_images(drawn):
    """Or the comparisons above would prove little: samplers, guidance and families are all seen."""
    pictures = [one.usual["picture"] for one in drawn.values()]
    for i, picture in enumerate(pictures):
        assert picture.std() > 5
        assert all((picture != other).any() for other in pictures[:i])


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_goes_on_from_an_image(drawn, name):
    """Image to image begins at the student's own times: the latents of our sampler from the same start.

    The generator gives the autoencoder's sample, then the noise, then what a stochastic sampler asks for.
    """
    one = drawn[name]
    student, cond = opened(one.folder)
    mean, std = student.codec.moments(image() * 2 - 1)
    for strength, stock in one.from_image.items():
        generator = torch.Generator().manual_seed(SEED)
        x0 = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        times = samplers.grid(STEPS)[-1 - round(STEPS * strength) :]
        alpha, sigma = student.schedule.at(times[0], like=x0)
        latents = samplers.find(student.sampler)(
            student, (alpha * x0 + sigma * noise).float(), times, clip=None,
            noise=partial(again, generator), **cond,
        )  # fmt: skip
        assert str(stock["kind"]).endswith("Img2ImgPipeline") and stock["picture"].shape == (32, 32, 3)
        assert_close(latents, stock["latents"])
        (decoded,) = student.codec.decode(latents).permute(0, 2, 3, 1)
        shades = (decoded / 2 + 0.5).clamp(0, 1).mul(255).round().int().numpy()
        assert np.abs(shades - stock["picture"].astype(int)).max() <= 1


def again(generator: torch.Generator, x: torch.Tensor) -> torch.Tensor:
    return samplers.randn(x.shape, generator, x)
