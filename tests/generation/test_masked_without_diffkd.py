"""Students of PixArt, SANA, Lumina 2, Z-Image and Qwen-Image where diffkd is not installed: stock diffusers,
called as the card says, draws what `diffkd sample` does."""

from __future__ import annotations

import json

import pytest
import torch

from diffkd.core import samplers
from diffkd.models import loading, packing, saving
from diffkd.runs.reports import model_card
from tests import masked_pipelines
from tests.masked_pipelines import KINDS
from tests.stock import Prompted, assert_sampled, stock_pictures_of_prompts

PROMPT, STEPS, SEED = "A small red Ring above a blue square", 4, 5
SAMPLERS = {kind: "ddim" for kind in KINDS} | {"sana": "renoise"}  # which hands its scheduler the generator


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """drawn[kind]: a student's folder and what stock drew, in one process, which cannot import diffkd."""
    work, asked = tmp_path_factory.mktemp("students"), []
    for kind in KINDS:
        made = masked_pipelines.pipeline(work / "parts", kind)
        masked_pipelines.save(made, kind, work / f"{kind}-teacher")
        student = loading.load(work / f"{kind}-teacher")
        student.steps, student.sampler, student.clip = STEPS, SAMPLERS[kind], None
        saving.save(student, work / kind)
        model_card.write(work / kind, model_card.describe(student, guidance_baked_in=3.0))
        card = json.loads((work / kind / "diffkd.json").read_text())
        call = {"num_inference_steps": card["steps"], **card["call"]}
        asked.append(Prompted(work / kind, PROMPT, SEED, call))
    found = stock_pictures_of_prompts(asked, work)
    return {kind: (work / kind, one) for kind, one in zip(KINDS, found, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_draws_the_same(drawn, tmp_path, cli, kind):
    folder, stock = drawn[kind]
    assert str(stock["kind"]) == masked_pipelines.PIPELINES[kind].__name__
    student, generator = loading.load(folder), torch.Generator().manual_seed(SEED)
    noise = torch.randn(1, *student.shape, generator=generator)
    cond = student.conditioner.embed([PROMPT])
    with torch.no_grad():
        latents = samplers.sample(student, noise, STEPS, student.sampler, generator=generator, **cond)
    theirs = torch.from_numpy(stock["latents"])
    if kind == "qwen_image":
        theirs = packing.unpack(theirs, *student.shape[1:])
    assert (latents - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())
    drawing = (folder, "--prompt", PROMPT, "-n", 1, "--seed", SEED)
    assert_sampled(cli, tmp_path / "out.npz", stock["picture"][None], *drawing)
