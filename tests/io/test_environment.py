"""What a record holds about the machine and the code."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from diffkd.io import environment


def git(folder, *arguments) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    ran = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a package in it, which `commit()` takes for its own."""
    package = tmp_path / "repo" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1\n")
    git(package.parent, "init", "-q", "-b", "main")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "first")
    monkeypatch.setattr(environment, "PACKAGE", package)
    return package


def test_the_commit_is_that_of_git(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert environment.commit() == head
    (checkout.parent / "elsewhere.txt").write_text("no code")
    assert environment.commit() == head
    (checkout / "__init__.py").write_text("a = 2\n")
    assert environment.commit() == head + "+"


def test_a_new_source_file_is_a_change(checkout):
    (checkout / "new.py").write_text("")
    assert environment.commit() == git(checkout, "rev-parse", "HEAD") + "+"


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    assert environment.commit() is None


def test_the_commit_of_a_surrounding_project_is_not_reported(checkout, monkeypatch):
    """Installed into a virtual environment inside another repository, which ignores it."""
    installed = checkout.parent / ".venv" / "diffkd"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    (checkout.parent / ".gitignore").write_text(".venv/\n")
    monkeypatch.setattr(environment, "PACKAGE", installed)
    assert environment.commit() is None


def test_no_commit_without_git(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment.commit() is None


def test_versions_are_those_installed():
    import diffusers
    import numpy
    import PIL

    import diffkd

    found = environment.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["diffusers"] == diffusers.__version__ and found["numpy"] == numpy.__version__
    assert found["pillow"] == PIL.__version__ and found["diffkd"] == diffkd.__version__


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it():
    """On Linux, ru_maxrss of a process begins with what the one that started it had."""
    own = "from diffkd.io.environment import peak_rss; held = b'1' * {}; print(peak_rss())"
    child = [sys.executable, "-c", own.format(1)]
    large = f"import subprocess; held = b'1' * (1 << 30); subprocess.run({child!r}, check=True)"
    peaks = [
        int(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout)
        for code in (own.format(1), own.format("(1 << 30)"), large)
    ]
    assert peaks[1] > 1 << 30
    assert abs(peaks[2] - peaks[0]) < 1 << 28
