"""Generated images: each depends on the seed, its index and its label alone."""

import pytest
import torch

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from diffkd.generation.generator import ImageGenerator, generate
from tests.gaussian import gaussian
from tests.tiny import student

COSINE = Schedule.cosine(64)


def images(denoiser, n, **options):
    return torch.cat(list(generate(denoiser, n, **options)))


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_an_image_depends_on_seed_and_index_only(sampler):
    denoiser = gaussian(COSINE, "v_prediction", mean=0.0)
    whole = images(denoiser, 20, steps=4, seed=3, batch_size=20, sampler=sampler)
    for batch_size in (1, 7, 64):
        assert torch.equal(
            images(denoiser, 20, steps=4, seed=3, batch_size=batch_size, sampler=sampler), whole
        )
    assert torch.equal(images(denoiser, 15, steps=4, seed=8, sampler=sampler), whole[5:])  # seed + i
    assert not torch.equal(images(denoiser, 20, steps=4, seed=100, sampler=sampler), whole)


def test_a_networks_images_do_not_change_with_the_batch():
    """Up to the rounding of batched arithmetic: at most one grey level, in very few pixels."""
    denoiser = student(10, "v_prediction", COSINE)
    whole = images(denoiser, 20, batch_size=20).int()
    alone = images(denoiser, 20, batch_size=3).int()
    assert (whole - alone).abs().max() <= 1 and (whole != alone).float().mean() < 1e-3


def test_a_label_reaches_its_image():
    denoiser = student(4, "v_prediction", COSINE)
    mixed = images(denoiser, 8, labels=[0, 3], batch_size=8).int()
    assert (mixed[1::2] - images(denoiser, 8, labels=[3], batch_size=8).int()[1::2]).abs().max() <= 1
    assert not torch.equal(mixed[0::2], images(denoiser, 8, labels=[3], batch_size=8).int()[0::2])
    assert torch.equal(images(denoiser, 4, labels=3), images(denoiser, 4, labels=[3]))  # one, for all


def test_what_cannot_be_generated():
    denoiser = gaussian(COSINE)
    with pytest.raises(UserError, match="no step count of its own"):
        images(denoiser, 1)
    for given in ({"n": 0}, {"steps": 0}, {"steps": -1}, {"batch_size": 0}):
        (name,), (value,) = given, given.values()
        with pytest.raises(UserError, match=f"{name} is {value}; use 1 or more"):
            images(denoiser, **{"n": 1, "steps": 1, **given})
    denoiser.shape = None
    with pytest.raises(UserError, match="shape"):
        images(denoiser, 1, steps=1)


def test_guidance_counts_twice():
    denoiser = Denoiser(torch.nn.Identity(), COSINE, "sample", shape=(1, 4, 4), num_classes=3, null_label=3)
    assert ImageGenerator(denoiser, 2, steps=3).nfe == 3
    assert ImageGenerator(denoiser, 2, steps=3, guidance=2.0).nfe == 6
    assert ImageGenerator(denoiser, 2, steps=3, guidance=2.0, sampler="heun").nfe == 10
