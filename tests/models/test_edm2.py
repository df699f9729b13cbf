"""EDM2's networks: what their pickles become computes what was published, guided against a worse one too."""

from __future__ import annotations

import json
import os

import pytest
import torch
import yaml
from diffusers import AutoencoderKL

import diffkd
from diffkd.core.samplers import sample
from diffkd.errors import UserError
from diffkd.models import edm2 as conversion
from diffkd.models import saving
from diffkd.models.edm2_unet import EDM2UNet
from tests import dit, edm, edm2, edm_pickles
from tests.edm_pickles import convert_edm, edm_reader

SIGMAS = torch.tensor([0.02, 0.7, 30.0])
LABELS = torch.tensor([2, 0, 1])
SMALLER = {**edm2.MADE, "channel_mult": [1, 1]}
UNLABELLED = {**SMALLER, "label_dim": 0}
LATENT = {**UNLABELLED, "img_channels": 4, "attn_resolutions": []}
MEAN, STD = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])


class Harmful:
    def __reduce__(self):
        return os.putenv, ("EDM_PICKLE_RAN", "yes")


def stability(**state):
    """The encoder of latents as EDM2 pickles it: of its numbers scale and bias alone are used."""
    scale = 0.5 / STD
    given = {"scale": scale.numpy(), "bias": (0 - MEAN * scale).numpy(), "batch_size": 8, "_vae": None}
    return edm_pickles.encoder(
        "StabilityVAEEncoder", vae_name="stabilityai/sd-vae-ft-mse", **{**given, **state}
    )


def pickled(folder, name, given, *, encoder=None, kind="Precond", inner="UNet", seed=0):
    """The weights, and the pickle as EDM2 writes it: with the head of its uncertainty."""
    made, beside = edm2.network(given, seed), {"logvar_linear": torch.nn.Linear(4, 1, bias=False).half()}
    edm_pickles.write(
        folder / f"{name}.pkl", made, kind, inner, given, part="unet", beside=beside,
        encoder=encoder or edm_pickles.encoder("StandardRGBEncoder"),
    )  # fmt: skip
    return made.state_dict(), folder / f"{name}.pkl"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of converted teachers, by name; and the weights of each as they were."""
    folder, weights = tmp_path_factory.mktemp("edm2"), {}
    with pytest.MonkeyPatch.context() as patch:
        edm_pickles.stand_in(patch)
        for seed, (name, given) in enumerate(
            {"teacher": edm2.MADE, "smaller": SMALLER, "unlabelled": UNLABELLED}.items()
        ):
            weights[name], path = pickled(folder, name, given, seed=seed)
            convert_edm.convert(path, folder / name)
    assert "EDM_PICKLE_RAN" not in os.environ
    return folder, weights


@torch.no_grad()
@pytest.mark.parametrize(
    "given",
    [edm2.MADE, UNLABELLED, {**edm2.MADE, "num_blocks": 2, "attn_resolutions": [8]}],
    ids=["labels", "no labels", "two blocks"],
)
def test_it_computes_what_was_published(given):
    """Operation by operation, in float64, of weights that were not normalised."""
    weights = edm2.network(given).double().state_dict()
    made = conversion.network_of(given, weights).double().eval()
    x, c_noise = edm.noise().double(), torch.tensor([-1.2, 0.1, 1.1], dtype=torch.float64)
    labels = LABELS if given["label_dim"] else None
    expected = edm2.reference(weights, x, c_noise, labels, given)
    found = made(x, c_noise, *([] if labels is None else [labels]))
    assert expected.std() > 0.1 and (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@torch.no_grad()
def test_a_pickle_becomes_a_teacher_in_its_preconditioning(models):
    folder, weights = models
    for name, given in (("teacher", edm2.MADE), ("unlabelled", UNLABELLED)):
        teacher = diffkd.load(folder / name)
        classes = given["label_dim"] or None
        assert (teacher.num_classes, teacher.null_label, teacher.schedule.sigma_data) == (classes, None, 0.6)
        assert isinstance(teacher.network, EDM2UNet) and teacher.network.config.dropout == 0.1
        x, t = 5 * edm.noise(), teacher.schedule.time_of(-SIGMAS.double().log())
        cond = {"class_labels": LABELS} if classes else {}
        expected = edm2.denoised(weights[name], x, SIGMAS, cond.get("class_labels"), given)
        assert (teacher(x, t, **cond) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("worse", ["smaller", "unlabelled"])
def test_guidance_against_a_worse_one(models, worse):
    """Autoguidance; and against a network without labels, as EDM2 has it in place of a null label."""
    folder, weights = models
    teacher = diffkd.load(folder / "teacher")
    with pytest.raises(UserError, match="a label that means no class, and this model has none"):
        teacher(edm.noise(), 0.5, guidance=2.0, class_labels=LABELS)
    diffkd.guidance.set_kind(teacher, worse=diffkd.load(folder / worse))
    x, t = 5 * edm.noise(), teacher.schedule.time_of(-SIGMAS.double().log())
    given = edm2.denoised(weights["teacher"], x, SIGMAS, LABELS, edm2.MADE)
    its = {"smaller": (LABELS, SMALLER), "unlabelled": (None, UNLABELLED)}[worse]
    of_worse = edm2.denoised(weights[worse], x, SIGMAS, *its)
    expected = of_worse + 1.7 * (given - of_worse)
    assert (given - of_worse).abs().max() > 0.05
    found = teacher(x, t, guidance=1.7, class_labels=LABELS)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_run_of_the_config(models, cli, tmp_path, monkeypatch):
    """configs/edm2-imagenet64/progressive.yaml, two updates of two stages of tiny networks of its layout."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((edm.ROOT / "configs/edm2-imagenet64/progressive.yaml").read_text())
    (tmp_path / "models").mkdir()
    for name, own in (("teacher", "edm2-img64-s"), ("smaller", "edm2-img64-xs")):
        (tmp_path / "models" / own).symlink_to(models[0] / name)
    for label in range(3):
        edm.pictures(tmp_path / f"images/class-{label}", 2)
    config |= {"evaluation": None, "pictures": 0, "spread_every": None}
    config["data"] |= {"path": "images", "size": edm2.SIDE}
    config["method"] |= {"steps": [2, 1], "updates": [2, 2], "warmup": 0}
    config["training"] |= {"batch_size": 4, "micro_batches": 2, "gradient_checkpointing": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    teacher = diffkd.load(models[0] / "teacher")
    for steps in (2, 1):
        folder = tmp_path / f"runs/edm2-imagenet64-progressive/students/{steps}-steps"
        student = diffkd.load(folder)
        assert (student.steps, student.guidance_baked_in, student.worse) == (steps, 1.7, None)
        card = json.loads((folder / "diffkd.json").read_text())
        assert card["stock"] is False and "worse" in card["guidance_kind"]
        assert "diffusers alone does not" in (folder / "README.md").read_text()
        moved = student.network.out_conv.weight - teacher.network.out_conv.weight
        assert 0 < moved.abs().max() < 1e-2
        with torch.no_grad():
            drawn = sample(student, edm.noise(), steps, class_labels=LABELS)
            again = (tmp_path / f"again-{steps}", saving.save(student, tmp_path / f"again-{steps}"))[0]
            (again / "diffkd.json").write_text((folder / "diffkd.json").read_text())
            assert torch.equal(sample(diffkd.load(again), edm.noise(), steps, class_labels=LABELS), drawn)


def test_gradients_with_blocks_computed_again_are_the_same(models):
    network = diffkd.load(models[0] / "teacher").network
    found = []
    for again in (False, True):
        if again:
            network.enable_gradient_checkpointing()
        network.zero_grad()
        network(edm.noise(), torch.zeros(3), LABELS).square().sum().backward()
        found.append([p.grad.clone() for p in network.parameters()])
    assert all(map(torch.equal, *found)) and max(grad.abs().max() for grad in found[0]) > 0.1


def test_frequencies_stay_in_float32(models):
    network = diffkd.load(models[0] / "teacher").network
    drawn, time = network.emb_fourier.freqs.clone(), torch.tensor([-1.2, 0.1, 1.1])
    embedded = network.emb_fourier(time)
    torch.nn.Module.to(network, torch.bfloat16)
    assert network.emb_noise.weight.dtype == torch.bfloat16
    assert torch.equal(network.emb_fourier.freqs, drawn)
    assert torch.equal(network.emb_fourier(time), embedded)
    assert network(edm.noise().bfloat16(), time, LABELS).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("channels", "millions"), [(128, 125), (192, 280), (256, 498), (320, 777), (384, 1119), (448, 1523)]
)
def test_the_networks_at_full_size_are_the_published_ones(channels, millions):
    """Table 2 of the paper: XS to XXL."""
    with torch.device("meta"):
        network = EDM2UNet(64, 4, channels, num_class_embeds=1000)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


# latents


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder of an autoencoder that says what Stable Diffusion's says of itself."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = dit.autoencoder()
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("vae")
    made.save_pretrained(folder, safe_serialization=True)
    return folder


@torch.no_grad()
def test_latents_are_edm2s_own(vae, tmp_path, monkeypatch):
    """Of images in [0, 1], each channel with a mean of 0 and a deviation of 0.5; and a student keeps them."""
    edm_pickles.stand_in(monkeypatch)
    _, path = pickled(tmp_path, "latent", LATENT, encoder=stability())
    with pytest.raises(UserError, match="in the latents of 'stabilityai/sd-vae-ft-mse'; name a folder of it"):
        convert_edm.convert(path, tmp_path / "none")
    convert_edm.convert(path, tmp_path / "teacher", vae)
    teacher = diffkd.load(tmp_path / "teacher")
    teacher.steps = 1
    saving.save(teacher, tmp_path / "student")
    student, stock = diffkd.load(tmp_path / "student"), AutoencoderKL.from_pretrained(vae).eval()
    assert teacher.codec.key == student.codec.key and teacher.shape == (4, 8, 8)
    assert teacher.codec.shape(32, 32) == (4, 8, 8)
    mean, std = (one.reshape(-1, 1, 1) for one in (MEAN, STD))
    images = torch.rand(2, 3, 32, 32)
    raw = stock.encode(images).latent_dist
    latents = (raw.mean - mean) / std * 0.5
    for model in (teacher, student):
        found = model.codec.moments(2 * images - 1)
        assert torch.allclose(found[0], latents, atol=1e-5)
        assert torch.allclose(found[1], raw.std / std * 0.5, atol=1e-6)
        decoded = stock.decode(latents / 0.5 * std + mean).sample
        assert torch.allclose((model.codec.decode(latents) + 1) / 2, decoded, atol=1e-5)
    noise = edm.noise(channels=4)
    assert torch.equal(sample(student, noise, 1), sample(teacher, noise, 1))
    (tmp_path / "student/vae/config.json").unlink()
    with pytest.raises(UserError, match="config.json"):
        diffkd.load(tmp_path / "student")
    (tmp_path / "teacher/vae").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="4 channels, which are latents, .*convert its pickle with one"):
        diffkd.load(tmp_path / "teacher")


# what is not read


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "EDMPrecond"}, "is an EDMPrecond of nothing; read so far is .* or EDM2's Precond of UNet"),
        ({"inner": "OtherUNet"}, "is a Precond of OtherUNet; read so far is"),
        ({"label_dropout": 0.1}, "an argument 'label_dropout', which is of no network read so far"),
        ({"channel_mult_emb": 2}, "channel_mult_emb 2; read so far is None"),
        ({"resample_filter": [1, 3, 3, 1]}, r"resample_filter \[1, 3, 3, 1\]; read so far is \[1, 1\]"),
        ({"channels_per_head": 16}, "attention of 8 channels does not divide by heads of 16"),
        ({"model_channels": 16}, "other weights than its arguments say"),
        ({"num_blocks": 2}, "other weights than its arguments say .*Missing key"),
    ],
    ids=str,
)
def test_networks_that_are_not_read(changes, says, tmp_path):
    record, inner = edm_reader.Record(), edm_reader.Record()
    record.kind, inner.kind = changes.pop("kind", "Precond"), changes.pop("inner", "UNet")
    record.state = {"_init_kwargs": {**edm2.MADE, "channel_mult": [1, 1], **changes}}
    record.state["_modules"] = {"unet": inner}
    inner.state = {"_parameters": edm2.network(SMALLER).state_dict()}
    with pytest.raises(UserError, match=says) as refused:
        convert_edm.network_of(record, tmp_path / "x.pkl")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("encoder", "says"),
    [
        (lambda: edm_pickles.encoder("StandardRGBEncoder", more=Harmful()), "names (os|posix|nt).putenv"),
        (lambda: edm_pickles.encoder("OtherEncoder"), "encoder 'OtherEncoder'; read so far is Standard"),
        (
            lambda: edm_pickles.encoder("StandardRGBEncoder"),
            "works on pixels, and --vae names an autoencoder",
        ),
        (lambda: stability(scale=None), "does not say how it normalises latents"),
        (lambda: stability(scale=torch.ones(3).numpy()), "latents of 4 channels, and .* normalises 3; give"),
    ],
    ids=["code", "another", "pixels", "no numbers", "three channels"],
)
def test_encoders_that_are_not_read(encoder, says, vae, tmp_path, monkeypatch):
    edm_pickles.stand_in(monkeypatch)
    _, path = pickled(tmp_path, "x", LATENT, encoder=encoder())
    with pytest.raises(UserError, match=says):
        convert_edm.convert(path, tmp_path / "out", vae)
    assert "EDM_PICKLE_RAN" not in os.environ and not (tmp_path / "out").exists()
