"""Feature networks that users train on images of their own: what they learn, their files, their uses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from diffkd.data.digits import Digits
from diffkd.metrics.features import describe, load
from diffkd.metrics.features.learning import effective_rank, vicreg
from diffkd.metrics.features.trained import KEY, TrainedFeatures
from diffkd.metrics.frechet import distance
from diffkd.metrics.sampling_error import gaussian_of
from diffkd.runs.feature_training import side_for, train
from tests.refusals import refuse

SMALL = ("--width", "16", "--num-features", "16", "--updates", "200")


def pixels() -> torch.Tensor:
    return torch.from_numpy(Digits(kind="digits").load().pixels)


def labels() -> torch.Tensor:
    found = Digits(kind="digits").load().labels
    assert found is not None
    return found


@pytest.fixture(scope="module")
def nets(tmp_path_factory, built_once) -> Path:
    """classes.safetensors, of the digits and their labels; views.safetensors, of the same without labels; and
    what was said."""

    def build(folder: Path) -> None:
        np.savez(folder / "digits.npz", arr_0=pixels().permute(0, 2, 3, 1).numpy())
        for name, images in (("classes", "digits"), ("views", str(folder / "digits.npz"))):
            with (folder / f"{name}.txt").open("w") as stream:
                console = Console(file=stream, width=200)
                train(images, folder / f"{name}.safetensors", console, width=16, num_features=16, updates=200)

    return built_once("trained_features", build)


@pytest.fixture
def here(nets, tmp_path, monkeypatch, image_folder) -> Path:
    for path in nets.iterdir():
        shutil.copy(path, tmp_path)
    image_folder(tmp_path, name="images", count=60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_classes_are_told_and_the_accuracy_is_true(nets):
    """That which is said is that of the held-out images, which are found again by the seed."""
    network, said = TrainedFeatures(nets / "classes.safetensors"), (nets / "classes.txt").read_text()
    held_out = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[: 1797 // 5]
    told = network.probabilities(network(pixels()[held_out])).argmax(1)
    accuracy = float((told == labels()[held_out]).double().mean())
    assert accuracy == network.about.accuracy and accuracy > 0.9
    assert f"{accuracy:.1%} of 359 held-out images told right, among 10" in said
    assert f"named {network.describe()['name']} in records" in said


def test_views_are_told_without_labels(nets):
    network, said = TrainedFeatures(nets / "views.safetensors"), (nets / "views.txt").read_text()
    assert network.about.classes == [] and not hasattr(network, "probabilities")
    assert network.about.same_image is not None and network.about.same_image > 0.1  # by chance 1 in 256
    assert 4 < network.about.effective_rank <= 16
    assert f"effective rank of the features: {network.about.effective_rank:.1f} of 16" in said


@pytest.mark.parametrize("name", ["classes", "views"])
def test_features_have_variance_one_and_see_how_far_images_are(nets, cli, name):
    """Distances grow with the noise in half of the digits, and are least of digits without."""
    network = load(str(nets / f"{name}.safetensors"))
    chosen = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[1797 // 5 :]
    features = network(pixels()[chosen])
    assert torch.allclose(features.mean(0), torch.zeros(16), atol=1e-4)
    assert torch.allclose(features.std(0), torch.ones(16), rtol=1e-3)
    halves = pixels()[::2], pixels()[1::2]
    noise = torch.randn(halves[1].shape, generator=torch.Generator().manual_seed(1))
    noisy = [(halves[1] + level * noise).clamp(0, 255).to(torch.uint8) for level in (0, 20, 60, 120)]
    one = gaussian_of(network(halves[0]))
    found = [distance(one, gaussian_of(network(x))) for x in noisy]
    assert found == sorted(found) and found[0] < 0.2 < 20 * found[0] < found[-1]


def test_the_seed_decides_the_bytes(cli, here):
    """Of views that classes are no matter to, too."""
    args = ("features", "train", "digits", *SMALL[:-1], "3")
    assert cli(*args, "--views", "--out", "v.safetensors").code == 0
    assert TrainedFeatures("v.safetensors").about.classes == []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert cli(*args, "--seed", seed, "--out", f"{out}.safetensors").code == 0
    a, b, c = (Path(f"{name}.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    state = torch.random.get_rng_state()
    TrainedFeatures("a.safetensors")
    assert torch.equal(state, torch.random.get_rng_state())


def test_every_command_takes_it_and_records_name_it_by_its_hash(cli, here, make_pipeline):
    network = TrainedFeatures("views.safetensors")
    name = describe("views.safetensors", network)["name"]
    assert re.fullmatch(r"trained-[0-9a-f]{8}", name) and name.endswith(network.sha256[:8])
    args = ("--features", "views.safetensors")
    code, out, err = cli("evaluate", "images", "digits", *args, "--metrics", "fid,kid", "--out", "r.json")
    assert code == 0 and sum(name in line and "compare only among" in line for line in out.splitlines()) == 1
    record = json.loads(Path("r.json").read_text())
    assert record["protocol"]["features"]["sha256"] == network.sha256
    assert record["protocol"]["evaluation"]["features"] == str(here / "views.safetensors")
    assert float(cli("fid", "images", "digits", *args).stdout.split()[1]) == record["fid"]
    assert cli("evaluate", "--repeat", "r.json").code == 0
    assert cli("stats", "digits", *args, "--out", "ref.npz").code == 0
    assert float(cli("fid", "images", "ref.npz", *args).stdout.split()[1]) == pytest.approx(record["fid"])
    refuse(cli, here, "fid", "images", "ref.npz", says=[name, "--features FILE.safetensors"])
    refuse(cli, here, "fid", "images", "ref.npz", "--features", "classes.safetensors", says=[name, "there"])
    scored = cli("evaluate", "images", "--metrics", "is", "--features", "classes.safetensors")
    assert scored.code == 0, scored.stderr
    refuse(cli, here, "evaluate", "images", "--metrics", "is", *args, says="class probabilities")
    make_pipeline(here, name="model")
    (here / "configs").mkdir()
    shutil.move("views.safetensors", "configs/own.safetensors")  # beside the config that names it
    content = {
        "out": "bench", "models": [{"path": "model", "steps": [1]}],
        "evaluation": {"features": "own.safetensors", "reference": "digits", "samples": 20},
    }  # fmt: skip
    Path("configs/bench.yaml").write_text(yaml.safe_dump(content))
    assert cli("benchmark", "configs/bench.yaml").code == 0
    [row] = json.loads(Path("bench/metrics.json").read_text())
    assert row["protocol"]["features"]["name"] == name


def test_features_of_two_classes_are_said_to_see_no_more(cli, here):
    """Dark and bright images are told apart by a line."""
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    pixels = rng.integers(0, 100, (80, 8, 8, 1)) + 150 * labels[:, None, None, None]
    np.savez("two.npz", arr_0=pixels.astype(np.uint8), labels=labels)
    args = ("features", "train", "two.npz", "--width", "8", "--num-features", "8", "--updates", "40")
    code, out, err = cli(*args, "--out", "two.safetensors")
    assert code == 0 and "100.0% of 16 held-out images" in out
    assert "hardly more than 1 direction (effective rank 1." in err and "--views" in err


def test_a_run_measures_by_it(cli, here):
    content = {
        "out": "teacher", "data": {"kind": "digits"},
        "model": {"channels": [8, 16], "norm_groups": 4, "mid_attention": False},
        "denoising": {"updates": 2, "warmup": 0}, "training": {"batch_size": 8}, "pictures": 0,
        "evaluation": {"samples": 20, "teacher_steps": [1], "features": "views.safetensors"},
    }  # fmt: skip
    Path("teacher.yaml").write_text(yaml.safe_dump(content))
    code, _, err = cli("train", "teacher.yaml")
    assert code == 0, err
    [record] = json.loads(Path("teacher/metrics.json").read_text())
    assert record["protocol"]["features"]["sha256"] == TrainedFeatures("views.safetensors").sha256


def test_vicreg_by_loops():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 3)) * [0.3, 2, 1], rng.standard_normal((6, 3))
    invariance = np.mean([(a[i, j] - b[i, j]) ** 2 for i in range(6) for j in range(3)])
    variance = covariance = 0.0
    for z in (a, b):
        c = np.cov(z, rowvar=False)
        variance += sum(max(0, 1 - (c[j, j] + 1e-4) ** 0.5) for j in range(3)) / 3
        covariance += sum(c[i, j] ** 2 for i in range(3) for j in range(3) if i != j) / 3
    expected = 25 * invariance + 25 * variance / 2 + covariance
    assert float(vicreg(torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(expected, rel=1e-12)


def test_the_size_by_default():
    sizes = {(8, 8): 8, (4, 4): 8, (28, 28): 32, (40, 33): 64, (300, 500): 64}
    assert {size: side_for(*size) for size in sizes} == sizes


def test_effective_rank():
    """d equal directions count d, a line 1, nothing 0; unequal ones by their entropy."""
    axes = torch.cat([torch.eye(5), -torch.eye(5)]).double()
    assert effective_rank(axes) == pytest.approx(5)
    assert effective_rank(torch.outer(torch.arange(9.0), torch.tensor([1.0, -2, 3]))) == pytest.approx(1)
    assert effective_rank(torch.ones(4, 3)) == 0
    shares = torch.tensor([0.75, 0.25]).double()
    uneven = torch.cat([torch.diag(shares.sqrt()), -torch.diag(shares.sqrt())])
    assert effective_rank(uneven) == pytest.approx(0.75**-0.75 * 0.25**-0.25)


def edited(here: Path, **changes: object) -> None:
    """classes.safetensors with other tensors or words."""
    with safe_open(here / "classes.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()[KEY])
    for key, value in changes.items():
        (about if key in about else tensors)[key] = value
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, "bad.safetensors", {KEY: json.dumps(about)}
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda here: Path("bad.safetensors").write_bytes(b""), "cannot be read"),
        (
            lambda here: Path("bad.safetensors").write_bytes(Path("views.safetensors").read_bytes()[:-9]),
            "read",
        ),
        (lambda here: save_file({"x": torch.zeros(2)}, "bad.safetensors"), "is not a feature network"),
        (lambda here: save_file({"x": torch.zeros(2)}, "bad.safetensors", {KEY: "{"}), "cannot be read"),
        (lambda here: edited(here, channels=2), "channels"),
        (lambda here: edited(here, num_features=10**6), "num_features"),
        (lambda here: edited(here, width=24), "other tensors"),
        (lambda here: edited(here, mean=torch.zeros(17)), "other tensors"),
        (lambda here: edited(here, mean=None), "other tensors"),
        (lambda here: edited(here, mean=torch.full((16,), torch.nan)), "not finite"),
        (lambda here: edited(here, std=torch.zeros(16)), "without a scale"),
    ],
)
def test_a_broken_or_foreign_file_is_one_line(cli, here, damage, says):
    damage(here)
    args = ("--features", "bad.safetensors")
    refuse(cli, here, "fid", "images", "digits", *args, says=["bad.safetensors", says, "features train"])


def test_what_cannot_be_trained_is_refused(cli, here, image_folder):
    learn = ("features", "train")
    refuse(cli, here, *learn, "digits", says="--out net.safetensors")
    refuse(cli, here, *learn, "digits", "--out", "net.pt", says=".safetensors")
    refuse(cli, here, *learn, "digits", "--out", "views.safetensors", says=["exists", "--overwrite"])
    refuse(cli, here, *learn, "digits", "--out", "n.safetensors", "--size", "24", says=["24", "16, 32"])
    refuse(cli, here, *learn, "digits", "--out", "n.safetensors", "--width", "20", says=["20", "24"])
    image_folder(here, name="few", count=7)
    refuse(cli, here, *learn, "few", "--out", "n.safetensors", says=["7 images", "50"])
    refuse(cli, here, "features", "show", "views.safetensors", "--seed", "1", says="--seed")
    refuse(cli, here, "features", "make", "digits", says=["'make'", "train or show"])
    refuse(cli, here, "fid", "images", "digits", "--features", "none.safetensors", says="none.safetensors")
    np.savez("same.npz", arr_0=np.full((60, 8, 8, 1), 9, np.uint8))
    refuse(cli, here, *learn, "same.npz", "--out", "n.safetensors", *SMALL[:-1], "2", says="collapsed")
    shown = cli("features", "show", "views.safetensors")
    assert shown.code == 0 and shown.stdout in Path("views.txt").read_text()
