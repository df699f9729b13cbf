"""What every test may use: the command in process, tiny stock pipelines, image folders; all made here."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.cli import main
from diffkd.io import plugins
from tests.waiting import ONE_THREAD


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """One: networks of a test are too small to be worth two, which spin where other work shares the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are the own modules of many tests; that they are run is said once, in whichever came first."""
    monkeypatch.setattr(plugins, "announced", {"toy", "wide", "json"})


class Outcome(NamedTuple):
    """What a command did: code, stdout, stderr = cli(...)."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """cli(*args) -> (code, stdout, stderr): the `diffkd` command, in this process."""

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
        return Outcome(code if isinstance(code, int) else int(code is not None), out, err)

    yield run
    root.handlers[:] = handlers  # the command logs to a stderr that ends with this test
    root.setLevel(level)


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., Path]:
    """make_pipeline(parent, *, ...) -> folder: a tiny UNet2DModel of random weights, saved by diffusers.

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

    def make(
        parent: Path,
        *,
        name: str = "pipeline",
        prediction: str = "v_prediction",
        classes: int | None = None,
        size: int | tuple[int, int] = 8,
        channels: int = 1,
        widths: Sequence[int] = (8, 16),
        scheduler: str | dict[str, Any] = "cosine",
        pipeline: str | None = None,
        seed: int = 0,
    ) -> Path:
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
        name_of_class = pipeline or ("DDIMPipeline" if classes is None else "ConsistencyModelPipeline")
        kind = diffusers.DDPMScheduler if name_of_class == "DDPMPipeline" else diffusers.DDIMScheduler
        arguments = schedulers[scheduler] if isinstance(scheduler, str) else scheduler
        noise = kind(**{"prediction_type": prediction, **arguments})
        folder = parent / name
        getattr(diffusers, name_of_class)(unet=network, scheduler=noise).save_pretrained(
            folder, safe_serialization=True
        )
        return folder

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
def _forking() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(  # ends with its stdin
        [sys.executable, "-m", "tests.forking"], cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ONE_THREAD,
    ) as process:  # fmt: skip
        yield process


@pytest.fixture
def launched(
    _forking: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """launched(2, *args): the `diffkd` command in so many processes that know of each other, on CPUs.

    By tests/forking.py, which is sooner there than torchrun; that has tests of its own, in test_stops and
    test_parallel.
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
    """How many images each call of a network had."""
    import diffusers

    calls: list[int] = []
    real = diffusers.UNet2DModel.forward

    def counted(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(sample))
        return real(self, sample, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DModel, "forward", counted)
    return calls


@pytest.fixture
def disk(tmp_path):
    """disk(size) -> a folder that holds so many bytes; again, to make it hold more."""
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
