"""Saving and loading: what a denoiser keeps on its way through a stock pipeline and its card."""

import json

import pytest
import torch

import diffkd
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from diffkd.generation.generator import generate
from diffkd.models import saving
from diffkd.runs.reports import model_card
from tests.tiny import student

COSINE = Schedule.cosine(64)


@pytest.mark.parametrize("classes", [None, 5])
def test_saved_and_loaded_is_the_same_denoiser(classes, tmp_path):
    denoiser = student(classes, "v_prediction", COSINE, clip=1.0)
    saving.save(denoiser, tmp_path / "student")
    model_card.write(tmp_path / "student", model_card.describe(denoiser))
    again = diffkd.load(tmp_path / "student")
    for key, value in denoiser.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[key])
    assert torch.equal(again.schedule.alphas_cumprod, COSINE.alphas_cumprod)
    assert (again.prediction, again.clip, again.steps, again.num_classes) == ("v_prediction", 1.0, 4, classes)
    assert not again.training and again.shape == (1, 8, 8)


def test_the_null_label_is_no_class(tmp_path):
    denoiser = student(6, "v_prediction", COSINE)
    denoiser.null_label, denoiser.num_classes = 5, 5
    saving.save(denoiser, tmp_path)
    model_card.write(tmp_path, model_card.describe(denoiser))
    again = diffkd.load(tmp_path)
    assert again.num_classes == 5 and again.null_label == 5 and again.network.config.num_class_embeds == 6
    assert again.label_dropout is None  # it is not known whether it learnt that label
    again.check_guidance()


@pytest.mark.parametrize("share", [-0.1, 1.5, "0.1", None, True])
def test_a_card_of_no_share(tmp_path, share):
    saving.save(student(None, "v_prediction", COSINE), tmp_path)
    (tmp_path / "diffkd.json").write_text(json.dumps({"label_dropout": share}))
    with pytest.raises(UserError, match="label_dropout .*, which is not a share from 0 to 1; repair it"):
        diffkd.load(tmp_path)


def test_dtype_and_device(tmp_path):
    saving.save(student(None, "v_prediction", COSINE), tmp_path)
    half = diffkd.load(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    batch = next(generate(half, 3, steps=2))
    assert batch.dtype == torch.uint8 and batch.shape == (3, 8, 8, 1)
    with pytest.raises(UserError, match="bfloat16; save in float32"):
        saving.save(half, tmp_path / "half")
