"""Students of Stable Diffusion 3 and Flux where diffkd is not installed: stock diffusers, called as the card
says, draws what `diffkd sample` does."""

from __future__ import annotations

import json

import pytest
import torch

from diffkd.core import samplers
from diffkd.models import guidance_input, loading, packing, saving
from diffkd.runs.reports import model_card
from tests import flow_pipelines
from tests.stock import Prompted, assert_sampled, stock_pictures_of_prompts

PROMPT, SEED = "a small red ring above a large blue square", 5
STUDENTS = [
    f"{kind}-{steps}-{sampler}"
    for kind in ("sd3", "flux", "baked")
    for steps, sampler in ((1, "ddim"), (2, "ddim"), (4, "ddim"), (8, "ddim"), (1, "renoise"))
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """drawn[student]: its folder and what stock drew, in one process for all, which cannot import diffkd."""
    work = tmp_path_factory.mktemp("students")
    for kind in ("sd3", "flux"):
        made = flow_pipelines.pipeline(work / "parts", kind)
        made.save_pretrained(work / kind, safe_serialization=True)
    asked = []
    for name in STUDENTS:
        kind, steps, sampler = name.split("-")
        student = loading.load(work / ("sd3" if kind == "sd3" else "flux"))
        student.fit((flow_pipelines.CHANNELS, flow_pipelines.SIDE, flow_pipelines.SIDE))
        if kind == "baked":
            guidance_input.fold(student, 6.0)
        student.steps, student.sampler = int(steps), sampler
        saving.save(student, work / name)
        model_card.write(work / name, model_card.describe(student))
        card = json.loads((work / name / "diffkd.json").read_text())
        call = {"num_inference_steps": card["steps"], **card["call"]}
        asked.append(Prompted(work / name, PROMPT, SEED, call))
    found = stock_pictures_of_prompts(asked, work)
    return {name: (work / name, one) for name, one in zip(STUDENTS, found, strict=True)}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_draws_the_same(drawn, tmp_path, cli, name):
    folder, stock = drawn[name]
    kind, _, sampler = name.split("-")
    pipeline = "StableDiffusion3Pipeline" if kind == "sd3" else "FluxPipeline"
    left = kind == "sd3" and sampler == "ddim"  # whose pipeline leaves the grid to its scheduler
    scheduler = "FlowMapEulerDiscreteScheduler" if left else "FlowMatchEulerDiscreteScheduler"
    assert (str(stock["kind"]), str(stock["scheduler"])) == (pipeline, scheduler)
    student = loading.load(folder)
    noise = torch.randn(1, *student.shape, generator=torch.Generator().manual_seed(SEED))
    cond = student.conditioner.embed([PROMPT])
    if student.guidance_range is not None:
        cond |= student.guided_by(student.usual_guidance, 1)
    with torch.no_grad():
        ours = samplers.sample(student, noise, student.steps, student.sampler, **cond)
    theirs = torch.from_numpy(stock["latents"])
    theirs = theirs if kind == "sd3" else packing.unpack(theirs, *student.shape[1:])
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    drawing = (folder, "--prompt", PROMPT, "-n", 1, "--seed", SEED)
    assert_sampled(cli, tmp_path / "out.npz", stock["picture"][None], *drawing)


def test_the_students_draw_different_images(drawn):
    """Or the comparisons above would prove little: steps, families and a weight baked in are seen."""
    pictures = {name: one["picture"] for name, (_, one) in drawn.items() if name.endswith("ddim")}
    for name, picture in pictures.items():
        assert all((picture != other).any() for key, other in pictures.items() if key != name)
