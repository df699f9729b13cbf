"""Conditions and their absence: what guidance leads away from, and what training drops."""

import pytest
import torch

from diffkd.core.conditioning import dropped
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule

COSINE = Schedule.cosine(64)


class Sum(torch.nn.Module):
    """Adds up what it is conditioned on."""

    def forward(self, x, time, states, size):
        return x * 0 + states.sum((1, 2)).reshape(-1, 1, 1, 1) + size.reshape(-1, 1, 1, 1)


def prompted():
    denoiser = Denoiser(Sum(), COSINE, "sample", shape=(1, 2, 2))
    denoiser.set_null({"states": torch.full((1, 3, 2), 0.5)})
    return denoiser


def test_guidance_leads_away_from_the_null_condition():
    """What has no null, such as a size, is the same in both halves."""
    states, size = torch.ones(2, 3, 2), torch.tensor([10.0, 20.0])
    found = prompted()(torch.zeros(2, 1, 2, 2), 0.5, guidance=2.0, states=states, size=size)
    assert torch.allclose(found[:, 0, 0, 0], torch.tensor([10.0, 20.0]) + 3 + 2.0 * (6 - 3))


def test_the_null_condition_moves_with_the_model_and_is_not_saved():
    denoiser = prompted()
    assert denoiser.state_dict() == {} and denoiser.to(torch.float64).null["states"].dtype == torch.float64


def test_a_share_of_the_conditions_is_dropped():
    rng = torch.Generator().manual_seed(0)
    cond = {"states": torch.randn(4000, 3, 2, generator=rng), "size": torch.arange(4000.0)}
    found = dropped(cond, prompted().null_of(cond), 0.25, rng)
    null = (found["states"] == 0.5).all((1, 2))
    assert null.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(found["states"][~null], cond["states"][~null])
    assert torch.equal(found["size"], cond["size"])


def test_of_labels_and_without_a_null_one():
    rng = torch.Generator().manual_seed(0)
    cond = {"class_labels": torch.arange(4000) % 3}
    for null, share in ((None, 0.5), (3, 0.0)):
        denoiser = Denoiser(torch.nn.Identity(), COSINE, "sample", num_classes=3, null_label=null)
        state = rng.get_state()
        found = dropped(cond, denoiser.null_of(cond), share, rng)
        assert torch.equal(found["class_labels"], cond["class_labels"])
        assert torch.equal(rng.get_state(), state)
    denoiser = Denoiser(torch.nn.Identity(), COSINE, "sample", num_classes=3, null_label=3)
    assert (dropped(cond, denoiser.null_of(cond), 1.0, rng)["class_labels"] == 3).all()
    assert cond["class_labels"].max() == 2 and dropped({}, denoiser.null_of({}), 0.5, rng) == {}
