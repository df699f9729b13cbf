import numpy as np
import pytest
import torch

from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from diffkd.generation.drawing import generate, labels_for, to_uint8
from tests.gaussian import gaussian
from tests.models.test_unet2d import student

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
    """Within the rounding of batched arithmetic: at most one grey level, and that hardly anywhere."""
    denoiser = student(10, "v_prediction", COSINE)
    whole = images(denoiser, 20, batch_size=20).int()
    alone = images(denoiser, 20, batch_size=3).int()
    assert (whole - alone).abs().max() <= 1 and (whole != alone).float().mean() < 1e-3


def test_pixels_are_rounded_as_pil_pipelines_do():
    x0 = torch.linspace(-1.5, 1.5, 4001).reshape(1, 1, 1, -1)
    stock = ((x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    assert np.array_equal(to_uint8(x0).numpy(), stock)
    every = torch.arange(256).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(every / 127.5 - 1)[..., 0].long(), every[:, 0])


def test_labels_are_taken_in_turn():
    denoiser = student(4, "v_prediction", COSINE)
    assert labels_for(denoiser, 6, None).tolist() == [0, 1, 2, 3, 0, 1]
    assert labels_for(denoiser, 5, [3, 1]).tolist() == [3, 1, 3, 1, 3]
    for wrong in ([4], [-1], []):
        with pytest.raises(UserError, match="this model has labels 0 to 3"):
            labels_for(denoiser, 2, wrong)
    with pytest.raises(UserError, match="unconditional"):
        labels_for(student(None, "v_prediction", COSINE), 2, [0])


def test_a_label_reaches_its_image():
    denoiser = student(4, "v_prediction", COSINE)
    mixed = images(denoiser, 8, labels=[0, 3], batch_size=8).int()
    assert (mixed[1::2] - images(denoiser, 8, labels=[3], batch_size=8).int()[1::2]).abs().max() <= 1
    assert not torch.equal(mixed[0::2], images(denoiser, 8, labels=[3], batch_size=8).int()[0::2])


def test_what_cannot_be_generated():
    denoiser = gaussian(COSINE)
    with pytest.raises(UserError, match="no step count of its own"):
        images(denoiser, 1)
    denoiser.shape = None
    with pytest.raises(UserError, match="shape"):
        images(denoiser, 1, steps=1)
