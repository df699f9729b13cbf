"""Fixtures of all tests: the command in one process or several, tiny stock pipelines, folders of images."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from diffkd.cli import main
from diffkd.cli.endings import UNFORESEEN
from diffkd.io import naming, plugins
from tests.waiting import ONE_THREAD

os.environ["DIFFKD_CACHE"] = "off"  # no test depends on what an earlier one left, nor leaves anything


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Networks this small gain nothing from a second thread, which would spin on cores that others share."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _user_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What one test imports is not another's; and user modules of many tests are announced once per process,
    in whichever test came first."""
    monkeypatch.setattr(plugins, "announced", {"toy", "wide", "json"})
    naming.speak("python")
    for known in (plugins.homes, plugins.looked):
        known.clear()
    before = {*sys.modules}
    yield
    for name in {*sys.modules} - before:
        if name.partition(".")[0] in plugins.homes:
            del sys.modules[name]


@pytest.fixture
def own_signals() -> Iterator[None]:
    """As in a terminal: nohup, and the shell for what runs in its background, have signals ignored."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """built_once(name, build) -> the folder that build(folder) filled, once for all xdist workers together.

    For what takes seconds to make: trained models, features. Tests read it, or copy it before they write.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built"  # a worker's lies in it
    root.mkdir(exist_ok=True)

    def get(name: str, build: Callable[[Path], object]) -> Path:
        with FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                unfinished = Path(tempfile.mkdtemp(dir=root))
                build(unfinished)
                unfinished.rename(root / name)
        return root / name

    return get


class Outcome(NamedTuple):
    """What a command did: code, stdout, stderr = cli(...)."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """cli(*args) -> (code, stdout, stderr): the `diffkd` command, in this process. No test that asks for
    errors of a known kind gets one that nobody foresaw."""

    monkeypatch.setenv("DIFFKD_TRACEBACK", "")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*args: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["diffkd", *map(str, args)])
        capsys.readouterr()
        try:
            main()
            code: int | str | None = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert code != UNFORESEEN, err
        return Outcome(code if isinstance(code, int) else int(code is not None), out, err)

    yield run
    root.handlers[:] = handlers  # the command logs to a stderr that ends with this test
    root.setLevel(level)


@pytest.fixture(scope="session")
def make_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_pipeline(parent, *, name="pipeline", ...) -> parent/name: a copy of a tiny UNet2DModel of random
    weights, saved by diffusers once for the same arguments.

    prediction: its prediction_type. classes: num_class_embeds. scheduler: "cosine" (zero terminal SNR,
    T = 1024), "linear" (T = 1000), or a dict of scheduler arguments. pipeline: a stock class's name; default
    DDIMPipeline, or ConsistencyModelPipeline where there are classes. DDPMPipeline comes with a
    DDPMScheduler, the others with a DDIMScheduler.
    """
    import diffusers

    schedulers = {
        "cosine": {
            "num_train_timesteps": 1024, "beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        "linear": {"num_train_timesteps": 1000, "beta_schedule": "linear"},
    }  # fmt: skip

    def save(
        folder: Path,
        *,
        prediction: str = "v_prediction",
        classes: int | None = None,
        size: int | tuple[int, int] = 8,
        channels: int = 1,
        widths: Sequence[int] = (8, 16),
        scheduler: str | dict[str, Any] = "cosine",
        pipeline: str | None = None,
        seed: int = 0,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = diffusers.UNet2DModel(
                sample_size=size,
                in_channels=channels,
                out_channels=channels,
                block_out_channels=tuple(widths),
                down_block_types=("DownBlock2D",) * len(widths),
                up_block_types=("UpBlock2D",) * len(widths),
                layers_per_block=1,
                norm_num_groups=4,
                add_attention=False,
                num_class_embeds=classes,
            )
        pipeline = pipeline or ("DDIMPipeline" if classes is None else "ConsistencyModelPipeline")
        kind = diffusers.DDPMScheduler if pipeline == "DDPMPipeline" else diffusers.DDIMScheduler
        arguments = schedulers[scheduler] if isinstance(scheduler, str) else scheduler
        noise = kind(**{"prediction_type": prediction, **arguments})
        getattr(diffusers, pipeline)(unet=network, scheduler=noise).save_pretrained(
            folder, safe_serialization=True
        )

    saved: dict[str, Path] = {}

    def make(parent: Path, *, name: str = "pipeline", **model: Any) -> Path:
        key = repr(sorted(model.items()))
        if key not in saved:
            folder = tmp_path_factory.mktemp("pipeline")
            save(folder, **model)
            saved[key] = folder
        return Path(shutil.copytree(saved[key], parent / name, dirs_exist_ok=True))

    return make


@pytest.fixture(scope="session")
def image_folder() -> Callable[..., Path]:
    """image_folder(parent, *, ...) -> folder of small random PNGs, `count` in all or in each of `classes`."""

    def make(
        parent: Path,
        *,
        name: str = "images",
        classes: Sequence[str] = (),
        count: int = 4,
        size: tuple[int, int] = (8, 8),
        channels: int = 1,
        seed: int = 0,
    ) -> Path:
        rng = np.random.default_rng(seed)
        width, height = size
        for place in classes or [""]:
            folder = parent / name / place
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
                Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(folder / f"{i:03d}.png")
        return parent / name

    return make


@pytest.fixture(scope="session")
def _forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    log = tmp_path_factory.mktemp("forking") / "stderr"  # libraries warn when they are imported
    with log.open("w") as stderr, subprocess.Popen(  # ends with its stdin
        [sys.executable, "-m", "tests.forking"], cwd=Path(__file__).parent.parent, env=ONE_THREAD,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
    ) as process:  # fmt: skip
        yield process
    assert process.returncode == 0, log.read_text()


@pytest.fixture
def launched(
    _forking: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """launched(2, *args): the `diffkd` command in so many processes of one group, on CPUs.

    By tests/forking.py, which starts them sooner than torchrun; that has tests of its own in
    tests/runs/test_session.py and tests/runs/test_parallel.py.
    """

    def run(processes: int, *args: object, module: str = "diffkd.cli") -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("launched")
        said = {name: folder / name for name in ("stdout", "stderr")}
        job = {
            "module": module, "processes": processes, "arguments": [*map(str, args)], "folder": os.getcwd(),
            "environment": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, **{k: str(v) for k, v in said.items()},
        }  # fmt: skip
        assert _forking.stdin and _forking.stdout
        print(json.dumps(job), file=_forking.stdin, flush=True)
        status = int(_forking.stdout.readline())
        return subprocess.CompletedProcess(args, status, *(path.read_text() for path in said.values()))

    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in each call of a network but the one that tries it when it is loaded."""
    import diffusers

    from diffkd.models import loading

    monkeypatch.setattr(loading, "_try", lambda denoiser: None)
    calls: list[int] = []
    real = diffusers.UNet2DModel.forward

    def counted(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(sample))
        return real(self, sample, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DModel, "forward", counted)
    return calls


@pytest.fixture
def disk(tmp_path):
    """disk(size) -> a folder on a file system of that size; called again, it resizes it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def make(size):
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        try:
            done = subprocess.run(command, capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip("a file system cannot be mounted here")
        mounted.append(place)
        return place

    yield make
    if mounted:
        subprocess.run(["umount", "-l", place], check=True)
