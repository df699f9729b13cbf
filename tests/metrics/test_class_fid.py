"""FID within each class, beside singular values in NumPy; the Inception Score, which needs no reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffkd
from diffkd.metrics.features.digits import DigitsFeatures
from tests.refusals import refuse

CLASSES = ("bird", "cat", "10")


@pytest.fixture
def here(tmp_path, monkeypatch, image_folder) -> Path:
    """The reference has its classes in another place of the order, as it has one image more of each."""
    image_folder(tmp_path, classes=CLASSES, count=6)
    image_folder(tmp_path, name="real", classes=CLASSES, count=7, seed=1)
    image_folder(tmp_path, name="plain", count=30, seed=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def features(folder: Path) -> np.ndarray:
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    with torch.no_grad():
        return DigitsFeatures()(torch.from_numpy(pixels)[:, None]).numpy()


def fid(x: np.ndarray, y: np.ndarray) -> float:
    """tr (S1 S2)^½ as the nuclear norm of the centred samples' products."""
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross)


def test_each_class_and_their_mean(cli, here):
    code, out, err = cli("fid", "images", "real", "--features", "digits", "--per-class")
    assert code == 0, err
    first, *lines, mean = out.splitlines()
    found = {name: float(value) for name, value in (line[7:].split(": ") for line in lines)}
    expected = {
        name: fid(features(here / "images" / name), features(here / "real" / name)) for name in CLASSES
    }
    assert [*found] == ["10", "cat", "bird"]  # numbers, then names
    assert found == pytest.approx(expected, rel=1e-9)
    assert float(mean.removeprefix("mean FID of classes: ")) == pytest.approx(np.mean([*expected.values()]))
    assert first == cli("fid", "images", "real", "--features", "digits").stdout.strip()
    record = diffkd.evaluate("images", "real", ("class_fid",), features="digits")
    assert record["class_fids"] == found and "fid" not in record


def test_by_numbers_where_a_set_has_no_names(cli, here):
    """An archive beside a folder: class i of the one is class i of the other."""
    pixels, labels = [], []
    for number, name in enumerate(sorted(CLASSES)):
        for path in sorted((here / "real" / name).iterdir()):
            pixels.append(np.asarray(Image.open(path)))
            labels.append(number)
    order = np.random.default_rng(0).permutation(len(labels))
    np.savez(here / "real.npz", arr_0=np.stack(pixels)[order][..., None], labels=np.array(labels)[order])
    record = diffkd.evaluate("images", "real.npz", ("class_fid",), features="digits")
    named = diffkd.evaluate("images", "real", ("class_fid",), features="digits")
    assert [*record["class_fids"]] == ["0", "1", "2"]
    values = [named["class_fids"][name] for name in sorted(CLASSES)]
    assert [*record["class_fids"].values()] == pytest.approx(values, rel=1e-9)


def test_images_of_a_model_by_the_labels_that_they_are_drawn_with(cli, here, make_pipeline):
    make_pipeline(here, name="labelled", classes=3)
    args = ("--features", "digits", "--metrics", "class_fid", "--steps", "1", "--json")
    record = json.loads(cli("evaluate", "labelled", "real", *args).stdout)
    assert {*record["class_fids"]} == {"0", "1", "2"} and record["protocol"]["samples"] == 21
    assert record["class_fid"] == pytest.approx(np.mean([*record["class_fids"].values()]))


def test_what_has_no_classes_or_too_few_images_is_refused(cli, here):
    args = ("--per-class", "--features", "digits")
    refuse(cli, here, "fid", "plain", "real", *args, says=["class_fid", "the images have no class labels"])
    refuse(cli, here, "fid", "images", "plain", *args, says="the reference has no class labels")
    for path in sorted((here / "images" / "cat").iterdir())[1:]:
        path.unlink()
    refuse(cli, here, "fid", "images", "real", *args, says=["'cat' has 1", "7 of the reference"])
    for name in ("a.npz", "b.npz"):
        np.savez(here / name, mu=np.zeros(64), sigma=np.eye(64))
    refuse(cli, here, "fid", "a.npz", "b.npz", "--per-class", says=["statistics", "--per-class"])


def test_the_inception_score_needs_no_reference(cli, here):
    args = ("--metrics", "is", "--features", "digits", "--is-splits", "2")
    beside = diffkd.evaluate("plain", "real", ("is",), features="digits", is_splits=2)
    code, out, err = cli("evaluate", "plain", *args, "--out", "r.json")
    assert code == 0 and out.startswith("plain\n"), (out, err)
    record = json.loads(Path("r.json").read_text())
    assert (record["is"], record["is_std"]) == (beside["is"], beside["is_std"])
    assert record["protocol"]["reference"]["spec"] == "none"
    code, out, _ = cli("evaluate", "--repeat", "r.json")
    assert code == 0 and out.count("the same to the last digit") == 2
    assert diffkd.evaluate("plain", None, ("is",), features="digits", is_splits=2)["is"] == record["is"]
    refuse(cli, here, "evaluate", "plain", "--metrics", "is,fid", says=["against what", "--metrics is"])
