"""`scripts/new_method` and the page that it takes its files from, docs/contributing/method.md."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffkd import methods
from tests.methods.conformance import check_losses, check_resumes
from tests.refusals import tree

ROOT = Path(__file__).parents[2]
PARTS = ("diffkd", "tests", "configs", "docs", "scripts", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The repository's files, to be read and copied only."""
    folder = tmp_path_factory.mktemp("copy")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.png")
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, folder / part)
    return folder


def new_method(folder, *arguments):
    command = [sys.executable, str(folder / "scripts/new_method"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60)


def run(folder, *command):
    """A module of Python in the copy, whose diffkd and tests come before those that are installed."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=folder, env=environment,
        timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def extended(copied, tmp_path_factory):
    """A copy with a method of the script's, and what the script printed."""
    folder = tmp_path_factory.mktemp("extended") / "repository"
    shutil.copytree(copied, folder)
    done = new_method(folder, "own_idea")
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


def test_the_files_of_a_new_method_pass_at_once(extended):
    folder, printed = extended
    written = printed.splitlines()[:-1]
    assert sorted(written) == [
        "configs/digits/own_idea.yaml", "diffkd/methods/own_idea.py", "docs/methods/README.md",
        "docs/methods/own_idea.md", "tests/methods/test_own_idea.py",
    ]  # fmt: skip
    texts = [(folder / path).read_text() for path in written if path != "docs/methods/README.md"]
    assert not any(re.search("endpoint|luhman", text, re.IGNORECASE) for text in texts)
    assert "class OwnIdea(Method):" in (folder / "diffkd/methods/own_idea.py").read_text()
    tests = ["tests/methods/test_conformance.py", "tests/methods/test_own_idea.py", "-k", "own_idea"]
    done = run(folder, "pytest", "-q", "-p", "no:cacheprovider", *tests, "-m", "not slow")
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"^7 passed", done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
def test_a_new_method_passes_the_slow_checks_too(extended):
    """Its config, its types, and two processes that equal one."""
    folder, _ = extended
    done = run(folder, "diffkd.cli", "distill", "configs/digits/own_idea.yaml", "--dry-run")
    assert done.returncode == 0 and "name: own_idea" in done.stdout, done.stderr
    pytest.importorskip("mypy")
    # what it imports is left out, which would take minutes and is checked by scripts/check
    alone = ["--follow-imports=skip", "--no-warn-return-any", "--allow-subclassing-any"]
    done = run(folder, "mypy", *alone, "diffkd/methods/own_idea.py")
    assert done.returncode == 0, done.stdout
    tests = ["tests/methods/test_conformance.py", "-k", "own_idea"]
    done = run(folder, "pytest", "-q", "-p", "no:cacheprovider", *tests, "-m", "slow")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-4000:]


@pytest.mark.parametrize("name", ["own_idea", "a" * 40])
def test_the_files_of_a_new_method_are_in_the_house_style(copied, tmp_path, name):
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if ruff is None:
        pytest.skip("needs ruff")
    shutil.copytree(copied, tmp_path / "copy")
    paths = new_method(tmp_path / "copy", name).stdout.splitlines()
    sources = [path for path in paths if path.endswith(".py")]
    for command in (["check"], ["format", "--diff"]) if name == "own_idea" else (["check"],):
        done = subprocess.run(
            [ruff, *command, "--no-cache", *sources], capture_output=True, text=True, cwd=tmp_path / "copy"
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "usage: scripts/new_method NAME"),
        (["one", "two"], "usage: scripts/new_method NAME"),
        ([""], "'' is not a name for a method"),
        (["Own"], "'Own' is not a name for a method; use lower-case letters, digits and _, 40 at most"),
        (["own-idea"], "is not a name"),
        (["../own"], "is not a name"),
        (["lambda"], "is not a name"),
        (["a" * 41], "is not a name"),
        (["base"], "'base' is taken by diffkd itself; use another name"),
        (["settings"], "'settings' is taken by diffkd itself"),
        (["find"], "is taken"),
        (["loss"], "is taken"),  # its class would be called Loss
        (["tensor"], "is taken"),
        (["progressive"], "diffkd/methods/progressive.py exists already; use another name"),
        (["teacher"], "configs/digits/teacher.yaml exists already"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_in_one_line(copied, arguments, says):
    before = tree(copied)
    done = new_method(copied, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert says in done.stderr and tree(copied) == before


def test_the_example_of_the_page_keeps_the_contract(tmp_path, monkeypatch):
    """As a method of the user's own, by its dotted path."""
    page = (ROOT / "docs/contributing/method.md").read_text()
    code = re.search(r"^### `diffkd/methods/endpoint.py`$.*?^```python\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide/endpoint.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    method = methods.find("guide.endpoint")()
    check_losses(method)
    check_resumes(method, tmp_path)
