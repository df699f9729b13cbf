"""The spread watch: its numbers against numpy, when it warns, and that training knows nothing of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffkd.data.digits import Digits
from diffkd.metrics import features
from diffkd.runs import session
from diffkd.runs.spread import EVENT, Watch, within_classes
from tests.runs.tiny import CONFIG, UNMEASURED, log, network, same, signal_at, write


def test_the_spread_is_the_pooled_variance_within_classes():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(50, 3)), rng.integers(0, 4, 50)
    parts = [x[labels == label] for label in np.unique(labels)]
    squares = sum(((part - part.mean(0)) ** 2).sum() for part in parts)
    found = within_classes(torch.from_numpy(x), torch.from_numpy(labels))
    assert found == pytest.approx(squares / (50 - len(parts)), rel=1e-12)
    assert within_classes(torch.from_numpy(x), None) == pytest.approx(x.var(0, ddof=1).sum(), rel=1e-12)
    assert np.isnan(within_classes(torch.from_numpy(x[:3]), torch.arange(3)))


def test_between_classes_does_not_count():
    """Collapsed to one image of each class: the spread within them is 0, however far apart they are."""
    x = torch.arange(4.0).repeat_interleave(8)[:, None] * 100
    assert within_classes(x, torch.arange(4).repeat_interleave(8)) == 0 < within_classes(x, None)


def said(ratios: list[float], caplog: pytest.LogCaptureFixture) -> list[int]:
    """The updates, 50 apart and from 0 on, at which a watch of these ratios warns."""
    caplog.clear()
    watch, updates = Watch("1-steps"), []
    for number, ratio in enumerate(ratios):
        watch.see(ratio, 50 * number)
        if len(caplog.records) > len(updates):
            updates.append(50 * number)
    return updates


@pytest.mark.parametrize(
    ("ratios", "warns"),
    [
        ([0.9, 0.9, 0.8, 0.3, 0.2, 0.2, 0.1], [200]),  # in the second look that finds it low
        ([0.9, 0.6, 0.44, 0.43], [150]),
        ([0.9, 0.3, 0.9, 0.3, 0.9], []),  # once is chance
        ([0.9, 0.3, 0.4, 0.6, 0.9], []),  # on its way up
        ([0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 0.6], []),  # blurred in the beginning, as by one step of a teacher
        ([0.02] * 9, [200]),  # and never more than that
        ([1.0, *[0.02, 0.03] * 5], [200]),  # collapsed, to a few images now and to others then
        ([0.02, 0.03] * 5, [250]),
        ([0.4, 0.38, 0.41, 0.4, 0.39], []),  # guided: a smaller spread than the data's, which stays
        ([1.5, 1.2, 1.0, 0.9], []),
    ],
)
def test_a_collapse_is_said_once_and_within_200_updates_of_its_start(caplog, ratios, warns):
    assert said(ratios, caplog) == warns
    for record in caplog.records:
        assert "stage 1-steps" in record.getMessage() and "method.learning_rate" in record.getMessage()


COLLAPSING = """
import torch
from pydantic import Field
from diffkd.methods.base import Loss, Method, Stage


class Collapsing(Method):
    reference = "for tests, 2026, https://example.org"
    updates: int = Field(12, description="updates")

    def stages(self, start):
        return [Stage("1-steps", self.updates, 1e-2, steps=1)]

    def losses(self, nets, batch, step, rng):
        noise = torch.randn(batch.x0.shape, generator=rng)
        t = torch.ones(len(noise), dtype=torch.float64)
        aim = noise.clamp(-1, 1) if step.progress < 0.4 else torch.zeros_like(noise)
        yield Loss("student", (nets["student"](noise, t, **batch.cond) - aim).square().mean())
"""


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_teacher) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "collapsing.py").write_text(COLLAPSING)
    write(
        "distill.yaml",
        {**CONFIG, **UNMEASURED},
        teacher={"path": str(tiny_teacher)},
        out="run",
        spread_every=2,
    )
    return tmp_path


def looks(folder: Path) -> list[tuple[int, float]]:
    return [(r["update"], r[EVENT]) for r in log(folder) if r.get("event") == EVENT]


def test_the_same_bits_with_it_and_without(here, cli):
    assert cli("distill", "distill.yaml").code == 0
    assert cli("distill", "distill.yaml", "out=unwatched", "spread_every=null").code == 0
    for name in ("4-steps", "2-steps", "1-steps"):
        assert same(network(here / "run/students" / name), network(here / "unwatched/students" / name))
    assert [r for r in log(here / "run") if "event" not in r] == log(here / "unwatched")
    assert [update for update, _ in looks(here / "run")] == [2, 2, 4, 6, 2, 4, 6]


def test_it_says_what_the_students_images_are(here, cli, monkeypatch):
    """In digits features, by hand: of the raw student after the last update, against the data."""
    kept: list[Any] = []
    real = session.run_stage

    def keeping(
        accelerator: Any, method: Any, stage: Any, nets: Any, *rest: Any, on_update: Any, **more: Any
    ):
        def done(update: int, record: Any) -> None:
            on_update(update, record)
            if update == stage.updates:
                with torch.no_grad():
                    generator = torch.Generator().manual_seed(0)
                    noise = torch.randn(4096, 1, 8, 8, generator=generator)
                    labels = torch.arange(4096) % 10
                    one = torch.ones(4096, dtype=torch.float64)
                    kept.append((nets["student"](noise, one, class_labels=labels), labels))

        real(accelerator, method, stage, nets, *rest, on_update=done, **more)

    monkeypatch.setattr(session, "run_stage", keeping)
    evaluation = "evaluation={samples: 32, teacher_steps: [2]}"
    assert cli("distill", "distill.yaml", "method.steps=[1]", "method.updates=2", evaluation).code == 0
    x0, labels = kept[0]
    net, data = features.load("digits"), Digits(kind="digits").load()
    of_student = net(((x0 / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))
    of_data = net(torch.from_numpy(data.pixels))
    expected = within_classes(of_student, labels) / within_classes(of_data, data.labels)
    assert looks(here / "run")[-1][1] == pytest.approx(expected, rel=0.4)  # of 128 images; other noises


def test_a_collapse_is_said_once_and_once_only_by_a_resumed_run(here, cli):
    run = ("distill", "distill.yaml", "method={name: collapsing, updates: 60}")
    code, _, err = cli(*run, "out=whole")
    (line,) = [line for line in err.splitlines() if "collapses" in line]
    update = int(line.split("at update ")[1].split()[0])
    assert code == 0 and 24 < update < 60
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, "1-steps", update + 1, send=[signal.SIGTERM])
        assert cli(*run).code == 130
    code, _, err = cli(*run)
    assert (code, err) == (0, ""), "it was said before"
    assert looks(here / "run") == looks(here / "whole")
    assert json.dumps(log(here / "run")) == json.dumps(log(here / "whole"))


@pytest.mark.slow
def test_two_processes_see_the_same(here, launched):
    found = []
    for processes in (1, 2):
        done = launched(
            processes, "distill", "distill.yaml", f"out={here / str(processes)}", "training.micro_batches=2"
        )
        assert done.returncode == 0, done.stderr
        found.append([ratio for _, ratio in looks(here / str(processes))])
    assert found[0] == pytest.approx(found[1], rel=1e-3) and len(found[0]) == 7


def test_a_run_without_images_looks_at_the_teachers(here, cli):
    regression = "{name: regression, pairs: 20, pair_steps: 2, updates: 4, guidance: 1.5}"
    assert cli("distill", "distill.yaml", f"method={regression}", "data={kind: none}").code == 0
    assert len(looks(here / "run")) == 2
