"""`diffkd benchmark`: its rows are what `diffkd evaluate` measures, each of them once."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from diffkd.core import samplers
from diffkd.models import loading
from diffkd.runs import repeat
from diffkd.runs.reports import model_card, plots
from tests.refusals import refuse, tree

CONFIG: dict[str, Any] = {
    "out": "runs/bench",
    "models": [
        {"path": "plain", "name": "teacher", "steps": [4, 1]},
        {"path": "student"},
        {"path": "plain", "name": "its own code", "steps": [2], "stock": True},
    ],
    "evaluation": {
        "features": "toy.Quarters", "reference": "real", "metrics": ["fid", "kid"], "samples": 30,
        "batch_size": 16, "kid_subset_size": 20,
    },
}  # fmt: skip
TOY = """
import torch
import torch.nn.functional as F

class Quarters(torch.nn.Module):
    num_features = 4

    def forward(self, images):
        return F.adaptive_avg_pool2d(images.double().mean(1, keepdim=True), 2).flatten(1) / 255
"""
FILES = ["benchmark.md", "config.yaml", "environment.json", "fid-nfe.png", "fid-seconds.png", "metrics.json"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_pipeline, image_folder) -> Path:
    root = tmp_path_factory.mktemp("made")
    make_pipeline(root, name="plain")
    student = make_pipeline(root, name="student", seed=1)
    denoiser = loading.load(student)
    denoiser.steps = 4
    model_card.write(student, model_card.describe(denoiser))
    image_folder(root, name="real", count=50)
    (root / "toy.py").write_text(TOY)
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("toy", None)
    return tmp_path


def changed(here: Path, **changes: Any) -> str:
    """A config of these changes."""
    (here / "other.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    return "other.yaml"


@pytest.fixture
def run(cli, here) -> Callable[..., str]:
    """run(*args) -> what it prints."""

    def benchmark(*args: object) -> str:
        code, out, err = cli("benchmark", *(args or ["bench.yaml"]))
        assert (code, err) == (0, ""), err
        return out

    return benchmark


@pytest.fixture
def refused(cli, here) -> Callable[..., None]:
    def benchmark(*args: object, says: list[str] | str = "") -> None:
        refuse(cli, here, "benchmark", *args, says=says)

    return benchmark


def records(folder: Path | str = "runs/bench") -> list[dict[str, Any]]:
    return json.loads(Path(folder, "metrics.json").read_text())


def table(folder: Path | str = "runs/bench") -> list[list[str]]:
    """Rows of benchmark.md, titles first."""
    lines = [x for x in Path(folder, "benchmark.md").read_text().splitlines() if x.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert all(set(cell) <= set("-:") for cell in rows[1]), rows[1]
    return rows[:1] + rows[2:]


ROWS = [("teacher", 4), ("teacher", 1), ("student", 4), ("its own code", 2)]


def test_rows_are_models_times_steps(run, cli):
    """Each with the numbers that evaluate gives."""
    out = run()
    assert [(r["model"], r["steps"]) for r in records()] == ROWS
    for record, path in zip(records(), ["plain", "plain", "student", "plain"], strict=True):
        more = ["--sampler", "stock"] if record["model"] == "its own code" else []
        code, text, _ = cli(
            "evaluate", path, "--reference", "real", "--features", "toy.Quarters", "--metrics", "fid,kid",
            "--samples", 30, "--batch-size", 16, "--steps", record["steps"], "--json",
            "--kid-subset-size", 20, *more,
        )  # fmt: skip
        expected = json.loads(text)
        assert code == 0
        for key in ("fid", "kid", "kid_std", "parameters"):
            assert record[key] == expected[key], key
        assert record["seconds"] > 0 and record["protocol"]["target"] == expected["protocol"]["target"]
        assert record["protocol"]["metrics"] == expected["protocol"]["metrics"]
        assert f"{record['fid']:.3f}" in out
    assert sorted(p.name for p in Path("runs/bench").iterdir() if p.name[0] != ".") == FILES


def test_the_table(run):
    run()
    titles, *rows = table()
    assert [row[:2] for row in rows] == [[model, str(steps)] for model, steps in ROWS]
    for row, record in zip(rows, records(), strict=True):
        cells = dict(zip(titles, row, strict=True))
        assert cells["FID"] == f"{record['fid']:.3f}"
        assert cells["KID"] == f"{record['kid']:.5f} ± {record['kid_std']:.5f}"
        assert cells["nfe"] == str(record.get("nfe", ""))
        assert cells["images/s"] == f"{30 / record['seconds']:.0f}"
    text = Path("runs/bench/benchmark.md").read_text()
    assert "30 images" in text and "toy.Quarters" in text and "real" in text


def test_models_of_one_name_are_rows_of_one_line(run, here):
    """Of several step counts, each another student; MACs and how many times faster, by the first row."""
    models = [
        {"path": "student", "name": "both", "steps": [4]},
        {"path": "plain", "name": "both", "steps": [2]},
    ]
    run(changed(here, out="runs/both", models=models))
    titles, *rows = table("runs/both")
    found = records("runs/both")
    assert [(r["model"], r["steps"]) for r in found] == [("both", 4), ("both", 2)]
    assert found[0]["protocol"]["target"]["path"] != found[1]["protocol"]["target"]["path"]
    for row, record in zip(rows, found, strict=True):
        cells = dict(zip(titles, row, strict=True))
        assert cells["MACs/image"] == f"{record['macs'] * record['nfe'] / 1e6:.2f} M"
        assert cells["times the first"] == f"{found[0]['seconds'] / record['seconds']:.3g}"


def test_the_plots(run, monkeypatch):
    run()
    for name in ("fid-nfe", "fid-seconds"):
        with Image.open(f"runs/bench/{name}.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    for name in ("fid-nfe", "fid-seconds"):
        Path(f"runs/bench/{name}.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib" in run() and not list(Path("runs/bench").glob("*.png"))


def test_what_the_plots_show(run, here):
    """A line through the teacher's two points; a model of one step count is a point of its own."""
    run()
    seen = {}
    from matplotlib.axes import Axes

    real = Axes.plot
    monkey = pytest.MonkeyPatch()
    monkey.setattr(
        Axes,
        "plot",
        lambda self, *a, **k: (
            seen.setdefault(k["label"], []).append((*a, k["linestyle"])) or real(self, *a, **k)
        ),
    )
    try:
        plots.tradeoffs(here / "runs/bench", records())
    finally:
        monkey.undo()
    one, four = sorted((r for r in records() if r["model"] == "teacher"), key=lambda r: r["nfe"])
    x, y, style = seen["teacher"][0]
    assert (tuple(x), tuple(y), style) == ((1, 4), (one["fid"], four["fid"]), "-")
    lone = {r["model"]: r for r in records() if r["model"] != "teacher" and r.get("nfe")}
    assert lone and {*seen} == {"teacher", *lone}
    for name, row in lone.items():
        assert seen[name][0] == ((row["nfe"],), (row["fid"],), "none")
    x, y, _ = seen["teacher"][1]
    assert sorted(x) == pytest.approx(sorted(r["seconds"] / 30 for r in (one, four)))


def test_a_second_time_nothing_is_measured(run, monkeypatch):
    first = run()
    before = tree(Path("runs/bench"))

    def drawn(*args: Any, **options: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(samplers, "sample", drawn)
    again = run()
    after = tree(Path("runs/bench"))
    assert first.endswith(again) and not again.startswith("teacher")  # no row is said as it is measured
    for name in ("metrics.json", "config.yaml", "environment.json", "benchmark.md"):
        assert after[name] == before[name], name
    assert after.keys() == before.keys()


@pytest.mark.parametrize("row", [1, 3])
def test_what_is_missing_is_measured_again(run, row):
    """And nothing else."""
    run()
    before = records()
    kept = before[:row] + before[row + 1 :]
    Path("runs/bench/metrics.json").write_text(json.dumps(kept))
    run()
    after = records()
    assert len(after) == 4 and all(record in after for record in kept)  # with the very seconds
    (new,) = [record for record in after if record not in kept]
    assert (new["model"], new["steps"], new["fid"]) == (*ROWS[row], before[row]["fid"])
    assert sorted(cells[:2] for cells in table()[1:]) == sorted([model, str(steps)] for model, steps in ROWS)


def test_the_table_has_the_order_of_the_config(run):
    """Whatever the order that its rows were measured in."""
    run()
    Path("runs/bench/metrics.json").write_text(json.dumps(records()[::-1][:3]))
    run()
    assert [cells[:2] for cells in table()[1:]] == [[model, str(steps)] for model, steps in ROWS]


def test_stopped_on_the_way_and_gone_on(cli, run, monkeypatch):
    """The rows that were there are kept; a torn row is none."""
    whole = run()
    expected = records()
    shutil.rmtree("runs")
    real, calls = samplers.sample, []

    def killed(denoiser: Any, noise: Any, steps: int, *args: Any, **options: Any) -> Any:
        calls.append(steps)
        if steps == 1:
            raise KeyboardInterrupt
        return real(denoiser, noise, steps, *args, **options)

    monkeypatch.setattr(samplers, "sample", killed)
    assert cli("benchmark", "bench.yaml").code == 130
    assert [(r["model"], r["steps"]) for r in records()] == ROWS[:1]
    monkeypatch.setattr(samplers, "sample", real)
    assert run().splitlines()[-1] == whole.splitlines()[-1]
    assert [r["fid"] for r in records()] == [r["fid"] for r in expected]


def test_agreement(run, here, cli):
    evaluation = {**CONFIG["evaluation"], "metrics": ["fid", "agreement"]}
    config = changed(
        here, models=CONFIG["models"][:2], teacher={"path": "plain", "steps": [8]}, evaluation=evaluation
    )
    run(config)
    code, text, _ = cli(
        "evaluate", "student", "--reference", "real", "--features", "toy.Quarters", "--metrics",
        "fid,agreement", "--samples", 30, "--batch-size", 16, "--teacher", "plain", "--teacher-steps", 8,
        "--json",
    )  # fmt: skip
    expected = json.loads(text)
    (found,) = [r for r in records() if r["model"] == "student"]
    assert (found["psnr"], found["feature_distance"]) == (expected["psnr"], expected["feature_distance"])
    assert "PSNR to teacher, dB" in table()[0]


def test_agreement_beside_stock(run, here):
    """A model that its own code draws starts from the same noise."""
    evaluation = {**CONFIG["evaluation"], "metrics": ["fid", "agreement"]}
    run(changed(here, teacher={"path": "plain", "steps": [8]}, evaluation=evaluation))
    found = {(r["model"], r["steps"]): r for r in records()}
    assert list(found) == ROWS
    assert "psnr" in found["student", 4] and "psnr" in found["its own code", 2]


def test_the_same_again_from_its_records(run, cli):
    run()
    console = Console(file=io.StringIO(), width=1000)
    assert repeat.repeat(Path("runs/bench/metrics.json"), console, features_name="toy.Quarters")
    out = console.file.getvalue()
    assert " now" not in out
    for record in records():
        for key in ("fid", "kid", "kid_std"):
            assert f"{key} {record[key]!r}: the same to the last digit" in out


def test_digits(run, here):
    """The features that are the default."""
    config = changed(here, models=[{"path": "plain", "steps": [1]}], evaluation={"reference": "digits"})
    run(config)
    (record,) = records()
    assert record["protocol"]["features"]["name"] == "digits" and record["protocol"]["samples"] == 1797
    assert "digits" in Path("runs/bench/benchmark.md").read_text()


def test_names(run, here):
    """Any characters: in the table, in the terminal and in the plots."""
    names = ["a|b", "_first", "a $x$", "$\\frac$", "[bold]x", "[/x]", "μ ≥ 2"]
    out = run(changed(here, models=[{"path": "plain", "name": name, "steps": [1]} for name in names]))
    assert [r["model"] for r in records()] == names
    assert [len(row) for row in table()] == [len(table()[0])] * (1 + len(names))
    assert all(name in out for name in names)
    assert len(list(Path("runs/bench").glob("fid-*.png"))) == 2


def test_a_dry_run(run, here):
    before = tree(here)
    out = yaml.safe_load(run("bench.yaml", "--dry-run", "evaluation.samples=20"))
    assert tree(here) == before
    assert out["evaluation"]["samples"] == 20 and out["evaluation"]["kid_subsets"] == 100
    assert [m["path"] for m in out["models"]] == ["plain", "student", "plain"]
    assert out["evaluation"]["reference"]["path"] == "real"
    (here / "dry.yaml").write_text(yaml.safe_dump(out))
    assert yaml.safe_load(run("dry.yaml", "--dry-run")) == out


@pytest.mark.slow
def test_two_processes(run, here, launched):
    run()
    done = launched(2, "benchmark", "bench.yaml", "out=runs/two")
    assert done.returncode == 0, done.stderr
    for one, two in zip(records(), records("runs/two"), strict=True):
        assert two["protocol"]["processes"] == 2
        for key in ("fid", "kid", "kid_std"):
            assert two[key] == pytest.approx(one[key], abs=1e-9), key
    assert [row[:2] for row in table("runs/two")] == [row[:2] for row in table()]
    assert done.stdout.count("benchmark.md") == 1


# mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("modls=[]", ["modls", "did you mean models?"]),
        ("models.0.stepps=[1]", ["stepps", "did you mean steps?"]),
        ("evaluation.metric=[fid]", ["evaluation.metric", "did you mean metrics?"]),
        ("evaluation.metrics=[fdi]", ["evaluation.metrics", "'fdi'"]),
        ("evaluation.metrics=[]", ["evaluation.metrics"]),
        ("evaluation={}", ["evaluation.reference", "missing"]),
        ("evaluation=null", ["evaluation"]),
        ("evaluation.reference=null", ["evaluation.reference", "missing"]),
        ("evaluation.reference=./gone", ["./gone"]),
        ("evaluation.reference=gone.npz", ["gone.npz", "does not exist"]),
        ("evaluation.reference=3", ["evaluation.reference"]),
        ("evaluation.reference={kind: npz}", ["evaluation.reference.path", "missing"]),
        ("evaluation.reference=model.pkl", ["model.pkl", "pickle"]),
        ("evaluation.features=no.such.Network", ["no.such.Network"]),
        ("evaluation.samples=1", ["evaluation.samples"]),
        ("evaluation.metrics=[fid, agreement]", ["teacher", "agreement"]),
        ("models=[]", ["models"]),
        ("models=[{path: plain, steps: [0]}]", ["steps", "0"]),
        ("models=[{path: plain}]", ["plain", "no step count"]),
        ("models=[{path: plain, steps: [1]}, {path: ./gone, steps: [1]}]", ["./gone"]),
        ("models=[{path: plain, steps: [1]}, {path: real, steps: [1]}]", ["real"]),
        ("models=[{path: plain, steps: [1, 1]}]", ["plain", "twice"]),
        ("models=[{path: plain, steps: [1]}, {path: student, name: plain, steps: [1]}]", ["plain", "twice"]),
        ("models=[{path: student}, {path: plain, name: student}]", ["student", "twice"]),
        ("models=[{path: student}, {path: plain, name: student, steps: [1]}]", ["student", "twice"]),
        ("models=[{path: plain, steps: [1], guidance: -1}]", ["guidance", "-1"]),
        ("models=[{path: plain, steps: [1], guidance: 2}]", ["guidance"]),
        ("models=[{path: plain, steps: [1], null_label: 2}]", ["null_label 2"]),
        ("models=[{path: plain, steps: [1], stock: true, guidance: 2}]", ["guidance"]),
        ("teacher={path: ./gone}", ["./gone"]),
        ("out=real", ["real", "is not empty"]),
        ("out=bench.yaml", ["bench.yaml is a file"]),
    ],
)  # fmt: skip
def test_configs(cli, here, override, says):
    code, out, err = cli("benchmark", "bench.yaml", override)
    assert (code, out, len(err.splitlines())) == (2, "", 1), (code, out, err)
    assert err.startswith("diffkd: error: ") and all(words in err for words in says), err


@pytest.mark.parametrize(
    "override",
    [
        "evaluation.reference=gone.npz",
        "evaluation.features=no.such.Network",
        "models=[{path: plain}]",
        "models=[{path: plain, steps: [1]}, {path: ./gone, steps: [1]}]",
        "teacher={path: ./gone}",
    ],
)
def test_nothing_is_left_of_a_config_that_cannot_work(refused, override):
    refused("bench.yaml", override)


def test_another_config_in_the_same_folder(run, refused):
    run()
    refused(
        "bench.yaml", "evaluation.samples=31", says=["runs/bench", "another config", "evaluation.samples"]
    )


def test_a_path_that_was_put_right(run, cli, here):
    """A mistake in a config does not take the folder's name for ever."""
    wrong = changed(here, models=[{"path": "./gone", "name": "plain", "steps": [1]}])
    assert cli("benchmark", wrong).code == 2
    run()


def test_a_model_that_draws_nan(run, cli, here, monkeypatch):
    """What was measured before it is kept, and goes on once the model is repaired."""
    monkeypatch.setattr(loading, "_try", lambda denoiser: None)  # as if it showed in later steps only
    path = here / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    tensors = load_file(path)
    tensors["conv_out.bias"][0] = torch.nan
    save_file(tensors, path)
    code, _, err = cli("benchmark", "bench.yaml")
    assert code == 2 and err.count("\n") == 1 and "NaN" in err
    assert "student" in err  # which of them
    assert [(r["model"], r["steps"]) for r in records()] == ROWS[:2]
    path.write_bytes(content)
    run()
    assert [(r["model"], r["steps"]) for r in records()] == ROWS


@pytest.mark.parametrize("content", ["{", "[3]", '{"a": 1}'])
def test_a_metrics_json_that_is_broken(run, refused, content):
    run()
    Path("runs/bench/metrics.json").write_text(content)
    refused("bench.yaml", says="metrics.json")
