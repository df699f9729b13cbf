"""CLIP score, curves over guidance weights and coco30k, of tiny text-to-image models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import diffkd
from diffkd.core.denoiser import GUIDANCE
from diffkd.io.npz import read_npz
from diffkd.metrics.clip_score import scores
from diffkd.metrics.features.clip_score import CLIPTextImage
from diffkd.metrics.features.inception import InceptionV3
from diffkd.metrics.frechet import frechet_distance
from diffkd.models import guidance_input, loading, saving
from diffkd.runs.reports import guidance_curves, model_card
from tests import text_to_image

CAPTIONS = ["a small red ring", "a blue star above a red square", "two crosses", "a circle", "the moon"]
SHAPES = ["a small red ring", "a blue star above a red square", "a large blue circle", "a large green cross"]
FAST = ("--features", "shapes", "--steps", 2, "--batch-size", 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A teacher, a student of 2 steps that takes w from 1 to 9, a CLIP, and a folder of photographs."""
    work = tmp_path_factory.mktemp("text")
    pipeline = text_to_image.pipeline(work / "parts", prediction="v_prediction")
    pipeline.save_pretrained(work / "teacher", safe_serialization=True)
    student = loading.load(work / "teacher")
    guidance_input.attach(student.network)
    weight = student.network.time_embedding.cond_proj.weight
    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    student.guidance_range, student.steps = (1.0, 9.0), 2
    saving.save(student, work / "student")
    model_card.write(work / "student", model_card.describe(student))
    text_to_image.clip(work / "clip", side=28)
    (work / "real").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(work / "real" / f"{i}.png")
    return work


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    for name in ("teacher", "student", "clip", "real"):
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    (tmp_path / "shapes.txt").write_text("\n".join(SHAPES) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def measure(cli, here):
    def run(*args: object) -> dict[str, Any]:
        code, out, err = cli("evaluate", *args, "--json")
        assert (code, err) == (0, ""), err
        return json.loads(out)

    return run


@pytest.fixture
def refused(cli, here):
    def run(*args: object, says: list[str]) -> None:
        code, out, err = cli(*args)
        assert (code, out, len(err.splitlines())) == (2, "", 1), (code, out, err)
        assert all(word in err for word in says), err

    return run


def clip_score(images: np.ndarray, prompts: list[str]) -> float:
    network = CLIPTextImage("clip")
    features = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    return scores(features, network.embed(prompts)[0]).mean().item()


def drawn(cli, model: str, n: int, *args: object) -> np.ndarray:
    """n of each caption in turn, in the batches of FAST: in others a pixel may round otherwise."""
    outcome = cli(
        "sample", model, "--prompts", "captions.txt", "-n", n, "--batch-size", 4, "--out", "s.npz",
        "--overwrite", *args,
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    with np.load("s.npz") as file:
        return file["arr_0"]


# CLIP score -----------------------------------------------------------------------------------------------


def test_a_model_is_scored_with_its_prompts_and_its_record_repeated(cli, here, measure):
    more = ["--prompts", "captions.txt", "--clip-score-weights", "clip", "--out", "record.json", "-w", 3]
    args = ["teacher", "--reference", "real", *FAST, "--samples", 10, "--metrics", "clip_score,fid", *more]
    found = measure(*args)
    images = drawn(cli, "teacher", 2, "--steps", 2, "-w", 3)
    assert found["clip_score"] == pytest.approx(clip_score(images, CAPTIONS * 2), rel=1e-5)
    assert 0 <= found["clip_score"] <= 100
    described = found["protocol"]["more_features"]["clip_score"]
    assert described["weights"] == "clip" and described["tokens"] == 77 and len(described["sha256"]) == 64
    assert found["protocol"]["evaluation"]["clip_score_weights"] == str((here / "clip").resolve())
    assert found["protocol"]["metrics"]["clip_score"] == {"scale": 100.0}
    outcome = cli("evaluate", "--repeat", "record.json")
    assert outcome.code == 0 and f"clip_score {found['clip_score']!r}: the same" in outcome.stdout


def test_statistics_alone_are_reference_enough(cli, here, measure):
    """The reference's images are not asked for by a metric that goes by prompts."""
    assert cli("stats", "real", "--out", "real.npz", "--features", "shapes").code == 0
    more = ["--prompts", "captions.txt", "--samples", 5, "--clip-score-weights", "clip"]
    args = [*FAST, "--metrics", "fid,clip_score", *more]
    with_file, with_images = (measure("teacher", "--reference", ref, *args) for ref in ("real.npz", "real"))
    assert (with_file["fid"], with_file["clip_score"]) == (with_images["fid"], with_images["clip_score"])


def test_a_folder_of_images_with_its_prompts(cli, here, measure):
    """As it was written; some of it with the prompts of those."""
    given = ("--prompts", "captions.txt", "-n", 2, "--steps", 2, "--batch-size", 4)
    assert cli("sample", "teacher", *given, "--out", "images").code == 0
    images = drawn(cli, "teacher", 2, "--steps", 2)
    args = ["images", "--reference", "real", "--features", "shapes", "--prompts", "captions.txt", "--metrics"]
    args += ["clip_score", "--clip-score-weights", "clip"]
    found = measure(*args, "--out", "record.json")
    assert found["clip_score"] == pytest.approx(clip_score(images, CAPTIONS * 2), rel=1e-5)
    assert found["protocol"]["prompts"]["count"] == 5
    chosen = sorted(torch.randperm(10, generator=torch.Generator().manual_seed(0))[:4].tolist())
    expected = clip_score(images[chosen], [(CAPTIONS * 2)[i] for i in chosen])
    assert measure(*args, "--samples", 4)["clip_score"] == pytest.approx(expected, rel=1e-5)
    assert cli("evaluate", "--repeat", "record.json").code == 0
    (here / "captions.txt").write_text("another\n")
    outcome = cli("evaluate", "--repeat", "record.json")
    assert outcome.code == 2 and "captions.txt" in outcome.stderr


def test_images_of_other_prompts_do_not_compare(cli, here, measure):
    """By no metric: prompts choose what is drawn, as labels do."""
    args = ["teacher", "--reference", "real", *FAST, "--samples", 4, "--metrics", "clip_score,fid"]
    args += ["--clip-score-weights", "clip"]
    measure(*args, "--prompts", "captions.txt", "--out", "one.json")
    measure(*args, "--prompts", "shapes.txt", "--out", "two.json")
    outcome = cli("compare", "one.json", "two.json")
    assert outcome.code == 1 and "prompts.sha256 was" in outcome.stdout and "FID" not in outcome.stdout


@pytest.mark.slow
def test_processes_do_not_matter(here, measure, launched):
    args = ["teacher", "--reference", "real", *FAST, "--samples", 10, "--metrics", "clip_score"]
    args += ["--prompts", "captions.txt", "--clip-score-weights", "clip"]
    whole = measure(*args)
    done = launched(2, "evaluate", *args, "--out", "two.json")
    assert done.returncode == 0, done.stderr
    two = json.loads(Path("two.json").read_text())
    assert two["protocol"]["processes"] == 2
    assert two["clip_score"] == pytest.approx(whole["clip_score"], rel=1e-6)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["real", "--metrics", "clip_score"], ["clip_score compares", "--prompts"]),
        (["real", "--prompts", "captions.txt"], ["--prompts captions.txt", "clip_score"]),
        (["teacher", "--clip-score-weights", "clip", "--prompts", "captions.txt"], ["--clip-score-weights"]),
        (["real", "--metrics", "clip_score", "--prompts", "captions.txt"], ["9 images", "5 prompts"]),
    ],
)
def test_prompts_that_do_not_fit(refused, args, says):
    refused("evaluate", *args, "--reference", "real", "--features", "shapes", says=says)


# guidance -------------------------------------------------------------------------------------------------


def test_a_model_that_takes_its_weight_is_asked_for_one(cli, here, measure):
    """And for its usual one where none is named."""
    args = [
        "student",
        "--reference",
        "real",
        *FAST,
        "--samples",
        5,
        "--prompts",
        "captions.txt",
        "--metrics",
        "fid",
    ]
    found = {w: measure(*args, "-w", w) for w in (1, 3)}
    assert [found[w]["protocol"]["guidance"] for w in found] == [1.0, 3.0]
    assert found[1]["fid"] != found[3]["fid"] and found[1]["nfe"] == found[3]["nfe"] == 2
    usual = measure(*args, "--out", "usual.json")
    assert usual["protocol"]["guidance"] == 7.5 and usual["fid"] == measure(*args, "-w", 7.5)["fid"]
    measure(*args, "-w", 1, "--out", "one.json")
    for name in ("usual", "one"):
        assert cli("evaluate", "--repeat", f"{name}.json").code == 0
    one = diffkd.load("student")
    assert one.usual_guidance == 7.5 and GUIDANCE in one.example_inputs()[2]


BENCH: dict[str, Any] = {
    "out": "bench",
    "models": [
        {"path": "teacher", "steps": [2], "prompts": "shapes.txt", "guidance": [1, 3]},
        {"path": "student", "prompts": "shapes.txt", "guidance": [1, 3, 5.5]},
        {"path": "student", "name": "usual", "prompts": "shapes.txt"},
    ],
    "evaluation": {
        "features": "shapes", "reference": "real", "samples": 8, "batch_size": 4,
        "metrics": ["fid", "clip_score", "prompt_accuracy"], "clip_score_weights": "clip",
    },
}  # fmt: skip
ROWS = [
    ("teacher", 1.0),
    ("teacher", 3.0),
    ("student", 1.0),
    ("student", 3.0),
    ("student", 5.5),
    ("usual", 7.5),
]


def test_a_benchmark_over_guidance_weights(cli, here, measure, monkeypatch):
    """Its rows are those of `diffkd evaluate`; what is missing is measured again, and nothing else."""
    (here / "bench.yaml").write_text(yaml.safe_dump(BENCH))
    outcome = cli("benchmark", "bench.yaml")
    assert (outcome.code, outcome.stderr) == (0, "")
    found = json.loads(Path("bench/metrics.json").read_text())
    assert [(r["model"], r["protocol"]["guidance"]) for r in found] == ROWS
    more = [
        "--metrics",
        "fid,clip_score,prompt_accuracy",
        "--clip-score-weights",
        "clip",
        "--prompts",
        "shapes.txt",
    ]
    own = measure("student", "--reference", "real", *FAST, "--samples", 8, *more, "-w", 5.5)
    for key in ("fid", "clip_score", "prompt_accuracy"):
        assert found[4][key] == own[key]
    lines = [x for x in Path("bench/benchmark.md").read_text().splitlines() if x.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][:4] == ["model", "steps", "guidance", "nfe"]
    assert [(row[0], float(row[2])) for row in cells[2:]] == ROWS
    for name in ("fid-clip_score", "fid-prompt_accuracy", "fid-nfe"):
        with Image.open(f"bench/{name}.png") as image:
            assert min(image.size) > 200 and f"bench/{name}.png" in outcome.stdout
    Path("bench/metrics.json").write_text(json.dumps([r for r in found if r is not found[3]]))
    assert cli("benchmark", "bench.yaml").code == 0
    again = json.loads(Path("bench/metrics.json").read_text())
    assert len(again) == 6 and all(r in again for r in found if r is not found[3])
    assert again[-1]["fid"] == found[3]["fid"] and again[-1]["protocol"]["guidance"] == 3.0


def row(model: str, steps: int, w: float, fid: float, score: float) -> dict[str, Any]:
    return {"model": model, "steps": steps, "fid": fid, "clip_score": score, "protocol": {"guidance": w}}


def test_what_the_curve_shows(tmp_path, monkeypatch):
    """A line a model and step count, labelled with the weights in order; a model of one is a point."""
    from matplotlib.axes import Axes

    lines, labels = {}, []
    plot, annotate = Axes.plot, Axes.annotate
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, **k: (
            lines.update({k["label"]: (list(x), list(y), k["linestyle"])}) or plot(self, x, y, **k)
        ),
    )
    monkeypatch.setattr(
        Axes,
        "annotate",
        lambda self, text, at, **k: labels.append((text, at)) or annotate(self, text, at, **k),
    )
    records = [row("a", 4, 7.5, 3.0, 27.0), row("a", 4, 1, 9.0, 20.0), row("a", 4, 2, 2.0, 25.0)]
    records += [row("b", 4, 1, 4.0, 24.0), row("b", 2, 1, 5.0, 22.0), row("b", 2, 3, 4.5, 23.0)]
    records += [row("baked", 1, 1, 2.5, 26.0)]
    assert guidance_curves.write(tmp_path, records) == [tmp_path / "fid-clip_score.png"]
    assert lines == {
        "a": ([20.0, 25.0, 27.0], [9.0, 2.0, 3.0], "-"),
        "b, 4 steps": ([24.0], [4.0], "none"),
        "b, 2 steps": ([22.0, 23.0], [5.0, 4.5], "-"),
        "baked": ([26.0], [2.5], "none"),
    }
    assert labels == [
        ("1", (20.0, 9.0)), ("2", (25.0, 2.0)), ("7.5", (27.0, 3.0)), ("1", (22.0, 5.0)), ("3", (23.0, 4.5))
    ]  # fmt: skip
    assert guidance_curves.write(tmp_path, records[3:4] + records[6:]) == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("models=[{path: teacher, steps: [2], guidance: [1, 1]}]", ["teacher twice", "guidance"]),
        ("models=[{path: teacher, steps: [2], guidance: [1, -2]}]", ["guidance.1", "-2"]),
        (
            "models=[{path: teacher, steps: [2], guidance: 2}, {path: teacher, steps: [2]}]",
            ["teacher twice", "guidance"],
        ),
        ("teacher={path: teacher, guidance: [1, 2]}", ["teacher.guidance [1.0, 2.0]"]),
        ("evaluation.protocol=coco", ["evaluation.protocol", "coco30k"]),
        ("evaluation.protocol=[coco30k]", ["evaluation.protocol", "coco30k"]),
        ("evaluation.protocol=coco30k", ["evaluation.features", "'shapes'", "'inception'"]),
    ],
)
def test_configs_that_are_refused(refused, here, override, says):
    (here / "bench.yaml").write_text(yaml.safe_dump(BENCH))
    refused("benchmark", "bench.yaml", override, says=says)


# coco30k --------------------------------------------------------------------------------------------------

COCO = ("--protocol", "coco30k", "--prompts", "captions.txt", "--steps", 1, "--batch-size", 3)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "untrained.safetensors"
    tensors = InceptionV3.untrained().state_dict()
    save_file({k: v.contiguous() for k, v in tensors.items() if not k.endswith("num_batches_tracked")}, path)
    return path


@pytest.fixture
def photos(here) -> Path:
    """Of several sizes."""
    (here / "photos").mkdir()
    rng = np.random.default_rng(2)
    for i, size in enumerate([(280, 300), (256, 256), (400, 270)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(here / "photos" / f"{i}.png")
    return here / "photos"


def at_256(image: Image.Image) -> np.ndarray:
    """The short side to 256 by Pillow's bicubic filter, and the centre, cut before it is resized."""
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC, box=box))


@pytest.mark.slow
def test_coco30k_is_all_that_it_says(cli, here, measure, photos, inception):
    """FID of captions at 256x256 from the images themselves, the CLIP score, and what the record holds."""
    more = ["--samples", 5, "--weights", inception, "--clip-score-weights", "clip", "--out", "record.json"]
    found = measure("teacher", "--reference", "photos", *COCO, *more)
    images = np.stack([at_256(Image.fromarray(one)) for one in drawn(cli, "teacher", 1, "--steps", 1)])
    real = np.stack([at_256(Image.open(path)) for path in sorted(photos.iterdir())])
    network = InceptionV3(inception, resize="tf1")
    x, y = (network(torch.from_numpy(a).permute(0, 3, 1, 2)).double() for a in (images, real))
    expected = frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert found["fid"] == pytest.approx(expected, rel=1e-4)
    assert found["clip_score"] == pytest.approx(clip_score(images, CAPTIONS), rel=1e-5)
    evaluation = found["protocol"]["evaluation"]
    fixed = {
        "protocol": "coco30k",
        "features": "inception",
        "resize": "tf1",
        "dtype": "float32",
        "image_size": 256,
    }
    assert fixed.items() <= evaluation.items() and evaluation["samples"] == 5
    assert found["protocol"]["reference"]["spec"]["resize"] == 256
    assert found["protocol"]["prompts"]["count"] == 5 and len(found["protocol"]["prompts"]["sha256"]) == 64
    assert any("coco30k with 5 images in place of 30,000" in note for note in found["notes"])
    # the same from the images in a folder, and from the record alone
    assert cli("sample", "teacher", "--prompts", "captions.txt", "--steps", 1, "--out", "images").code == 0
    more = ["--samples", 5, "--weights", inception, "--batch-size", 3, "--protocol", "coco30k"]
    assert measure("images", "--reference", "photos", *more)["fid"] == pytest.approx(found["fid"], rel=1e-9)
    assert cli("evaluate", "--repeat", "record.json").code == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], ["30,000 captions", "there are 5", "--samples 5"]),
        (["--samples", 30_001], ["--samples", "30001", "30000"]),
        (["--samples", 5, "--features", "shapes"], ["--features", "'shapes'", "'inception'"]),
        (["--samples", 5, "--feature-resize", "clean"], ["--feature-resize", "'clean'", "'tf1'"]),
        (["--samples", 5, "--dtype", "float64"], ["--dtype", "'float64'", "'float32'"]),
        (["--samples", 5, "--resize", 512], ["--resize 512", "256"]),
    ],
)
def test_what_contradicts_coco30k_is_refused(refused, photos, more, says):
    refused("evaluate", "teacher", "--reference", "photos", *COCO, *more, says=says)


def test_models_and_references_that_are_not_of_coco30k(cli, here, refused, photos, make_pipeline, inception):
    make_pipeline(here, name="pixels")
    given = ["--protocol", "coco30k", "--steps", 1, "--samples", 5, "--weights", inception]
    refused("evaluate", "pixels", "--reference", "photos", *given, says=["captions", "pixels"])
    refused("evaluate", "teacher", "--reference", "photos", *given, says=["draws from prompts", "--prompts"])
    refused("evaluate", "teacher", "--reference", "digits", *given, says=["8x8", "256x256"])
    refused(
        "evaluate", "teacher", "--reference", "photos", "--protocol", "coco", says=["--protocol", "coco30k"]
    )
    shutil.copytree("real", "small")
    assert cli("stats", "small", "--out", "small.npz", "--features", "shapes").code == 0
    refused(
        "evaluate", "teacher", "--reference", "small.npz", *given, says=["32x32", "diffkd stats --resize 256"]
    )
    assert "protocol" in read_npz(here / "small.npz")


@pytest.mark.parametrize("command", ["train", "distill"])
def test_runs_have_captions_of_their_own(refused, here, make_pipeline, command):
    config: dict[str, Any] = {"out": "run", "data": {"kind": "digits"}, "evaluation": {"protocol": "coco30k"}}
    config |= {"teacher": {"path": "pixels"}, "method": {"name": "output"}} if command == "distill" else {}
    make_pipeline(here, name="pixels")
    (here / "run.yaml").write_text(yaml.safe_dump(config))
    refused(command, "run.yaml", says=["evaluation.protocol coco30k", "diffkd evaluate"])
