"""`diffkd stats`: its file beside NumPy's mean and covariance of the same features."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffkd import metrics
from diffkd.data.digits import Digits
from diffkd.io.environment import versions
from diffkd.metrics import features
from tests.refusals import refuse

TOY = """
import torch
import torch.nn.functional as F

class Quarters(torch.nn.Module):
    num_features = 4

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.double().mean(1, keepdim=True), 2).flatten(1) / 255

class Single(Quarters):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return super().forward(images).float() * self.weight

class Broken(Quarters):
    def forward(self, images):
        return super().forward(images) * float("nan")
"""


def quarters(images: np.ndarray) -> np.ndarray:
    """toy.Quarters of (N, 8, 8, C) uint8."""
    grey = images.astype(np.float64).mean(3)
    return grey.reshape(len(grey), 2, 4, 2, 4).mean((2, 4)).reshape(len(grey), 4) / 255


def of_folder(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))])


def pixels_sha256(images: np.ndarray) -> str:
    """Of the digests of all images in order, each of its shape and its bytes."""
    each = [hashlib.sha256(f"{tuple(x.shape)}".encode() + x.tobytes()).digest() for x in images]
    return hashlib.sha256(b"".join(each)).hexdigest()


def load(path: Path | str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture
def here(tmp_path, monkeypatch, image_folder) -> Path:
    """images: 30 in colour. classes: 3 times 9."""
    image_folder(tmp_path, count=30, channels=3)
    image_folder(tmp_path, name="classes", classes=["b", "a", "c"], count=9, seed=1)
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("toy", None)
    return tmp_path


@pytest.fixture
def compute(cli, here) -> Callable[..., dict[str, np.ndarray]]:
    """compute(*args) -> the arrays that the command writes."""

    def run(*args: object, features: str = "toy.Quarters") -> dict[str, np.ndarray]:
        code, _, err = cli("stats", *args, "--features", features, "--out", "ref.npz", "--overwrite")
        assert (code, err) == (0, "")
        return load("ref.npz")

    return run


@pytest.fixture
def refused(cli, here) -> Callable[..., None]:
    def run(*args: object, says: list[str] | str = "") -> None:
        refuse(cli, here, "stats", *args, says=says)

    return run


def check(arrays: dict[str, np.ndarray], features: np.ndarray) -> None:
    mu, sigma = features.mean(0), np.cov(features, rowvar=False)
    assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    assert arrays["mu"].shape == mu.shape and arrays["sigma"].shape == sigma.shape
    np.testing.assert_allclose(arrays["mu"], mu, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(arrays["sigma"], sigma, rtol=1e-10, atol=1e-14 * np.abs(sigma).max())
    assert arrays["num_samples"] == len(features)


# what is written ------------------------------------------------------------------------------------------


def test_digits(cli, here):
    """By the features that go with them, and the class of each."""
    assert cli("stats", "digits", "--out", "ref.npz").code == 0
    arrays = load("ref.npz")
    images = Digits(kind="digits").load()
    network = metrics.DigitsFeatures()
    check(arrays, network(torch.from_numpy(images.pixels)).numpy())
    assert np.array_equal(arrays["labels"], images.labels.numpy())
    protocol = json.loads(str(arrays["protocol"]))
    assert protocol["features"] == network.describe() and protocol["features"]["num_features"] == 64
    assert protocol["sha256"] == pixels_sha256(images.pixels.transpose(0, 2, 3, 1))


def test_a_folder(here, compute):
    arrays, images = compute("images"), of_folder(here / "images")
    check(arrays, quarters(images))
    protocol = json.loads(str(arrays["protocol"]))
    assert protocol["sha256"] == pixels_sha256(images)
    assert (protocol["samples"], protocol["name"]) == (30, "images")
    assert protocol["features"]["name"] == "toy.Quarters" and len(protocol["features"]["sha256"]) == 64
    assert protocol["versions"] == versions()
    assert "labels" not in arrays and "features" not in arrays


def test_a_file_of_images(compute):
    images = np.random.default_rng(3).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    np.savez("images.npz", arr_0=images, arr_1=np.arange(20) % 7)
    arrays = compute("images.npz")
    check(arrays, quarters(images))
    assert np.array_equal(arrays["labels"], np.arange(20) % 7)
    assert json.loads(str(arrays["protocol"]))["sha256"] == pixels_sha256(images)


def test_classes_are_kept(here, compute):
    arrays = compute("classes")
    assert np.array_equal(arrays["labels"], np.repeat([0, 1, 2], 9))
    check(arrays, quarters(of_folder(here / "classes")))


def test_a_data_set(here, compute):
    images = of_folder(here / "images")
    content = {"image": [Image.fromarray(x) for x in images], "label": [i % 2 for i in range(30)]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)}
    made = datasets.Dataset.from_dict(content, datasets.Features(kinds))
    datasets.DatasetDict({"train": made.select(range(20)), "test": made.select(range(20, 30))}).save_to_disk(
        "set"
    )
    check(compute("set", "--resize", 8), quarters(images[:20]))
    arrays = compute("set", "--resize", 8, "--split", "test")
    check(arrays, quarters(images[20:]))
    assert np.array_equal(arrays["labels"], np.arange(10) % 2)


def test_images_are_resized(here, compute):
    expected = [
        np.asarray(Image.open(path).resize((4, 4), Image.Resampling.BICUBIC))
        for path in sorted((here / "images").iterdir())
    ]
    grey = np.stack(expected).astype(np.float64).mean(3)
    check(compute("images", "--resize", 4), grey.reshape(30, 2, 2, 2, 2).mean((2, 4)).reshape(30, 4) / 255)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_batch_size_does_not_matter(here, compute, size):
    arrays = compute("images", "--batch-size", size, "--store-features")
    check(arrays, quarters(of_folder(here / "images")))
    np.testing.assert_allclose(arrays["features"], quarters(of_folder(here / "images")), rtol=1e-12)


def test_features_are_stored_as_they_are(here, compute):
    """In single precision, where the network computes so."""
    features = compute("images", "--store-features", features="toy.Single")["features"]
    assert features.dtype == np.float32
    assert np.array_equal(features, quarters(of_folder(here / "images")).astype(np.float32))


def test_the_weights_are_known_by_their_values(compute):
    one = json.loads(str(compute("images", features="toy.Single")["protocol"]))["features"]["sha256"]
    network = features.load("toy.Single")
    total = hashlib.sha256(b"weight () " + np.float32(1).tobytes())
    assert one == total.hexdigest()
    with torch.no_grad():
        network.weight += 1
    assert features.describe("toy.Single", network)["sha256"] != one


def test_the_file_is_replaced_when_asked(cli, here, refused):
    args = ["--features", "toy.Quarters", "--out", "ref.npz"]
    assert cli("stats", "images", *args).code == 0
    refused("classes", *args, says=["ref.npz", "exists already", "--overwrite"])
    assert cli("stats", "classes", *args, "--overwrite").code == 0
    check(load("ref.npz"), quarters(of_folder(here / "classes")))


def test_into_a_folder_that_is_not_there_yet(cli, here):
    assert cli("stats", "images", "--features", "toy.Quarters", "--out", "new/er/ref.npz").code == 0
    assert [p.name for p in (here / "new" / "er").iterdir()] == ["ref.npz"]


def test_what_is_said(cli, here):
    code, out, err = cli("stats", "images", "--features", "toy.Quarters", "--out", "ref.npz")
    assert (code, err) == (0, "") and "30 images" in out and "toy.Quarters" in out and "ref.npz" in out


def test_one_that_evaluate_reads(cli, here, compute):
    """With it the distance of the images to themselves is none, and every metric of stored features works."""
    compute("images", "--store-features")
    code, out, err = cli(
        "evaluate", "images", "--reference", "ref.npz", "--metrics", "fid,kid,prdc", "--json",
        "--features", "toy.Quarters",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["fid"] == pytest.approx(0, abs=1e-12) and found["protocol"]["reference"]["count"] == 30
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["protocol"]["features"]["name"] == "toy.Quarters"


def test_two_processes_are_one(here, compute, launched):
    args = ["classes", "--store-features", "--batch-size", 7]
    one = compute(*args)
    done = launched(2, "stats", *args, "--features", "toy.Quarters", "--out", "two.npz")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two.npz") == 1
    two = load("two.npz")
    for key in ("mu", "sigma", "features", "labels", "num_samples"):
        np.testing.assert_allclose(two[key], one[key], rtol=1e-12, atol=1e-15)
    for key in ("features", "samples", "name", "spec", "sha256"):
        assert protocol_of(two)[key] == protocol_of(one)[key], key


# mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["images"], ["--out"]),
        (["images", "--out", "ref"], ["--out", "ref", ".npz"]),
        (["images", "--out", "ref.npy"], ["ref.npy", ".npz"]),
        (["images", "--out", "toy.py/ref.npz"], ["toy.py"]),
        (["./gone", "--out", "ref.npz"], ["./gone", "does not exist"]),
        (["gone.npz", "--out", "ref.npz"], ["gone.npz", "does not exist"]),
        (["toy.py", "--out", "ref.npz"], ["toy.py"]),
        (["model.pkl", "--out", "ref.npz"], ["model.pkl", "pickle", "convert"]),
        (["owner/set", "--out", "ref.npz"], ["owner/set", "--resize"]),
        (["images", "--out", "ref.npz", "--features", "inseption"], ["inseption", "inception"]),
        (["images", "--out", "ref.npz", "--features", "toy.Broken"], ["finite"]),
        (["images", "--out", "ref.npz", "--batch-size", 0], ["--batch-size"]),
        (["images", "--out", "ref.npz", "--resize", 0], ["--resize"]),
    ],
    ids=lambda x: " ".join(map(str, x))[:60],
)
def test_mistakes(refused, args, says):
    features = [] if "--features" in args else ["--features", "toy.Quarters"]
    refused(*args, *features, says=says)


def test_a_folder_by_the_files_name(refused, here):
    (here / "ref.npz").mkdir()
    args = ["images", "--features", "toy.Quarters", "--out", "ref.npz"]
    refused(*args, says="ref.npz")
    refused(*args, "--overwrite", says=["ref.npz", "folder"])


def test_a_model(refused, here, make_pipeline):
    make_pipeline(here)
    refused("pipeline", "--out", "ref.npz", says=["pipeline", "model", "diffkd sample"])


def test_statistics_are_no_images(refused, compute):
    compute("images")
    refused("ref.npz", "--out", "new.npz", "--features", "toy.Quarters", says=["ref.npz", "arr_0", "mu"])


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(refused, here, count):
    for path in sorted((here / "images").iterdir())[count:]:
        path.unlink()
    says = ["images", "at least 2" if count else "no images"]
    refused("images", "--features", "toy.Quarters", "--out", "ref.npz", says=says)


def test_sizes_that_differ(refused, here, image_folder, compute):
    image_folder(here, name="large", count=3, size=(12, 9), channels=3)
    shutil.move("large", "images")
    refused("images", "--features", "toy.Quarters", "--out", "ref.npz", says=["12x9", "8x8", "--resize"])
    assert compute("images", "--resize", 8)["num_samples"] == 33


def test_nothing_is_half_written(refused, cli, here):
    """The last of the images is broken: what was there before still is."""
    args = ["--features", "toy.Quarters", "--out", "ref.npz"]
    assert cli("stats", "classes", *args).code == 0
    path = here / "images" / "029.png"
    path.write_bytes(path.read_bytes()[:50])
    refused("images", *args, "--overwrite", "--batch-size", 4, says=["029.png", "cannot be read"])


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written(refused, here):
    (here / "closed").mkdir(mode=0o500)
    refused("images", "--features", "toy.Quarters", "--out", "closed/ref.npz", says="closed")


def test_images_that_the_features_do_not_take(refused, here):
    network = (
        "class Wide(torch.nn.Module):\n    num_features = 3\n    def forward(self, x): return x @ x.float()\n"
    )
    (here / "wide.py").write_text("import torch\n" + network)
    sys.modules.pop("wide", None)
    refused("images", "--features", "wide.Wide", "--out", "ref.npz", says="wide.Wide")


def protocol_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return json.loads(str(arrays["protocol"]))


def test_the_same_twice(compute):
    """Byte for byte, but for the archive's times."""
    one, two = compute("images"), compute("images")
    assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)
    assert protocol_of(one) == protocol_of(two)
