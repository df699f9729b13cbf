"""Image files, complete whenever `diffkd sample` ends: killed, out of space, or beside another process."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from filelock import FileLock
from PIL import Image
from rich.console import Console

from diffkd.generation import generator
from diffkd.generation import sample as sampling
from tests.refusals import refuse, tree
from tests.waiting import ONE_THREAD

# The command with a network that takes its time; the images are the same.
SLOWLY = textwrap.dedent("""
    import sys, time, diffusers
    from diffkd.cli import main
    real, seconds = diffusers.UNet2DModel.forward, float(sys.argv[1])
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return real(*args, **kwargs)
    diffusers.UNet2DModel.forward = slow
    if __name__ == "__main__":
        sys.argv = ["diffkd", *sys.argv[2:]]
        main()
""")


# The command killed before the first, second, ... change to the disk, each time from the same start; then
# run again. Prints what was not as it should be.
KILLED_EVERYWHERE = textwrap.dedent("""
    import json, os, shutil, signal, sys
    from pathlib import Path
    import torch, diffusers
    from diffkd.cli import main
    from diffkd.models import loading
    from tests.refusals import tree

    start, whole, place, args, out = *map(Path, sys.argv[1:4]), json.loads(sys.argv[4]), sys.argv[5]
    loading.load(args[1])  # what is imported late is imported now
    CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "os.link")

    def run(at, log):
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        os.chdir(place)
        done = 0
        def hook(event, what):
            nonlocal done
            changes = event in CHANGES
            if event == "open":
                changes = bool(what[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if changes and (str(what[0]).startswith(str(place)) or not os.path.isabs(str(what[0]))):
                done += 1
                if done == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        sys.argv = ["diffkd", *args]
        status = 70
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    old, new = tree(start), tree(whole)
    kills, wrong = 0, []
    while kills < 400:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(start, place)
        if run(kills + 1, place.parent / "first.txt") != -signal.SIGKILL:
            break
        kills += 1
        there = tree(place)
        shown = {k: v for k, v in there.items() if v and not Path(k).name.startswith(".")}
        images = {k: v for k, v in shown.items() if k.endswith((f"{out}.npz", ".png")) and "grid" not in k}
        for before in ([old, new] if old else [new]):
            if all(before.get(k) == v for k, v in images.items()):
                break
        else:
            wrong.append([kills, "images are torn or of two runs"])
        status = run(0, place.parent / "second.txt")
        after = tree(place)
        if status:
            said = (place.parent / "second.txt").read_text().strip().splitlines()
            wrong.append([kills, f"status {status}: {said[-1:]}"])
        more, less = sorted(after.keys() - new.keys()), sorted(new.keys() - after.keys())
        other = sorted(k for k in new if k in after and after[k] != new[k])
        if more or less or other:
            wrong.append([kills, f"left {more}, lacks {less}, other {other}"])
    print(json.dumps({"kills": kills, "wrong": wrong}))
""")


@pytest.fixture
def here(tmp_path, monkeypatch, make_pipeline):
    """The working directory: plain, unconditional, and labelled, of four classes."""
    make_pipeline(tmp_path, name="plain")
    make_pipeline(tmp_path, name="labelled", classes=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(*args, seconds):
    command = [sys.executable, "-c", SLOWLY, seconds, *args]
    return subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ONE_THREAD
    )


def complete(folder):
    """The complete images, or parts of an .npz, hidden folders included."""
    files = [p for p in folder.rglob("*") if p.suffix in (".png", ".npy")]
    return [p for p in files if p.name[0] != "." and not p.name.endswith("grid.png")]


def kill_in_the_middle(here, *args):
    """Kills the command once some images are complete; its worker processes, which must end too."""
    process = started("sample", *args, seconds=0.25)
    try:
        while not complete(here / "killed") and process.poll() is None:
            time.sleep(0.02)
        others = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    finally:
        process.kill()
        said = process.communicate()
    assert process.returncode == -9, said
    _, alive = psutil.wait_procs(others, timeout=15)
    for orphan in alive:
        orphan.kill()
    assert not alive, "a worker process outlives the command"
    return others


# killed ---------------------------------------------------------------------------------------------------


def exhaustive(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("out", "first", "then"),
    [
        ("drawn", ["--workers", 2], ["--workers", 2]),
        exhaustive("drawn", [], []),
        exhaustive("drawn.npz", [], []),
        exhaustive("drawn", ["--batch-size", 4], ["--batch-size", 6]),
        exhaustive("drawn.npz", ["--batch-size", 4], ["--batch-size", 6]),
    ],
)
def test_a_killed_run_is_resumed(cli, here, drawn, out, first, then):
    n = 90
    args = ["labelled", "-n", n, "--steps", 1, "--batch-size", 4, "--device", "cpu"]
    assert cli("sample", *args, "--out", here / "whole" / out).code == 0
    others = kill_in_the_middle(here, *args, *first, "--out", here / "killed" / out)
    assert bool(others) == ("--workers" in first)
    before = {p: p.stat().st_mtime_ns for p in complete(here / "killed") if p.suffix == ".png"}
    there = len(before)
    for path in complete(here / "killed"):
        there += len(np.load(path)) if path.suffix == ".npy" else 0
    assert 0 < there < n
    drawn.clear()
    code, stdout, err = cli("sample", *args, *then, "--out", here / "killed" / out)
    assert code == 0 and f"{n} images" in stdout
    assert all("which has ended: taken over" in line for line in err.splitlines()) and err.count("\n") <= 1
    assert n - there <= sum(drawn) <= n - there + 2 * 6
    assert {p: p.stat().st_mtime_ns for p in before} == before
    if "--batch-size" not in then:
        assert tree(here / "killed") == tree(here / "whole")
        return
    assert tree(here / "killed").keys() == tree(here / "whole").keys()
    arrays = []
    for place in ("killed", "whole"):
        if out == "drawn":
            arrays.append(np.stack([Image.open(p) for p in sorted((here / place / out).glob("*.png"))]))
        else:
            with np.load(here / place / out) as content:
                assert content["arr_1"].tolist() == [i % 4 for i in range(n)]
                arrays.append(content["arr_0"])
    assert arrays[0].shape == arrays[1].shape
    assert np.abs(arrays[0].astype(int) - arrays[1].astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("out", "overwrite"),
    [
        ("drawn.npz", True),
        exhaustive("drawn.npz", False), exhaustive("drawn", True), exhaustive("drawn", False),
    ],
)  # fmt: skip
def test_killed_before_any_change_to_the_disk(cli, here, out, overwrite):
    """At every moment the images are complete and of one run; the same command ends as if unbroken."""
    args = ["sample", str(here / "plain"), "-n", "5", "--steps", "1", "--batch-size", "2", "--out", out]
    args += ["--overwrite"] if overwrite else []
    for name in ("start", "whole"):
        (here / name).mkdir()
        os.chdir(here / name)
        if overwrite:
            assert cli(*args[:2], "-n", 7, "--steps", 1, "--seed", 9, "--out", out).code == 0
        if name == "whole":
            assert cli(*args).code == 0
    places = [here / "start", here / "whole", here / "killed" / "place"]
    places[-1].parent.mkdir()
    command = [sys.executable, "-c", KILLED_EVERYWHERE, *map(str, places), json.dumps(args), "drawn"]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["kills"] > 10
    assert not found["wrong"], "\n".join(f"before change {at}: {what}" for at, what in found["wrong"])


@pytest.mark.slow
def test_a_killed_overwrite_is_resumed(cli, here, drawn):
    """The old .npz stays until the new one is complete, and no part is drawn twice."""
    args = ["labelled", "-n", 90, "--steps", 1, "--batch-size", 4, "--overwrite"]
    assert cli("sample", *args, "--out", "whole.npz").code == 0
    (here / "killed").mkdir()
    assert cli("sample", *args, "--seed", 5, "--out", "killed/drawn.npz").code == 0
    old = (here / "killed" / "drawn.npz").read_bytes()
    kill_in_the_middle(here, *args, "--out", here / "killed" / "drawn.npz")
    assert (here / "killed" / "drawn.npz").read_bytes() == old
    there = sum(len(np.load(path)) for path in complete(here / "killed") if path.suffix == ".npy")
    drawn.clear()
    assert cli("sample", *args, "--out", "killed/drawn.npz").code == 0
    assert (here / "killed" / "drawn.npz").read_bytes() == (here / "whole.npz").read_bytes()
    assert there > 0 and sum(drawn) <= 90 - there + 4


# memory and disk ------------------------------------------------------------------------------------------

# The command with a network that costs nothing, and then what it took at most.
MEASURED = textwrap.dedent("""
    from diffusers import UNet2DModel
    from diffusers.models.unets.unet_2d import UNet2DOutput
    from diffkd.cli import main
    from diffkd.io.environment import peak_rss
    UNet2DModel.forward = lambda self, sample, *args, **kwargs: UNet2DOutput(sample=sample / 2)
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    print(peak_rss())
""")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path, make_pipeline):
    """20,000 more images are 246 MB of pixels. (Below 8,000 the allocator is still growing.)"""
    model = make_pipeline(tmp_path, size=64, channels=3, widths=[4])
    peaks = {}
    for n in (8_000, 28_000):
        args = ["diffkd", "sample", model, "-n", n, "--steps", 1, "--out", tmp_path / f"{n}.npz"]
        code = f"import sys; sys.argv = {list(map(str, args))!r}\n{MEASURED}"
        environment = {**ONE_THREAD, "MALLOC_ARENA_MAX": "2"}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stderr
        peaks[n] = int(ran.stdout.splitlines()[-1]) / 1e6
    assert (tmp_path / "28000.npz").stat().st_size > 28_000 * 64 * 64 * 3
    assert peaks[28_000] - peaks[8_000] < 80, peaks


@pytest.mark.parametrize(
    ("out", "size", "workers"),
    [
        ("drawn", "2800k", 0),  # a page a file
        pytest.param("drawn", "2800k", 2, marks=pytest.mark.slow),
        ("drawn.npz", "64k", 0),  # in the second part
        ("drawn.npz", "120k", 0),  # after the parts
    ],
)
def test_a_full_disk(cli, here, disk, monkeypatch, out, size, workers):
    monkeypatch.setattr("diffkd.generation.sample.free_bytes", lambda path: 1 << 30)  # as others fill it
    n, place = 1200, disk(size)
    args = ["sample", here / "plain", "-n", n, "--steps", 1, *(["--workers", 2] if workers else []), "--out"]
    assert cli(*args, here / "whole" / out).code == 0
    code, stdout, err = cli(*args, place / out)
    assert (code, len(err.splitlines())) == (1, 1), (code, err)
    assert stdout == "" and str(place / out) in err and "the disk is full" in err
    pictures = {p.name for p in place.rglob("*.png") if not p.name.endswith("grid.png")}
    there = {int(name[:-4]) for name in pictures}
    for path in complete(place):
        if path.suffix == ".npy":
            first = int(re.match(r"\d+", path.name)[0])
            there |= set(range(first, first + len(np.load(path))))
    assert there and f"{len(there)} of {n} images are complete" in err
    if len(there) < n:
        assert re.search(rf"from image {min(set(range(n)) - there)}\b", err)
    for name in pictures:
        assert (place / out / name).read_bytes() == (here / "whole" / out / name).read_bytes()
    assert not [p for p in place.rglob("*") if p.name == ".lock" or p.suffix == ".tmp"]
    disk("16m")
    assert cli(*args, place / out).code == 0
    assert tree(place) == tree(here / "whole")


def test_a_disk_that_was_full_from_the_start(cli, here, disk):
    place = disk("4k")
    (place / "of another").write_bytes(b"x" * 4096)
    for out in ("drawn", "drawn.npz"):
        code, stdout, err = cli("sample", "plain", "-n", 3, "--steps", 1, "--out", place / out)
        assert (code, stdout, len(err.splitlines())) == (1, "", 1), err
        assert re.search("the disk is full|the disk has 0 B", err), err


@pytest.mark.skipif(os.geteuid() == 0 or sys.platform == "win32", reason="root may write anywhere")
def test_a_folder_without_write_permission(cli, here):
    (here / "drawn").mkdir(mode=0o555)
    refuse(cli, here, "sample", "plain", "-n", 3, "--steps", 1, "--out", "drawn", says="drawn")


@pytest.mark.slow
def test_a_worker_that_is_killed(cli, here, drawn):
    """As by a system out of memory: one line, the other worker ends too, and the same command resumes."""
    args = ["sample", here / "plain", "-n", 90, "--steps", 1, "--batch-size", 4, "--workers", 2]
    assert cli(*args, "--out", here / "whole" / "drawn").code == 0
    process = started(*args, "--out", here / "killed" / "drawn", seconds=0.25)
    try:
        while not complete(here / "killed") and process.poll() is None:
            time.sleep(0.02)
        others = psutil.Process(process.pid).children(recursive=True)
        workers = [other for other in others if "spawn_main" in " ".join(other.cmdline())]
        workers[0].kill()
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert psutil.wait_procs(workers, timeout=15)[1] == []
    # torchao says what it lacks as soon as it is imported, here before the command can hush it
    lines = [line for line in err.decode().splitlines() if line.startswith("diffkd: ")]
    assert process.returncode == 1 and len(lines) == 1 and "Traceback" not in err.decode(), err.decode()
    assert "of 90 images are complete" in lines[0] and "resumes from image" in lines[0]
    there = len(complete(here / "killed"))
    drawn.clear()
    assert cli(*args, "--out", here / "killed" / "drawn").code == 0
    assert tree(here / "killed") == tree(here / "whole")
    assert there > 0 and sum(drawn) < 90


# two at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "folder"), [("drawn", "drawn"), ("drawn.npz", ".drawn.npz.parts")])
def test_a_place_that_another_process_uses(cli, here, out, folder):
    args = ["sample", "plain", "-n", 3, "--steps", 1, "--out", out]
    (here / folder).mkdir()
    with FileLock(here / folder / ".lock"):
        for more in ([], ["--overwrite"], ["--seed", 5]):
            refuse(cli, here, *args, *more, says=[out, "another process"])
        assert (here / folder / ".lock").exists()
    assert cli(*args).code == 0
    assert cli(*args[:-1], f"fresh{out[5:]}").code == 0
    assert {k[5:]: v for k, v in tree(here).items() if k.startswith("drawn")} == {
        k[5:]: v for k, v in tree(here).items() if k.startswith("fresh")
    }


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("out", ["drawn", "drawn.npz"])
def test_another_process_ends_while_this_one_warms_up(cli, here, monkeypatch, out, seed):
    """Warm-up takes minutes; images that another process wrote meanwhile must not be replaced."""
    real, began = generator.ImageGenerator.prepare, []

    def prepare(images):
        if not began:
            began.append(True)
            quiet = Console(quiet=True)
            sampling.sample_to("plain", here / out, quiet, n=9, steps=1, device="cpu", seed=seed)
            began.append(tree(here))
        return real(images)

    monkeypatch.setattr(generator.ImageGenerator, "prepare", prepare)
    code, _, err = cli("sample", "plain", "-n", 4, "--steps", 1, "--device", "cpu", "--out", out)
    assert tree(here) == began[1]
    assert (code, len(err.splitlines())) == (2, 1) and out in err


# names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["im[1]", "a b", "ünï", "[red]x", "drawn.d"])
@pytest.mark.parametrize("suffix", ["", ".npz"])
def test_names_with_special_characters(cli, here, name, suffix):
    out = here / f"{name}{suffix}"
    leftover = here / f".{out.name}.123.tmp" if suffix else out / ".000001.png.tmp"  # of a killed process
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"torn")
    args = ["sample", "plain", "-n", 3, "--steps", 1, "--out", out.name]
    code, stdout, err = cli(*args)
    assert (code, err) == (0, "") and out.name in stdout
    assert not leftover.exists()
    assert cli(*args) == (0, f"all 3 images exist already: {out.name}\n", "")


def test_temporary_files_of_other_outputs_are_left_alone(cli, here):
    """Another process may be finishing drawn.npz while the folder `drawn` is begun."""
    others = [here / f".{name}.123.tmp" for name in ("drawn.npz", "drawn.grid.png", "drawn2.npz")]
    for path in others:
        path.write_bytes(b"half there")
    assert cli("sample", "plain", "-n", 2, "--steps", 1, "--out", "drawn").code == 0
    assert [path.name for path in others if not path.exists()] == []


def test_only_the_images_and_their_grid_are_left(cli, here):
    """The folder with its record and the grid; the .npz and its grid."""
    for out in ("drawn", "drawn.npz"):
        (here / "in").mkdir()
        assert cli("sample", "plain", "-n", 2, "--steps", 1, "--out", f"in/{out}").code == 0
        names = {"drawn-grid.png", "drawn"} if out == "drawn" else {"drawn.npz", "drawn.grid.png"}
        assert {p.name for p in (here / "in").iterdir()} == names
        shutil.rmtree(here / "in")
