"""Help, version, completion, and the list of methods: what a user sees first, at once."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
import yaml

import diffkd
from diffkd import methods, metrics
from diffkd.cli import app, completion
from diffkd.data import Data
from diffkd.metrics import features, tool_distances
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.models.students.config import Student
from diffkd.runs.config import Train
from diffkd.training.config import Training
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
    assert f"Usage: diffkd {command}" in out  # and not of "python -m", however it was started
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
        ("diffkd distill x.yaml seed = 1 method.0.name = reg", {"regression"}),  # as bash splits words
        ("diffkd train x.yaml training.optimizer =", {"adamw", "adamw_8bit"}),
        ("diffkd distill x.yaml training.batch_size =", set()),
    ],
)
def test_completion(line, offers):
    ran = run(_DIFFKD_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(line.count(" ")))
    assert ({*ran.stdout.split()}, ran.stderr, ran.returncode) == (offers, "", 0)


def test_completion_of_a_word_that_the_shell_leaves_whole():
    line = "diffkd distill x.yaml seed=1 evaluation.protocol=cl"
    ran = run(_DIFFKD_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)
    assert re.findall(r'"([^"]*=[^"]*)"', ran.stdout) == ["evaluation.protocol=clean-fid"], ran.stderr


def test_bash_completes_by_the_script_that_is_shown(tmp_path):
    """In bash itself, which finds its own name, evaluates the script and presses the key."""
    command = tmp_path / "diffkd"
    command.write_text(f"#!{sys.executable}\nfrom diffkd.cli import main\n\nmain()\n")
    command.chmod(0o755)
    pressed = (
        'eval "$(diffkd --show-completion)"; COMP_WORDS=(diffkd sample x --format w); COMP_CWORD=4; '
        '_diffkd_completion diffkd; complete -p diffkd; echo "${COMPREPLY[@]}"'
    )
    ran = subprocess.run(
        ["bash", "--norc", "-c", pressed], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.stderr == ""
    assert ran.stdout.split("\n")[:2] == ["complete -o default -F _diffkd_completion diffkd", "webp"]


def test_words_that_are_completed_are_those_that_are_taken():
    """Of each key the values, in their order, that the typed object names."""

    def words(kind: type, key: str) -> tuple[str, ...]:
        """The strings of its Literals."""
        waiting, found = [kind.model_fields[key].annotation], []
        while waiting:
            one = waiting.pop(0)
            waiting = [*get_args(one), *waiting]
            found += [one] if isinstance(one, str) else []
        return tuple(found)

    def kinds(union: object) -> tuple[str, ...]:
        return tuple(words(kind, "kind")[0] for kind in get_args(get_args(union)[0]))

    assert {
        "method.name": tuple(methods.names()),
        "method.sampler": words(methods.find("progressive"), "sampler"),
        "student.kind": kinds(Student),
        "data.kind": kinds(Data),
        "prediction": words(Train, "prediction"),
        "training.precision": words(Training, "precision"),
        "training.optimizer": words(Training, "optimizer"),
        "evaluation.protocol": words(Evaluation, "protocol"),
        "evaluation.features": completion.FEATURES,
        "evaluation.resize": words(Evaluation, "resize")[:4],  # and two of older versions
        "evaluation.sampler": words(Evaluation, "sampler"),
    } == completion.VALUES
    assert {*completion.FEATURES} == {*features.NAMES} and completion.TOOLS == tool_distances.TOOLS
    assert {*metrics.kinds()} == {*completion.METRICS}


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


def test_methods_are_two_tables(cli):
    """What each does, with its paper, and what it needs; in 120 columns."""
    code, out, err = cli("methods")
    does, table, legend = out.split("\n\n")
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 120
    head, *phrases = [re.split(r" {2,}", line, maxsplit=1) for line in does.splitlines()]
    assert head == ["method", "what it does"] and [name for name, _ in phrases] == methods.names()
    for name, phrase in phrases:
        kind = methods.find(name)
        assert phrase == (sys.modules[kind.__module__].__doc__ or "").splitlines()[0]
        author, year = re.match(r"(\w+).*?(\d{4})", kind.reference).groups()
        assert re.search(rf"\(.*\b{author}\b.*{year}.*\)", phrase), (name, author, year)
    head, *rows = [re.split(r" {2,}", line) for line in table.splitlines()]
    assert head == ["method", "learns from", "more networks", "memory", "calls"]
    assert [row[0] for row in rows] == methods.names()
    cells = {row[0]: row[1:] for row in rows}
    student = "a student's, (activations)"
    assert cells["dmd2"] == ["its teacher alone", "fake, (heads)", student, "5 student, 1 teacher, 6 fake"]
    assert cells["progressive"] == ["noised images", "none", "none", "1 student, 2 teacher"]
    assert cells["tcm"][:3] == ["images, after consistency", "(first)", "(weights)"]
    assert [cells[name][0] for name in ("regression", "guidance")] == ["pairs", "noised images, labels"]
    told = {line.partition(":")[0] for line in legend.splitlines()} | {"none"}
    for name, source, networks, memory, calls in rows:
        needs = methods.find(name).needs
        assert ("images" in source) == needs.data and (source == "pairs") == needs.pairs
        assert set(re.findall(r"\w+", networks)) <= told
        assert (memory == "none") == (not needs.memory) and (networks != "none") <= bool(needs.memory)
        assert calls == ", ".join(f"{count:g} {network}" for network, count in needs.passes.items())


@pytest.mark.parametrize("name", methods.names())
def test_a_method_in_full(cli, name):
    code, out, err = cli("methods", name)
    kind = methods.find(name)
    assert (code, err) == (0, "") and kind.reference in out
    for key, field in kind.model_fields.items():
        assert re.search(rf"^  {key}: \S.*{re.escape(field.description or '')}$", out, re.MULTILINE)
    assert re.search(r"^learns from: ((noised )?images|pairs|its teacher alone)", out, re.MULTILINE)
    assert re.search(r"^inputs beside the image: (none|labels)", out, re.MULTILINE)
    assert ("an input that means none" in out) == kind.needs.unconditional
    assert ("; with guidance labels or prompts, and one that means none" in out) == (
        "guidance" in kind.model_fields
    )
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
