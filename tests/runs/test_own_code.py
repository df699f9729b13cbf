"""Code of the user's own in whole runs: beside the config, from any folder, in one process and in two."""

from __future__ import annotations

import sys

import pytest

from diffkd.io import plugins
from tests.io.test_plugins import METHOD, NETWORK
from tests.runs import tiny

TRAINS = """
    def losses(self, nets, batch, step, rng):
        from diffkd.core.noise import add_noise, grid_times
        from diffkd.methods.base import Loss

        t, _ = grid_times(len(batch.x0), 4, rng, batch.x0.device)
        x_t = add_noise(nets["student"].schedule, batch.x0, t, rng)
        gap = nets["student"](x_t, t, **batch.cond) - nets["teacher"](x_t, t, **batch.cond)
        yield Loss("student", self.strength * gap.square().mean())
"""


@pytest.fixture
def config(tmp_path, monkeypatch, tiny_teacher):
    """A config beside the code that it names; the current folder is another."""
    (tmp_path / "own_method.py").write_text(METHOD.replace("Stage('mine', 1", "Stage('mine', 3") + TRAINS)
    (tmp_path / "own_features.py").write_text(NETWORK)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    content = {
        **tiny.CONFIG, "teacher": {"path": str(tiny_teacher)}, "method": {"name": "./own_method.py"},
        "evaluation": {"samples": 8, "features": "own_features", "teacher_steps": [2]}, "pictures": 0,
    }  # fmt: skip
    return tiny.write(tmp_path / "run.yaml", content)


def forget():
    """As a new process does."""
    for name in ("own_method", "own_features"):
        sys.modules.pop(name, None)
    plugins.homes.clear()
    plugins.looked.clear()


def test_a_run_and_the_same_command_again(config, cli):
    code, out, err = cli("distill", config, "out=run")
    assert code == 0, err
    assert [line.partition(" (")[0] for line in err.splitlines()] == [
        "diffkd: running user code: module own_method", "diffkd: running user code: module own_features"
    ]  # fmt: skip
    assert "students: mine (own_method, 1); 1 updates in all" in out
    kept = tiny.records(config.parent / "elsewhere/run")
    assert {record["protocol"]["features"]["name"] for record in kept} == {"own_features.Pooled"}
    forget()
    code, out, err = cli("distill", config, "out=run")
    assert code == 0, err
    assert tiny.records(config.parent / "elsewhere/run") == kept
    student = "run/students/mine"
    reference = ["--reference", "digits", "--samples", 8, "--features"]
    forget()
    code, out, err = cli("evaluate", student, *reference, "own_features")
    assert code == 2 and f"neither installed nor in {config.parent}/elsewhere" in err
    code, out, err = cli("evaluate", student, *reference, "../own_features.py")
    assert code == 0, err


@pytest.mark.slow
def test_in_two_processes(config, launched):
    done = launched(2, "distill", config, "out=run")
    assert done.returncode == 0, done.stderr
    assert (config.parent / "elsewhere/run/students/mine").is_dir()
