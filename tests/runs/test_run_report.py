"""The report: its tables, strips and curves say what the files say; it stands alone and harms nobody."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffkd.generation import grids
from diffkd.runs.reports import run_report

pytest.importorskip("matplotlib")
TEACHER = {8: 2.5, 32: 1.25, 2: 31.0, 1: 62.5}  # not in order: the page puts them in order
STUDENTS = {8: 1.5, 2: 2.0, 1: 3.75}
TILE = 8
Log = list[dict[str, Any]]


class Page(HTMLParser):
    """What a browser would see: tags with attributes, rows of tables, captions, text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("meta", "img", "path", "use", "rect"):  # that have no content
            return
        self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> list[list[str]]:
        """The table whose head begins with that word."""
        return next(table for table in self.tables if table[0] and table[0][0] == first)

    def facts(self) -> dict[str, str]:
        """The tables of two columns."""
        return {row[0]: row[1] for table in self.tables for row in table if len(row) == 2}

    def strips(self) -> dict[str, np.ndarray]:
        """Pixels by title, in the order of the page."""
        found = {}
        for tag, attrs in self.tags:
            if tag == "img":
                kind, data = str(attrs["src"]).split(",")
                assert kind == "data:image/png;base64"
                found[str(attrs["alt"])] = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        return found

    def curves(self, label: str, colour: str) -> list[list[tuple[float, float]]]:
        """The points of one plot's lines of that colour, in the plot's own coordinates, y upwards."""
        plot = re.search(rf'<svg role="img" aria-label="{label}.*?</svg>', self.source, re.S)
        assert plot
        lines = re.findall(rf'<path d="([^"]*)" clip-path[^>]*stroke: var\(--{colour}\)', plot[0])
        return [[(float(x), -float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", line)] for line in lines]


def record(role: str, steps: int, fid: float, features: str = "digits") -> dict[str, Any]:
    protocol = {
        "features": {"name": features, "sha256": "a1", "num_features": 64}, "samples": 500, "seed": 3,
        "reference": {"name": "digits", "count": 1797}, "sampler": "ddim", "steps": steps, "nfe": steps,
    }  # fmt: skip
    return {
        "model": "teacher" if role == "teacher" else f"{steps}-steps", "role": role, "steps": steps,
        "nfe": steps, "fid": fid, "seconds": 0.75 * steps, "protocol": protocol,
    }  # fmt: skip


def logged(stage: str, index: int, losses: list[float], updates: int) -> Log:
    return [
        {"stage": stage, "stage_index": index, "update": 10 * (i + 1), "updates": updates,
         "loss": loss, "loss_by_noise": [None, loss, 2 * loss, None, loss],
         "gap": loss**0.5, "gap_by_noise": [None, loss, loss, None, 7.0]}
        for i, loss in enumerate(losses)
    ]  # fmt: skip


def put_log(folder: Path, log: Log, torn: str = "") -> None:
    (folder / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in log) + torn, encoding="utf-8"
    )


def put_metrics(folder: Path, records: Log) -> None:
    (folder / "metrics.json").write_text(json.dumps(records), encoding="utf-8")


def put_grid(folder: Path, name: str, *, rows: int = 3, tile: int = TILE, channels: int = 1) -> np.ndarray:
    rng = np.random.default_rng(sum(map(ord, name)))
    pixels = rng.integers(0, 256, (rows * tile, 8 * tile, channels), dtype=np.uint8).squeeze(
        -1 if channels == 1 else ()
    )
    (folder / "samples").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / "samples" / f"{name}.png")
    return pixels


def first_tiles(grid: np.ndarray, count: int, tile: int = TILE) -> np.ndarray:
    """The grid's first tiles side by side, row after row of eight."""
    lines = [grid[i : i + tile] for i in range(0, len(grid), tile)]
    return np.concatenate(lines, axis=1)[:, : count * tile]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run of three students."""
    folder = tmp_path / "digits-run"
    folder.mkdir()
    (folder / "config.yaml").write_text("out: runs/digits-run\nseed: 0\n", encoding="utf-8")
    environment = {
        "command": ["diffkd", "distill", "a b.yaml"],
        "commit": "c0ffee",
        "versions": {"torch": "2.9"},
    }
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    records = [record("teacher", *item) for item in TEACHER.items()]
    put_metrics(folder, records + [record("student", *item) for item in STUDENTS.items()])
    put_log(
        folder,
        logged("8-steps", 0, [0.5, 0.2, 0.1], 30)
        + logged("2-steps", 1, [0.4, 0.3], 20)
        + logged("1-steps", 2, [0.9], 10),
    )
    for name in ("1-steps", "2-steps", "8-steps", "teacher-1-steps", "teacher-2-steps", "teacher-32-steps"):
        put_grid(folder, name)
    return folder


def page(folder: Path) -> Page:
    path = run_report.write(folder)
    assert path == folder / "report.html"
    return Page(path)


def test_the_table_says_what_was_measured(run: Path) -> None:
    assert page(run).table("steps") == [
        ["steps", "nfe", "teacher FID", "student FID", "student / teacher’s best", "s per 1000 images"],
        ["32", "32", "1.25", "–", "–", "48.00"],
        ["8", "8", "2.50", "1.50", "1.20", "12.00"],
        ["2", "2", "31.00", "2.00", "1.60", "3.00"],
        ["1", "1", "62.50", "3.75", "3.00", "1.50"],
    ]


def test_seconds_are_the_students_and_two_nfe_are_both_shown(run: Path) -> None:
    guided = record("teacher", 4, 9.0) | {"nfe": 8, "seconds": 100.0}
    put_metrics(run, [guided, record("student", 4, 9.5)])
    assert page(run).table("steps")[1] == ["4", "8 / 4", "9.00", "9.50", "1.06", "6.00"]


def test_a_chain_has_a_row_for_every_student(run: Path) -> None:
    again = record("student", 1, 2.5) | {"model": "1-steps-dmd2"}
    put_metrics(run, [record("teacher", 1, 62.5), record("student", 1, 3.75), again])
    assert page(run).table("steps")[1:] == [
        ["1-steps", "1", "–", "3.75", "0.060", "1.50"],
        ["1-steps-dmd2", "1", "62.50", "2.50", "0.040", "1.50"],
    ]  # fmt: skip


def test_the_summary_names_the_best_the_last_and_the_features(run: Path) -> None:
    first, note, *_ = page(run).texts["p"]
    assert first == (
        "The teacher’s best FID is 1.25, at 32 steps. "
        "Distilled to 1 step, the student’s FID is 3.75, 3.00 times the teacher’s best."
    )
    assert note == (
        "FID by the feature network “digits”. "
        "It is not an Inception-FID: compare it with other digits-FIDs only."
    )


def test_an_inception_fid_needs_no_warning(run: Path) -> None:
    put_metrics(run, [record("teacher", 4, 9.0, features="inception")])
    assert page(run).texts["p"][1] == "FID by the feature network “inception”."


def test_the_fid_plot_is_log_log(run: Path) -> None:
    result = page(run)
    for colour, fids in (("teacher", TEACHER), ("student", STUDENTS)):
        (points,) = result.curves("FID", colour)
        steps = sorted(fids, reverse=True)
        assert len(points) == len(steps)
        for axis, values in ((0, steps), (1, [fids[n] for n in steps])):
            drawn = [point[axis] for point in points]
            expected = [math.log(value / values[0]) / math.log(values[-1] / values[0]) for value in values]
            assert [(d - drawn[0]) / (drawn[-1] - drawn[0]) for d in drawn] == pytest.approx(
                expected, abs=1e-4
            )
    (theirs,), (ours,) = result.curves("FID", "teacher"), result.curves("FID", "student")
    assert ours[-1][0] == theirs[-1][0] and ours[-1][1] < theirs[-1][1], "one step: below the teacher"
    assert {"62.50", "31.00", "2.50", "1.25", "3.75", "2.00", "1.50"} <= set(result.texts["text"])


def test_strips_are_the_grids_first_tiles_in_order(run: Path) -> None:
    strips = page(run).strips()
    names = {
        "teacher, 32 steps": "teacher-32-steps", "teacher, 2 steps": "teacher-2-steps",
        "teacher, 1 step": "teacher-1-steps", "student, 8 steps": "8-steps", "student, 2 steps": "2-steps",
        "student, 1 step": "1-steps",
    }  # fmt: skip
    assert list(strips) == list(names)
    for title, name in names.items():
        expected = first_tiles(np.asarray(Image.open(run / "samples" / f"{name}.png")), 10)
        np.testing.assert_array_equal(strips[title], expected)


def test_strips_carry_the_fid_of_their_model(run: Path) -> None:
    captions = page(run).texts["figcaption"]
    assert captions[0] == "teacher, 32 stepsFID 1.25"
    assert captions[-1] == "student, 1 stepFID 3.75"


def test_students_of_one_step_count_have_each_its_own_strip_value_and_mark(run: Path) -> None:
    again = record("student", 1, 2.5) | {"model": "1-steps-dmd2"}
    one = page(run).source.count("<use ")  # a mark of a plot
    put_metrics(run, [*json.loads((run / "metrics.json").read_text()), again])
    put_grid(run, "1-steps-dmd2")
    result = page(run)
    assert result.texts["figcaption"][-2:] == ["student, 1 stepFID 3.75", "student, 1 step, dmd2FID 2.50"]
    assert "of an earlier stage" in result.texts["text"]
    assert result.source.count("<use ") == one + 2, "in the plot, and in its legend"


def test_columns_stay_aligned_and_a_broken_picture_is_left_out(run: Path) -> None:
    short = put_grid(run, "4-steps", rows=1)
    (run / "samples" / "2-steps.png").write_bytes((run / "samples" / "1-steps.png").read_bytes()[:200])
    (run / "samples" / "8-steps.png").write_bytes(b"no picture")
    strips = page(run).strips()
    assert [title for title in strips if title.startswith("student")] == [
        "student, 4 steps",
        "student, 1 step",
    ]
    assert {strip.shape for strip in strips.values()} == {(TILE, 8 * TILE)}
    np.testing.assert_array_equal(strips["student, 4 steps"], short)


def test_colours_stay_and_large_tiles_are_reduced(run: Path) -> None:
    for path in (run / "samples").glob("*.png"):
        path.unlink()
    small = put_grid(run, "2-steps", rows=2, channels=3)
    put_grid(run, "1-steps", rows=2, tile=160, channels=3)
    with Image.open(run / "samples" / "2-steps.png") as grid:
        palette = grid.quantize(16)
    palette.save(run / "samples" / "4-steps.png")
    strips = page(run).strips()
    np.testing.assert_array_equal(strips["student, 2 steps"], first_tiles(small, 10))
    np.testing.assert_array_equal(
        strips["student, 4 steps"], first_tiles(np.asarray(palette.convert("RGB")), 10)
    )
    assert strips["student, 1 step"].shape == (128, 1280, 3)


def test_grids_with_gaps_and_of_oblong_images_are_cut_right(run: Path) -> None:
    for path in (run / "samples").glob("*.png"):
        path.unlink()
    for steps, shape in ((4, (40, 64)), (2, (64, 40)), (1, (150, 300))):
        images = np.random.default_rng(steps).integers(0, 256, (12, *shape, 3), dtype=np.uint8)
        grids.save(grids.grid(images), run / "samples" / f"{steps}-steps.png")
        strip = page(run).strips()[f"student, {steps} step{'s' * (steps > 1)}"]
        if steps > 1:
            np.testing.assert_array_equal(strip, np.concatenate(images[:10], axis=1))
        else:
            assert strip.shape == (64, 1280, 3)


PROMPTS = ["a red ring", "</li><script>alert(1)</script> & <i>", "a star " * 40, "a ring"]


@pytest.fixture
def prompted(run: Path) -> Path:
    """A run of a text-to-image model: its grids say their prompts, its records how well they are followed."""
    for path in (run / "samples").glob("*.png"):
        images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        grids.save(grids.grid(images, PROMPTS * 3), path)
    records = json.loads((run / "metrics.json").read_text())
    for one in records:
        one["prompt_accuracy"] = 0.9 if one["role"] == "teacher" else 0.7 + one["steps"] / 100
    put_metrics(run, records)
    return run


def test_prompts_stand_once_under_the_columns_that_show_them(prompted: Path) -> None:
    """Escaped, long ones cut, with the whole to be seen by pointing at it."""
    result = page(prompted)
    shown = result.texts["li"]
    assert len(shown) == 8 and result.source.count("<ol") == 1
    assert shown[:2] == PROMPTS[:2] and shown[3:5] == ["a ring", PROMPTS[0]]
    assert shown[2].endswith("…") and len(shown[2]) < 130 and PROMPTS[2].startswith(shown[2][:-2])
    assert [attrs["title"] for tag, attrs in result.tags if tag == "li"][:4] == PROMPTS
    assert not {tag for tag, _ in result.tags} & {"script", "i"}
    assert "one noise and one prompt" in " ".join(result.texts["p"])
    assert {strip.shape for strip in result.strips().values()} == {(128, 8 * 128, 3)}
    assert result.source.index("<ol") > max(
        m.start() for m in re.finditer('<figure class="strip', result.source)
    )


def test_strips_of_other_prompts_have_their_own_under_them(prompted: Path) -> None:
    images = np.zeros((8, 32, 32, 3), np.uint8)
    grids.save(grids.grid(images, ["else", "other"]), prompted / "samples" / "1-steps.png")
    result = page(prompted)
    assert result.texts["li"][8:] == ["else", "other"] * 4 and result.source.count("<ol") == 2


def test_what_is_measured_of_prompts_is_beside_the_fid(prompted: Path) -> None:
    result = page(prompted)
    head, *rows = result.table("steps")
    assert head[2:6] == ["teacher FID", "student FID", "teacher prompt accuracy", "student prompt accuracy"]
    assert [row[4:6] for row in rows] == [
        ["0.900", "–"],
        ["0.900", "0.780"],
        ["0.900", "0.720"],
        ["0.900", "0.710"],
    ]
    assert result.texts["p"][0].endswith("Its prompt accuracy is 0.710, the teacher’s 0.900.")
    assert result.texts["figcaption"][-1] == "student, 1 stepFID 3.75prompt accuracy 0.710"
    records = json.loads((prompted / "metrics.json").read_text())
    for one in records:
        one["prompt_accuracy"] = "<b>" if one["role"] == "teacher" else one["prompt_accuracy"]
    put_metrics(prompted, records)
    result = page(prompted)
    assert result.table("steps")[0][4] == "student prompt accuracy", "what is no number is left out"
    assert result.texts["p"][0].endswith("Its prompt accuracy is 0.710.")


def test_curves_are_the_log(run: Path) -> None:
    for label, power in (("Loss", 1.0), ("Gap", 0.5)):
        first, second, third = page(run).curves(label, "student")
        assert (len(first), len(second), len(third)) == (3, 2, 1)
        heights = [y for _, y in (*first, *second, *third)]
        logs = [power * math.log10(v) for v in (0.5, 0.2, 0.1, 0.4, 0.3, 0.9)]
        scale = (heights[0] - heights[2]) / (logs[0] - logs[2])
        assert scale > 0
        assert [(h - heights[0]) / scale for h in heights] == pytest.approx(
            [v - logs[0] for v in logs], abs=1e-3
        )
        stage = second[1][0] - first[2][0]  # from the end of a stage to the end of the next
        assert third[0][0] - second[1][0] == pytest.approx(stage, abs=1e-3)
        assert [x - first[2][0] for x, _ in first] == pytest.approx([-2 / 3 * stage, -stage / 3, 0], abs=1e-3)


def test_networks_beside_the_student_and_the_spread(run: Path) -> None:
    """Their losses, which may be negative; all gradient norms in one plot, their ratios in another; how often
    a discriminator is right; the spread, of events."""
    log = logged("2-steps", 0, [0.4, 0.3], 20) + logged("1-steps", 1, [0.9, 0.8], 20)
    for i, line in enumerate(log):
        line |= {"grad_norm": 10.0**-i, "fake_grad_norm": 1.0, "fake_loss": 0.5 - 0.3 * i}
        line |= {"fake_grad_ratio": 10.0**i, "heads_accuracy": (0.5, 0.75, 1.0, 0.25)[i]}
    looks: Log = [
        {"event": "spread", "stage": "1-steps", "stage_index": 1, "update": u, "spread": v}
        for u, v in ((5, 1.0), (10, 0.5), (20, 0.0))
    ]
    put_log(run, log[:3] + looks + log[3:])
    result = page(run)
    titles = [
        "Loss", "Gap", "Losses of the other networks", "Gradient norms", "Ratios of gradient norms",
        "Accuracy of the discriminator", "Spread",
    ]  # fmt: skip
    assert result.texts["h3"][-7:] == titles
    fake = [y for line in result.curves("Losses of the other networks", "student") for _, y in line]
    assert [(y - fake[0]) / (fake[1] - fake[0]) for y in fake] == pytest.approx([0, 1, 2, 3], abs=1e-3)
    norms = result.curves("Gradient norms", "student")
    student = [y for line in norms[:2] for _, y in line]
    assert [(y - student[0]) / (student[1] - student[0]) for y in student] == pytest.approx(
        [0, 1, 2, 3], abs=1e-3
    )
    assert len({round(y, 3) for line in norms[2:4] for _, y in line}) == 1
    assert {"student", "fake"} <= set(result.texts["text"])
    for title, shares in (("Ratios of gradient norms", [0, 1, 2, 3]), (titles[-2], [0, 1, 2, -1])):
        heights = [y for line in result.curves(title, "student") for _, y in line]
        assert [(y - heights[0]) / (heights[1] - heights[0]) for y in heights] == pytest.approx(
            shares, abs=1e-3
        ), title
    (spread,) = (line for line in result.curves("Spread", "student") if line)
    assert [(y - spread[0][1]) / (spread[2][1] - spread[0][1]) for _, y in spread] == pytest.approx(
        [0, 0.5, 1], abs=1e-3
    )


def test_one_network_has_no_plots_of_others(run: Path) -> None:
    for line in (log := logged("2-steps", 0, [0.4, 0.3], 20)):
        line["grad_norm"] = 1.0
    put_log(run, log)
    assert page(run).texts["h3"][-2:] == ["Loss", "Gap"]


def test_loss_by_noise_is_the_mean_of_the_last_ten_records(run: Path) -> None:
    losses = [1000.0] * 5 + [float(i) for i in range(1, 11)]
    log = logged("2-steps", 0, losses, 150)
    log[-1]["loss_by_noise"][2] = None  # the last has no time in this bin: the mean of nine, 2 * 5
    put_log(run, log)
    tables = [table for table in page(run).tables if table[0] and table[0][0] == "stage"]
    bins = ["stage", "0–0.2", "0.2–0.4", "0.4–0.6", "0.6–0.8", "0.8–1"]
    assert tables[0] == [bins, ["2-steps", "–", "5.5", "10", "–", "5.5"]]
    assert tables[1] == [bins, ["2-steps", "–", "5.5", "5.5", "–", "7"]]


def test_a_negative_loss_is_plotted_and_tabled_as_any_other(run: Path) -> None:
    """As that of `sid` and `adversarial` is, beside a stage whose loss is positive. A gap of 0, as of a fake
    network that begins as the teacher, leaves the others their logarithm."""
    log = logged("2-steps", 0, [4.0, 2.0], 20) + logged("1-steps", 1, [1.0, 1.0], 20)
    for line, loss in zip(log[2:], (-2.0, -4.0), strict=True):
        line |= {"loss": loss, "loss_by_noise": [None, loss, 6 + loss, None, loss]}
    log[0]["gap"] = 0.0
    put_log(run, log)
    result = page(run)
    heights = [y for line in result.curves("Loss", "student") for _, y in line]
    assert [(y - heights[0]) / (heights[1] - heights[0]) for y in heights] == pytest.approx(
        [0, 1, 3, 4], abs=1e-3
    )
    assert [len(line) for line in result.curves("Gap", "student")][:2] == [1, 2]
    (table, *_) = [table for table in result.tables if table[0] and table[0][0] == "stage"]
    assert table[1:] == [["2-steps", "–", "3", "6", "–", "3"], ["1-steps", "–", "-3", "3", "–", "-3"]]


def test_a_torn_last_line_events_and_blank_lines_change_nothing(run: Path) -> None:
    whole = page(run).source
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    event = json.dumps({"event": "resumed", "stage": "8-steps", "update": 7, "loss": 1e9})
    (run / "log.jsonl").write_text(
        "\n".join([event, *lines, "", '{"stage": "1-steps", "upd']), encoding="utf-8"
    )
    assert page(run).source == whole


def test_values_that_are_no_numbers_leave_the_rest(run: Path) -> None:
    log = logged("8-steps", 0, [0.5, 1.0, 0.1, 0.2], 40)
    log[1]["loss"], log[2]["loss"] = float("nan"), None
    del log[0]["gap"], log[0]["gap_by_noise"]
    put_log(run, log)
    put_metrics(run, [record("teacher", 8, 2.5), record("student", 4, float("inf")), {"model": "2-steps"}])
    result = page(run)
    assert [len(line) for line in result.curves("Loss", "student")] == [2]
    assert result.table("steps")[1:] == [["8", "8", "2.50", "12.00"]]


def test_an_unfinished_stage_is_said(run: Path) -> None:
    assert "The log ends" not in page(run).source
    put_log(run, logged("8-steps", 0, [0.5, 0.2], 30))
    assert "The log ends in stage 8-steps, at update 20 of 30." in page(run).texts["p"][0]


def test_config_environment_and_protocol_are_quoted(run: Path) -> None:
    result = page(run)
    assert result.texts["summary"] == ["Config", "Environment", "Protocol of the numbers"]
    assert result.texts["pre"] == ["out: runs/digits-run\nseed: 0\n"]
    expected = {
        "command": "diffkd distill 'a b.yaml'", "commit": "c0ffee", "versions.torch": "2.9", "seed": "3",
        "features.sha256": "a1", "reference.count": "1797", "steps": "32; 8; 2; 1",
    }  # fmt: skip
    facts = result.facts()
    assert {key: facts[key] for key in expected} == expected


def test_the_page_in_order(run: Path) -> None:
    result = page(run)
    assert result.texts["h1"] == ["digits-run"]
    assert result.texts["h2"] == ["FID against steps", "The same noise", "Training"]


@pytest.mark.parametrize(
    "gone", ["config.yaml", "environment.json", "log.jsonl", "metrics.json", "samples"], ids=lambda name: name
)
def test_a_missing_file_takes_its_own_part_only(run: Path, gone: str) -> None:
    os.rename(run / gone, run.parent / gone)
    result = page(run)
    parts = [*result.texts.get("h2", []), *result.texts.get("summary", [])]
    lost = {
        "config.yaml": {"Config"}, "environment.json": {"Environment"}, "log.jsonl": {"Training"},
        "metrics.json": {"FID against steps", "Protocol of the numbers"}, "samples": {"The same noise"},
    }  # fmt: skip
    every = [
        "FID against steps",
        "The same noise",
        "Training",
        "Config",
        "Environment",
        "Protocol of the numbers",
    ]
    assert parts == [part for part in every if part not in lost[gone]]


def test_an_empty_folder_and_torn_files_give_a_page(tmp_path: Path) -> None:
    for name in ("metrics.json", "environment.json", "log.jsonl"):
        (tmp_path / name).write_text('[{"fid": 1.', encoding="utf-8")
    assert page(tmp_path).texts["p"] == ["No FID has been measured in this run."]


def test_a_teachers_training(tmp_path: Path) -> None:
    put_metrics(tmp_path, [record("teacher", 64, 0.272)])
    put_log(tmp_path, logged("teacher", 0, [0.8, 0.3, 0.25, 0.21], 40))
    grid = put_grid(tmp_path, "teacher")
    result = page(tmp_path)
    assert result.texts["p"][0] == "The teacher’s best FID is 0.272, at 64 steps."
    assert result.texts["h2"] == ["FID against steps", "Samples", "Training"]
    assert result.table("steps") == [
        ["steps", "nfe", "teacher FID", "s per 1000 images"],
        ["64", "64", "0.272", "96.00"],
    ]
    np.testing.assert_array_equal(result.strips()["teacher"], first_tiles(grid, 10))
    labels = result.texts["text"]
    assert {"0", "20", "40", "updates"} <= set(labels), "its x axis counts updates"
    assert {"0.3", "0.5"} <= set(labels), "a range within one power of ten still has its ticks"


HOSTILE = "<img src=x onerror=alert(1)>&amp;BODY $\\frac$"


def test_nothing_quoted_becomes_markup(run: Path) -> None:
    folder = run.parent / HOSTILE
    os.rename(run, folder)
    (folder / "config.yaml").write_text(
        f"out: '</pre><script>alert(2)</script>{HOSTILE}'\n", encoding="utf-8"
    )
    environment = {HOSTILE: [HOSTILE, "</td><script>"]}
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    put_log(folder, [*logged("$\\frac$学", 0, [0.5, 0.2], 20), *logged(HOSTILE, 1, [0.5, 0.2], 30)])
    put_metrics(folder, [record("teacher", 8, 2.5, HOSTILE), record("student", 8, 3.0, HOSTILE)])
    os.rename(folder / "samples" / "8-steps.png", folder / "samples" / f"{HOSTILE}.png")
    result = page(folder)
    assert result.texts["h1"] == result.texts["title"] == [HOSTILE]
    assert "<script>alert(2)</script>" in result.texts["pre"][0]
    assert HOSTILE in result.strips() and HOSTILE in [row[0] for row in result.table("stage")]
    assert f"The log ends in stage {HOSTILE}, at update 20 of 30." in result.texts["p"][0]
    assert f"“{HOSTILE}”" in result.texts["p"][1]
    plots = "".join(result.texts["text"])
    assert f"{HOSTILE[:10]}30" in plots and "$\\frac$?20" in plots, "a stage in a plot: short, and no formula"
    tags = {tag for tag, _ in result.tags}
    assert not tags & {"script", "iframe", "link", "object", "embed", "base", "form"}
    assert not [name for _, attrs in result.tags for name in attrs if name.startswith("on")]


def test_the_page_asks_for_nothing(run: Path) -> None:
    result = page(run)
    assert 'src="http' not in result.source and "<link" not in result.source
    for _, attrs in result.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            assert str(attrs.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert set(re.findall(r"url\((.)", result.source)) <= {"#"} and "@import" not in result.source
    policies = [
        attrs["content"] for _, attrs in result.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_plots_take_the_pages_colours(run: Path) -> None:
    source = page(run).source
    assert "#0b0b0" not in source
    used, defined = (set(re.findall(pattern, source)) for pattern in (r"var\((--[a-z]+)\)", r"(--[a-z]+):"))
    assert {"--teacher", "--student", "--ink", "--faint"} <= used <= defined


def test_the_same_files_give_the_same_bytes_and_no_other_file(run: Path) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = content()
    first = page(run).source
    after = content()
    assert after.pop(run / "report.html").decode() == first
    assert after == before
    assert page(run).source == first


def test_a_failed_write_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = page(run).source
    names = {path.name for path in run.iterdir()}
    put_metrics(run, [])

    def fail(*_: object) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        run_report.write(run)
    assert (run / "report.html").read_text(encoding="utf-8") == old
    assert {path.name for path in run.iterdir()} == names


def test_without_matplotlib_there_is_no_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_report.write(run) is None
    assert not (run / "report.html").exists()


def test_the_users_own_matplotlib_settings_neither_matter_nor_change(run: Path) -> None:
    import matplotlib

    plain = page(run).source
    with matplotlib.rc_context({"svg.fonttype": "path", "text.color": "red", "lines.linestyle": ":"}):
        assert page(run).source == plain
        assert matplotlib.rcParams["svg.fonttype"] == "path"
