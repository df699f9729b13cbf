"""What models and images are compared with: every form of one set gives one number."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from diffkd import metrics
from diffkd.data.digits import Digits
from diffkd.metrics import frechet
from diffkd.metrics.evaluation.image_sets import parse
from diffkd.metrics.evaluation.reference import Reference
from diffkd.runs import repeat
from tests.refusals import refuse

TOY = """
import torch
import torch.nn.functional as F

class Quarters(torch.nn.Module):
    num_features = 4

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.double().mean(1, keepdim=True), 2).flatten(1) / 255 * self.weight

class Others(Quarters):
    def forward(self, images):
        return super().forward(images) ** 2

class Heavier(Quarters):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))

class Halves(Quarters):
    num_features = 2

    def forward(self, images):
        return super().forward(images)[:, :2]
"""
METRICS = "fid,kid,prdc,fd_inf"


def quarters(images: np.ndarray) -> np.ndarray:
    """toy.Quarters of (N, 8, 8, C) uint8."""
    grey = images.astype(np.float64).mean(3)
    return grey.reshape(len(grey), 2, 4, 2, 4).mean((2, 4)).reshape(len(grey), 4) / 255


def fid(a: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> float:
    """Of features (N, d) and a Gaussian of full rank: the root by the eigenvalues of the product."""
    ours = np.cov(a, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(ours @ sigma).real.clip(0)).sum()
    return ((a.mean(0) - mu) ** 2).sum() + np.trace(ours) + np.trace(sigma) - 2 * root


def of_folder(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))])


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_pipeline, image_folder) -> Path:
    """images: 40, to be measured. real: 50, to compare with. labelled: a model of 10 classes."""
    root = tmp_path_factory.mktemp("made")
    image_folder(root, count=40, channels=3)
    image_folder(root, name="real", count=50, channels=3, seed=1)
    make_pipeline(root, name="labelled", classes=10)
    (root / "toy.py").write_text(TOY)
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("toy", None)
    return tmp_path


@pytest.fixture
def measure(cli, here) -> Callable[..., dict[str, Any]]:
    """measure(reference, *args, target="images") -> the record."""

    def run(
        reference: str,
        *args: object,
        target: str = "images",
        features: str = "toy.Quarters",
        may_say: str = "\0",
    ) -> Any:
        code, out, err = cli(
            "evaluate", target, "--reference", reference, "--features", features, *args, "--json"
        )
        assert code == 0 and (not err or may_say in err)
        return json.loads(out)

    return run


@pytest.fixture
def refused(cli, here) -> Callable[..., None]:
    def run(
        reference: str, *args: object, says: list[str] | str = "", features: str = "toy.Quarters"
    ) -> None:
        refuse(
            cli,
            here,
            "evaluate",
            "images",
            "--reference",
            reference,
            "--features",
            features,
            *args,
            says=says,
        )

    return run


@pytest.fixture
def stats(cli, here) -> Callable[..., Path]:
    """stats(*args) -> ref.npz, of the folder `real` by default features."""

    def run(*args: object, images: str = "real", features: str = "toy.Quarters") -> Path:
        assert (
            cli("stats", images, "--features", features, "--out", "ref.npz", "--overwrite", *args).code == 0
        )
        return here / "ref.npz"

    return run


def rewrite(path: Path, **changes: Any) -> None:
    """The file with other arrays; None for without it."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    arrays = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
    np.savez(path, **arrays)


# one set in every form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "images", "stats", "both"])
def test_every_form_of_a_reference_gives_one_number(here, measure, stats, form):
    options = ["--metrics", METRICS, "--kid-subset-size", 20]
    expected = measure("real", *options)
    pixels = of_folder(here / "real")
    if form == "images":
        np.savez("ref.npz", arr_0=pixels)
    elif form == "stats":
        stats("--store-features")
    elif form == "both":
        rewrite(stats(), arr_0=pixels)  # statistics, and the images for what needs every feature
    found = measure("real" if form == "folder" else "ref.npz", *options)
    for key in ("fid", "kid", "kid_std", "precision", "recall", "density", "coverage", "fd_inf"):
        assert found[key] == pytest.approx(expected[key], abs=1e-12), key
    for key in ("count", "sha256"):
        assert found["protocol"]["reference"][key] == expected["protocol"]["reference"][key], key


def test_a_file_of_others(here, measure):
    """With nothing in it but a mean and a covariance, whatever their numbers."""
    rng = np.random.default_rng(2)
    root = rng.standard_normal((4, 4))
    mu, sigma = rng.standard_normal(4), root @ root.T
    np.savez("ref.npz", mu=mu, sigma=sigma)
    found = measure("ref.npz", "--metrics", "fid,fd_inf")
    x = quarters(of_folder(here / "images"))
    assert found["fid"] == pytest.approx(fid(x, mu, sigma), rel=1e-9)
    line = metrics.frechet_infinity(
        torch.from_numpy(x), frechet.gaussian(torch.from_numpy(mu), torch.from_numpy(sigma))
    )
    assert found["fd_inf"] == pytest.approx(line.value, rel=1e-9)
    reference = found["protocol"]["reference"]
    assert (reference["name"], reference["count"], len(reference["sha256"])) == ("ref.npz", None, 64)
    np.savez("ref.npz", mu=mu + 1e-9, sigma=sigma)
    assert measure("ref.npz")["protocol"]["reference"]["sha256"] != reference["sha256"]


@pytest.mark.parametrize("dtype", [np.float32, ">f8"])
def test_a_file_of_others_in_other_numbers(measure, here, dtype):
    x = quarters(of_folder(here / "real"))
    mu, sigma = x.mean(0).astype(dtype), np.cov(x, rowvar=False).astype(dtype)
    np.savez_compressed("ref.npz", mu=mu, sigma=sigma)
    found = measure("ref.npz")["fid"]
    expected = fid(quarters(of_folder(here / "images")), mu.astype(float), sigma.astype(float))
    assert found == pytest.approx(expected, abs=1e-9)


def test_features_are_those_of_the_file(cli, here, stats):
    """Where none are named, and they are diffkd's own: a file does not get to name code."""
    assert cli("stats", "real", "--features", "digits", "--out", "digits.npz").code == 0
    code, out, _ = cli("evaluate", "images", "--reference", "digits.npz", "--json")
    assert code == 0 and json.loads(out)["protocol"]["features"]["name"] == "digits"
    stats()
    code, out, err = cli("evaluate", "images", "--reference", "ref.npz", "--json")
    assert (code, out) == (2, "") and "name it: --features toy.Quarters" in err


def test_digits_in_every_form(cli, here, measure):
    """As the word, as a file of statistics and as images."""
    assert cli("stats", "digits", "--out", "ref.npz").code == 0
    pixels = Digits(kind="digits").load().pixels.transpose(0, 2, 3, 1)
    np.savez("pixels.npz", arr_0=pixels)
    may_say = "images of 8x8 in colour: numbers by them say little"  # where the images come first
    names = ("digits", "ref.npz", "pixels.npz")
    found = [measure(name, features="digits", may_say=may_say) for name in names]
    for other in found[1:]:
        assert other["fid"] == pytest.approx(found[0]["fid"], rel=1e-12)
    assert len({record["protocol"]["reference"]["sha256"] for record in found}) == 1


def test_the_samples_are_as_many_as_the_reference_has(measure, stats):
    for reference in ("real", str(stats())):
        found = measure(reference, "--steps", 1, target="labelled")
        assert found["protocol"]["samples"] == 50


@pytest.mark.parametrize("form", ["folder", "stats", "images"])
def test_labels_are_those_of_the_reference(here, measure, stats, image_folder, cli, form):
    """Image i of a class-conditional model has the label of the reference's image i."""
    image_folder(here, name="sorted", classes=["a", "b", "c"], count=7)
    labels = np.repeat([0, 1, 2], 7)
    name = "sorted" if form == "folder" else "ref.npz"
    if form == "stats":
        stats(images="sorted")
    elif form == "images":
        np.savez("ref.npz", arr_0=of_folder(here / "sorted"), arr_1=labels)
    found = measure(name, "--steps", 2, "--samples", 30, target="labelled")
    given = ",".join(str(labels[i % 21]) for i in range(30))
    args = ["--steps", 2, "-n", 30, "--classes", given, "--out", "drawn.npz"]
    assert cli("sample", "labelled", *args).code == 0
    real = quarters(of_folder(here / "sorted"))
    with np.load("drawn.npz") as file:
        expected = fid(quarters(file["arr_0"]), real.mean(0), np.cov(real, rowvar=False))
    assert found["fid"] == pytest.approx(expected, abs=1e-9) and found["protocol"]["labels"] == "data"


def test_labels_that_a_model_does_not_have(cli, here, image_folder):
    image_folder(here, name="sorted", classes=[f"{i:02d}" for i in range(11)], count=2)
    for sampler in ("ddim", "stock"):
        code, out, err = cli(
            "evaluate", "labelled", "--reference", "sorted", "--features", "toy.Quarters", "--steps", 1,
            "--sampler", sampler,
        )  # fmt: skip
        assert (code, out) == (2, "") and "class label 10 is out of range" in err


def test_a_reference_is_resized(here, measure, image_folder):
    image_folder(here, name="large", count=20, size=(16, 16), channels=3)
    found = measure("large", "--resize", 8)
    small = [
        np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BICUBIC))
        for path in sorted((here / "large").iterdir())
    ]
    real = quarters(np.stack(small))
    expected = fid(quarters(of_folder(here / "images")), real.mean(0), np.cov(real, rowvar=False))
    assert found["fid"] == pytest.approx(expected, abs=1e-9)
    assert found["protocol"]["reference"]["spec"]["resize"] == 8


def test_in_python(here, stats):
    """Reference knows of a file what diffkd stats wrote."""
    stats("--store-features")
    reference = Reference(parse("ref.npz"))
    x = quarters(of_folder(here / "real"))
    assert (reference.count, reference.name, reference.labels) == (50, "ref.npz", None)
    assert reference.protocol["features"]["name"] == "toy.Quarters"
    np.testing.assert_allclose(reference.stored_features, x, rtol=1e-12)
    np.testing.assert_allclose(reference.statistics.sigma, np.cov(x, rowvar=False), rtol=1e-10)


# features that do not fit ---------------------------------------------------------------------------------


def test_other_numbers_of_features(refused, stats):
    stats()
    refused("ref.npz", features="toy.Halves", says=["ref.npz", "4 features", "toy.Halves", "2"])
    refused("ref.npz", "--allow-mismatch", features="toy.Halves", says=["ref.npz", "4 features"])
    refused("ref.npz", features="digits", says=["4 features", "64"])


@pytest.mark.parametrize("features", ["toy.Others", "toy.Heavier"])
def test_other_features_of_the_same_number(here, refused, measure, stats, features, cli):
    """Another name, other weights: not without a word, which the record keeps."""
    stats()
    refused("ref.npz", features=features, says=["ref.npz", "other features", "--allow-mismatch"])
    args = ["--allow-mismatch", "--out", "r.json"]
    found = measure("ref.npz", *args, features=features)
    x, real = quarters(of_folder(here / "images")), quarters(of_folder(here / "real"))
    x = x**2 if features == "toy.Others" else 2 * x
    assert found["fid"] == pytest.approx(fid(x, real.mean(0), np.cov(real, rowvar=False)), abs=1e-9)
    assert found["protocol"]["evaluation"]["allow_mismatch"] is True
    assert repeat.repeat(Path("r.json"), Console(quiet=True), features_name=features)
    plain = ["evaluate", "images", "--reference", "ref.npz", "--features", features, "--allow-mismatch"]
    code, out, _ = cli(*plain)
    assert code == 0 and "compare with no others" in out


def test_weights_that_were_changed_since(refused, stats):
    """The same name."""
    stats()
    text = Path("toy.py").read_text()
    Path("toy.py").write_text(text.replace("torch.ones(4,", "1.5 * torch.ones(4,"))
    shutil.rmtree("__pycache__", ignore_errors=True)
    sys.modules.pop("toy", None)
    refused("ref.npz", says=["ref.npz", "sha256", "--allow-mismatch"])


def test_a_mismatch_is_not_compared_with_a_match(here, measure, stats, cli):
    """A number that "cannot be compared" is not."""
    stats()
    measure("ref.npz", "--out", "a.json", "--allow-mismatch")
    stats(features="toy.Heavier")
    measure("ref.npz", "--out", "b.json", "--allow-mismatch")
    code, out, _ = cli("compare", "a.json", "b.json")
    assert code == 1, out


@pytest.mark.parametrize("field", ["resize", "sha256"])
def test_how_inception_resized(here, refused, stats, field):
    """By a protocol as diffkd stats writes it; 2,048 features that were never computed."""
    network = {"name": "inception", "sha256": "0" * 64, "num_features": 64, "resize": "clean"}
    own = metrics.DigitsFeatures().describe()
    rng = np.random.default_rng(0).standard_normal((100, 64))
    known = {**own, field: network[field]}
    np.savez(
        "ref.npz", mu=rng.mean(0), sigma=np.cov(rng, rowvar=False), protocol=json.dumps({"features": known})
    )
    refused("ref.npz", features="digits", says=["ref.npz", field, network[field], "--allow-mismatch"])


# files that are none --------------------------------------------------------------------------------------

MU, SIGMA = np.zeros(4), np.eye(4)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"sigma": SIGMA}, "no mu"),
        ({"mu": MU}, "no sigma"),
        ({"x": MU}, "no mu and no sigma"),
        ({}, "no mu and no sigma"),
        ({"mu": MU, "sigma": np.full((4, 4), np.nan)}, "not finite"),
        ({"mu": MU + np.inf, "sigma": SIGMA}, "not finite"),
        ({"mu": MU, "sigma": np.triu(np.ones((4, 4)))}, "not symmetric"),
        ({"mu": MU, "sigma": SIGMA[:3]}, "do not fit"),
        ({"mu": MU[None], "sigma": SIGMA}, "do not fit"),
        ({"mu": np.zeros(3), "sigma": SIGMA}, "do not fit"),
        ({"mu": np.array(["a"] * 4), "sigma": SIGMA}, "ref.npz"),
        ({"mu": MU, "sigma": SIGMA + 1j}, "ref.npz"),
        ({"mu": MU, "sigma": -SIGMA}, "ref.npz"),
        ({"mu": MU, "sigma": SIGMA, "num_samples": 1}, "num_samples"),
        ({"mu": MU, "sigma": SIGMA, "num_samples": 2.5}, "num_samples"),
        ({"mu": MU, "sigma": SIGMA, "protocol": "{"}, "protocol"),
        ({"mu": MU, "sigma": SIGMA, "protocol": '{"features": 3}'}, "protocol"),
        ({"mu": MU, "sigma": SIGMA, "num_samples": 9, "features": np.zeros((8, 4))}, "features"),
        ({"mu": np.array([None] * 4), "sigma": SIGMA}, "pickle"),
        ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "at least 2"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "at least 2"),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, "shape (4, 8, 8)"),
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, "shape (4, 3, 8, 8)"),
        ({"arr_0": np.zeros((4, 8, 8, 3))}, "float64"),
        ({"arr_0": np.full((4, 8, 8, 3), np.nan)}, "NaN"),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x) or "empty",
)
def test_files_that_are_no_reference(refused, arrays, says):
    np.savez("ref.npz", **arrays)
    refused("ref.npz", says=["ref.npz", says])


def test_what_another_tool_calls_features_or_labels_is_left_alone(here):
    np.savez("ref.npz", mu=MU, sigma=SIGMA, features=np.zeros((8, 3)), labels=np.array(["a"]))
    reference = Reference(parse("ref.npz"))
    assert reference.stored_features is None and reference.labels is None and reference.count is None


@pytest.mark.parametrize(
    "labels", [np.array(["a", "b"] * 25), np.arange(50.0) / 7, np.zeros((50, 2), int), np.zeros(3, int)]
)
def test_labels_that_are_none(here, stats, cli, labels):
    """Left out, or refused in a line; no crash, and no labels of other images."""
    rewrite(stats(), labels=labels)
    code, out, err = cli("evaluate", "labelled", "--reference", "ref.npz", "--steps", 1, "--json")
    if code == 0:
        assert json.loads(out)["protocol"]["labels"] == "balanced"
    else:
        assert (code, len(err.splitlines())) == (2, 1) and "labels" in err


def test_stored_features_that_are_not_finite(refused, stats):
    rewrite(stats(), features=np.full((50, 4), np.nan))
    refused("ref.npz", "--metrics", "kid,prdc", says=["ref.npz", "finite"])


@pytest.mark.parametrize("metric", ["kid", "prdc"])
def test_statistics_alone_are_not_enough(refused, stats, metric):
    stats()
    refused("ref.npz", "--metrics", metric, says=["ref.npz", "features", "--store-features"])
    np.savez("third.npz", mu=MU, sigma=SIGMA)
    refused("third.npz", "--metrics", f"fid,{metric}", says=["third.npz", "features", "--store-features"])


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pt", ".PTH", ".bin"])
def test_pickles_are_not_opened(refused, suffix):
    says = [f"ref{suffix}", "pickle", "convert", "numpy.savez"]
    refused(f"ref{suffix}", says=says)
    Path(f"ref{suffix}").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    refused(f"ref{suffix}", says=says)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone.npz", "does not exist"),
        ("gone/er", "--resize"),
        ("./gone", "does not exist"),
        ("toy.py", "not an .npz"),
        ("labelled", "model"),
        ("", "name"),
    ],
)
def test_paths_that_are_no_reference(refused, name, says):
    refused(name, says=[name, says])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"words"])
def test_files_that_are_broken(refused, content):
    Path("ref.npz").write_bytes(content)
    refused("ref.npz", says=["ref.npz", "cannot be read"])


def test_one_image_of_another_size(refused, here):
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(here / "real" / "zz.png")
    refused("real", says=["real", "8x9", "8x8", "--resize"])


def test_all_images_the_same(here, measure):
    """A covariance of nothing but zeros is one."""
    for path in (here / "real").iterdir():
        Image.fromarray(np.full((8, 8, 3), 51, np.uint8)).save(path)
    x = quarters(of_folder(here / "images"))
    expected = ((x.mean(0) - 0.2) ** 2).sum() + np.trace(np.cov(x, rowvar=False))
    assert measure("real")["fid"] == pytest.approx(expected, abs=1e-12)
