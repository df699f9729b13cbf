"""`diffkd distill` of a text-to-image teacher: captions and latents cached, students that open in stock."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import diffkd
from diffkd import methods
from diffkd.core import samplers
from diffkd.data import shards
from diffkd.data.resized import ResizedDataset
from diffkd.data.shapes import Shapes
from diffkd.generation import asked
from diffkd.generation.prompts import described
from diffkd.metrics.evaluation import image_sources
from diffkd.metrics.evaluation import records as evaluation_records
from diffkd.models.codecs import Autoencoder
from tests import text_to_image
from tests.edits import changed
from tests.runs.adapters import assert_trained
from tests.runs.tiny import OF_LATENTS as CONFIG
from tests.runs.tiny import assert_same_runs, network, signal_at

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a red ring", "a star above a square", "two crosses", "a small circle", "a ring"]


@pytest.fixture(scope="module", params=["sd", "xl"])
def work(request, tmp_path_factory):
    """A v-prediction teacher and a folder of captioned images."""
    work = tmp_path_factory.mktemp(request.param)
    text_to_image.teacher_and_images(work, CAPTIONS, xl=request.param == "xl")
    return work


@pytest.fixture
def here(work, tmp_path, monkeypatch):
    for name in ("teacher", "images"):
        (tmp_path / name).symlink_to(work / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def test_a_run_from_captions_to_students(cli, here):
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    cached = here / "run" / "cache"
    assert len([*cached.glob("latents/*/000000.safetensors")]) == 1
    (recipe,) = cached.glob("embeddings/*/embeddings.json")
    assert json.loads(recipe.read_text())["size"] == [32, 32]
    assert (here / "run" / "samples" / "2-steps.png").exists()
    # the student draws in stock at default arguments what diffkd draws
    folder = here / "run" / "students" / "2-steps"
    student = diffkd.load(folder)
    assert student.guidance_baked_in == 3.0 and student.steps == 2
    (ours,) = diffkd.generate(student, 2, prompts=CAPTIONS[:2], seed=5)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    theirs = pipeline(
        CAPTIONS[:2], num_inference_steps=2, generator=generators, output_type="np", height=32, width=32
    ).images
    assert np.abs(ours.numpy().astype(int) - np.rint(theirs * 255)).max() <= 1
    card = (folder / "README.md").read_text()
    assert "pipeline(" in card and "batch_size" not in card and "num_inference_steps=2" in card
    (tried,) = yaml.safe_load(card.split("---")[1])["widget"]  # a caption of its pictures
    assert tried["text"] in CAPTIONS


SEVERAL: dict[str, Any] = {"steps": [2, 1]}
METHODS: dict[str, dict[str, Any]] = {
    "adversarial": {"steps": 2},
    "consistency": SEVERAL,
    "dmd2": {"steps": 2, "fake_updates": 1, "gan": 1e-3},
    "f_distill": {"steps": 2, "fake_updates": 1},
    "feature": {},
    "imm": {**SEVERAL, "group": 2},
    "lcm": SEVERAL,
    "meanflow": SEVERAL,
    "output": {},
    "progressive": {"steps": [2]},
    "reflow": {"steps": [2], "pairs": 6, "pair_steps": 2},
    "regression": {"pairs": 6, "pair_steps": 2},
    "scm": SEVERAL,
    "shortcut": SEVERAL,
    "sid": {"steps": 2, "fake_updates": 1},
    "tcm": SEVERAL,
}
UNFIT = {  # and why
    "denoising": "trains a teacher",
    "guidance": "makes a student of no steps: its own tests are below",
    "logits": "is of classifiers",
}
OF_NO_STEPS = ("feature", "output")  # whose spread nobody watches
BY_DEFAULT = ("dmd2", "consistency", "regression")


def test_every_method_is_named_above():
    assert {*methods.names()} == {*METHODS, *UNFIT}


@pytest.mark.parametrize(
    "method", [m if m in BY_DEFAULT else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_methods_know_no_family(cli, here, method):
    chain = [
        {"name": name, "updates": 2, **METHODS[name]}
        for name in (["consistency"] if method == "tcm" else []) + [method]
    ]
    outcome = cli("distill", "run.yaml", f"method={json.dumps(chain)}", "pictures=0", "spread_every=1")
    assert outcome.code == 0, outcome.stderr
    losses = [json.loads(line) for line in (here / "run" / "log.jsonl").read_text().splitlines()]
    assert any("spread" in line for line in losses) == (method not in OF_NO_STEPS)
    assert all(network(folder) for folder in (here / "run" / "students").iterdir())


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(cli, here, monkeypatch):
    assert cli("distill", "run.yaml", "out=whole", "pictures=0").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, "4-steps", 1, send=[signal.SIGTERM])
        assert cli("distill", "run.yaml", "out=broken", "pictures=0").code == 130
    assert cli("distill", "run.yaml", "out=broken", "pictures=0").code == 0
    assert_same_runs(here / "whole", here / "broken")


@pytest.mark.slow
@pytest.mark.parametrize("work", ["xl"], indirect=True)
def test_adapters(cli, here, monkeypatch):
    """Of Stable Diffusion in tests/runs/test_lora.py too."""
    assert_trained(cli, monkeypatch, here)


def test_a_cache_that_is_stopped_is_gone_on_with(cli, here, monkeypatch):
    moments, calls = Autoencoder.moments, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return moments(*args)

    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * 2 * 4 * 4 * 64)
    monkeypatch.setattr(Autoencoder, "moments", stopping)
    assert cli("distill", "run.yaml", "pictures=0").code == 130
    assert len([*(here / "run/cache/latents").glob("*/*.safetensors")]) == 1
    assert cli("distill", "run.yaml", "pictures=0").code == 0
    assert len(calls) == 4  # of three files


def test_a_cache_is_shared_by_runs(cli, here):
    assert cli("distill", "run.yaml", "cache=cache", "pictures=0", "method.steps=[2]").code == 0
    before = {path: path.stat().st_mtime_ns for path in (here / "cache").rglob("*.safetensors")}
    assert cli("distill", "run.yaml", "out=other", "cache=cache", "pictures=0", "method.steps=[2]").code == 0
    assert before == {path: path.stat().st_mtime_ns for path in (here / "cache").rglob("*.safetensors")}


def test_what_other_encoders_made_is_made_again_and_a_line_says_so(cli, here):
    """Beside it; latents are of the autoencoder alone."""
    for _ in range(2):
        outcome = cli("cache", "run.yaml", "cache=cache")
        assert outcome.code == 0 and "of other encoders" not in outcome.stderr
    shutil.copytree(here / "teacher", here / "other")
    changed(here / "other", "text_encoder/config.json", hidden_act="gelu")
    outcome = cli("cache", "run.yaml", "cache=cache", "teacher.path=other")
    line = "cache holds embeddings of other encoders or data; these are computed anew, beside them"
    assert outcome.code == 0 and line in outcome.stderr and "holds latents" not in outcome.stderr
    kept = [len([*(here / "cache" / what).iterdir()]) for what in ("embeddings", "latents")]
    assert kept == [2, 1]


def test_images_are_decoded_as_they_are_encoded(cli, here, monkeypatch):
    """Never all of them; one that cannot be read is left out of training and of the pictures' captions."""
    (here / "images").unlink()
    shutil.copytree((here / "teacher").resolve().parent / "images", here / "images")
    (here / "images" / "7.png").write_bytes(b"no image")
    (here / "images" / "3.txt").unlink()
    (here / "images" / "4.txt").write_text("\n")
    monkeypatch.setattr(ResizedDataset, "decode_all", lambda *args: pytest.fail("all were decoded"))
    outcome = cli("distill", "run.yaml", "method.steps=[2]")
    assert outcome.code == 0, outcome.stderr
    assert "unreadable image: images/7.png" in outcome.stderr
    assert "images: 2 of 10 images have no caption, and the empty prompt in its place" in outcome.stderr
    (cached,) = (here / "run" / "cache").glob("latents/*/000000.safetensors")
    assert load_file(cached)["readable"].tolist() == [i != 7 for i in range(10)]
    assert cli("distill", "run.yaml", "method.steps=[2]").code == 0


ASKED = "data={kind: prompts, path: run.yaml}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (("data.size=30",), ["30x30 do not divide by 4"]),
        (("data={kind: none}", "method={name: regression, pairs: 4}"), ["data kind none has no captions"]),
        (("data={kind: none}",), ["progressive learns from images", "data.draws"]),
        (("data={kind: prompts, path: gone.txt}",), ["gone.txt cannot be read"]),
        (("data={kind: prompts, path: empty.txt}",), ["empty.txt has no prompts"]),
        ((ASKED, "method.alpha=0.5"), ["progressive", "learns what images are"]),
        ((ASKED, "data.steps=2000"), ["2000 steps are more than the teacher's 1000"]),
        ((ASKED, "data.draws=4", "method={name: regression}"), ["data.draws 4", "leave it out"]),
        (("data={kind: folder, path: bare, size: 32}",), ["has no captions", "metadata.jsonl"]),
    ],
)
def test_data_that_does_not_fit(cli, here, changes, says):
    (here / "bare").mkdir()
    (here / "empty.txt").write_text("\n\n")
    shutil.copy(here / "images" / "0.png", here / "bare" / "0.png")
    outcome = cli("distill", "run.yaml", *changes)
    assert outcome.code == 2 and all(word in outcome.stderr for word in says), outcome.stderr
    assert not (here / "run").exists()


def test_a_student_takes_the_guidance_weight_as_an_input_and_keeps_it(cli, here):
    """`guidance`, then halved: a stock call with guidance_scale draws it."""
    method = [
        {"name": "guidance", "range": [1, 9], "updates": 2, "learning_rate": 0.05, "warmup": 0},
        {"name": "progressive", "steps": [4], "updates": 2, "learning_rate": 1e-3},
    ]
    outcome = cli("distill", "run.yaml", f"method={json.dumps(method)}", "pictures=0")
    assert outcome.code == 0, outcome.stderr
    folder = here / "run" / "students" / "4-steps"
    student = diffkd.load(folder)
    assert student.guidance_range == [1, 9] and student.guidance_baked_in == 1.0
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.time_cond_proj_dim == 256
    drawn = {}
    for weight in (2.0, 7.5):
        (ours,) = diffkd.generate(student, 2, prompts=CAPTIONS[:2], seed=5, guidance=weight)
        generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
        theirs = pipeline(
            CAPTIONS[:2], num_inference_steps=4, generator=generators, output_type="np", height=32, width=32,
            guidance_scale=weight,
        ).images  # fmt: skip
        drawn[weight] = ours.numpy().astype(int)
        assert np.abs(drawn[weight] - np.rint(theirs * 255)).max() <= 1
    assert np.abs(drawn[2.0] - drawn[7.5]).max() > 0


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": "dmd2", "steps": 2}, ["do not know the weight", "bake one weight in"]),
        ({"name": "progressive", "steps": [4], "guidance": 3.0}, ["bakes in guidance 3", "an input"]),
    ],
)
def test_what_cannot_follow_a_student_that_takes_the_weight(cli, here, method, says):
    chain = [{"name": "guidance", "range": [1, 9], "updates": 2}, {**method, "updates": 2}]
    outcome = cli("distill", "run.yaml", f"method={json.dumps(chain)}")
    assert outcome.code == 2 and all(word in outcome.stderr for word in says), outcome.stderr
    assert not (here / "run").exists()


@pytest.mark.parametrize(
    ("config", "kind", "prediction"),
    [("sd15/progressive", "sd", "epsilon"), ("sdxl/guidance-then-progressive", "xl", "epsilon")],
)
def test_the_configs_of_public_teachers_on_tiny_ones_of_their_layout(
    cli, tmp_path, monkeypatch, work, config, kind, prediction
):
    """Two updates of every stage."""
    made = text_to_image.pipeline(tmp_path / "parts", xl=kind == "xl", prediction=prediction)
    made.save_pretrained(tmp_path / "teacher", safe_serialization=True)
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((ROOT / "configs" / f"{config}.yaml").read_text())
    methods = content["method"] if isinstance(content["method"], list) else [content["method"]]
    for method in methods:
        method |= {"updates": 2, "warmup": 0} if "warmup" in method else {"updates": 2}
        method |= {"updates_v": 2} if "updates_v" in method else {}
    changes = {
        "teacher": {"path": "teacher"}, "method": methods, "evaluation": None, "pictures": 0,
        "data.path": str(work / "images"), "data.size": 32, "training.batch_size": 4,
        "training.micro_batches": 2,
    }  # fmt: skip
    given = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    outcome = cli("distill", ROOT / "configs" / f"{config}.yaml", *given)
    assert outcome.code == 0, outcome.stderr
    students = tmp_path / content["out"] / "students"
    last = diffkd.load(students / ("1-steps" if kind == "sd" else "4-steps"))
    (drawn,) = diffkd.generate(last, 1, prompts=["a ring"])
    assert drawn.shape == (1, 32, 32, 3)


def test_a_run_of_images_of_several_shapes(cli, here):
    """Each micro-batch is of one; the student is drawn in the most frequent."""
    rng = np.random.default_rng(0)
    (here / "several").mkdir()
    for number, (height, width) in enumerate([(32, 32)] * 5 + [(24, 40)] * 4 + [(48, 27)] * 3):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / "several" / f"{number:02}.png")
        (here / "several" / f"{number:02}.txt").write_text(CAPTIONS[number % 5] + "\n")
    data = "data={kind: folder, path: several, size: 32, buckets: 8, upscale: true}"
    outcome = cli(
        "distill", "run.yaml", data, "training.micro_batches=2", "method.updates=4", "spread_every=2"
    )
    assert outcome.code == 0, outcome.stderr
    assert "12 images of 32x32 (5), 40x24 (4), 24x40 (3), RGB" in outcome.stdout
    assert len([*(here / "run/cache/latents").glob("*/latents.json")]) == 3
    drawn = np.asarray(Image.open(here / "run/samples/2-steps.png"))
    assert drawn.std() > 0
    (images,) = diffkd.generate(diffkd.load(here / "run/students/2-steps"), 1, prompts=["a ring"])
    assert images.shape == (1, 32, 32, 3)
    refused = cli("distill", "run.yaml", data, "out=other", "evaluation={features: shapes}")
    assert refused.code == 2 and "evaluation.reference is missing: data.buckets 8" in refused.stderr


PROMPTS = ("data={kind: prompts, path: prompts.txt, draws: 6, steps: 3, guidance: 2}", "pictures=4")


def test_a_run_from_prompts_alone(cli, here):
    """The teacher's own draws are the data: of the prompts in turn."""
    (here / "prompts.txt").write_text("a red ring\na star above a square\n\ntwo crosses\na red ring\n")
    outcome = cli("distill", "run.yaml", *PROMPTS, "spread_every=1")
    assert outcome.code == 0, outcome.stderr
    assert "data: 3 different prompts (prompts.txt), no images" in outcome.stdout
    assert "6 that the teacher draws in 3 steps, guidance 2" in outcome.stdout
    assert not (here / "run/cache/latents").exists()
    stored = load_file(here / "run/pairs/data/000000.safetensors")["x0"]
    recipe = json.loads((here / "run/pairs/data/pairs.json").read_text())
    teacher = diffkd.load(here / "teacher")
    prompts = ["a red ring", "a star above a square", "two crosses", "a red ring"]
    cond = teacher.conditioner.embed([*prompts, *prompts[:2]], size=(32, 32))
    generators = [torch.Generator().manual_seed(recipe["seed"] + i) for i in range(6)]
    noise = torch.stack([torch.randn(4, 8, 8, generator=one) for one in generators])
    with torch.no_grad():
        expected = samplers.sample(teacher, noise, 3, "ddim", guidance=2.0, **cond)
    assert torch.allclose(stored, expected.float(), atol=1e-4)
    (drawn,) = diffkd.generate(diffkd.load(here / "run/students/2-steps"), 1, prompts=["a ring"])
    assert drawn.shape == (1, 32, 32, 3)


def test_a_teacher_that_takes_the_weight_draws_with_it(cli, here):
    """What it draws in place of data is of its usual weight, as an input."""
    (here / "prompts.txt").write_text("a red ring\n")
    method = {"name": "guidance", "range": [2, 6], "updates": 2, "learning_rate": 0.05, "warmup": 0}
    halved = {"name": "progressive", "steps": [4], "updates": 2, "learning_rate": 1e-3}
    assert cli("distill", "run.yaml", f"method={json.dumps([method, halved])}", "out=one").code == 0
    data = "data={kind: prompts, path: prompts.txt, draws: 2, steps: 4}"
    given = ("teacher.path=one/students/4-steps", data, "method={name: progressive, steps: [2], updates: 2}")
    outcome = cli("distill", "run.yaml", *given)
    assert outcome.code == 0, outcome.stderr
    assert "2 that the teacher draws in 4 steps, guidance 6" in outcome.stdout
    teacher = diffkd.load(here / "one/students/4-steps")
    cond = teacher.conditioner.embed(["a red ring"], size=(32, 32))
    recipe = json.loads((here / "run/pairs/data/pairs.json").read_text())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(recipe["seed"]))
    with torch.no_grad():
        weight = torch.tensor([6.0])
        expected = samplers.sample(teacher, noise, 4, "ddim", **cond, guidance_scale=weight)
    stored = load_file(here / "run/pairs/data/000000.safetensors")["x0"][:1]
    assert torch.allclose(stored, expected.float(), atol=1e-4)
    asked._say_once.cache_clear()
    outcome = cli("distill", "run.yaml", *given, "data.guidance=20", "out=other", "pictures=0")
    assert outcome.code == 0 and "takes guidance from 2 to 6, and is drawn with 20" in outcome.stderr


def test_pairs_are_drawn_whole(cli, here):
    """SDXL is told that an image of a pair is as large as it is, and not that another was cut."""
    (here / "wide").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(here / "wide" / f"{number}.png")
        (here / "wide" / f"{number}.txt").write_text(CAPTIONS[number])
    data = ("data={kind: folder, path: wide, size: 32}", "pictures=0", "cache=cache")
    method = {"name": "regression", "updates": 2, "pairs": 3, "pair_steps": 2, "guidance": 2.0}
    outcome = cli("distill", "run.yaml", *data, f"method={json.dumps(method)}", "out=pairs")
    assert outcome.code == 0, outcome.stderr
    teacher, folder = diffkd.load(here / "teacher"), here / "pairs/pairs/teacher"
    seed = json.loads((folder / "pairs.json").read_text())["seed"]
    noise = torch.stack(
        [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)]
    )
    cond = teacher.conditioner.embed(CAPTIONS[:3], size=(32, 32))
    with torch.no_grad():
        expected = samplers.sample(teacher, noise, 2, "ddim", guidance=2.0, **cond)
    stored = load_file(folder / "000000.safetensors")["x0"]
    assert torch.allclose(stored, expected.float(), atol=1e-4)


def test_a_run_that_asks_the_teacher_alone_draws_nothing_first(cli, here):
    (here / "prompts.txt").write_text("a red ring\na star\n")
    method = {"name": "dmd2", "steps": 1, "updates": 2, "fake_updates": 1, "warmup": 0}
    data = "data={kind: prompts, path: prompts.txt}"
    outcome = cli("distill", "run.yaml", f"method={json.dumps(method)}", data, "spread_every=1")
    assert outcome.code == 0, outcome.stderr
    assert not (here / "run/pairs").exists() and not (here / "run/cache/latents").exists()
    log = [json.loads(line) for line in (here / "run/log.jsonl").read_text().splitlines()]
    assert [record["update"] for record in log if record.get("event") == "spread"] == [1, 2]


def test_prompts_are_encoded_beforehand(cli, here):
    (here / "prompts.txt").write_text("a red ring\na star\n")
    outcome = cli("cache", "run.yaml", PROMPTS[0])
    assert outcome.code == 0 and "3 captions and images computed" in outcome.stdout, outcome.stderr


def test_what_is_computed_beforehand_is_not_computed_again(cli, here, make_pipeline):
    """`diffkd cache`, in two goes; then the run only trains."""
    outcome = cli("cache", "run.yaml")
    assert outcome.code == 0 and "16 captions and images computed: run/cache" in outcome.stdout
    next((here / "run/cache/latents").glob("*/*.safetensors")).unlink()
    assert "10 captions and images computed" in cli("cache", "run.yaml").stdout
    assert "nothing was missing" in cli("cache", "run.yaml").stdout
    before = {path: path.stat().st_mtime_ns for path in (here / "run").rglob("*.safetensors")}
    assert cli("distill", "run.yaml", "pictures=0", "method.steps=[2]").code == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    make_pipeline(here, name="pixels", size=32, channels=3)
    outcome = cli("cache", "run.yaml", "teacher.path=pixels", "method.guidance=1")
    assert outcome.code == 2 and "makes pixels" in outcome.stderr


def test_the_captions_of_a_reference_are_the_prompts(cli, here):
    """Of pictures that are held out, in a run and by `diffkd evaluate`."""
    held_out = {"kind": "shapes", "count": 20, "start": 1_000_000}
    captions = Shapes(**held_out).load().captions
    chosen = [captions[i] for i in image_sources.subset(20, 6).tolist()]
    measured = {
        "features": "shapes",
        "metrics": ["fid", "prompt_accuracy"],
        "samples": 6,
        "teacher_steps": [1],
    }
    given = json.dumps({**measured, "reference": held_out})
    outcome = cli("distill", "run.yaml", f"evaluation={given}", "pictures=0", "method.steps=[2]")
    assert outcome.code == 0, outcome.stderr
    for record in json.loads((here / "run" / "metrics.json").read_text()):
        assert record["protocol"]["prompts"] == described(chosen)
        assert 0 <= record["prompt_accuracy"] <= 1
    outcome = cli("evaluate", "teacher", "--reference", "shapes", "--samples", 6, "--steps", 1, "--json")
    assert outcome.code == 0, outcome.stderr
    many = Shapes(kind="shapes", count=2000, start=1_000_000).load().captions
    expected = described([many[i] for i in image_sources.subset(2000, 6).tolist()])
    assert json.loads(outcome.stdout)["protocol"]["prompts"] == expected


def test_a_model_is_measured_with_prompts_and_its_record_repeated(cli, here):
    (here / "prompts.txt").write_text("a red ring\na star above a square\ntwo crosses\n")
    given = (
        "evaluate",
        "teacher",
        "--reference",
        "images",
        "--features",
        "shapes",
        "--samples",
        8,
        "--steps",
        2,
    )
    outcome = cli(*given, "--prompts", "prompts.txt", "--out", "record.json", "-w", 3)
    assert outcome.code == 0, outcome.stderr
    (record,) = evaluation_records.load(here / "record.json")
    assert record["protocol"]["prompts"]["count"] == 3 and record["nfe"] == 4
    assert record["protocol"]["target"]["prompts"] == str(here / "prompts.txt")
    assert cli("evaluate", "--repeat", "record.json").code == 0
    (here / "prompts.txt").write_text("another\n")
    outcome = cli("evaluate", "--repeat", "record.json")
    assert outcome.code == 2 and "prompts.txt" in outcome.stderr
    outcome = cli(*given)
    assert outcome.code == 2 and "draws from prompts" in outcome.stderr and "--prompts" in outcome.stderr


def test_prompts_for_a_model_that_takes_none_are_refused(cli, here, make_pipeline):
    make_pipeline(here, name="pixels")
    (here / "prompts.txt").write_text("a\n")
    outcome = cli(
        "evaluate",
        "pixels",
        "--reference",
        "digits",
        "--steps",
        1,
        "--samples",
        4,
        "--prompts",
        "prompts.txt",
    )
    assert outcome.code == 2 and "takes none" in outcome.stderr
