"""EDM's own networks: the conversion of their pickles, which runs none of them, and the network itself."""

from __future__ import annotations

import io
import json
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
import yaml

import diffkd
from diffkd.core.samplers import sample
from diffkd.errors import UserError
from diffkd.models.song_unet import SongUNet
from tests import edm, edm_pickles
from tests.edm_pickles import convert_edm, edm_reader

WIDTH, SIDE = 8, 8
MADE = {"img_resolution": SIDE, "img_channels": 3, "label_dim": 3, "model_type": "SongUNet",
        "augment_dim": 9, "model_channels": WIDTH, "channel_mult": [1, 2], "num_blocks": 1,
        "attn_resolutions": [4], "dropout": 0.13}  # fmt: skip
NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1]}  # fmt: skip


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """pickled(**changes) -> the network, and its pickle as EDM writes it."""
    edm_pickles.stand_in(monkeypatch)

    def make(kind="EDMPrecond", inner="SongUNet", **changes):
        given = {**MADE, **changes}
        torch.manual_seed(0)
        taps = torch.tensor(given.pop("taps", given.get("resample_filter", [1, 1])), dtype=torch.float32)
        ncsn = len(taps) == 4 or given.get("embedding_type") == "fourier"
        layout = SIDE, 3, WIDTH, (1, 2), 1, (4,), 0.13, given["label_dim"] or None, 9
        network = SongUNet(*layout, fourier=ncsn, residual=ncsn, wide=ncsn)
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        for name, part in network.named_modules():
            if name.endswith(("_up.conv0", "_up.skip", "_down.conv0", "_down.skip", "_aux_residual")):
                part.register_buffer("resample_filter", torch.outer(taps, taps)[None, None] / taps.sum() ** 2)
        return network.eval(), edm_pickles.write(tmp_path / "network.pkl", network, kind, inner, given)

    return make


def reference(weights, x, c_noise, labels, ncsn):
    """The network by its names, as Karras et al.'s publication lays it out, one operation at a time."""
    half = WIDTH // 2
    frequencies = 10000 ** (-torch.arange(half) / (half - 1))
    if ncsn:
        frequencies = 2 * torch.pi * weights["map_noise.freqs"]
    angles = c_noise[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], 1)
    taps = torch.tensor([1.0, 3, 3, 1] if ncsn else [1.0, 1])
    box, edge = torch.outer(taps, taps)[None, None] / taps.sum() ** 2, int(ncsn)
    linear = lambda name, v: F.linear(v, weights[f"{name}.weight"], weights.get(f"{name}.bias"))  # noqa: E731
    if labels is not None:
        embedding = embedding + linear("map_label", F.one_hot(labels, 3).float() * 3**0.5)
    embedding = F.silu(linear("map_layer1", F.silu(linear("map_layer0", embedding))))

    def conv(name, v, resampled=""):
        kernel = weights[f"{name}.weight"]
        tiled = box.tile(v.shape[1], 1, 1, 1)
        if resampled == "down":
            v = F.conv2d(v, tiled, stride=2, groups=v.shape[1], padding=edge)
        if resampled == "up":
            v = F.conv_transpose2d(v, 4 * tiled, stride=2, groups=v.shape[1], padding=edge)
        return F.conv2d(v, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)

    def norm(name, v):
        scale = weights[f"{name}.weight"]
        return F.group_norm(v, min(32, len(scale) // 4), scale, weights[f"{name}.bias"], 1e-6)

    def block(name, v):
        resampled = name.split("_")[1] if name.endswith(("_up", "_down")) else ""
        h = conv(f"{name}.conv0", F.silu(norm(f"{name}.norm0", v)), resampled)
        h = h + linear(f"{name}.affine", embedding)[:, :, None, None]
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)))
        v = conv(f"{name}.skip", v, resampled) if f"{name}.skip.weight" in weights else v
        v = (v + h) * 0.5**0.5
        if f"{name}.qkv.weight" in weights:
            b, c, height, width = v.shape
            q, k, w = conv(f"{name}.qkv", norm(f"{name}.norm2", v)).reshape(b, c, 3, -1).unbind(2)
            share = torch.einsum("ncq,nck->nqk", q, k / c**0.5).softmax(2)
            out = torch.einsum("nqk,nck->ncq", share, w).reshape(b, c, height, width)
            v = (conv(f"{name}.proj", out) + v) * 0.5**0.5
        return v

    kept = [conv("enc.8x8_conv", x)]
    for name in ("enc.8x8_block0", "enc.4x4_down", "enc.4x4_block0"):
        kept.append(block(name, kept[-1]))
        if ncsn and name == "enc.4x4_down":
            part = "enc.4x4_aux_residual"
            h = F.conv2d(x, weights[f"{part}.weight"], padding=1 + edge)
            h = F.conv2d(h, box.tile(h.shape[1], 1, 1, 1), stride=2, groups=h.shape[1])
            kept[-1] = (kept[-1] + h + weights[f"{part}.bias"][:, None, None]) * 0.5**0.5
    x = block("dec.4x4_in1", block("dec.4x4_in0", kept[-1]))
    for name in ("4x4_block0", "4x4_block1", "8x8_up", "8x8_block0", "8x8_block1"):
        x = block(f"dec.{name}", x if name.endswith("_up") else torch.cat([x, kept.pop()], 1))
    return conv("dec.8x8_aux_conv", F.silu(norm("dec.8x8_aux_norm", x)))


@torch.no_grad()
@pytest.mark.parametrize("ncsn", [False, True], ids=["DDPM++", "NCSN++"])
@pytest.mark.parametrize("classes", [0, 3])
def test_a_pickle_becomes_a_teacher(pickled, tmp_path, classes, ncsn):
    """The network as published, operation by operation, inside EDM's preconditioning; nothing of the pickle
    is run."""
    network, path = pickled(label_dim=classes, **(NCSN if ncsn else {}))
    convert_edm.convert(path, tmp_path / "teacher")
    assert "EDM_PICKLE_RAN" not in os.environ
    teacher = diffkd.load(tmp_path / "teacher")
    assert (teacher.num_classes, teacher.schedule.sigma_data) == (classes or None, 0.6)
    x, t = 5 * edm.noise(), torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64)
    labels = torch.tensor([2, 0, 1]) if classes else None
    cond = {} if labels is None else {"class_labels": labels}
    sigma = teacher.schedule.at(t)[1].float().reshape(-1, 1, 1, 1)
    total = sigma**2 + 0.6**2
    raw = reference(network.state_dict(), x / total**0.5, sigma.flatten().log() / 4, labels, ncsn)
    x0 = 0.6**2 / total * x + sigma * 0.6 / total**0.5 * raw
    assert raw.std() > 0.05 and torch.allclose(teacher(x, t, **cond), x0, rtol=1e-4, atol=1e-5)


def test_frequencies_stay_in_float32():
    """Of NCSN++; a network in half precision would take the time for another."""
    network = SongUNet(SIDE, 3, WIDTH, (1, 2), 1, (4,), 0.0, fourier=True, residual=True, wide=True).eval()
    drawn, time = network.map_noise.freqs.clone(), torch.tensor([-1.2, 0.1, 1.1])
    embedded = network._embedded(time)
    torch.nn.Module.to(network, torch.bfloat16)
    assert network.map_layer0.weight.dtype == torch.bfloat16 and torch.equal(network.map_noise.freqs, drawn)
    assert torch.equal(network._embedded(time), embedded)
    assert network(edm.noise().bfloat16(), time).dtype == torch.bfloat16


def test_a_run_of_the_config(pickled, cli, tmp_path, monkeypatch):
    """configs/edm-cifar10/progressive.yaml, two updates of each stage of a tiny network of its layout."""
    monkeypatch.chdir(tmp_path)
    _, path = pickled(label_dim=0)
    convert_edm.convert(path, tmp_path / "models/edm-cifar10")
    config = yaml.safe_load((edm.ROOT / "configs/edm-cifar10/progressive.yaml").read_text())
    config |= {"evaluation": None, "pictures": 0, "spread_every": None}
    config["data"] = {"kind": "folder", "path": str(edm.pictures(tmp_path / "images")), "size": SIDE}
    config["method"] |= {"updates": 2, "warmup": 0}
    config["training"] |= {"batch_size": 4, "precision": "float32"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    for steps in (8, 4, 2, 1):
        folder = tmp_path / "runs/edm-cifar10-progressive/students" / f"{steps}-steps"
        student = diffkd.load(folder)
        assert (student.steps, type(student.network)) == (steps, SongUNet)
        assert sample(student, edm.noise(), steps).isfinite().all()
        text = (folder / "README.md").read_text()
        assert "diffusers alone does not" in text and "DiffusionPipeline" not in text
        assert json.loads((folder / "diffkd.json").read_text())["stock"] is False


class Harmful:
    def __reduce__(self):
        return os.putenv, ("EDM_PICKLE_RAN", "yes")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Harmful(), "the pickle names (os|posix|nt).putenv, which no network of EDM needs"),
        ({"ema": Harmful()}, "putenv"),
        ({"other": 1}, "holds no network named ema"),
        ([1], "holds no network named ema"),
        (print, "the pickle names builtins.print"),
    ],
    ids=["code", "code of a network", "no network", "a list", "a builtin"],
)
def test_other_pickles_are_refused(tmp_path, content, says):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=says):
        edm_reader.read(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "VPPrecond"}, "is a VPPrecond of SongUNet"),
        ({"inner": "OtherUNet"}, "is an EDMPrecond of OtherUNet; read so far is an EDMPrecond of SongUNet"),
        ({"fir": True}, "argument 'fir', which is of no network read so far"),
        ({"embedding_type": "learned"}, "embedding_type 'learned'; read so far is positional or fourier"),
        ({"embedding_type": "fourier"}, "encoder_type 'standard'; read so far is 'residual'"),
        ({"encoder_type": "residual"}, "encoder_type 'residual'; read so far is 'standard'"),
        ({**NCSN, "encoder_type": "skip"}, "encoder_type 'skip'; read so far is 'residual'"),
        ({**NCSN, "decoder_type": "skip"}, "decoder_type 'skip'; read so far is 'standard'"),
        ({"resample_filter": [1, 3, 3, 1]}, r"resample_filter \[1, 3, 3, 1\]; read so far is \[1, 1\]"),
        ({**NCSN, "channel_mult_noise": 1}, "channel_mult_noise 1; read so far is 2"),
        ({**NCSN, "taps": [1, 1]}, r"filters that its resample_filter \[1, 3, 3, 1\] does not say"),
        ({"model_channels": 16}, "other weights than its arguments say"),
    ],
)
def test_networks_that_are_not_read(pickled, changes, says):
    _, path = pickled(**changes)
    with pytest.raises(UserError, match=says):
        convert_edm.network_of(edm_reader.read(path).network, path)


def test_a_torn_pickle(pickled, tmp_path):
    _, path = pickled()
    (tmp_path / "torn.pkl").write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cannot be read as a pickle of EDM"):
        edm_reader.read(tmp_path / "torn.pkl")


def test_a_teacher_that_is_a_pickle_says_how_to_convert_it(pickled):
    _, path = pickled()
    with pytest.raises(UserError, match=f"python scripts/convert_edm.py {path} FOLDER"):
        diffkd.load(path)


def test_tensors_of_another_kind_are_not_read():
    with pytest.raises(UserError, match="number of type 'O'"):
        edm_reader._Dtype("O")
    assert edm_reader._scalar(edm_reader._Dtype("f8"), b"\0" * 8) == 0.0
    with pytest.raises(pickle.UnpicklingError):
        buffer = io.BytesIO()
        torch.save({"x": Harmful()}, buffer)
        edm_reader._storage(buffer.getvalue())
