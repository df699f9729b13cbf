"""What the metrics cost, as ratios within this process, medians of pairs (figures: docs/performance.md):

    python scripts/bench_metrics.py [--device cuda] [--batch 16] [--rounds 3] [--only floor resamples ...]

- features per second, from uint8 images to statistics, against the bare Inception on a prepared input;
- frechet_distance at d = 2048 against scipy.linalg.sqrtm of the product (extra `dev`);
- frechet_distance and resamples of 300 images, d = 2048, against the eigenvectors of their covariances;
- the floor of 300 images and a reference of 10,000, d = 2048, against one draw of the simulation that it
  replaced, of which there were eight;
- precision, recall, density and coverage of 10,000 x 10,000 x 64: peak memory.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

from diffkd.io.environment import commit, peak_rss
from diffkd.metrics import InceptionV3, density_coverage, frechet_distance, precision_recall
from diffkd.metrics.evaluation.collector import Collector
from diffkd.metrics.frechet import Gaussian, distance
from diffkd.metrics.sampling_error import Subsets, floor
from diffkd.metrics.statistics import BLOCK


def seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def paired(
    one: Callable[[], object], two: Callable[[], object], rounds: int, device: torch.device
) -> tuple[float, float, float]:
    """Median times of both, run in turn, and the median of one / two: other work hits both alike."""
    times = [(seconds(one, device), seconds(two, device)) for _ in range(rounds)]
    return (
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(a / b for a, b in times),
    )


def neighbours() -> None:
    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(10_000, 64, generator=rng) for _ in range(2))
    before = peak_rss() / 2**30
    started = time.perf_counter()
    precision_recall(real, fake, 3)
    density_coverage(real, fake, 5)
    took = time.perf_counter() - started
    peak = peak_rss() / 2**30
    print(
        f"precision, recall, density, coverage of 10,000 x 10,000 x 64: peak {peak:.2f} GB, of which "
        f"{before:.2f} GB before ({took:.1f} s)"
    )


def features(device: torch.device, batch: int, rounds: int) -> None:
    """As many batches as fill a block of the statistics, so that its sums are in the time."""
    network = InceptionV3.untrained().to(device)
    rng = torch.Generator().manual_seed(0)
    batches = BLOCK // batch
    for size in (32, 256):
        images = torch.randint(0, 256, (batch, size, size, 3), generator=rng, dtype=torch.uint8).to(device)
        prepared = torch.randn(batch, 3, 299, 299, generator=rng).to(device)
        collector = Collector(network, batch, device)
        network.trunk(prepared), network(images.permute(0, 3, 1, 2))  # once before the clock runs
        bare, whole, ratio = paired(
            lambda x=prepared: [network.trunk(x) for _ in range(batches)],
            lambda x=images, c=collector: [c.update(0, x) for _ in range(batches)],
            rounds,
            device,
        )
        rates = (batch * batches / whole, batch * batches / bare)
        print(
            f"Inception, {batches} batches of {batch} at {size}x{size}: {rates[0]:.1f} features/s from "
            f"uint8 to statistics, {rates[1]:.1f} bare: {ratio:.3f} (aim: 0.95)"
        )


def root(device: torch.device, rounds: int) -> None:
    """Two spectra: as steep as Inception's (well conditioned), and of fewer samples than features."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -3, 2048, dtype=torch.float64)

    def covariance(samples: int) -> torch.Tensor:
        x = torch.randn(samples, 2048, generator=rng, dtype=torch.float64) * scale
        turn = torch.linalg.qr(torch.randn(2048, 2048, generator=rng, dtype=torch.float64)).Q
        return torch.cov((x @ turn).T)

    mu = torch.zeros(2048, dtype=torch.float64, device=device)
    for samples in (10_000, 1_000):
        one, two = covariance(samples), covariance(samples)
        a, b, product = one.to(device), two.to(device), (one @ two).numpy()
        ours = frechet_distance(mu, a, mu, b)
        theirs = float(one.trace() + two.trace()) - 2 * float(np.trace(scipy.linalg.sqrtm(product)).real)
        scipys, mine, ratio = paired(
            lambda p=product: scipy.linalg.sqrtm(p),
            lambda a=a, b=b: frechet_distance(mu, a, mu, b),
            rounds,
            device,
        )
        print(
            f"frechet_distance, d = 2048, covariances of {samples:,} samples: {mine:.2f} s on {device.type}, "
            f"scipy sqrtm {scipys:.2f} s on the CPU: {ratio:.1f} times (aim: 3); "
            f"values {ours:.12g} and {theirs:.12g}"
        )


def used(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds, and GB by which the peak of this process rose."""
    before, started = peak_rss(), time.process_time()
    work()
    took, after = time.process_time() - started, peak_rss()
    return took, (after - before) / 2**30


def by_eigenvectors(x: torch.Tensor) -> Gaussian:
    """The Gaussian of samples (N, d) as it is found where nothing is known of its rank."""
    sigma = torch.cov(x.T)
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return Gaussian(x.mean(0), vectors[:, kept] * values[kept].sqrt(), sigma.trace())


def resamples() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, 2048, generator=rng, dtype=torch.float64) for _ in range(2))
    reference = by_eigenvectors(y)
    chosen = torch.randint(300, (300,), generator=rng)
    plain, _ = used(lambda: distance(by_eigenvectors(x[chosen]), reference))
    subsets = Subsets(x, reference)
    ten, _ = used(lambda: [subsets.distance(chosen) for _ in range(10)])
    moments = [(one.mean(0), torch.cov(one.T)) for one in (x, y)]
    whole, _ = used(lambda: frechet_distance(*moments[0], *moments[1]))
    off = subsets.distance(chosen) / distance(by_eigenvectors(x[chosen]), reference) - 1
    print(
        f"a resample of 300 images, d = 2048: {ten / 10:.4f} CPU s, by eigenvectors {plain:.2f}: "
        f"{10 * plain / ten:.0f} times faster (relative difference {abs(off):.0e}); frechet_distance of two "
        f"such sets {whole:.2f} CPU s"
    )


def low() -> None:
    """The computation before the simulation: the peak of a process only rises."""
    scale = torch.arange(1, 2049, dtype=torch.float64).rsqrt()
    sigma = torch.cov((torch.randn(1_000, 2048, dtype=torch.float64) * scale).T)
    ours, memory = used(lambda: floor(sigma, 300, 1_000))

    def one_draw(count: int = 10_000) -> float:
        x = torch.randn(count, 2048, dtype=torch.float64) * scale
        real = torch.linalg.qr((x - x.mean(0)) / (count - 1) ** 0.5, mode="r").R.T
        fake = (x[:300] - x[:300].mean(0)).T / 299**0.5
        return float(torch.linalg.svdvals(fake.T @ real).sum())

    theirs, more = used(one_draw)
    print(
        f"floor of 300 images, d = 2048: {ours:.2f} CPU s and {memory:.2f} GB for any reference; one draw "
        f"of a simulation with a reference of 10,000: {theirs:.2f} CPU s and {memory + more:.2f} GB: "
        f"{theirs / ours:.1f} times"
    )


PARTS = ("neighbours", "features", "root", "resamples", "floor")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    given = parser.parse_args()
    device = torch.device(given.device)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}")
    work = {
        "floor": low, "resamples": resamples, "neighbours": neighbours,
        "features": lambda: features(device, given.batch, given.rounds),
        "root": lambda: root(device, given.rounds),
    }  # fmt: skip
    for part, measure in work.items():
        if part in given.only:
            measure()


if __name__ == "__main__":
    main()
