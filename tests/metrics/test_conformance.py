"""What holds for every metric, and for the one that docs/contributing/metric.md adds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

import diffkd
from diffkd import metrics
from diffkd.cli.app import app
from diffkd.metrics.base import MAIN, Metric
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.features import NAMES, OF_METRICS

ROOT = Path(diffkd.__file__).parents[1]
KINDS = metrics.kinds()
EVALUATE = typer.main.get_command(app).commands["evaluate"]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_metric_is_one_final_class_with_its_keys_and_its_row(kind):
    assert kind.__mro__[1] is Metric and kind.__doc__ and kind.values
    assert kind.network == MAIN or kind.network in (*NAMES, *OF_METRICS)
    fields = Evaluation.model_fields
    assert all(
        field.description and fields[key].annotation == field.annotation
        for key, field in kind.model_fields.items()
    )
    assert f"| `{kind.name}` |" in (ROOT / "docs/evaluation.md").read_text()
    assert re.search(rf"\b{kind.name}\b", metrics_help())
    assert json.loads(json.dumps(kind().options(100, 200))) == kind().options(100, 200)


def metrics_help() -> str:
    return next(one.help for one in EVALUATE.params if one.name == "metrics")


def test_keys_titles_and_config_keys_are_of_one_metric_each():
    for found in (
        [key for kind in KINDS.values() for value in kind.values for key in (value.key, *value.spread)],
        [value.title for kind in KINDS.values() for value in kind.values],
        [key for kind in KINDS.values() for key in kind.model_fields],
    ):
        assert len(found) == len(set(found))


def test_metrics_come_in_the_order_of_tables():
    assert list(KINDS)[:2] == ["fid", "fd_inf"] and list(KINDS)[-1] == "agreement"


def example() -> str:
    page = (ROOT / "docs/contributing/metric.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", page, re.S)[1]


@pytest.mark.parametrize(("n", "d"), [(5, 12), (40, 7)])
@pytest.mark.parametrize("order", [1.0, 2.0, 0.5])
def test_the_mathematics_of_the_example(n, d, order):
    """Beside the eigenvalues of the whole N x N matrix, in NumPy."""
    written: dict[str, object] = {"__name__": "vendi"}
    exec(compile(example().split("class Vendi")[0], "metric.md", "exec"), written)
    score = written["vendi_score"]
    x = np.random.default_rng([3, n, d]).standard_normal((n, d))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    p = np.linalg.eigvalsh(unit @ unit.T / n)
    p = p[p > 1e-12]
    expected = np.exp(-(p * np.log(p)).sum()) if order == 1 else (p**order).sum() ** (1 / (1 - order))
    assert score(torch.from_numpy(x), order) == pytest.approx(expected, rel=1e-6)
    assert score(torch.eye(6), order) == pytest.approx(6) and score(torch.ones(6, 3), order) == pytest.approx(
        1
    )


def test_a_metric_is_added_by_its_file_alone(tmp_path, image_folder):
    """The package with the page's example in it, and nothing else changed."""
    package = shutil.copytree(
        ROOT / "diffkd", tmp_path / "diffkd", ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "metrics/vendi.py").write_text(example(), encoding="utf-8")
    images = image_folder(tmp_path, count=12)
    command = [
        sys.executable, "-m", "diffkd.cli", "evaluate", images, "--reference", images, "--features", "digits",
        "--metrics", "vendi,kid", "--out", "record.json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert 1 < record["vendi"] <= 12 and f"{record['vendi']:.2f}" in done.stdout
    assert record["protocol"]["metrics"]["vendi"] == {"order": 1.0}
    assert record["protocol"]["evaluation"]["vendi_order"] == 1.0
    assert record["kid"] is not None
