"""The scene of tests/cli/scene.py as the current folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffkd.cli import main
from tests.cli import scene


@pytest.fixture
def at_scene(tmp_path, monkeypatch, built_once, make_pipeline, image_folder) -> Path:
    """A folder of its own, with a record too, the caches of its user in it."""

    def build(folder: Path) -> None:
        scene.build(folder, make_pipeline, image_folder)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            patch.setattr("sys.argv", ["diffkd", *scene.WRITING["evaluate"][:-1], "record.json"])
            with pytest.raises(SystemExit, match="0"):
                main()

    scene.bring(built_once("scene of the command", build), tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "here"
