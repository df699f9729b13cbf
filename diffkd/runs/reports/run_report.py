"""One page for one run: FID against steps, the same noise through every model, the course of training.

It reads the run folder and nothing else: a page can be made of any run, at any time, on any machine.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from diffkd.runs.reports import (
    fid_chart,
    page,
    run_files,
    sample_strips,
    teacher_sampling,
    training_charts,
)
from diffkd.runs.reports.run_files import Measurements, Record, Stages


def write(folder: Path) -> Path | None:
    """Writes report.html into a run folder, finished or not; None, and no page, without matplotlib.

    Reads config.yaml, environment.json, log.jsonl, metrics.json and samples/*.png, as far as they exist. The
    page stands alone: it loads no other file. The same files give the same bytes.
    """
    measured, stages = run_files.measurements(folder / "metrics.json"), run_files.stages(folder / "log.jsonl")
    spread = run_files.stages(folder / "log.jsonl", "spread")
    return page.write(folder, lambda: [
        _summary(measured, stages), fid_chart.section(measured),
        sample_strips.section(folder / "samples", measured), training_charts.section(stages, spread),
        details(folder, measured.records()),
    ])  # fmt: skip


def _summary(measured: Measurements, stages: Stages) -> str:
    """What was distilled, how good it is and by which features, for a reader in a hurry."""
    sentences, best = [], measured.best
    if best:
        sentences.append(
            f"The teacher’s best FID is {page.number(best['fid'])}, at {page.steps(best['steps'])}."
        )
    if measured.students:
        last = measured.students[min(measured.students)]
        ratio = measured.ratio(last)
        compared = "" if ratio is None else f", {page.number(ratio)} times the teacher’s best"
        fid = page.number(last["fid"])
        sentences.append(f"Distilled to {page.steps(last['steps'])}, the student’s FID is {fid}{compared}.")
        teacher = run_files.of_prompts(best)
        for title, text in run_files.of_prompts(last).items():
            beside = f", the teacher’s {teacher[title]}" if title in teacher else ""
            sentences.append(f"Its {title} is {text}{beside}.")
        if doubt := teacher_sampling.doubt(last, best):
            sentences.append(f"{doubt}.")
    if not measured.records():
        sentences.append("No FID has been measured in this run.")
    if stages:
        name, end = list(stages)[-1], list(stages.values())[-1][-1]
        if end["update"] < end.get("updates", 0):
            sentences.append(f"The log ends in stage {name}, at update {end['update']} of {end['updates']}.")
    text = f'<p class="lead">{page.escaped(" ".join(sentences))}</p>'
    protocols = (dict(page.flat(record.get("protocol", {}))) for record in measured.records())
    for features in dict.fromkeys(protocol.get("features.name", "unknown") for protocol in protocols):
        note = f"FID by the feature network “{features}”."
        if features != "inception":
            note += f" It is not an Inception-FID: compare it with other {features}-FIDs only."
        text += f'<p class="note">{page.escaped(note)}</p>'
    return text


def details(folder: Path, records: Sequence[Record] = ()) -> str:
    """Config, environment and the protocol of the numbers, folded away."""
    parts = []
    config = run_files.read_text(folder / "config.yaml")
    environment = run_files.read_json(folder / "environment.json")
    if config:
        parts.append(("Config", f"<pre>{html.escape(config)}</pre>"))
    if environment:
        parts.append(("Environment", page.table([], page.flat(environment), "facts")))
    protocol: dict[str, dict[str, None]] = {}
    for record in records:
        for key, text in page.flat(record.get("protocol", {})):
            protocol.setdefault(key, {})[text] = None
    if protocol:  # several values where the measurements differ
        rows = [(key, "; ".join(values)) for key, values in protocol.items()]
        parts.append(("Protocol of the numbers", page.table([], rows, "facts")))
    return "".join(f"<details><summary>{title}</summary>{content}</details>" for title, content in parts)
