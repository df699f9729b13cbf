"""Help, version, completion, and the list of methods: what a user sees first, at once."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

import diffkd
from diffkd import methods
from diffkd.cli import app
from tests.test_docs import ROOT

COMMANDS = typer.main.get_command(app.app).commands


def test_version(cli):
    assert cli("--version") == (0, f"diffkd {diffkd.__version__}\n", "")


def test_dir_shows_the_public_names():
    shown = dir(diffkd)
    assert {"load", "generate", "evaluate", "Denoiser", "schedules", "methods", "metrics"} <= {*shown}
    assert all(hasattr(diffkd, name) for name in shown)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_ends_with_an_example_that_the_command_takes(cli, command, monkeypatch):
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    example = re.search(r"Example: diffkd (.*?)\s*\Z", out)
    assert example, out[-300:]  # on one line, so that it can be copied
    words = example[1].split()
    assert words[0] == command
    asked = app.app(words, standalone_mode=False)
    assert asked.func is inspect.unwrap(COMMANDS[command].callback)
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()


def test_examples_go_on_from_each_other():
    """Those of the later commands name what the earlier ones make."""
    examples = {kind.__name__: example.split() for kind, example in app.EXAMPLES.items()}
    run = yaml.safe_load((ROOT / examples["distill"][2]).read_text())
    models = [f"{run['out']}/students/{one['steps']}-steps-{one['name']}" for one in run["method"]]
    assert examples["sample"][2] in models
    assert examples["evaluate"][2] == examples["fid"][2] == examples["sample"][-1]


def run(*words: str, shell: str = "bash", **variables: str) -> subprocess.CompletedProcess[str]:
    """The command with the variables that typer's scripts set, and no shell to be found above it."""
    code = "import sys; sys.argv[0] = 'diffkd'; from diffkd.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={**os.environ, **variables},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("diffkd sam", {"sample"}),
        ("diffkd methods pro", {"progressive"}),
        ("diffkd sample x --mode g", {"graph"}),
        ("diffkd evaluate x --metrics k", {"kid"}),
        ("diffkd evaluate x --metrics fid,p", {"fid,prdc", "fid,prompt_accuracy"}),
    ],
)
def test_completion(line, offers):
    ran = run(_DIFFKD_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(line.count(" ")))
    assert ({*ran.stdout.split()}, ran.stderr, ran.returncode) == (offers, "", 0)


@pytest.mark.parametrize("shell", ["complete_tcsh", "source_x", "x", ""])
def test_completion_for_a_shell_that_is_not_known(shell):
    ran = run("--version", _DIFFKD_COMPLETE=shell)
    assert "Traceback" not in ran.stderr and len(ran.stderr.splitlines()) <= 1


def test_a_shell_that_cannot_be_told(cli, monkeypatch):
    shellingham = pytest.importorskip("shellingham")

    def fails() -> None:
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", fails)
    for option in ("--show-completion", "--install-completion"):
        code, out, err = cli(option)
        assert code == 1 and len((out + err).splitlines()) == 1 and "not supported" in out + err


def test_completion_imports_no_torch():
    code = (
        "import os, sys; sys.argv = ['diffkd']; from diffkd.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('HEAVY', [m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    )
    words = "diffkd methods x"
    variables = {"_DIFFKD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "2"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **variables},
    )
    assert ran.stdout.splitlines()[-1] == "HEAVY []", ran.stderr


def test_methods_are_a_table(cli):
    code, out, err = cli("methods")
    table, _, legend = out.partition("\n\n")
    head, *rows = [re.split(r" {2,}", line) for line in table.splitlines()]
    assert (code, err, [row[0] for row in rows]) == (0, "", methods.names())
    assert head == ["method", "paper", "learns from", "more networks", "what it does"]
    sources = {row[0]: row[2] for row in rows}
    assert (sources["dmd2"], sources["regression"]) == ("its teacher alone", "pairs")
    assert (sources["progressive"], sources["denoising"]) == ("noised images", "images")
    assert sources["tcm"] == "images, after a consistency student"
    for name, paper, source, networks, phrase in rows:
        kind = methods.find(name)
        assert kind.reference.startswith(f"{paper}, http")
        assert ("images" in source) == kind.needs.data and (source == "pairs") == kind.needs.pairs
        assert networks == (", ".join(kind.needs.networks) or "none")
        told = {line.partition(":")[0] for line in legend.splitlines()} | {"none", "projectors"}
        assert {part.partition(" ")[0] for part in networks.split(", ")} <= told
        assert phrase == (sys.modules[kind.__module__].__doc__ or "").splitlines()[0]
    assert len({line.index(row[4]) for line, row in zip(table.splitlines()[1:], rows, strict=True)}) == 1


@pytest.mark.parametrize("name", methods.names())
def test_a_method_in_full(cli, name):
    code, out, err = cli("methods", name)
    kind = methods.find(name)
    assert (code, err) == (0, "") and kind.reference in out
    for key, field in kind.model_fields.items():
        assert re.search(rf"^  {key}: \S.*{re.escape(field.description or '')}$", out, re.MULTILINE)
    assert re.search(r"^learns from: ((noised )?images|pairs|its teacher alone)", out, re.MULTILINE)
    listed = ", ".join(kind.needs.networks) or "none"
    assert re.search(rf"^networks beside teacher and student: {listed}$", out, re.MULTILINE)
    assert re.search(r"^memory over teacher and student: \S", out, re.MULTILINE)
    assert kind.needs.calls and f"network calls in an update: {kind.needs.calls}" in out
    guided = "guidance" in kind.model_fields and "teacher" in kind.needs.calls
    assert ("guidance doubles the teacher's" in out) == guided
    page = re.search(r"^page: (.*)$", out, re.MULTILINE)
    assert page and re.search(rf"\b{name}\b", Path(page[1]).read_text(encoding="utf-8"))


def test_a_method_that_does_not_exist(cli):
    code, out, err = cli("methods", "progresive")
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "progressive" in err
