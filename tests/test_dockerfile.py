"""The Dockerfile against the repository: what it copies, installs and starts is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions(text: str) -> list[tuple[str, str]]:
    """(FROM, ...), (RUN, ...), ... in order, lines joined and comments left out."""
    kept = "\n".join(line for line in text.splitlines() if line and not line.startswith("#"))
    words = (" ".join(line.split()).partition(" ") for line in kept.replace("\\\n", " ").splitlines())
    return [(word, rest) for word, _, rest in words]


def of(word: str) -> list[str]:
    return [rest for first, rest in DOCKERFILE if first == word]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def test_the_base_is_one_version():
    (base,) = of("FROM")
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+", base), base


def test_what_is_copied_is_there_and_let_through():
    """And the build of the package finds the files that pyproject.toml names."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {source for line in of("COPY") for source in shlex.split(line)[:-1]}
    assert ignored[1] == "*" and copied == {line[1:] for line in ignored if line.startswith("!")}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml"} <= copied


def test_what_is_installed_is_what_pyproject_names():
    (extras,) = (line.removeprefix("EXTRAS=").split(",") for line in of("ARG"))
    assert {*extras} <= {*PROJECT["optional-dependencies"]} - {"test", "docs", "dev"}
    installs = [line for line in of("RUN") if "pip install" in line]
    assert len(installs) == 2 and all("--constraint constraints.txt" in line for line in installs)
    assert installs[1].endswith('".[$EXTRAS]"')


def test_it_starts_the_command_as_a_user_without_rights():
    words = [word for word, _ in DOCKERFILE]
    (user,) = of("USER")
    assert int(user) > 0 and of("RUN")[-1].startswith(f"useradd --create-home --uid {user} diffkd ")
    assert "RUN" not in words[words.index("USER") :]
    assert of("ENTRYPOINT") == ['["diffkd"]'] and "diffkd" in PROJECT["scripts"]
    assert of("WORKDIR")[-1] == "/work"


@pytest.mark.parametrize("page", ["docs/running.md", "docs/tutorials/many-gpus.md", "Dockerfile"])
def test_the_configs_and_folders_of_the_commands_are_those_of_the_image(page):
    """In `docker run`: /work is mounted, and configs are named where the image has them or in /work."""
    text = (ROOT / page).read_text(encoding="utf-8")
    runs = re.findall(r"docker run [^\n]*", text)
    assert runs
    for run in runs:
        mounted = re.search(r'-v "\$PWD:(\S+)"', run)
        assert mounted is None or mounted[1] == "/work"
        for place in re.findall(r"/opt/diffkd/(configs/\S+)", run):
            assert "COPY configs /opt/diffkd/configs" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
            assert (ROOT / place).is_file()
