"""Labels of images: in turn, in proportion to counts, and those that a model does not take."""

import numpy as np
import pytest
import torch

from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from diffkd.generation.labels import labels_for, proportional
from tests.tiny import student

COSINE = Schedule.cosine(64)


def test_labels_are_taken_in_turn():
    denoiser = student(4, "v_prediction", COSINE)
    assert labels_for(denoiser, 6, None).tolist() == [0, 1, 2, 3, 0, 1]
    assert labels_for(denoiser, 5, [3, 1]).tolist() == [3, 1, 3, 1, 3]
    for wrong in ([4], [-1], []):
        with pytest.raises(UserError, match="this model has labels 0 to 3"):
            labels_for(denoiser, 2, wrong)
    with pytest.raises(UserError, match="unconditional"):
        labels_for(student(None, "v_prediction", COSINE), 2, [0])


@pytest.mark.parametrize("counts", [[5000, 5000], [1, 2, 3, 4], [980, 0, 7, 13, 0], [10**6, 1], [1] * 1000])
@pytest.mark.parametrize("n", [10, 333, 5000])
def test_proportional_labels_have_their_shares(counts, n):
    labels = proportional(counts, n)
    share = np.array(counts) / sum(counts)
    found = np.bincount(labels.numpy(), minlength=len(counts))
    assert np.abs(found - n * share).max() <= 2 and (found[share == 0] == 0).all()
    assert torch.equal(proportional(counts, 3 * n)[:n], labels)
