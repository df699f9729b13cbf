"""FID and friends beside the tools that others use, on the same random Inception weights:

    python scripts/compare_peers.py [--peers DIR] [--images 20] [--kinds png jpeg ...] [--out table.json]

Relative differences from torch-fidelity, clean-fid, pytorch-fid, torchmetrics and prdc, for each kind of
file, and how fast Inception is beside pytorch-fid's. The tools' wheels are installed into DIR, without what
they depend on, if they are not there: nothing gets into this Python's own packages. Each tool reads the
files, runs its own network and computes its own distance; --project lets it do the last in the span of the
features, where the distance is the same and takes seconds less. --presets measures by the tools' presets,
which read files and take the root as the tools do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

WHEELS = ("torch-fidelity", "clean-fid", "pytorch-fid", "prdc", "torchvision")
DEFAULT_PEERS = Path("~/.cache/diffkd/peers").expanduser()
Features = Callable[[list[Path]], np.ndarray]
Distance = Callable[[np.ndarray, np.ndarray], float]


def install(folder: Path) -> None:
    """Raises CalledProcessError where pip finds no index."""
    if not (folder / "complete").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--target", folder, *WHEELS], check=True)
        (folder / "complete").touch()


def find_peers(folder: Path) -> None:
    """From here on the tools can be imported; before torchmetrics, which looks for torch-fidelity but once.

    torchvision's compiled operators are for one build of torch, and no tool needs them: what registers them
    is left out.
    """
    sys.path.append(str(folder))
    warnings.filterwarnings("ignore", module="cleanfid|pytorch_fid|torch_fidelity|prdc")
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


# images


def pictures(count: int, height: int, width: int, channels: int, seed: int) -> np.ndarray:
    """Random blobs of many sizes, (count, height, width, channels) uint8; another seed, other colours."""
    rng = np.random.default_rng(seed)
    total = np.zeros((count, height, width, channels))
    for size in (2, 4, 8, 16, 32):
        coarse = torch.from_numpy(rng.standard_normal((count, channels, size, size)))
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        total += fine.permute(0, 2, 3, 1).numpy() / size**0.5
    return (100 + 50 * seed + (45 - 15 * seed) * total).clip(0, 255).astype(np.uint8)


KINDS: dict[
    str, tuple[str, tuple[int, int], int, dict[str, Any]]
] = {  # suffix, height x width, channels, how
    "png": ("png", (64, 64), 3, {}),
    "jpeg": ("jpg", (64, 64), 3, {"quality": 90}),
    "webp": ("webp", (64, 64), 3, {"quality": 90}),
    "grey": ("png", (64, 64), 1, {}),
    "rgba": ("png", (64, 64), 4, {}),
    "16-bit": ("png", (64, 64), 1, {}),
    "299": ("png", (299, 299), 3, {}),
    "400x300": ("png", (300, 400), 3, {}),
    "mixed": ("png", (64, 64), 3, {}),  # three sizes in turn, which the tools take one by one
}


def write(kind: str, folder: Path, count: int, seed: int) -> list[Path]:
    suffix, (height, width), channels, options = KINDS[kind]
    folder.mkdir(parents=True)
    paths = []
    for i, picture in enumerate(pictures(count, height, width, channels, seed)):
        if kind == "mixed":
            picture = picture[: height - 16 * (i % 3), : width - 8 * (i % 2)]
        array = picture[..., 0] if channels == 1 else picture
        paths.append(folder / f"{i:04d}.{suffix}")
        if kind == "16-bit":
            array = array.astype(np.uint16) * 257
        Image.fromarray(array).save(paths[-1], **options)
    return paths


def rgb(path: Path) -> torch.Tensor:
    """(1, 3, H, W) uint8, as every one of the tools decodes a file."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]


# the tools: from files to features, and the distance between two sets of features


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


def pytorch_fid_network(weights: Path, **options: bool) -> Any:
    from pytorch_fid import inception

    inception.load_state_dict_from_url = lambda *args, **kwargs: torch.load(weights)
    return inception.InceptionV3([3], **options).eval()


def pytorch_fid(weights: Path) -> tuple[Features, Distance]:
    from pytorch_fid import fid_score

    network = pytorch_fid_network(weights)
    fid_score.tqdm = lambda loader: loader

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return float(fid_score.calculate_frechet_distance(*moments(x), *moments(y)))

    def features(files: list[Path]) -> np.ndarray:
        together = 1 if len({Image.open(path).size for path in files}) > 1 else min(16, len(files))
        found: np.ndarray = fid_score.get_activations(files, network, together, num_workers=0)
        return found

    return features, distance


def clean_fid(weights: Path) -> tuple[Features, Distance]:
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W

    network = InceptionV3W.__new__(InceptionV3W)  # its own opens the file of another network
    torch.nn.Module.__init__(network)
    trunk = pytorch_fid_network(weights, resize_input=False, normalize_input=False)
    network.layers = types.SimpleNamespace(forward=lambda x: trunk(x)[0])
    network.resize_inside = False

    def features(files: list[Path]) -> np.ndarray:
        names = [str(path) for path in files]
        device = torch.device("cpu")
        found: np.ndarray = fid.get_files_features(
            names, network, num_workers=0, batch_size=16, device=device, mode="clean", verbose=False
        )
        return found

    return features, lambda x, y: float(fid.fid_from_feats(x, y))


def torch_fidelity(weights: Path) -> tuple[Features, Distance]:
    from torch_fidelity import metric_fid
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception", ["2048"], str(weights))

    def features(files: list[Path]) -> np.ndarray:
        images = ImagesPathDataset(files)
        return torch.cat([network(images[i][None])[0] for i in range(len(files))]).numpy()

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        stats = (metric_fid.fid_features_to_statistics(torch.from_numpy(one)) for one in (x, y))
        return float(metric_fid.fid_statistics_to_metric(*stats, False)[metric_fid.KEY_METRIC_FID])

    return features, distance


def torchmetrics(weights: Path) -> tuple[Features, Distance]:
    from torchmetrics.image import fid

    network = fid.NoTrainInceptionV3("inception", ["2048"], str(weights))

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        x_and_y = (torch.from_numpy(part).double() for one in (x, y) for part in moments(one))
        return float(fid._compute_fid(*x_and_y))

    return lambda files: torch.cat([network(rgb(path)) for path in files]).numpy(), distance


PEERS = {"tf1": torch_fidelity, "clean": clean_fid, "pytorch-fid": pytorch_fid, "torchmetrics": torchmetrics}


def others(weights: Path, fake: np.ndarray, real: np.ndarray) -> dict[str, tuple[str, float]]:
    """Every other number by a tool, from torch-fidelity's features."""
    from prdc import compute_prdc
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    last = torch.load(weights)["fc.weight"]
    x, y = torch.from_numpy(fake), torch.from_numpy(real)
    size = min(len(x), len(y))
    # In double precision, which torch-fidelity does not use: KID is a small difference of large sums.
    kid = kid_features_to_metric(x.double(), y.double(), kid_subsets=1, kid_subset_size=size, verbose=False)
    score = isc_features_to_metric(x @ last.T, splits=1, shuffle=False)
    prc = prc_features_to_metric(x, y, verbose=False)
    with redirect_stdout(None):
        dense = compute_prdc(real, fake, 5)
    return {
        "kid": ("torch-fidelity", kid["kernel_inception_distance_mean"]),
        "is": ("torch-fidelity", score["inception_score_mean"]),
        "precision": ("torch-fidelity", prc["precision"]),
        "recall": ("torch-fidelity", prc["recall"]),
        "density": ("prdc", dense["density"]),
        "coverage": ("prdc", dense["coverage"]),
    }


# the comparison


def span(*sets: np.ndarray) -> list[np.ndarray]:
    """The same features in coordinates of the space that they span: distances and kernels stay."""
    basis = np.linalg.qr(np.concatenate(sets).astype(np.float64).T)[0]
    return [one @ basis for one in sets]


def compare(
    kind: str, count: int, weights: Path, folder: Path, *, project: bool, more: bool, presets: bool
) -> list[dict]:
    """A row for each number that both have."""
    import diffkd
    from diffkd.metrics.tool_distances import TOOLS

    files = {
        name: write(kind, folder / kind / name, count, seed) for seed, name in enumerate(("fake", "real"))
    }
    rows = []
    for mode, open_peer in PEERS.items():
        tool, first = open_peer.__name__.replace("_", "-"), mode == "tf1" and more
        if (presets and tool not in TOOLS) or (kind == "mixed" and not presets):
            continue
        how = {"protocol": tool} if presets else {"features": "inception", "feature_resize": mode}
        ours: Any = diffkd.evaluate(
            folder / kind / "fake", folder / kind / "real",
            ("fid", "kid", "is", "prdc") if first else ("fid",), **how,
            weights=str(weights.with_suffix(".safetensors")), is_splits=1 if first else None, device="cpu",
            cache=False,
        )  # fmt: skip
        features, distance = open_peer(weights)
        fake, real = (features(files[name]) for name in ("fake", "real"))
        value = distance(*(span(fake, real) if project else (fake, real)))
        theirs = {"fid": (tool, value)}
        if first:
            theirs |= others(weights, fake, real)
        for key, (tool, value) in theirs.items():
            larger = max(abs(ours[key]), abs(value))
            off = abs(ours[key] - value) / larger if larger else 0.0
            rows.append({"files": kind, "mode": mode, "number": key, "tool": tool, "ours": ours[key],
                         "theirs": value, "difference": off})  # fmt: skip
            print(
                f"{kind:8} {mode:12} {key:10} {ours[key]:<14.8g} {tool:15} {value:<14.8g} {off:.1e}",
                flush=True,
            )
    return rows


def rate(weights: Path, rounds: int) -> float:
    """How many times as many images a second as pytorch-fid's network, from uint8 32x32: median of pairs."""
    from diffkd.metrics import InceptionV3

    ours = InceptionV3(weights.with_suffix(".safetensors"), resize="pytorch-fid")
    theirs = pytorch_fid_network(weights)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    ratios = []
    with torch.no_grad():
        for i in range(rounds + 1):  # the first is for nothing
            start = time.perf_counter()
            theirs(images.float() / 255)
            middle = time.perf_counter()
            ours(images)
            if i:
                ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=Path, default=DEFAULT_PEERS, help="where the tools' wheels are kept")
    parser.add_argument("--images", type=int, default=20, help="in each of two sets")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--fid-only", action="store_true")
    parser.add_argument("--project", action="store_true", help="distances in the span of the features")
    parser.add_argument("--presets", action="store_true", help="ours by the preset of each tool")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing; 0 for none")
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    given = parser.parse_args()
    install(given.peers)
    find_peers(given.peers)
    from safetensors.torch import save_file

    from diffkd.metrics.features.inception import random_weights

    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), []
        weights = folder / "inception.pth"
        torch.save(random_weights(0), weights)
        save_file(random_weights(0), weights.with_suffix(".safetensors"))
        for kind in given.kinds:
            rows += compare(
                kind, given.images, weights, folder, project=given.project, more=not given.fid_only,
                presets=given.presets,
            )  # fmt: skip
        if given.rounds:
            print(f"Inception: {rate(weights, given.rounds):.2f} times pytorch-fid's images a second")
    if given.out:
        given.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
