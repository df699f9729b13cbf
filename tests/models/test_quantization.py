"""8-bit weights: their rounding, their size, and how such a model is sampled and evaluated."""

import json
import sys

import pytest
import torch
from torch import nn

import diffkd
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.models import saving, sizes
from diffkd.models.quantization import MIN_CHANNELS, quantized
from tests.refusals import refuse
from tests.tiny import student

torchao = pytest.importorskip("torchao")
COSINE = Schedule.cosine(64)


class Network(nn.Module):
    """The layers of a UNet, and a convolution too narrow to be quantized."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = (
            nn.Conv2d(16, 24, 3, padding=1),
            nn.Conv2d(MIN_CHANNELS - 1, 16, 3, padding=1),
        )
        self.linear, self.norm = nn.Linear(24, 24), nn.GroupNorm(4, 24)

    def forward(self, x, time):
        x = self.norm(self.wide(self.narrow(x)))
        return self.linear(x.movedim(1, 3)).movedim(3, 1)[:, : MIN_CHANNELS - 1]


def denoiser(seed=0):
    torch.manual_seed(seed)
    return Denoiser(Network(), COSINE, "v_prediction", shape=(MIN_CHANNELS - 1, 8, 8))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_weight_moves_by_half_a_step_of_its_scale(seed):
    """The scale is the largest weight of an output channel and kernel position, over 127."""
    model = denoiser(seed)
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    quantized(model)
    moved = 0
    for name, weight in model.network.named_parameters():
        if name not in ("wide.weight", "linear.weight"):
            assert torch.equal(weight, before[name])
            continue
        error = (weight.dequantize() - before[name]).abs()
        step = before[name].abs().amax(1, keepdim=True) / 127
        assert (error <= 0.505 * step + 1e-8).all() and error.max() > 0.4 * step.min()
        moved += 1
    assert moved == 2


def test_it_computes_with_the_dequantized_weights():
    model, plain = denoiser(), denoiser()
    quantized(model)
    with torch.no_grad():
        for name, weight in plain.network.named_parameters():
            if name in ("wide.weight", "linear.weight"):
                weight.copy_(model.network.get_parameter(name).dequantize())
        x = torch.randn(3, MIN_CHANNELS - 1, 8, 8, generator=torch.Generator().manual_seed(1))
        t = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
        assert (model(x, t) - plain(x, t)).abs().max() < 1e-5


def test_size():
    plain, model = (sizes.denoiser_size(d) for d in (denoiser(), quantized(denoiser())))
    assert model[:2] == plain[:2]
    wide, linear = 16 * 24 * 9, 24 * 24
    scales = (24 * 9 + 24) * 5  # in float32, and zero points in 8 bits
    older = 24 * 7  # torchao 0.17 has the linear layer's zero points in 64 bits
    assert plain.bytes - model.bytes - 3 * (wide + linear) + scales in (0, -older)


def test_it_is_evaluated_and_repeated(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saving.save(student(None, "v_prediction", COSINE), tmp_path / "plain")
    how = ("--reference", "digits", "--steps", "4", "--samples", "40")
    assert cli("evaluate", "plain", *how, "--quantize", "int8", "--out", "int8.json").code == 0
    assert cli("evaluate", "plain", *how, "--out", "plain.json").code == 0
    found, plain = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("int8", "plain"))
    target = found["protocol"]["target"]
    assert target["quantize"] == "int8" and target["sha256"] != plain["protocol"]["target"]["sha256"]
    assert found["fid"] != plain["fid"] and found["fid"] == pytest.approx(plain["fid"], rel=0.1)
    assert found["bytes"] < plain["bytes"] and found["parameters"] == plain["parameters"]
    assert cli("evaluate", "--repeat", "int8.json").code == 0


def test_its_images_are_not_mixed_with_others(tmp_path, cli):
    saving.save(student(None, "v_prediction", COSINE), tmp_path / "plain")
    draw = ("sample", tmp_path / "plain", "-n", "4", "--steps", "2", "--out", tmp_path / "drawn")
    assert cli(*draw, "--quantize", "int8").code == 0
    assert "already" in cli(*draw, "--quantize", "int8")[1]
    assert cli(*draw).code == 2  # other weights, and those images are not to be mixed with


def test_refused(tmp_path, cli, monkeypatch):
    saving.save(student(None, "v_prediction", COSINE), tmp_path / "plain")
    draw = ("sample", tmp_path / "plain", "-n", "4", "--steps", "2", "--out", tmp_path / "drawn")
    refuse(cli, tmp_path, *draw, "--quantize", "int4", says="quantize 'int4' is unknown; use int8")
    with pytest.raises(ValueError, match="save the model loaded without quantize"):
        saving.save(diffkd.load(tmp_path / "plain", quantize="int8"), tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    refuse(cli, tmp_path, *draw, "--quantize", "int8", says="pip install torchao")
