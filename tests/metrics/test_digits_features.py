"""Digits features on anything else than digits say so, once."""

from __future__ import annotations

import logging

import pytest
import torch

from diffkd.metrics.features import load


def warned(caplog: pytest.LogCaptureFixture, images: torch.Tensor) -> list[str]:
    network = load("digits")
    with caplog.at_level(logging.WARNING, "diffkd"):
        network(images)
        network(images)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 1, 28, 28), (2, 3, 32, 32)])
def test_small_grey_images_may_be_digits(caplog, shape):
    assert warned(caplog, torch.full(shape, 7, dtype=torch.uint8)) == []


@pytest.mark.parametrize(
    ("shape", "what"), [((2, 3, 8, 16), "16x8 in colour"), ((2, 1, 64, 64), "64x64: numbers")]
)
def test_others_cannot_be(caplog, shape, what):
    images = torch.arange(torch.Size(shape).numel()).remainder(256).to(torch.uint8).reshape(shape)
    (line,) = warned(caplog, images)
    assert f"these are images of {what}" in line and "features: inception, or your own" in line
