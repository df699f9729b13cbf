"""What the metrics cost, each as a ratio within this process (best of several runs, alternating):

    python scripts/bench_metrics.py [--device cuda] [--batch 16] [--rounds 5]

- features per second, from uint8 images to statistics, against the bare Inception on a prepared input;
- frechet_distance at d = 2048 against scipy.linalg.sqrtm of the product (extra `dev`);
- precision, recall, density and coverage of 10,000 x 10,000 x 64: peak memory.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

from diffkd.metrics import InceptionV3, density_coverage, frechet_distance, precision_recall
from diffkd.metrics.collect import Collector
from diffkd.runs import commit


def seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def best(works: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """The least time of each, in turn, so that what else the machine does hits all alike."""
    for work in works.values():
        seconds(work, device)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return {name: min(of) for name, of in times.items()}


def neighbours() -> None:
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(10_000, 64, generator=rng) for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    precision_recall(real, fake, 3)
    density_coverage(real, fake, 5)
    took = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"precision, recall, density, coverage of 10,000 x 10,000 x 64: peak {peak:.2f} GB, of which "
        f"{before:.2f} GB before ({took:.1f} s)"
    )


def features(device: torch.device, batch: int, rounds: int) -> None:
    network = InceptionV3.untrained().to(device)
    rng = torch.Generator().manual_seed(0)
    for size in (32, 256):
        images = torch.randint(0, 256, (batch, size, size, 3), generator=rng, dtype=torch.uint8).to(device)
        prepared = torch.randn(batch, 3, 299, 299, generator=rng).to(device)
        collector = Collector(network, batch, device)
        works: dict[str, Callable[[], object]] = {
            "bare": lambda x=prepared: network.trunk(x),
            "whole": lambda x=images, c=collector: c.update(0, x),
        }
        times = best(works, rounds, device)
        print(
            f"Inception, batch {batch}, {size}x{size}: {batch / times['whole']:.1f} features/s from uint8 to "
            f"statistics, {batch / times['bare']:.1f} bare: {times['bare'] / times['whole']:.3f} (asked 0.95)"
        )


def root(device: torch.device, rounds: int) -> None:
    """Two spectra: as steep as Inception's (well conditioned), and of fewer samples than features."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -3, 2048, dtype=torch.float64)

    def covariance(samples: int) -> torch.Tensor:
        x = torch.randn(samples, 2048, generator=rng, dtype=torch.float64) * scale
        turn = torch.linalg.qr(torch.randn(2048, 2048, generator=rng, dtype=torch.float64)).Q
        return torch.cov((x @ turn).T)

    mu = torch.zeros(2048, dtype=torch.float64)
    for samples in (10_000, 1_000):
        one, two = covariance(samples), covariance(samples)
        both = one.to(device), two.to(device)
        product = (one @ two).numpy()
        works: dict[str, Callable[[], object]] = {
            "ours": lambda a=both[0], b=both[1]: frechet_distance(mu.to(device), a, mu.to(device), b),
            "scipy": lambda p=product: scipy.linalg.sqrtm(p),
        }
        times = best(works, rounds, device)
        trace = float(np.trace(scipy.linalg.sqrtm(product)).real)
        theirs = float(one.trace() + two.trace()) - 2 * trace
        ours = frechet_distance(mu.to(device), both[0], mu.to(device), both[1])
        print(
            f"frechet_distance, d = 2048, covariances of {samples:,} samples: {times['ours']:.2f} s, scipy "
            f"sqrtm {times['scipy']:.2f} s: {times['scipy'] / times['ours']:.1f} times (asked 3); "
            f"values {ours:.12g} and {theirs:.12g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    device = torch.device(given.device)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}")
    neighbours()
    features(device, given.batch, given.rounds)
    root(device, max(given.rounds // 2, 1))


if __name__ == "__main__":
    main()
