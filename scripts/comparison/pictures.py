"""Pictures of a comparison: FID against steps, FID against cost, and what each method draws in one step."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import INK, TILES, strips

from comparison.table import best_teacher, fid, least_steps, student_at
from diffkd.generation.generator import generate
from diffkd.models import loading
from diffkd.runs.reports import plots


def fid_against_steps(path: Path, results: Mapping[str, Any], features: str) -> bool:
    """A line a method through its step counts, and the teacher's own; False without matplotlib."""

    def draw(plot: Any) -> None:
        for guidance, style in zip(dict.fromkeys([results["guidance"], 1.0]), ("-", "--"), strict=False):
            rows = sorted((row["steps"], fid(row, features)) for row in results["teacher"]
                          if row["guidance"] == guidance)  # fmt: skip
            title = f"teacher, w = {guidance:g}"
            plot.plot(*zip(*rows, strict=True), color="black", linestyle=style, linewidth=1.2, label=title)
        for name, method, look in _looks(results):
            steps = sorted({row["steps"] for row in method["students"]})
            rows = [student_at(method, n) for n in steps]
            values = [row["of"][features]["fid"] for row in rows if row is not None]
            means, errors = [statistics.mean(v) for v in values], [_deviation(v) for v in values]
            plot.errorbar(steps, means, yerr=errors, capsize=2, linewidth=1, label=name, **look)
        most = max(row["steps"] for row in results["teacher"])
        _plain(plot, [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= most])

    options = {"xscale": "log", "yscale": "log", "xlabel": "steps", "ylabel": f"FID, {features} features"}
    return plots.write_png(path, draw, width=8.5, **options)


def fid_against_seconds(path: Path, results: Mapping[str, Any], features: str) -> bool:
    """A point a method, at the fewest steps that it has a student for; the teacher at its most as lines."""

    def draw(plot: Any) -> None:
        for guidance, style in zip(dict.fromkeys([results["guidance"], 1.0]), ("-", "--"), strict=False):
            row = best_teacher(results, guidance)
            title = f"teacher, w = {guidance:g}, {row['steps']} steps"
            plot.axhline(fid(row, features), color="black", linestyle=style, linewidth=1, label=title)
        for name, method, look in _looks(results):
            row, seconds = least_steps(method), method["seconds"]
            values = row["of"][features]["fid"]
            title = f"{name}, {row['steps']} step{'s' * (row['steps'] > 1)}"
            plot.errorbar(
                statistics.mean(seconds), statistics.mean(values), xerr=_deviation(seconds),
                yerr=_deviation(values), capsize=2, linestyle="none", label=title, **look,
            )  # fmt: skip
        plot.set_xlim(left=0)
        _plain(plot)

    options = {"yscale": "log", "xlabel": "CPU seconds of training", "ylabel": f"FID, {features} features"}
    return plots.write_png(path, draw, width=8.5, **options)


def _looks(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], dict[str, Any]]]:
    """Each method with its colour and marker, the same in every picture and no two alike."""
    from matplotlib import colormaps

    colours = colormaps["tab10"].colors
    for i, (name, method) in enumerate(results["methods"].items()):
        marker = plots.MARKERS[(i + i // len(colours)) % len(plots.MARKERS)]
        yield name, method, {"color": colours[i % len(colours)], "marker": marker, "markersize": 5}


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _plain(plot: Any, steps: Sequence[int] = ()) -> None:
    """Plain numbers on both axes, and the names beside the plot, where none can cover another."""
    from matplotlib.ticker import LogLocator

    if steps:
        plot.set_xticks(steps, map(str, steps))
        plot.xaxis.set_minor_formatter("")
    low, high = plot.get_ylim()
    parts = {3: (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), 20: (1, 2, 3, 5, 7), 200: (1, 2, 5)}
    fine = next((subs for most, subs in parts.items() if high < most * low), (1,))
    plot.yaxis.set_major_locator(LogLocator(subs=fine))
    plot.yaxis.set_minor_formatter("")
    plot.yaxis.set_major_formatter("{x:g}")
    plot.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))


def draws(path: Path, results: Mapping[str, Any], teacher: Path, students: Mapping[str, Path]) -> bool:
    """A row a method, of the same noises and labels: its student of the fewest steps, the teacher first.

    students: the folder of each method's run."""
    best = best_teacher(results, results["guidance"])
    options = {} if best["guidance"] == 1 else {"guidance": best["guidance"]}
    rows = [(f"teacher, {best['steps']} steps", INK, _images(teacher, best["steps"], options))]
    for name, method in results["methods"].items():
        row = least_steps(method)
        title = f"{name}, {row['steps']} step{'s' * (row['steps'] > 1)}"
        rows.append((title, INK, _images(students[name] / "students" / row["model"], row["steps"], {})))
    try:
        strips(path, rows, left=0.24)
    except ImportError:
        return False
    return True


def _images(path: Path, steps: int, options: Mapping[str, Any]) -> np.ndarray:
    """The first, a class after the other, from the same noises for every model, as `strips` takes them."""
    batches = generate(loading.load(path), TILES, steps=steps, seed=0, **options)
    images = np.concatenate([batch.cpu().numpy() for batch in batches])
    return images[..., 0] if images.shape[-1] == 1 else images
