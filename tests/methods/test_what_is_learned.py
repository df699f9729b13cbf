"""Which methods learn what images are, and which only ask their teacher at them."""

from __future__ import annotations

import pytest

from diffkd import methods
from diffkd.core.denoiser import Denoiser

REAL = {
    "adversarial": [{}], "denoising": [{}], "f_distill": [{}], "tcm": [{}], "dmd2": [{"gan": 1e-3}],
    "feature": [{}], "progressive": [{"alpha": 0.5}], "imm": [{}],
}  # fmt: skip
NOISED = {"feature": [{"task": 0.0}], "imm": [{"mode": "distillation"}], "dmd2": [{"steps": 4}]}


def of(name, settings):
    return methods.find(name)(**settings)


@pytest.mark.parametrize("name", [n for n in methods.names() if methods.find(n).kind is Denoiser])
def test_what_a_method_learns_from_images(name):
    """Its settings decide: a discriminator, the data's own denoising, `mode: training`."""
    for settings in REAL.get(name, []):
        assert of(name, settings).learns_what_data_is() and of(name, settings).learns_from_data()
    for settings in NOISED.get(name, [{}] if name not in REAL else []):
        assert not of(name, settings).learns_what_data_is()
    kind = methods.find(name)
    assert kind().learns_what_data_is() == kind.needs.real  # which `diffkd methods` lists
    if "mode" in methods.find(name).model_fields:
        assert of(name, {"mode": "training"}).learns_what_data_is()
