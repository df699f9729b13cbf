"""Class-conditional latent students where diffkd is not installed: stock diffusers, called as the card says,
draws what `diffkd sample` does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkd.core import samplers
from diffkd.models import loading, saving
from diffkd.runs.reports import model_card
from tests import dit
from tests.stock import assert_sampled, stock_pictures_of_labels

LABELS, SEED = [0, 1, 2, 3], 5
STUDENTS = [
    f"{prediction}-{steps}-{sampler}"
    for prediction in ("epsilon", "v_prediction")
    for steps, sampler in ((1, "ddim"), (2, "ddim"), (4, "ddim"), (8, "ddim"), (1, "renoise"))
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """drawn[student]: its folder and what stock drew, in one process for all, which cannot import diffkd."""
    work = tmp_path_factory.mktemp("students")
    for prediction in ("epsilon", "v_prediction"):
        made = dit.pipeline(prediction=prediction)
        made.save_pretrained(work / prediction, safe_serialization=True)
    for name in STUDENTS:
        prediction, steps, sampler = name.split("-")
        student = loading.load(work / prediction)
        student.steps, student.sampler, student.clip = int(steps), sampler, None
        saving.save(student, work / name)
        model_card.write(work / name, model_card.describe(student, guidance_baked_in=3.0))
    found = stock_pictures_of_labels([work / name for name in STUDENTS], work, LABELS)
    return {name: (work / name, one) for name, one in zip(STUDENTS, found, strict=True)}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_draws_the_same(drawn, tmp_path, cli, name):
    folder, stock = drawn[name]
    scheduler = "LCMScheduler" if name.endswith("renoise") else "DDIMScheduler"
    assert (str(stock["kind"]), str(stock["scheduler"])) == ("DiTPipeline", scheduler)
    student = loading.load(folder)
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(LABELS))]
    noise = torch.cat([torch.randn(1, *student.shape, generator=one) for one in generators])
    with torch.no_grad():
        latents = samplers.sample(
            student, noise, student.steps, student.sampler, class_labels=torch.tensor(LABELS)
        ).numpy()
    assert np.abs(latents - stock["latents"]).max() <= 1e-5 * max(1, np.abs(latents).max())
    drawing = (folder, "--classes", "0,1,2,3", "-n", 4, "--seed", SEED)
    assert_sampled(cli, tmp_path / "out.npz", stock["pictures"], *drawing)
    other = [found["pictures"] for one, (_, found) in drawn.items() if one != name and one[0] != name[0]]
    assert all((stock["pictures"] != one).any() for one in other)


def test_the_card_says_how_it_is_called(drawn):
    card = (drawn["epsilon-4-ddim"][0] / "README.md").read_text()
    call = "pipeline(guidance_scale=1.0, class_labels=[i % 10 for i in range(16)], num_inference_steps=4)"
    assert call in card and "Name `guidance_scale=1.0`" in card and "batch_size" not in card
