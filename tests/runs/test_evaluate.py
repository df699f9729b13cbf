"""`diffkd evaluate` and `diffkd compare`: every number again from the images themselves, by NumPy."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import diffkd
from diffkd import metrics
from diffkd.core import samplers
from diffkd.data.digits import Digits
from diffkd.errors import UserError
from diffkd.io.environment import versions
from diffkd.metrics import features, frechet
from diffkd.metrics.evaluation import config, image_stream
from diffkd.metrics.features.inception import InceptionV3
from diffkd.metrics.score import inception_score
from diffkd.models import loading
from diffkd.runs.reports import model_card
from diffkd.runs.stats import stats
from tests.refusals import refuse, tree

ALL = "fid,kid,is,prdc,fd_inf"


# Features that NumPy has too, one from each quarter, and classes for the Inception Score.
TOY = """
import torch

import diffkd
import torch.nn.functional as F

class Quarters(torch.nn.Module):
    num_features = 4

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.double().mean(1, keepdim=True), 2).flatten(1) / 255

    def probabilities(self, features):
        return (10 * features).softmax(1)

class Colours(torch.nn.Module):
    num_features = 3

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 8)

    def forward(self, images):
        return self.conv(images.float()).flatten(1)

class Broken(Quarters):
    def forward(self, images):
        return super().forward(images) * float("nan")

class Liar(Quarters):
    num_features = 5

class Wants(Quarters):
    def __init__(self, size):
        super().__init__()
"""


def quarters(images: np.ndarray) -> np.ndarray:
    """toy.Quarters of (N, 8, 8, C) uint8."""
    grey = images.astype(np.float64).mean(3)
    return grey.reshape(len(grey), 2, 4, 2, 4).mean((2, 4)).reshape(len(grey), 4) / 255


def digits_features(images: np.ndarray) -> np.ndarray:
    network = metrics.DigitsFeatures()
    return network(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def fid(a: np.ndarray, b: np.ndarray) -> float:
    """From features (N, d) and (M, d): the trace of the root is a nuclear norm, without any covariance."""
    x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (a, b))
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross


def digits() -> tuple[np.ndarray, list[int]]:
    images = Digits(kind="digits").load()
    return images.pixels.transpose(0, 2, 3, 1), images.labels.tolist()


@functools.cache
def real_digits() -> np.ndarray:
    """Their features."""
    return digits_features(digits()[0])


def of_folder(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))])


def give_steps(folder: Path, steps: int) -> Path:
    """Makes a student of a pipeline."""
    denoiser = loading.load(folder)
    denoiser.steps = steps
    model_card.write(folder, model_card.describe(denoiser))
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_pipeline, image_folder) -> Path:
    """Pipelines (plain, labelled, colour, student of 4 steps), two folders, and digits.npz."""
    root = tmp_path_factory.mktemp("made")
    make_pipeline(root, name="plain")
    make_pipeline(root, name="labelled", classes=10)
    make_pipeline(root, name="colour", channels=3)
    give_steps(make_pipeline(root, name="student", seed=1), 4)
    image_folder(root, name="images", count=41, channels=3)
    image_folder(root, name="real", count=60, seed=1)
    (root / "toy.py").write_text(TOY)
    stats("digits", root / "digits.npz", Console(quiet=True), store=True)
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A copy of them to work in."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("toy", None)
    # As if they were diffkd's own: that a record does not get to name code is for tests/test_untrusted.py.
    monkeypatch.setattr(features, "NAMES", (*features.NAMES, "toy.Quarters"))
    return tmp_path


@pytest.fixture
def measure(cli, here) -> Callable[..., Any]:
    """measure(*args) -> the record that --json prints; a list of several."""

    def run(*args: object) -> Any:
        code, out, err = cli("evaluate", *args, "--json")
        assert (code, err) == (0, "")
        return strict(out)

    return run


def strict(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def sampled(cli, here) -> Callable[..., np.ndarray]:
    """sampled(model, n, *args) -> images (N, H, W, C) that `diffkd sample` writes."""

    def run(model: str, n: int, *args: object) -> np.ndarray:
        assert cli("sample", model, "-n", n, "--out", "s.npz", "--overwrite", *args).code == 0
        with np.load("s.npz") as file:
            return file["arr_0"]

    return run


@pytest.fixture
def refused(cli, here) -> Callable[..., str]:
    """refused(*args, says=[...]): one line, status 2, nothing written. The line is returned."""

    def run(*args: object, says: list[str] | str = "") -> str:
        return refuse(cli, here, *args, says=says)

    return run


# what is measured -----------------------------------------------------------------------------------------


def test_a_folder(here, measure):
    found = measure("images", "--reference", "real", "--features", "toy.Quarters")
    assert found["fid"] == pytest.approx(
        fid(quarters(of_folder(here / "images")), quarters(of_folder(here / "real"))), abs=1e-9, rel=1e-9
    )
    assert found["protocol"]["samples"] == 41 and found["protocol"]["reference"]["count"] == 60


def test_from_python(here, measure):
    """diffkd.evaluate gives the record that the command prints."""
    options = {"features": "toy.Quarters", "metrics": ("fid", "kid"), "kid_subset_size": 20}
    found = diffkd.evaluate("images", here / "real", **options)
    more = ["--metrics", "fid,kid", "--kid-subset-size", 20]
    printed = measure("images", "--reference", "real", "--features", "toy.Quarters", *more)
    assert [found[key] for key in ("fid", "kid", "kid_std")] == [
        printed[k] for k in ("fid", "kid", "kid_std")
    ]
    several = diffkd.evaluate("student", "digits", steps=[1, 2], samples=4)
    assert [record["steps"] for record in several] == [1, 2]
    with pytest.raises(UserError, match="teacher is for the metric agreement"):
        diffkd.evaluate("student", "digits", teacher="student")


def some_of(total: int, count: int) -> list[int]:
    """What is measured where fewer are asked for than there are."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].tolist())


def test_some_of_a_folder(here, measure):
    """A fixed random choice, since folders are in the order of their classes."""
    found = measure("images", "--reference", "real", "--features", "toy.Quarters", "--samples", 30)
    images = of_folder(here / "images")
    chosen = images[some_of(len(images), 30)]
    expected = fid(quarters(chosen), quarters(of_folder(here / "real")))
    assert found["fid"] == pytest.approx(expected, abs=1e-9)
    assert found["protocol"]["samples"] == 30


def test_a_file_of_images(here, measure):
    images = np.random.default_rng(3).integers(0, 256, (70, 8, 8, 1), dtype=np.uint8)
    np.savez("images.npz", arr_0=images)
    found = measure("images.npz", "--reference", "digits")
    assert found["fid"] == pytest.approx(fid(digits_features(images), real_digits()), rel=1e-9)


def test_digits_against_digits(measure):
    assert measure("digits", "--reference", "digits")["fid"] == pytest.approx(0, abs=1e-9)


def test_a_model_in_several_steps(measure, sampled):
    real = real_digits()
    found = measure("plain", "--reference", "digits", "--steps", "8,2,1", "--samples", 100, "--seed", 5)
    assert [record["steps"] for record in found] == [8, 2, 1] == [record["nfe"] for record in found]
    for record in found:
        drawn = sampled("plain", 100, "--steps", record["steps"], "--seed", 5)
        assert record["fid"] == pytest.approx(fid(digits_features(drawn), real), rel=1e-9)
    assert len({record["fid"] for record in found}) == 3


def test_a_student_in_its_own_steps(measure, sampled):
    found = measure("student", "--reference", "digits.npz", "--samples", 70)
    expected = fid(digits_features(sampled("student", 70)), real_digits())
    assert found["fid"] == pytest.approx(expected, rel=1e-9)
    assert (found["steps"], found["protocol"]["steps"]) == (4, 4)


@pytest.mark.parametrize("sampler", ["heun", "ancestral"])
def test_other_samplers(measure, sampled, sampler):
    options = ["--steps", 3, "--sampler", sampler]
    found = measure("plain", "--reference", "digits.npz", "--samples", 70, *options)
    expected = fid(digits_features(sampled("plain", 70, *options)), real_digits())
    assert found["fid"] == pytest.approx(expected, rel=1e-9)
    assert found["protocol"]["sampler"] == sampler
    assert found["nfe"] == (5 if sampler == "heun" else 3)


@pytest.mark.parametrize("classes", ["data", "balanced", "3,1,4", None])
def test_a_model_with_classes(measure, sampled, classes):
    """By default the labels are the reference's, a fixed random choice where there are more."""
    images, labels = digits()
    args = [] if classes is None else ["--classes", classes]
    found = measure("labelled", "--reference", "digits.npz", "--steps", 2, "--samples", 80, *args)
    own = [labels[i] for i in some_of(len(labels), 80)]
    given = ",".join(map(str, own)) if classes in (None, "data") else classes
    drawn = sampled("labelled", 80, "--steps", 2, "--classes", given)
    assert found["fid"] == pytest.approx(fid(digits_features(drawn), real_digits()), rel=1e-9)
    assert found["protocol"]["labels"] == {None: "data", "3,1,4": [3, 1, 4]}.get(classes, classes)


def test_guidance(measure, sampled):
    """Label 9 as the one that means no class."""
    options = ["--reference", "digits.npz", "--steps", 2, "--samples", 70, "--classes", "0-3"]
    found = measure("labelled", *options, "-w", 3, "--null-label", 9)
    denoiser = loading.load("labelled")
    loading.set_null_label(denoiser, 9)
    labels, batches = [i % 4 for i in range(70)], []
    from diffkd.generation.generator import generate

    for batch in generate(denoiser, 70, steps=2, labels=labels, guidance=3.0):
        batches.append(batch.numpy())
    expected = fid(digits_features(np.concatenate(batches)), real_digits())
    assert found["fid"] == pytest.approx(expected, rel=1e-9)
    assert (found["nfe"], found["protocol"]["guidance"]) == (4, 3.0)
    assert found["fid"] != measure("labelled", *options)["fid"]


@pytest.mark.parametrize("target", [["images", "--samples", 41], ["plain", "--steps", 2, "--samples", 41]])
def test_the_batch_size_does_not_matter(measure, target):
    def found(size: int) -> dict[str, Any]:
        more = ["--features", "toy.Quarters", "--metrics", ALL, "--batch-size", size, "--kid-subset-size", 20]
        return measure(*target, "--reference", "real", *more)

    whole = found(64)
    for size in (1, 7, 41):
        other = found(size)
        for key in ("fid", "kid", "kid_std", "is", "is_std", "precision", "recall", "density", "coverage"):
            assert other[key] == pytest.approx(whole[key], abs=1e-9), key
        assert other["protocol"]["batch_size"] == size


def test_every_metric(here, measure):
    more = ["--kid-subset-size", 20, "--kid-subsets", 30, "--is-splits", 4]
    found = measure("images", "--reference", "real", "--features", "toy.Quarters", "--metrics", ALL, *more)
    x, y = (torch.from_numpy(quarters(of_folder(here / name))) for name in ("images", "real"))
    kid = metrics.kernel_distance(x, y, subsets=30, subset_size=20)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    score = inception_score((10 * x).softmax(1)[order.argsort()], 4)
    near, dense = metrics.precision_recall(y, x), metrics.density_coverage(y, x)
    assert (found["kid"], found["kid_std"]) == pytest.approx((kid.mean, kid.std), abs=1e-12)
    assert (found["is"], found["is_std"]) == pytest.approx((score.mean, score.std), abs=1e-12)
    assert (found["precision"], found["recall"]) == tuple(near)
    assert (found["density"], found["coverage"]) == tuple(dense)
    line = metrics.frechet_infinity(x, frechet.gaussian(y.mean(0), torch.cov(y.T)))
    assert (found["fd_inf"], found["fd_inf_slope"]) == pytest.approx((line.value, line.slope), abs=1e-9)


@pytest.mark.parametrize("name", [name for name in metrics.__all__ if not name.startswith(("CLIP", "DINO"))])
def test_public_names_are_no_modules(name):
    """Whatever was imported before: a function must not hide behind the module of its name."""
    __import__("diffkd.metrics.evaluation.evaluator")
    assert callable(getattr(metrics, name)), getattr(metrics, name)


def test_order_and_repetition_of_metrics(measure):
    args = ["images", "--reference", "real", "--features", "toy.Quarters", "--metrics"]
    one, other = measure(*args, "kid,fid,kid"), measure(*args, "fid,kid")
    assert (one["fid"], one["kid"]) == (other["fid"], other["kid"])


def test_an_interval(measure):
    args = ["images", "--reference", "real", "--features", "toy.Quarters"]
    found = measure(*args, "--bootstrap", 50)
    assert found["fid_low"] < found["fid"] < found["fid_high"] and found["fid_std"] > 0
    assert found["fid"] == pytest.approx(measure(*args)["fid"], abs=1e-12)


def test_agreement(measure, sampled):
    """Image by image with the teacher, from the same noise."""
    options = ["--reference", "digits.npz", "--samples", 70, "--metrics", "agreement"]
    found = measure("student", *options, "--teacher", "plain", "--teacher-steps", 8, "--batch-size", 9)
    ours, theirs = sampled("student", 70), sampled("plain", 70, "--steps", 8)
    error = ((ours.astype(float) - theirs.astype(float)) ** 2).mean()
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-9)
    x, y = digits_features(ours), digits_features(theirs)
    spread = 2 * np.trace(np.cov(y, rowvar=False))
    expected = np.sqrt(((x - y) ** 2).sum(1).mean() / spread)
    assert found["feature_distance"] == pytest.approx(expected, abs=1e-9)
    teacher = found["protocol"]["teacher"]
    assert teacher["steps"] == 8 and teacher["path"].endswith("plain")


def test_a_model_agrees_with_itself(measure):
    options = ["--reference", "digits.npz", "--samples", 70, "--metrics", "fid,agreement"]
    found = measure("plain", *options, "--steps", 8, "--teacher", "plain", "--teacher-steps", 8)
    assert found["psnr"] is None and found["feature_distance"] == 0


def test_the_teacher_is_drawn_once(measure, drawn_steps):
    options = ["--samples", 70, "--metrics", "agreement", "--teacher", "plain", "--teacher-steps", 7]
    found = measure("plain", "--reference", "digits.npz", "--steps", "1,2,3", *options)
    assert drawn_steps.count(7) == 70 == drawn_steps.count(1)
    assert found[0]["psnr"] < found[1]["psnr"] < found[2]["psnr"]


# (the steps that it is measured at, how often it is drawn in 7): first, it keeps what students are compared
# with; later it is drawn again, for its time
@pytest.mark.parametrize(("steps", "times"), [("7,1,3", 1), ("1,7,3", 2)])
@pytest.mark.parametrize("room", [1 << 30, 1])  # for the images of a teacher
def test_a_teacher_that_is_measured_too(measure, drawn_steps, monkeypatch, steps, times, room):
    args = ["plain", "--reference", "digits.npz", "--samples", 70, "--batch-size", 16, "--metrics"]
    alone = measure(*args, "fid", "--steps", steps)
    separate = [
        measure(*args, "fid,agreement", "--steps", n, "--teacher", "plain", "--teacher-steps", 7)
        for n in (1, 3)
    ]
    monkeypatch.setattr(image_stream, "CACHE_BYTES", room)
    drawn_steps.clear()
    found = measure(*args, "fid,agreement", "--steps", steps, "--teacher", "plain", "--teacher-steps", 7)
    assert drawn_steps.count(7) == 70 * (times if room > 1 else 3)
    assert [r["fid"] for r in found] == [r["fid"] for r in alone]
    of = {r["steps"]: r for r in found}
    assert of[7]["psnr"] is None and of[7]["feature_distance"] == 0
    for one in separate:
        assert of[one["steps"]]["psnr"] == one["psnr"]
        assert of[one["steps"]]["feature_distance"] == one["feature_distance"]
    assert {key: of[7]["protocol"][key] for key in ("steps", "seed")} == {"steps": 7, "seed": 0}
    assert of[7]["protocol"]["teacher"] == of[1]["protocol"]["teacher"]


def test_another_model_is_not_the_teacher(measure, drawn_steps):
    args = ["student", "--reference", "digits.npz", "--samples", 20, "--metrics", "agreement"]
    assert measure(*args, "--teacher", "plain", "--teacher-steps", 4)["psnr"] is not None
    assert drawn_steps.count(4) == 40


# by the pipeline's own code -------------------------------------------------------------------------------


def test_stock_is_the_same_bit_for_bit(measure):
    """Spacing is trailing, and clipping on: what the step counts of a student are made for."""
    args = ["student", "--reference", "digits", "--samples", 70]
    ours, stock = measure(*args), measure(*args, "--sampler", "stock", "--steps", 4)
    assert ours["fid"] == stock["fid"]
    assert (
        stock["protocol"]["sampler"] == "stock" and stock["protocol"]["scheduler"]["name"] == "DDIMScheduler"
    )


@pytest.mark.parametrize("classes", ["data", "7,2"])
def test_stock_with_classes_is_the_same(measure, classes):
    args = ["labelled", "--reference", "digits.npz", "--samples", 70, "--steps", 2, "--classes", classes]
    ours, stock = measure(*args), measure(*args, "--sampler", "stock")
    assert stock["fid"] == ours["fid"] and stock["protocol"]["labels"] == ours["protocol"]["labels"]


def test_stock_of_another_scheduler(here, measure):
    """diffusers' own code beside a call of it."""
    path = here / "plain" / "scheduler" / "scheduler_config.json"
    edit(path, timestep_spacing="leading", rescale_betas_zero_snr=False)
    found = measure(
        "plain", "--reference", "digits", "--samples", 70, "--steps", 3, "--sampler", "stock", "--seed", 2
    )
    pipeline = diffusers.DDIMPipeline.from_pretrained(here / "plain")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(2 + i) for i in range(70)]
    drawn = []
    for start in (0, 64):
        own = generators[start : start + 64]
        drawn.append(pipeline(len(own), own, num_inference_steps=3, output_type="np").images)
    images = (np.concatenate(drawn) * 255).round().astype(np.uint8)
    assert found["fid"] == pytest.approx(fid(digits_features(images), real_digits()), rel=1e-9)


def test_stock_labels_out_of_range(refused):
    args = ["evaluate", "labelled", "--reference", "digits", "--samples", 9, "--steps", 1]
    refused(*args, "--classes", "3,10", says="out of range")
    refused(*args, "--classes", "3,10", "--sampler", "stock", says="out of range")


def test_stock_labels_of_an_unconditional_model(refused):
    args = ["evaluate", "plain", "--reference", "digits", "--samples", 9, "--steps", 1, "--classes", "0-3"]
    refused(*args, says="unconditional")
    refused(*args, "--sampler", "stock", says="unconditional")


@pytest.mark.parametrize("more", [["--steps", 2000], ["--steps", 1, "--seed", 2**64]])
def test_stock_options_that_diffusers_does_not_take(refused, more):
    refused(
        "evaluate", "plain", "--reference", "digits", "--samples", 9, "--sampler", "stock", *more, says=""
    )


def save_text_to_image(folder: Path) -> None:
    import transformers

    network = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None, cross_attention_dim=8,
    )  # fmt: skip
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    words = {
        **letters,
        **{f"{k}</w>": 26 + i for k, i in letters.items()},
        "<|startoftext|>": 52,
        "<|endoftext|>": 53,
        "ab</w>": 54,
    }
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    text = transformers.CLIPTextConfig(
        vocab_size=55, bos_token_id=52, eos_token_id=53, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1, projection_dim=8,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")),
        unet=network,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


@pytest.mark.parametrize("sampler", ["ddim", "stock"])
def test_a_pipeline_that_needs_prompts(refused, here, sampler):
    pytest.importorskip("transformers")
    save_text_to_image(here / "painter")
    of_stock = ["StableDiffusionPipeline", "prompt", "folder"]
    says = of_stock if sampler == "stock" else ["painter draws from prompts", "--prompts"]
    refused(
        "evaluate", "painter", "--reference", "digits", "--samples", 4, "--steps", 1, "--sampler", sampler,
        says=says,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{"_class_name": "NoSuchPipeline"}, {"unet": ["diffusers", "NoSuchModel"]}, {"unet": None}]
)
def test_stock_of_a_pipeline_that_is_broken(refused, here, changes):
    edit(here / "plain" / "model_index.json", **changes)
    refused(
        "evaluate", "plain", "--reference", "digits", "--samples", 4, "--steps", 1, "--sampler", "stock",
        says="plain",
    )  # fmt: skip


# the record -----------------------------------------------------------------------------------------------


def test_the_protocol(here, measure):
    found = measure(
        "student", "--reference", "digits", "--samples", 20, "--seed", 3, "--metrics", "fid,kid",
        "--device", "cpu",
    )  # fmt: skip
    protocol = found["protocol"]
    assert protocol["features"] == {
        "name": "digits", "num_features": 64, "sha256": metrics.DigitsFeatures().describe()["sha256"],
    }  # fmt: skip
    kept = (
        "samples",
        "steps",
        "nfe",
        "sampler",
        "guidance",
        "labels",
        "seed",
        "device",
        "dtype",
        "processes",
    )
    assert [protocol[key] for key in kept] == [20, 4, 4, "ddim", 1.0, None, 3, "cpu", "float32", 1]
    assert protocol["threads"] == torch.get_num_threads() and protocol["batch_size"] == 64
    assert protocol["versions"] == versions() and protocol["versions"]["torch"] == version("torch")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(config.__file__).parent, capture_output=True, text=True
    )
    if head.returncode == 0:
        assert protocol["commit"].rstrip("+") == head.stdout.strip()
    reference = protocol["reference"]
    assert (reference["name"], reference["count"], len(reference["sha256"])) == ("digits", 1797, 64)
    assert protocol["metrics"]["kid"]["subset_size"] == 20
    target = protocol["target"]
    assert target["path"] == str(here / "student") and len(target["sha256"]) == 64
    assert found["seconds"] > 0
    parameters = load_file(here / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert found["parameters"] == sum(p.numel() for p in parameters.values())


def test_what_identifies_weights_and_images(here, measure, make_pipeline, image_folder):
    """Equal in a copy, another for one pixel or one weight."""
    args = ["--features", "toy.Quarters", "--samples", 20, "--steps", 1]

    def hashes() -> tuple[str, str]:
        protocol = measure("plain", "--reference", "real", *args)["protocol"]
        return protocol["target"]["sha256"], protocol["reference"]["sha256"]

    weights, pixels = hashes()
    shutil.copytree("real", "copy")
    copied = measure("plain", "--reference", "copy", *args)["protocol"]["reference"]["sha256"]
    assert copied == pixels
    image = np.asarray(Image.open("real/007.png")).copy()
    image[3, 4] ^= 1
    Image.fromarray(image).save("real/007.png")
    one, two = hashes()
    assert one == weights and two != pixels
    path = here / "plain" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] += 1e-3
    save_file(tensors, path)
    assert hashes()[0] != weights


@pytest.mark.parametrize("steps", ["2", "2,1"])
def test_out_is_what_json_prints(cli, here, steps):
    code, out, err = cli(
        "evaluate", "plain", "--reference", "digits", "--steps", steps, "--samples", 9, "--metrics",
        "fid,agreement", "--teacher", "plain", "--teacher-steps", 1, "--json",
        "--out", "new/folder/record.json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = strict((here / "new" / "folder" / "record.json").read_text())
    assert found == strict(out) and isinstance(found, dict) == (steps == "2")
    assert [p.name for p in (here / "new" / "folder").iterdir()] == ["record.json"]


def test_every_number_is_printed_whole(cli, here):
    args = ["plain", "--reference", "real", "--features", "digits", "--samples", 50, "--metrics", ALL]
    code, out, err = cli("evaluate", *args, "--steps", "1,2,3,4,5,6,7,8", "--out", "r.json")
    assert (code, err) == (0, "")
    missing = [r["steps"] for r in strict(Path("r.json").read_text()) if f"{r['fid']:.3f}" not in out]
    assert missing == [], out


def test_a_name_with_brackets_is_printed(cli, here):
    shutil.move("images", "images[final]")
    code, out, _ = cli(
        "evaluate", "images[final]", "--reference", "real", "--features", "toy.Quarters", "--out", "a[b].json"
    )
    assert code == 0 and "images[final]" in out and "a[b].json" in out
    code, out, _ = cli("compare", "a[b].json", "a[b].json")
    assert code == 0 and "a[b].json" in out


def test_few_images_come_with_what_to_expect(cli, measure):
    """Against draws of 20 digits themselves: the expectation of their FID."""
    args = ["evaluate", "plain", "--reference", "digits", "--steps", 1]
    code, out, _ = cli(*args, "--samples", 20)
    assert code == 0
    said = float(out.split("an FID of about ")[1].split()[0])
    real = real_digits()
    rng = np.random.default_rng(0)
    draws = [fid(real[rng.choice(len(real), 20, replace=False)], real) for _ in range(20)]
    assert said == pytest.approx(np.mean(draws), rel=0.15)
    code, out, _ = cli(*args)
    assert code == 0 and "images are few" not in out and "1,797 images" in out


RUN = {
    "teacher": "runs/x/teacher",
    "student": "runs/x/students/4-steps",
}


@pytest.fixture
def run_folder(here) -> Path:
    for name, place in RUN.items():
        shutil.copytree(here / "student", here / place)
        edit(here / place / "diffkd.json", steps=4 if name == "student" else None)
    (here / "runs/x/config.yaml").write_text("out: runs/x\n")
    (here / "runs/x/metrics.json").write_text('[{"model": "before"}]')
    return here / "runs" / "x"


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("wanted", ["fid", "kid", "fid,agreement"])
def test_a_run_keeps_the_record(run_folder, measure, name, wanted):
    args = ["--teacher", "plain", "--teacher-steps", 2] if "agreement" in wanted else []
    steps = [2, 1]
    found = measure(
        RUN[name], "--reference", "digits.npz", "--samples", 9, "--steps", "2,1", "--metrics", wanted, *args
    )
    kept = strict((run_folder / "metrics.json").read_text())
    assert kept == [{"model": "before"}, *found]
    card = strict(Path(RUN[name], "diffkd.json").read_text())
    assert card["metrics"] == found and [r["steps"] for r in found] == steps
    readme = Path(RUN[name], "README.md").read_text()
    for record in found:
        assert (f"{record['fid']:.3f}" if "fid" in record else f"{record['kid']:.5f}") in readme
    (other,) = set(RUN) - {name}
    assert "metrics" not in strict(Path(RUN[other], "diffkd.json").read_text())


def test_a_run_keeps_what_its_pipelines_own_code_drew(run_folder, measure):
    args = ["--reference", "digits.npz", "--samples", 9, "--sampler", "stock"]
    found = measure(RUN["student"], *args, "--steps", 2)
    assert strict((run_folder / "metrics.json").read_text())[1:] == [found]
    again = measure(RUN["student"], *args)  # in the pipeline's own step count
    assert strict((run_folder / "metrics.json").read_text())[2:] == [again]


def test_models_outside_of_a_run_are_left_alone(here, measure):
    before = tree(here)
    for name in ("student", "plain"):
        measure(name, "--reference", "digits.npz", "--samples", 9, "--steps", 1)
    measure("images", "--reference", "real", "--features", "toy.Quarters")
    assert {k: v for k, v in tree(here).items() if "__pycache__" not in k} == before


def test_images_of_a_run_are_left_out_of_its_record(run_folder, measure):
    shutil.copytree("images", run_folder / "images")
    measure(run_folder / "images", "--reference", "real", "--features", "toy.Quarters")
    assert strict((run_folder / "metrics.json").read_text()) == [{"model": "before"}]


@pytest.mark.parametrize("content", ['{"loss": 1}', '[{"model": ', "[]]"])
def test_a_metrics_json_that_is_not_ours_is_left(run_folder, cli, content):
    (run_folder / "metrics.json").write_text(content)
    code, _, err = cli("evaluate", RUN["student"], "--reference", "digits.npz", "--samples", 9)
    assert (run_folder / "metrics.json").read_text() == content
    assert code == 2 and err.startswith("diffkd: error: ") and "metrics.json" in err


def test_a_run_goes_on_after_its_models_were_measured(here, cli):
    """Records without an FID or a step count are among those that `diffkd distill` finds when it goes on.

    The last student's own is not there yet: the run was stopped before.
    """
    (here / "distill.yaml").write_text(
        "{out: runs/y, teacher: {path: plain}, data: {kind: digits}, training: {batch_size: 4},"
        " method: {name: progressive, steps: [2, 1], updates: 1}, pictures: 2,"
        " evaluation: {samples: 9, teacher_steps: [2]}}"
    )
    assert cli("distill", "distill.yaml").code == 0
    place, student = Path("runs/y/metrics.json"), "runs/y/students/2-steps"
    found = strict(place.read_text())
    place.write_text(json.dumps([r for r in found if r["model"] != "1-steps"]))
    args = ["evaluate", student, "--reference", "digits.npz", "--samples", 9]
    assert cli(*args, "--metrics", "kid").code == 0
    assert cli(*args, "--sampler", "stock").code == 0
    code, out, err = cli("distill", "distill.yaml")
    assert (code, err) == (0, "")
    (last,) = [r for r in strict(place.read_text()) if r["model"] == "1-steps"]
    assert last["fid"] == found[-1]["fid"]
    code, out, err = cli("evaluate", "--repeat", "runs/y/metrics.json")
    assert (code, err) == (0, "") and " now" not in out


# measured again -------------------------------------------------------------------------------------------


def recorded(cli: Callable[..., Any], *args: object, out: str = "record.json") -> dict[str, Any]:
    assert cli("evaluate", *args, "--out", out).code == 0
    return strict(Path(out).read_text())


REPEATED = {
    "folder": ["images", "--reference", "real", "--features", "toy.Quarters", "--metrics", ALL],
    "some of a folder": ["images", "--reference", "real", "--features", "toy.Quarters", "--samples", 20],
    "resized": ["images", "--reference", "real", "--features", "toy.Quarters", "--resize", 6],
    "model": [
        "plain", "--reference", "digits.npz", "--steps", "1,3", "--samples", 70, "--metrics", ALL,
        "--seed", 4,
    ],
    "student": ["student", "--reference", "digits.npz", "--samples", 70, "--batch-size", 9, "--bootstrap", 5],
    "classes": ["labelled", "--reference", "digits.npz", "--steps", 2, "--samples", 70, "--classes", "3,4"],
    "guidance": [
        "labelled", "--reference", "digits.npz", "--steps", 2, "--samples", 70, "-w", 2, "--null-label", 9,
        "--classes", "0-3",
    ],
    "agreement": [
        "student", "--reference", "digits.npz", "--samples", 70, "--metrics", "fid,agreement",
        "--teacher", "plain", "--teacher-steps", 5,
    ],
    "stock": ["plain", "--reference", "digits", "--samples", 70, "--sampler", "stock", "--steps", 3],
    "stock with classes": [
        "labelled", "--reference", "digits.npz", "--samples", 70, "--sampler", "stock", "--steps", 3,
    ],
    "digits": ["digits", "--reference", "real", "--features", "digits"],
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
def test_a_record_is_measured_again(cli, here, name):
    found = recorded(cli, *REPEATED[name])
    before = tree(here)
    code, out, err = cli("evaluate", "--repeat", "record.json")
    assert (code, err) == (0, "")
    records = found if isinstance(found, list) else [found]
    advice = ("steps", "nfe", "seconds", "parameters", "fid_floor")
    numbers = [k for r in records for k, v in r.items() if k not in advice
               and (v is None or isinstance(v, float))]  # fmt: skip
    assert out.count("the same to the last digit") == len(numbers) > 0
    for record in records:
        assert repr(record["fid"]) in out
    assert tree(here) == before


def test_a_runs_records_are_measured_again(cli, run_folder):
    (run_folder / "metrics.json").write_text("[]")
    for steps in (1, 3):
        args = ["evaluate", RUN["student"], "--reference", "digits.npz", "--steps", steps, "--samples", 9]
        assert cli(*args).code == 0
    code, out, _ = cli("evaluate", "--repeat", run_folder / "metrics.json")
    assert code == 0 and out.count("fid ") == 2 and " now" not in out


@pytest.mark.parametrize("reference", ["real", "real.npz"])
def test_somewhere_else(cli, here, monkeypatch, reference):
    """Paths of a record do not depend on the folder that the command was given in."""
    if reference == "real.npz":
        assert cli("stats", "real", "--features", "toy.Quarters", "--out", "real.npz").code == 0
    args = ["--features", "toy.Quarters", "--steps", 2, "--samples", 30]
    found = recorded(cli, "plain", "--reference", reference, *args)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    code, out, err = cli("evaluate", "--repeat", here / "record.json")
    assert (code, err) == (0, "") and f"{found['fid']!r}: the same to the last digit" in out


@pytest.mark.slow
def test_a_fresh_process(cli, here):
    found = recorded(cli, *REPEATED["model"])
    command = [sys.executable, "-m", "diffkd.cli", "evaluate", "--repeat", "record.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(here))
    assert (done.returncode, done.stderr) == (0, "") and " now" not in done.stdout
    for record in found:
        assert f"fid {record['fid']!r}: the same to the last digit" in done.stdout


def environment(*folders: Path) -> dict[str, str]:
    root = Path(diffkd.__file__).parents[1]
    path = os.pathsep.join(map(str, [*folders, root]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def test_a_number_that_was_tampered_with(cli, here):
    found = recorded(cli, *REPEATED["folder"])
    digit = found["kid"] * (1 + 2**-50)
    edit(here / "record.json", kid=digit)
    code, out, err = cli("evaluate", "--repeat", "record.json")
    assert (code, err) == (1, "")
    assert f"kid {digit!r}: {found['kid']!r} now" in out
    assert f"fid {found['fid']!r}: the same to the last digit" in out


def test_other_weights_than_were_measured(refused, cli, here, make_pipeline):
    recorded(cli, "plain", "--reference", "digits.npz", "--steps", 1, "--samples", 9)
    shutil.rmtree("plain")
    make_pipeline(here, name="plain", seed=8)
    refused("evaluate", "--repeat", "record.json", says=[str(here / "plain"), "is not what was measured"])


@pytest.mark.parametrize("name", ["student", "teacher", "stock", "images"])
def test_whatever_is_not_what_was_measured_is_named(refused, cli, here, make_pipeline, name):
    """Not only that some number is another."""
    options = ["--reference", "digits.npz", "--steps", 1, "--samples", 9]
    more = {"teacher": ["--metrics", "agreement", "--teacher", "student"], "stock": ["--sampler", "stock"]}
    if name == "images":
        recorded(cli, *REPEATED["folder"])
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("images/000.png")
    else:
        recorded(cli, "student" if name == "student" else "plain", *options, *more.get(name, []))
        changed = "plain" if name == "stock" else "student"
        shutil.rmtree(changed)
        make_pipeline(here, name=changed, seed=8)
    refused("evaluate", "--repeat", "record.json", says=["is not what was measured"])


def test_another_reference_than_was_compared_with(refused, cli, here):
    recorded(cli, *REPEATED["folder"])
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("real/000.png")
    refused("evaluate", "--repeat", "record.json", says=["real is not what was measured"])


@pytest.mark.parametrize("gone", ["images", "real", "plain", "student"])
def test_what_was_measured_is_gone(refused, cli, here, gone):
    if gone in ("images", "real"):
        recorded(cli, *REPEATED["folder"])
    else:
        recorded(cli, *REPEATED["agreement"])
    shutil.rmtree(gone)
    line = refused("evaluate", "--repeat", "record.json", says=[gone])
    assert "is for models" not in line and "are for models" not in line, line


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "[3]", "{}", '{"fid": 3}', '{"protocol": 3}', '{"protocol": {"evaluation": {}}}', "[{}]"],
)
def test_files_that_are_no_records(refused, here, content):
    Path("r.json").write_text(content)
    refused("evaluate", "--repeat", "r.json", says="r.json")
    refused("compare", "r.json", "r.json", says="r.json")


@pytest.mark.parametrize("command", [["evaluate", "--repeat"], ["compare", "gone.json"]])
@pytest.mark.parametrize("path", ["gone.json", "plain", "real/000.png"])
def test_paths_that_are_no_records(refused, command, path):
    refused(*command, path, says=["cannot be read as a record"])


@pytest.mark.parametrize(
    "key", ["threads", "device", "model", "seed", "steps", "evaluation", "reference", "spec"]
)
def test_a_record_that_lacks_a_part(cli, here, key):
    """Repeated without it, or refused in a line."""
    found = recorded(cli, "plain", "--reference", "digits.npz", "--steps", 1, "--samples", 9)
    for place in (found, found["protocol"], found["protocol"]["reference"]):
        place.pop(key, None)
    Path("r.json").write_text(json.dumps(found))
    code, _, err = cli("evaluate", "--repeat", "r.json")
    assert (code, err) == (0, "") or (code, len(err.splitlines())) == (2, 1)


def test_repeat_takes_no_target(refused, cli, here):
    recorded(cli, *REPEATED["folder"])
    refused("evaluate", "images", "--repeat", "record.json", says=["--repeat"])
    refused("evaluate", "--reference", "real", "--repeat", "record.json", says=["--repeat"])


# two records ----------------------------------------------------------------------------------------------


def test_two_models_compared(cli, here):
    options = ["--reference", "digits.npz", "--samples", 70, "--steps", 2]
    a = recorded(cli, "plain", *options, out="a.json")
    b = recorded(cli, "student", *options, out="b.json")
    assert f"{a['fid']:.3f}" != f"{b['fid']:.3f}"
    code, out, err = cli("compare", "a.json", "b.json")
    assert (code, err) == (0, "")
    assert f"{a['fid']:.3f}" in out and f"{b['fid']:.3f}" in out
    c = recorded(cli, "images", "--reference", "digits.npz", "--samples", 40, out="c.json")
    d = recorded(cli, "plain", "--reference", "digits.npz", "--samples", 40, "--steps", 1, out="d.json")
    code, out, _ = cli("compare", "c.json", "d.json")
    assert code == 0 and f"{c['fid']:.3f}" in out and f"{d['fid']:.3f}" in out


BASE = ["images", "--reference", "real", "--features", "toy.Quarters", "--samples", 41]
OTHER = {
    "samples": (
        ["images", "--reference", "real", "--features", "toy.Quarters", "--samples", 40],
        ["41", "40"],
    ),
    "features": (["images", "--reference", "real", "--features", "digits"], ["toy.Quarters", "digits"]),
    "reference": (["images", "--reference", "plainer", "--features", "toy.Quarters"], ["sha256"]),
    "count": (["images", "--reference", "fewer", "--features", "toy.Quarters"], ["60", "59"]),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_cannot_be_compared(cli, here, image_folder, name):
    image_folder(here, name="plainer", count=60, seed=9)
    shutil.copytree("real", "fewer")
    Path("fewer/000.png").unlink()
    args, says = OTHER[name]
    one, two = recorded(cli, *BASE, out="a.json"), recorded(cli, *args, out="b.json")
    for first, second in (("a.json", "b.json"), ("b.json", "a.json")):
        code, out, err = cli("compare", first, second)
        assert (code, err) == (1, "")
        assert (name in out or "reference" in out) and all(words in out for words in says)
        for record in (one, two):
            assert f"{record['fid']:.3f}"[:-1] not in out and repr(record["fid"])[:6] not in out


@pytest.mark.parametrize("option", [["--metrics", "kid"], ["--classes", "0-3"]])
def test_other_options_that_cannot_be_compared(cli, here, option):
    """Labels, and metrics without one in common."""
    args = ["labelled", "--reference", "digits", "--steps", 1, "--samples", 9]
    recorded(cli, *args, out="a.json")
    recorded(cli, *args, *option, out="b.json")
    code, out, _ = cli("compare", "a.json", "b.json")
    assert code == 1 and option[0].strip("-").replace("classes", "labels") in out


def test_many_records_compared(cli, here):
    options = ["--reference", "real", "--features", "digits", "--samples", 30, "--metrics", "fid,kid"]
    a = recorded(cli, "plain", *options, "--steps", "1,2,3,4,5", out="a.json")
    b = recorded(cli, "student", *options, "--steps", "1,2,4", out="b.json")
    code, out, _ = cli("compare", "a.json", "b.json")
    assert code == 0
    missing = [(r["model"], r["steps"]) for r in [*a, *b] if f"{r['fid']:.3f}" not in out]
    assert missing == [], out


# processes ------------------------------------------------------------------------------------------------


NUMBERS = {"fid", "kid", "kid_std", "is", "is_std", "precision", "recall", "density", "coverage", "fd_inf"}
SEVERAL = {
    "folder": ["images", "--reference", "real", "--features", "toy.Quarters", "--metrics", ALL],
    "one batch": [
        "images", "--reference", "real", "--features", "toy.Quarters", "--metrics", ALL + ",fid",
        "--batch-size", 500,
    ],
    "digits": [
        "images", "--reference", "real", "--features", "digits", "--metrics", ALL, "--batch-size", 500,
    ],
    "model": [
        "student", "--reference", "digits", "--samples", 50, "--batch-size", 6,
        "--metrics", ALL + ",agreement", "--teacher", "plain", "--teacher-steps", 4, "--steps", "1,4",
    ],
    "model, one batch": [
        "student", "--reference", "real", "--features", "digits", "--samples", 50, "--batch-size", 500,
        "--metrics", ALL + ",agreement", "--teacher", "plain", "--teacher-steps", 4,
    ],
    "stock": ["labelled", "--reference", "digits", "--samples", 50, "--sampler", "stock", "--steps", 2,
              "--batch-size", 8],
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [name if name == "model" else pytest.param(name, marks=pytest.mark.exhaustive) for name in SEVERAL],
)
def test_two_processes_measure_what_one_does(cli, here, launched, name):
    """Also where one of them has no batch at all."""
    args = SEVERAL[name]
    done = launched(2, "evaluate", *args, "--out", "two.json")
    assert done.returncode == 0, done.stderr
    one, two = recorded(cli, *args, "--device", "cpu"), strict(Path("two.json").read_text())
    ones, twos = ([x] if isinstance(x, dict) else x for x in (one, two))
    for a, b in zip(ones, twos, strict=True):
        assert b["protocol"]["processes"] == 2 and a["protocol"]["processes"] == 1
        numbers = (NUMBERS | {"psnr", "feature_distance"}) & a.keys()
        assert "fid" in numbers
        for key in numbers:
            assert b[key] == pytest.approx(a[key], abs=1e-9, rel=1e-9), key
        assert a["protocol"]["reference"] == b["protocol"]["reference"]
    assert cli("compare", "record.json", "two.json").code == 0


def test_two_processes_print_once(cli, here, launched):
    args = SEVERAL["folder"]
    done = launched(2, "evaluate", *args, "--json")
    assert done.returncode == 0, done.stderr
    one, two = recorded(cli, *args, "--device", "cpu"), strict(done.stdout)
    assert two["protocol"]["processes"] == 2 and two["fid"] == pytest.approx(one["fid"], abs=1e-9)


def test_an_error_of_one_process_does_not_leave_the_other_waiting(here, launched):
    """The broken image is in the batches of the second alone."""
    Path("images/007.png").write_bytes(Path("images/007.png").read_bytes()[:60])
    args = ["images", "--reference", "real", "--features", "toy.Quarters", "--batch-size", 7]
    done = launched(2, "evaluate", *args, "--out", "r.json")
    assert done.returncode != 0 and not Path("r.json").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("diffkd: error: ")]
    own = [
        line for line in lines if "another process of this run is gone; its own error says why" not in line
    ]
    assert len(own) == 1 and "007.png" in own[0]


# Inception ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "untrained.safetensors"
    tensors = InceptionV3.untrained().state_dict()
    save_file({k: v.contiguous() for k, v in tensors.items() if not k.endswith("num_batches_tracked")}, path)
    yield path
    path.unlink()


@pytest.mark.slow
def test_inception(cli, here, inception_weights):
    """Six images against eight: far fewer images than features."""
    shutil.copytree("images", "eight", ignore=lambda _, names: sorted(names)[8:])
    args = ["images", "--reference", "eight", "--samples", 6, "--weights", inception_weights]
    found = recorded(cli, *args, "--metrics", "fid,kid", "--batch-size", 4)
    network = InceptionV3(inception_weights)
    every = of_folder(here / "images")
    some = every[some_of(len(every), 6)]
    six, eight = (
        network(torch.from_numpy(x).permute(0, 3, 1, 2)).double().numpy()
        for x in (some, of_folder(here / "eight"))
    )
    assert found["fid"] == pytest.approx(fid(six, eight), rel=1e-4)  # float32 features
    kid = metrics.kernel_distance(torch.from_numpy(six), torch.from_numpy(eight))
    assert found["kid"] == pytest.approx(kid.mean, rel=1e-4)
    assert found["protocol"]["features"] == network.describe()
    assert found["protocol"]["features"]["resize"] == "tf1"
    code, out, _ = cli("evaluate", "--repeat", "record.json")
    assert code == 0 and f"kid {found['kid']!r}: the same" in out and " now" not in out
    code, out, err = cli("evaluate", *args, "--metrics", "is")
    assert code == 2 and "10 splits" in err


@pytest.mark.parametrize(
    "option", [["--feature-resize", "clean"], ["--dtype", "float64"], ["--weights", "w.pth"]]
)
@pytest.mark.parametrize("command", ["evaluate", "stats"])
@pytest.mark.parametrize("features", ["digits", "toy.Quarters"])
def test_options_of_inception_for_other_features(refused, command, option, features):
    args = ["evaluate", "images", "--reference", "real"] if command == "evaluate" else ["stats", "real"]
    more = ["--out", "new.npz"] if command == "stats" else []
    refused(*args, *more, "--features", features, *option, says=[option[1], features])


@pytest.mark.parametrize(
    "option", [["--feature-resize", "bicubic"], ["--dtype", "float16"], ["--dtype", "half"]]
)
@pytest.mark.parametrize("command", ["evaluate", "stats"])
def test_options_that_inception_has_not(refused, command, option):
    args = ["evaluate", "images", "--reference", "real"] if command == "evaluate" else ["stats", "real"]
    more = ["--out", "new.npz"] if command == "stats" else []
    refused(*args, *more, "--features", "inception", *option, says=option[1])


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors", "w.bin", "gone.pth", "plain"])
def test_weights_of_inception_that_are_not(refused, here, name):
    if name.startswith("w"):
        Path(name).write_bytes(b"no weights at all")
    args = ["evaluate", "images", "--reference", "real", "--features", "inception"]
    line = refused(*args, "--weights", name, says=name)
    assert name not in ("w.pth", "w.pt") or "sha256" in line


# mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["images", "--metrics", "fid,kdi"], ["metrics", "'kdi'"]),
        (["images", "--metrics", ""], ["metrics"]),
        (["images", "--features", "inseption"], ["inseption", "inception"]),
        (["images", "--features", "no.such.Network"], ["no.such.Network"]),
        (["images", "--features", "toy.None"], ["toy.None"]),
        (["images", "--features", "..toy.Quarters"], ["..toy.Quarters"]),
        (["images", "--features", "toy.Wants"], ["toy.Wants"]),
        (["images", "--reference", "real", "--features", "toy.Liar"], ["5", "4"]),
        (["images", "--reference", "real", "--features", "toy.Broken"], ["finite"]),
        (["images", "--features", "json.JSONDecoder"], ["json.JSONDecoder"]),
        (["plain", "--steps", "2", "--sampler", "eular"], ["'eular'", "heun"]),
        (["plain"], ["plain", "--steps"]),
        (["plain", "--steps", "0"], ["--steps", "'0'"]),
        (["plain", "--steps", "abc"], ["--steps", "'abc'"]),
        (["plain", "--steps", "1,,2"], ["--steps", "'1,,2'"]),
        (["plain", "--steps", "²"], ["--steps", "'²'"]),
        (["plain", "--steps="], ["--steps"]),
        (["plain", "--steps=-1"], ["--steps"]),
        (["plain", "--steps", "1", "--seed", 2**64], ["seed"]),
        (["plain", "--steps", "1", "--classes", "0-3"], ["unconditional"]),
        (["plain", "--steps", "1", "-w", "2"], ["guidance"]),
        (["plain", "--steps", "1", "-w", "nan"], ["guidance"]),
        (["plain", "--steps", "1", "--null-label", "3"], ["null_label 3"]),
        (["labelled", "--steps", "1", "--classes", "10"], ["10", "0 to 9"]),
        (["labelled", "--steps", "1", "--classes", "3-1"], ["--classes", "'3-1'"]),
        (["labelled", "--steps", "1", "--null-label", "10"], ["null_label 10"]),
        (["plain", "--steps", "1", "--metrics", "agreement"], ["agreement", "teacher"]),
        (
            ["plain", "--steps", "1", "--metrics", "agreement", "--teacher", "gone/x/y"],
            ["gone/x/y"],
        ),
        (
            ["plain", "--steps", "1", "--metrics", "agreement", "--teacher", "images"],
            ["images"],
        ),
        (["images", "--teacher", "plain"], ["images", "model"]),
        (["images", "--steps", "1"], ["images", "model"]),
        (["images", "--samples", "42"], ["images", "41", "42"]),
        (["images", "--samples", "1"], ["--samples"]),
        (["images", "--samples", "9", "--metrics", "is"], ["10 splits", "9"]),
        (["images", "--samples", "3", "--metrics", "prdc"], ["nearest", "3"]),
        (["images", "--samples", "20", "--metrics", "fd_inf"], ["fd_inf", "20"]),
        (["images", "--reference", "real", "--features", "toy.Liar", "--metrics", "kid"], ["5", "4"]),
        (["images", "--reference", "images", "--features", "toy.Colours", "--metrics", "is"], ["Colours"]),
        (["plain", "--reference", "plain", "--steps", "1"], ["plain", "model", "images"]),
        (["plain/model_index.json"], ["plain/model_index.json"]),
        (["./gone"], ["./gone", "does not exist"]),
        (["./gone", "--steps", "4"], ["./gone", "does not exist"]),
        (["gone.npz"], ["gone.npz", "does not exist"]),
        (["model.pkl"], ["model.pkl", "pickle", "convert"]),
        (["model.pt"], ["model.pt", "pickle", "convert"]),
        (["toy.py"], ["toy.py"]),
        (["images", "--out", "plain"], ["--out", "plain"]),
        (["images", "--out", "toy.py/record.json"], ["toy.py"]),
    ],
    ids=lambda x: " ".join(map(str, x))[:70],
)  # fmt: skip
def test_mistakes(refused, args, says):
    reference = [] if "--reference" in args else ["--reference", "digits.npz"]
    refused("evaluate", *args, *reference, says=says)


@pytest.mark.parametrize("args", [[], ["images"], ["--reference", "digits"]])
def test_half_a_command(refused, args):
    refused("evaluate", *args, says=["TARGET", "--reference"])


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", "", "xla", "meta"])
@pytest.mark.parametrize("command", ["evaluate", "stats"])
def test_a_device_that_is_none(refused, command, device):
    args = ["evaluate", "images", "--reference", "digits.npz"] if command == "evaluate" else ["stats", "real"]
    more = ["--features", "digits", "--out", "new.npz"] if command == "stats" else []
    refused(*args, *more, "--device", device, says=["--device", repr(device)])


def test_a_record_of_a_device_that_is_not_here(refused, cli, here):
    if torch.cuda.is_available():
        pytest.skip("it is here")
    found = recorded(cli, *REPEATED["folder"])
    edit(here / "record.json", protocol={**found["protocol"], "device": "cuda"})
    refused("evaluate", "--repeat", "record.json", says=["cuda"])


def test_folders_of_mixed_sizes(refused, measure, here, image_folder):
    image_folder(here, name="more", count=20, size=(12, 9), channels=3)
    for path in (here / "images").iterdir():
        shutil.copy(path, here / "more" / f"small {path.name}")
    args = ["more", "--reference", "real", "--features", "toy.Quarters"]
    refused("evaluate", *args, says=["more", "12x9", "8x8", "--resize"])
    found = measure(*args, "--resize", 8)
    assert found["protocol"]["target"]["spec"]["resize"] == 8 and found["protocol"]["samples"] == 61


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(refused, here, image_folder, count):
    image_folder(here, name="few", count=count)
    says = ["few", "at least 2" if count else "no images"]
    refused("evaluate", "few", "--reference", "digits.npz", says=says)
    refused("evaluate", "images", "--reference", "few", "--features", "digits", says=says)


@pytest.mark.parametrize("kept", [0, 40])
def test_an_image_that_cannot_be_read(refused, here, kept):
    path = here / "images" / "017.png"
    path.write_bytes(path.read_bytes()[:kept])
    args = ["--features", "digits"]
    refused("evaluate", "images", "--reference", "real", *args, says=["017.png", "cannot be read"])
    refused("evaluate", "real", "--reference", "images", *args, says=["017.png", "cannot be read"])


def test_images_of_floats(refused, here):
    images = np.random.default_rng(0).random((9, 8, 8, 3))
    np.savez("floats.npz", arr_0=images)
    refused("evaluate", "floats.npz", "--reference", "digits.npz", says=["floats.npz", "float64", "uint8"])
    images[3, 4, 5, 1] = np.nan
    np.savez("floats.npz", arr_0=images)
    refused("evaluate", "floats.npz", "--reference", "digits.npz", says=["floats.npz", "NaN"])


@pytest.mark.parametrize("sampler", ["ddim", "stock"])
def test_a_model_that_draws_nan(refused, here, sampler):
    path = here / "plain" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = torch.nan
    save_file(tensors, path)
    args = [
        "evaluate",
        "plain",
        "--reference",
        "digits.npz",
        "--steps",
        1,
        "--samples",
        9,
        "--sampler",
        sampler,
    ]
    refused(*args, "--out", "r.json", says=["NaN"])


def test_images_that_the_features_do_not_take(refused, here):
    """Of another channel count than the user's own network has."""
    args = ["evaluate", "plain", "--steps", 1, "--samples", 9, "--features", "toy.Colours"]
    refused(*args, "--reference", "real", says=["toy.Colours"])


def test_images_of_a_size_that_the_features_do_not_take(refused, here, image_folder):
    image_folder(here, name="small", size=(5, 5), channels=3)
    refused("evaluate", "small", "--reference", "images", "--features", "toy.Colours", says=["toy.Colours"])


@pytest.mark.parametrize("teacher", ["colour", "large"])
def test_a_teacher_of_other_images(refused, here, make_pipeline, teacher):
    """PSNR of grey with colour would be a number too, by broadcasting."""
    make_pipeline(here, name="large", size=16)
    args = ["evaluate", "plain", "--reference", "digits.npz", "--steps", 1, "--samples", 9]
    refused(*args, "--metrics", "agreement", "--teacher", teacher, "--teacher-steps", 1, says=[teacher])


def test_an_unwritable_out_is_told_before_the_work(refused, here, monkeypatch):
    """Not after an hour of it."""

    def drawn(*args: Any, **options: Any) -> Any:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(samplers, "sample", drawn)
    args = ["evaluate", "plain", "--reference", "digits.npz", "--steps", 1]
    refused(*args, "--out", "toy.py/r.json", says=["toy.py"])
