"""One page for one run: FID against steps, the same noise through every model, the course of training.

It reads the run folder and nothing else: a page can be made of any run, at any time, on any machine.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from diffkd.data.decoding import open_image
from diffkd.errors import printable
from diffkd.io.files import new_file
from diffkd.io.text import from_json
from diffkd.runs.reports import page, plots

Record = dict[str, Any]
Stages = dict[str, list[Record]]
COLUMNS = 8  # of a grid in samples/
TILES = 10  # of a strip: one of each class where there are ten in turn, and legible on a phone
TILE = 128  # the most pixels of a strip's tile, so that a page of many models stays small
LAST = 10  # records of a stage whose mean is its value by noise


class _Measured(NamedTuple):
    """metrics.json by steps, most first. best: the teacher's record of the least FID."""

    teacher: dict[int, Record]
    students: dict[int, Record]
    best: Record | None

    def ratio(self, record: Record | None) -> float | None:
        """FID relative to the teacher's best; None where either is not known."""
        return record["fid"] / self.best["fid"] if record and self.best and self.best["fid"] > 0 else None

    def records(self) -> list[Record]:
        return [*self.teacher.values(), *self.students.values()]


def write(folder: Path) -> Path | None:
    """Writes report.html into a run folder, whole or half finished; None, and no page, without matplotlib.

    Reads config.yaml, environment.json, log.jsonl, metrics.json and samples/*.png, those that are there. The
    page stands alone: it asks for no other file. The same files give the same bytes.
    """
    measured, stages = _measured(folder / "metrics.json"), _stages(folder / "log.jsonl")
    try:
        with plots.drawing():
            parts = [_summary(measured, stages), _fid(measured), _noise(folder / "samples", measured)]
            parts += [_training(stages), details(folder, measured.records())]
    except ImportError:
        return None
    path = folder / "report.html"
    with new_file(path) as temporary:
        temporary.write_text(page.whole(folder.resolve().name, "\n".join(parts)), encoding="utf-8")
    return path


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(text: str) -> Any:
    """None for what is no JSON: a file that is missing, a line that is torn."""
    try:
        return from_json(text)
    except ValueError:
        return None


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _measured(path: Path) -> _Measured:
    found = _json(_text(path))
    known = [r for r in found if isinstance(r, dict)] if isinstance(found, list) else []
    whole = [
        r
        for r in known
        if type(r.get("steps")) is int and r["steps"] > 0 and _real(r.get("fid"))
        if isinstance(r.get("protocol", {}), dict)
    ]
    found = sorted(whole, key=lambda r: -r["steps"])
    teacher = {r["steps"]: r for r in found if r.get("role") == "teacher"}
    students = {r["steps"]: r for r in found if r.get("role") == "student"}
    return _Measured(teacher, students, min(teacher.values(), key=lambda r: r["fid"], default=None))


def _stages(path: Path) -> Stages:
    """The log's records by stage, in the order they were made; events and torn lines are left out."""
    stages: Stages = {}
    for record in map(_json, _text(path).split("\n")):
        if isinstance(record, dict) and "event" not in record and {"stage", "update"} <= record.keys():
            stages.setdefault(str(record["stage"]), []).append(record)
    return stages


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _summary(measured: _Measured, stages: Stages) -> str:
    """What was distilled, how good it is and by which features: what a reader in a hurry needs."""
    said, best = [], measured.best
    if best:
        said.append(f"The teacher’s best FID is {page.number(best['fid'])}, at {_steps(best['steps'])}.")
    if measured.students:
        last = measured.students[min(measured.students)]
        ratio = measured.ratio(last)
        said.append(f"Distilled to {_steps(last['steps'])}, the student’s FID is {page.number(last['fid'])}")
        said[-1] += "." if ratio is None else f", {page.number(ratio)} times the teacher’s best."
    if not measured.records():
        said.append("No FID has been measured in this run.")
    if stages:
        name, end = list(stages)[-1], list(stages.values())[-1][-1]
        if end["update"] < end.get("updates", 0):
            said.append(f"The log ends in stage {name}, at update {end['update']} of {end['updates']}.")
    text = f'<p class="lead">{page.escaped(" ".join(said))}</p>'
    names = (
        dict(page.flat(r.get("protocol", {}))).get("features.name", "unknown") for r in measured.records()
    )
    for features in dict.fromkeys(names):
        note = f"FID by the feature network “{features}”."
        if features != "inception":
            note += f" It is not an Inception-FID: compare it with other {features}-FIDs only."
        text += f'<p class="note">{page.escaped(note)}</p>'
    return text


def _fid(measured: _Measured) -> str:
    rows = []
    for steps in sorted(measured.teacher.keys() | measured.students.keys(), reverse=True):
        theirs, ours = measured.teacher.get(steps), measured.students.get(steps)
        nfe = dict.fromkeys(str(r.get("nfe", "–")) for r in (theirs, ours) if r)
        fids = [page.number(r["fid"] if r else None) for r in (theirs, ours)]
        more = [page.number(measured.ratio(ours)), _seconds(ours or theirs or {})]
        rows.append([str(steps), " / ".join(nfe), *fids, *more])
    if not rows:
        return ""
    head = ["steps", "nfe", "teacher FID", "student FID", "student / teacher’s best", "s per 1000 images"]
    note = "nfe: network evaluations per image. Seconds: the student’s, or the teacher’s where there is none."
    if any("/" in row[1] for row in rows):
        note += " Two nfe: the teacher’s / the student’s."
    kept = [column for column in zip(head, *rows, strict=True) if set(column[1:]) != {"–"}]
    head, *rows = (list(row) for row in zip(*kept, strict=True))
    table = f'<div class="card">{page.table(head, rows, "numbers")}<p class="small">{note}</p></div>'
    chart = ""
    if len(measured.records()) > 1:
        chart = f'<div class="card"><p class="small">FID, lower is better</p>{_fid_chart(measured)}</div>'
    return f'<section><h2>FID against steps</h2><div class="pair">{chart}{table}</div></section>'


def _seconds(record: Record) -> str:
    samples, seconds = record.get("protocol", {}).get("samples"), record.get("seconds")
    return page.number(seconds / samples * 1000 if samples and seconds else None)


def _fid_chart(measured: _Measured) -> str:
    figure, axes = plots.axes()
    for records, colour, marker, label in (
        (measured.teacher, plots.TEACHER, "o", "teacher"),
        (measured.students, plots.STUDENT, "s", "students"),
    ):  # fmt: skip
        shown = {steps: r["fid"] for steps, r in records.items() if r["fid"] > 0}  # the axis is a logarithm
        axes.plot(list(shown), list(shown.values()), color=colour, marker=marker, markersize=4.5, label=label)
        above = records is measured.teacher
        for steps, fid in shown.items():
            if above and steps in measured.students and fid < 1.15 * measured.students[steps]["fid"]:
                continue  # the curves meet; the student's value stands for both
            axes.annotate(
                page.number(fid), (steps, fid), xytext=(2, 5) if above else (-4, -6),
                textcoords="offset points",
                ha="left" if above else "center", va="bottom" if above else "top", fontsize=8.5, color=colour,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.margins(x=0.09, y=0.14)
    every = sorted(measured.teacher.keys() | measured.students.keys())
    kept = every[:1]
    for steps in every[1:]:  # no label on top of another
        if math.log(steps / kept[-1]) > 0.013 * len(f"{kept[-1]}{steps}") * math.log(every[-1] / every[0]):
            kept.append(steps)
    axes.set_xticks(kept, [str(steps) for steps in kept], fontsize=8.5)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("steps")
    axes.legend(frameon=False, loc="upper right")
    return plots.svg(figure, "FID against steps, of the teacher and the students")


def _noise(folder: Path, measured: _Measured) -> str:
    """One strip a model: the teacher before the students, many steps before few."""
    found = []
    for path in sorted(folder.glob("*.png")):
        teacher, steps = path.stem.startswith("teacher"), re.search(r"(\d+)-steps", path.stem)
        count = int(steps[1]) if steps else None
        found.append((not teacher, -(count or math.inf), path.stem, count, _tiles(path)))
    found = sorted(row for row in found if row[-1])
    width = min((len(tiles) for *_, tiles in found), default=0)
    rows = ""
    for student, _, stem, count, tiles in found:
        role, records = ("student", measured.students) if student else ("teacher", measured.teacher)
        title = f"{role}, {_steps(count)}" if count else stem
        fid = f"<span>FID {page.number(records[count]['fid'])}</span>" if count and count in records else ""
        caption = f"<figcaption><b>{page.escaped(title)}</b>{fid}</figcaption>"
        rows += f'<figure class="strip {role}">{caption}{_strip(tiles[:width], title)}</figure>'
    why = "A column starts from one noise and one label: each row is what its model makes of them."
    head = f"<h2>The same noise</h2><p>{why}</p>" if len(found) > 1 else "<h2>Samples</h2>"
    return f'<section>{head}<div class="card">{rows}</div></section>' if rows else ""


def _tiles(path: Path) -> list[Image.Image]:
    """The first square tiles of a grid; none of a picture that cannot be read."""
    try:
        with open_image(path) as file:
            grid = file if file.mode in ("L", "RGB") else file.convert("RGB")
            size = grid.width // COLUMNS
            corners = [(i % COLUMNS * size, i // COLUMNS * size) for i in range(TILES)]
            return [grid.crop((x, y, x + size, y + size)) for x, y in corners if y + size <= grid.height]
    except Exception:  # Pillow raises many kinds
        return []


def _strip(tiles: Sequence[Image.Image], title: str) -> str:
    size = tiles[0].width
    strip = Image.new(tiles[0].mode, (size * len(tiles), size))
    for i, tile in enumerate(tiles):
        strip.paste(tile, (i * size, 0))
    if size > TILE:
        strip = strip.resize((TILE * len(tiles), TILE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    strip.save(stream, format="PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
    rendering = "pixelated" if size <= 64 else "auto"  # larger ones are shown reduced, where it would alias
    style = f"--tiles:{len(tiles)};image-rendering:{rendering}"
    shape = f'width="{strip.width}" height="{strip.height}" style="{style}"'
    return f'<img alt="{page.escaped(title)}" {shape} src="{source}">'


def _training(stages: Stages) -> str:
    cards = ""
    for key, title, what in (
        ("loss", "Loss", "What the optimizer minimises."),
        ("gap", "Gap", "Root mean squared distance of the predicted x0 from its target."),
    ):
        curves = [_curve(records, key) for records in stages.values()]
        if any(curves):
            chart = _curves_chart(stages, curves, f"{title} by stage")
            heat = _heat(stages, f"{key}_by_noise")
            cards += f'<div class="card"><h3>{title}</h3><p class="small">{what}</p>{chart}{heat}</div>'
    return f'<section><h2>Training</h2><div class="pair">{cards}</div></section>' if cards else ""


def _curve(records: list[Record], key: str) -> list[tuple[float, float]]:
    """(share of the stage's updates, value)."""
    whole = records[-1].get("updates") or records[-1]["update"] or 1
    return [(r["update"] / whole, r[key]) for r in records if _real(r.get(key)) and r[key] > 0]


def _curves_chart(stages: Stages, curves: list[list[tuple[float, float]]], label: str) -> str:
    """Stages side by side and equally wide: the last may have ten times the updates of the first."""
    figure, axes = plots.axes()
    for i, points in enumerate(curves):
        if i:
            axes.axvline(i, color=plots.FAINT, linewidth=0.6)
        axes.plot([i + u for u, _ in points], [v for _, v in points], color=plots.STUDENT, linewidth=1.3)
    short = (printable(name.removesuffix("-steps")) for name in stages)
    names = [name.encode("ascii", "replace").decode()[:10] for name in short]
    updates = [records[-1].get("updates") or records[-1]["update"] for records in stages.values()]
    if len(stages) > 1:
        shown = range(0, len(names), -(-len(names) // 10))  # no label on top of another
        axes.set_xticks([i + 0.5 for i in shown], [f"{names[i]}\n{updates[i]}" for i in shown])
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("stage (steps of its student), and its updates")
    else:
        axes.set_xticks([0, 0.5, 1], ["0", f"{updates[0] / 2:g}", str(updates[0])])
        axes.set_xlabel("updates")
    axes.set_xlim(0, len(names))
    return plots.svg(figure, label)


def _heat(stages: Stages, key: str) -> str:
    """Stages by bins of t, shaded by the logarithm."""
    rows = {name: [r[key] for r in records[-LAST:] if r.get(key)] for name, records in stages.items()}
    means = {name: [_mean(column) for column in zip(*found, strict=False)] for name, found in rows.items()}
    logs = [math.log(value) for row in means.values() for value in row if value]
    if not logs:
        return ""
    bins, low, span = max(map(len, means.values())), min(logs), max(logs) - min(logs) or 1
    body = ""
    for name, row in means.items():
        body += f"<tr><td>{page.escaped(name)}</td>"
        for value in row:
            shade = 0.04 + 0.5 * (math.log(value) - low) / span if value else 0
            text = f"{value:.2g}" if value else "–"
            body += f'<td style="background:rgb(15 130 120/{shade:.2f})">{text}</td>'
        body += "</tr>"
    head = "".join(f"<th>{b / bins:g}–{(b + 1) / bins:g}</th>" for b in range(bins))
    note = f"By t, from data (0) to noise (1), the mean of a stage’s last {LAST} records. –: no such t."
    table = f"<thead><tr><th>stage</th>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<table class="numbers heat">{table}</table><p class="small">{note}</p>'


def _mean(values: Iterable[Any]) -> float | None:
    """None where no time of the stage lies in the bin."""
    known = [value for value in values if _real(value) and value > 0]
    return sum(known) / len(known) if known else None


def details(folder: Path, measured: Sequence[Record] = ()) -> str:
    """Config, environment and the protocol of the numbers, folded away."""
    parts = []
    config, environment = _text(folder / "config.yaml"), _json(_text(folder / "environment.json"))
    if config:
        parts.append(("Config", f"<pre>{html.escape(config)}</pre>"))
    if environment:
        parts.append(("Environment", page.table([], page.flat(environment), "facts")))
    protocol: dict[str, dict[str, None]] = {}
    for record in measured:
        for key, text in page.flat(record.get("protocol", {})):
            protocol.setdefault(key, {})[text] = None
    if protocol:  # several values: they differ between the measurements
        rows = [(key, "; ".join(values)) for key, values in protocol.items()]
        parts.append(("Protocol of the numbers", page.table([], rows, "facts")))
    return "".join(f"<details><summary>{title}</summary>{content}</details>" for title, content in parts)
