"""A disk that fills up under any command: one line, exit status 1, nothing half written, and it goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from diffkd.generation import encoding
from diffkd.io import files
from tests.cli import scene
from tests.refusals import tree

slow = pytest.mark.slow
NUMBERS = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO]


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*") if p.suffix in (".tmp", ".old")]


def whole(outcome: tuple[int, str, str], status: int = 1) -> str:
    code, _, err = outcome
    errors = [line for line in err.splitlines() if line.startswith("diffkd: error: ")]
    assert (code, len(errors)) == (status, 1) and "Traceback" not in err, outcome
    return errors[0]


@pytest.mark.parametrize(
    ("command", "number"), [*((c, errno.ENOSPC) for c in scene.WRITING), *(("stats", n) for n in NUMBERS[1:])]
)
def test_writing_fails(at_scene, cli, monkeypatch, command, number):
    """The first file that is synced cannot be; the same command then ends as if nothing had been."""
    with monkeypatch.context() as patch:
        for module in (files, encoding):

            def fails(*args: object) -> None:
                raise OSError(number, os.strerror(number))

            patch.setattr(module, "sync" if module is files else "_sync", fails)
        line = whole(cli(*scene.WRITING[command]))
    assert "made" in line and leftovers(at_scene) == []
    assert cli(*scene.WRITING[command]).code == 0


@pytest.mark.parametrize(
    "size", ["12k", *(pytest.param(f"{n}k", marks=pytest.mark.slow) for n in (4, 40, 100))]
)
@pytest.mark.parametrize("command", scene.WRITING)
def test_a_real_disk(at_scene, cli, disk, command, size):
    (at_scene / "made").symlink_to(disk(size))
    code, out, err = cli(*scene.WRITING[command])
    if code:
        whole((code, out, err))
        assert leftovers(at_scene / "made") == []
        disk("50m")
        assert cli(*scene.WRITING[command]).code == 0
    assert len(tree(at_scene / "made")) > 0


def test_a_write_that_ends_early_is_no_image(tmp_path, monkeypatch):
    """An unbuffered write may write a part and raise nothing, as a disk fills up."""
    import numpy as np
    from PIL import Image

    real = open

    def short(path: str, mode: str = "r", **options: object) -> object:
        stream = real(path, mode, **options)  # type: ignore[call-overload]

        class Short:
            def __enter__(self) -> Short:
                return self

            def __exit__(self, *args: object) -> None:
                stream.close()

            def write(self, data: memoryview) -> int:
                written: int = stream.write(data[:7])
                return written

        return Short()

    monkeypatch.setattr(encoding, "open", short, raising=False)
    pixels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    encoding.write_images(tmp_path, [0], pixels, "png")
    with Image.open(tmp_path / "000000.png") as image:
        assert (np.asarray(image) == pixels[0, ..., 0]).all()


def test_what_certainly_does_not_fit_is_not_begun(at_scene, cli, monkeypatch):
    for command, what in (("sample-npz", "free_bytes"), ("sample", "free_files")):
        with monkeypatch.context() as patch:
            patch.setattr(f"diffkd.generation.sample.{what}", lambda path: 2)
            line = whole(cli(*scene.WRITING[command]))
        assert "needs" in line and "has" in line and not (at_scene / "made").exists()


def test_parts_that_a_machine_cut_short_are_drawn_again(at_scene, cli, monkeypatch):
    args = scene.WRITING["sample-npz"]
    with monkeypatch.context() as patch:
        patch.setattr("diffkd.generation.npz_writer.NpzWriter.finish", _interrupted)
        assert cli(*args).code == 130
    (part,) = (at_scene / "made" / ".images.npz.parts").glob("*.npy")
    whole_part = part.read_bytes()
    for cut in (b"", whole_part[:20], whole_part[:-1]):
        part.write_bytes(cut)
        with monkeypatch.context() as patch:
            patch.setattr("diffkd.generation.npz_writer.NpzWriter.finish", _interrupted)
            assert cli(*args).code == 130
        assert part.read_bytes() == whole_part
    assert cli(*args).code == 0


def test_an_image_that_is_broken_is_named(at_scene, cli):
    args = scene.WRITING["sample"]
    assert cli(*args).code == 0
    (at_scene / "made/images/000001.png").write_bytes(b"")
    (at_scene / "made/images/000002.png").unlink()
    assert "000001.png cannot be read" in whole(cli(*args), 2)
    (at_scene / "made/images/000001.png").unlink()
    if hasattr(os, "mkfifo"):  # nobody ever writes into it
        os.mkfifo(at_scene / "made/images/000001.png")
        assert "000001.png cannot be read" in whole(cli(*args), 2)
        (at_scene / "made/images/000001.png").unlink()
    assert cli(*args).code == 0


def _interrupted(*args: object) -> None:
    raise KeyboardInterrupt
