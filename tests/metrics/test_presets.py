"""Presets beside the chains of the tools that they are named for, each written out here a second time: from
files to one number. scripts/compare_peers.py runs the tools themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from diffkd.metrics import features
from diffkd.metrics.features.inception_weights import NAMES, URL, VARIABLE
from diffkd.metrics.features.resize import prepare
from diffkd.metrics.frechet import frechet_distance
from diffkd.metrics.tool_distances import TOOLS, rooted_distance, single_mean
from tests.refusals import refuse

SIDE, WIDE, HIGH, WIDTH = 20, 12, 27, 33


def body(x: Tensor) -> Tensor:
    """A network in the place of Inception's: (B, 3, SIDE, SIDE), normalised -> (B, WIDE) float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * SIDE * SIDE, WIDE, generator=generator) / 30
    return (x.flatten(1) @ weight).sigmoid() * torch.logspace(0, -2, WIDE)


class Small(nn.Module):
    num_features = WIDE

    def __init__(self, weights: object, *, resize: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.resize, self.dtype = resize, dtype
        self.register_parameter("none", nn.Parameter(torch.zeros(1)))

    def forward(self, images: Tensor) -> Tensor:
        return body(prepare(images, SIDE, self.resize, dtype=self.dtype))

    def describe(self) -> dict[str, Any]:
        return {"name": "inception", "sha256": "0" * 64, "num_features": WIDE, "resize": self.resize}


def pictures(folder: Path, count: int, seed: int) -> Path:
    """JPEG, some turned on their side by EXIF data alone, PNG, and 16-bit PNG: as photographs come."""
    rng, folder = np.random.default_rng(seed), folder / f"set-{seed}"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(count):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8) // (seed + 1)
        image = Image.fromarray(coarse).resize((WIDTH, HIGH), Image.Resampling.BICUBIC)
        if i % 3 == 0:
            image.save(folder / f"{i:03d}.png")
        elif i % 3 == 1:
            image.save(folder / f"{i:03d}.jpg", quality=80, exif=turned if i % 2 else b"")
        else:
            grey = np.asarray(image.convert("L")).astype(np.uint16) * 2
            Image.fromarray(grey).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sets")
    return pictures(root, 31, 0), pictures(root, 40, 1)


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(features, "InceptionV3", Small)


# the tools' chains


def files(folder: Path) -> list[np.ndarray]:
    """RGB (H, W, 3) uint8, as all of them decode files."""
    return [np.array(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]


def chw(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())[None]


def half_pixel(image: np.ndarray) -> Tensor:
    x = F.interpolate(chw(image).float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * x - 1


def pillow(image: np.ndarray) -> Tensor:
    channels = [Image.fromarray(image[:, :, c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(c.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels]
    return (torch.from_numpy(np.stack(resized)) - 128)[None] / 128


def corner(image: np.ndarray) -> Tensor:
    """TensorFlow 1: output i at i times the scale."""
    x = image.astype(np.float32)
    for axis in (0, 1):
        at = (np.arange(SIDE) * np.float32(x.shape[axis] / SIDE)).astype(np.float32)
        low = np.floor(at).astype(int)
        share = (at - low).reshape(-1, *[1] * (2 - axis)).astype(np.float32)
        start, end = x.take(low, axis), x.take(np.minimum(low + 1, x.shape[axis] - 1), axis)
        x = start + (end - start) * share
    return (torch.from_numpy(x.transpose(2, 0, 1).copy()) - 128)[None] / 128


def sampled(image: np.ndarray) -> Tensor:
    """The same as a shifted grid, as NVIDIA's detector has it."""
    shift = torch.tensor([[1 / WIDTH - 1 / SIDE], [1 / HIGH - 1 / SIDE]])
    theta = torch.cat([torch.eye(2), shift], 1)[None]
    grid = F.affine_grid(theta, [1, 3, SIDE, SIDE], align_corners=False)
    x = F.grid_sample(chw(image).float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return (x - 128) / 128


def moments(x: np.ndarray, mean: type) -> tuple[np.ndarray, np.ndarray]:
    return np.mean(x.astype(mean), axis=0), np.cov(x, rowvar=False)


def raw_moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, n = x.astype(np.float64), len(x)
    mu = x.sum(0) / n
    return mu, (x.T @ x - np.outer(mu, mu) * n) / (n - 1)


def rooted(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]) -> float:
    (mu1, s1), (mu2, s2) = one, two
    return float(((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real))


CHAINS: dict[str, tuple[Callable[[np.ndarray], Tensor], Callable[[np.ndarray], Any]]] = {
    "pytorch-fid": (half_pixel, lambda x: moments(x, np.float64)),
    "clean-fid": (pillow, lambda x: moments(x, np.float32)),
    "torch-fidelity": (corner, lambda x: moments(x, np.float32)),
    "edm": (sampled, raw_moments),
    "adm": (corner, lambda x: moments(x, np.float32)),
}


def mixed(folder: Path, count: int, seed: int) -> Path:
    """PNG of three sizes: some alone, some in rows of one size that go through the network together."""
    rng, folder = np.random.default_rng(seed), folder / f"mixed-{seed}"
    folder.mkdir()
    for i in range(count):
        width, height = ((WIDTH, HIGH), (HIGH, WIDTH), (15, 41))[(i // 4 if i < 12 else i) % 3]
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8) // (seed + 1)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:03d}.png")
    return folder


def by_hand(tool: str, sets: tuple[Path, Path]) -> float:
    entrance, statistics = CHAINS[tool]
    found = (torch.cat([body(entrance(image)) for image in files(folder)]).numpy() for folder in sets)
    return rooted(*map(statistics, found))


@pytest.mark.parametrize("tool", TOOLS)
def test_a_preset_gives_the_number_of_its_tool(cli, sets, small, tmp_path, tool):
    """Of files that diffkd itself reads otherwise; in one line, as a record, and repeated from it."""
    code, out, err = cli("fid", *sets, "--preset", tool)
    assert code == 0, err
    [line] = out.splitlines()
    value, expected = float(line.removeprefix("FID: ")), by_hand(tool, sets)
    assert value == pytest.approx(expected, rel=1e-5)
    assert cli("evaluate", *sets, "--protocol", tool, "--out", tmp_path / "r.json").code == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["fid"] == value and record["protocol"]["metrics"]["fid"] == {"as": tool}
    repeated = cli("evaluate", "--repeat", tmp_path / "r.json")
    assert repeated.code == 0 and "the same to the last digit" in repeated.stdout


@pytest.mark.parametrize("tool", ["clean-fid", "pytorch-fid", "torch-fidelity"])
def test_images_of_several_sizes_are_resized_each_on_its_own(cli, small, tmp_path, tool):
    """In batches that cut rows of one size, as statistics and beside images of one size."""
    many = mixed(tmp_path, 31, 0), mixed(tmp_path, 40, 1)
    expected = by_hand(tool, many)
    code, out, err = cli("fid", *many, "--preset", tool, "--batch-size", 5)
    assert code == 0, err
    assert float(out.removeprefix("FID: ")) == pytest.approx(expected, rel=1e-5)
    assert all(f"{folder} holds images of 3 sizes, each resized on its own" in err for folder in many)
    assert "a part of the distance may be" not in err
    assert cli("stats", many[1], "--preset", tool, "--out", tmp_path / "real.npz").code == 0
    assert cli("evaluate", many[0], "--reference", tmp_path / "real.npz", "--protocol", tool,
               "--out", tmp_path / "r.json").code == 0  # fmt: skip
    assert json.loads((tmp_path / "r.json").read_text())["fid"] == pytest.approx(expected, rel=1e-5)
    refuse(cli, tmp_path, "fid", *many, says=["different sizes", "--resize"])


def test_presets_differ(sets, small):
    """Else one could pass in the place of another: by resize, values and decoding far more than 1e-5."""
    found = [by_hand(tool, sets) for tool in ("pytorch-fid", "clean-fid", "torch-fidelity")]
    assert all(abs(a - b) > 1e-3 * a for i, a in enumerate(found) for b in found[:i])


def test_archives_and_statistics(cli, sets, small, tmp_path):
    """ADM reads archives; statistics of the same protocol may stand for either set."""
    for folder in sets:
        np.savez(tmp_path / f"{folder.name}.npz", arr_0=np.stack(files(folder)))
    names = [tmp_path / f"{folder.name}.npz" for folder in sets]
    value = float(cli("fid", *names, "--preset", "adm").stdout.split()[1])
    assert value == pytest.approx(by_hand("adm", sets), rel=1e-5)
    stats = [tmp_path / f"{name.stem}-stats.npz" for name in names]
    for name, out in zip(names, stats, strict=True):
        assert cli("stats", name, "--preset", "adm", "--out", out).code == 0
    for pair in ((names[0], stats[1]), stats):
        assert float(cli("fid", *pair, "--preset", "adm").stdout.split()[1]) == pytest.approx(value, rel=1e-5)
    refuse(cli, tmp_path, "fid", *stats, "--preset", "clean-fid", says=["tf1", "stats --preset clean-fid"])
    refuse(cli, tmp_path, "stats", names[0], "--preset", "coco30k", "--out", "x.npz", says="'coco30k'")


def test_a_singular_product_is_rooted_as_the_tools_do():
    """Fewer samples than features. Of nearly equal sets the rounding of the root is most of the number."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((15, 40))
    y = x + 1e-7 * rng.standard_normal((15, 40))
    far = rng.standard_normal((20, 40)) + 1
    one, two, other = (moments(part, np.float64) for part in (x, y, far))
    assert rooted_distance(*one, *other) == pytest.approx(rooted(one, other), rel=1e-6)
    exact = frechet_distance(*one, *two)
    assert exact < 1e-11 < abs(rooted_distance(*one, *two)) < 1e-5


def test_the_mean_in_single_precision():
    """As NumPy adds float32 rows: not the rounded mean."""
    x = np.abs(np.random.default_rng(1).standard_normal((4000, 3))).astype(np.float32)
    assert np.array_equal(single_mean(torch.from_numpy(x)), x.mean(0))
    assert not np.array_equal(x.mean(0), x.astype(np.float64).mean(0).astype(np.float32))


def test_what_is_at_odds_with_a_preset_is_refused(cli, sets, small, tmp_path):
    refuse(cli, tmp_path, "fid", *sets, "--preset", "fid", says=["'fid'", "clean-fid"])
    for args in (("--features", "digits"), ("--feature-resize", "clean"), ("--dtype", "float64")):
        refuse(cli, tmp_path, "fid", *sets, "--preset", "adm", *args, says=[args[0], "protocol adm"])


def test_without_the_weights_of_its_tool_a_preset_is_refused(
    cli, sets, tmp_path, tmp_path_factory, monkeypatch
):
    """None named, none kept, and no way to get them."""
    kept = tmp_path_factory.mktemp("hub")
    (kept / "checkpoints").mkdir()

    def download(*_, **__):
        raise URLError("no route")

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(kept))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    says = [NAMES[0], str(kept / "checkpoints"), "neither --weights nor", VARIABLE, URL, "no route"]
    for command in (("fid", *sets), ("stats", sets[0], "--out", "x.npz")):
        refuse(cli, tmp_path, *command, "--preset", "pytorch-fid", says=says)
