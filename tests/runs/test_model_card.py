"""The model card beside a student: its snippet runs, and nothing that it quotes becomes markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from markdown_it import MarkdownIt

from diffkd.core.denoiser import Denoiser
from diffkd.generation.generator import generate
from diffkd.models import loading, saving
from diffkd.runs.reports import card_head, model_card


def saved(folder: Path, denoiser: Denoiser, **more: Any) -> dict[str, Any]:
    """The denoiser as a pipeline with its card, which is returned."""
    saving.save(denoiser, folder)
    card = model_card.describe(denoiser, **more)
    model_card.write(folder, card)
    return card


def record(**changes: Any) -> dict[str, Any]:
    protocol = {"features": {"name": "digits"}, "samples": 1797, "reference": {"name": "digits"}}
    return {"steps": 4, "nfe": 4, "fid": 12.3456, "protocol": {**protocol, **changes}}


class Cells(HTMLParser):
    """The rows of all tables of a page, each cell as (text, tags inside it)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, list[str]]]] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(("", []))
            self.inside = True
        elif self.inside:
            self.rows[-1][-1][1].append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            text, tags = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, tags)


def parts(folder: Path) -> tuple[dict[str, Any], str, str]:
    """A card's front matter, its page as HTML, and its Python."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    markdown = MarkdownIt("commonmark").enable("table")
    code = [t.content for t in markdown.parse(body) if t.type == "fence" and t.info == "python"]
    assert len(code) == 1
    return yaml.safe_load(front), markdown.render(body), code[0]


def facts(folder: Path) -> dict[str, str]:
    """The first table, read by a Markdown parser; its cells hold text and no markup."""
    rows = [row for row in Cells(parts(folder)[1]).rows if len(row) == 2]
    assert all(tags == [] for row in rows for _, tags in row), rows
    return {key[0].strip(): value[0].strip() for key, value in rows}


@pytest.fixture
def student(tmp_path, make_pipeline):
    def make(steps: int | None = 4, **how: Any) -> Denoiser:
        denoiser = loading.load(make_pipeline(tmp_path / "source", **how))
        denoiser.steps = steps
        return denoiser

    return make


@pytest.mark.parametrize(
    ("steps", "how"),
    [
        (4, {}),
        (1, {"classes": 3}),
        (4, {"classes": 3, "channels": 3}),
        (None, {}),
        (None, {"classes": 3, "scheduler": "linear", "prediction": "epsilon"}),
    ],
)
def test_the_snippet_runs_as_it_stands(tmp_path, student, steps, how):
    """With nothing changed but the path: sixteen pictures, and with our generators our very pixels."""
    denoiser = student(steps, **how)
    folder = tmp_path / "saved"
    saved(folder, denoiser)
    code = parts(folder)[2]
    assert code.count("path/to/this/folder") == 1
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    assert len(names["images"]) == 16 and {image.size for image in names["images"]} == {(8, 8)}
    assert isinstance(names["pipeline"], DiffusionPipeline)

    generators = [torch.Generator().manual_seed(i) for i in range(16)]
    names["generators"] = generators
    call = code.splitlines()[-1].replace("batch_size=16", "batch_size=16, generator=generators")
    exec(call, names)
    drawn = np.stack([np.asarray(image).reshape(8, 8, -1) for image in names["images"]])
    shown = int(call.split("num_inference_steps=")[1].split(")")[0])
    assert shown == steps or steps is None and denoiser.schedule.num_train_timesteps % shown == 0
    assert np.array_equal(drawn, next(generate(denoiser, 16, steps=shown)).numpy())


def test_the_card_says_for_how_many_steps(tmp_path, student):
    saved(tmp_path / "four", student(4))
    text = (tmp_path / "four" / "README.md").read_text()
    assert "# A student of 4 sampling steps\n" in text and "num_inference_steps=4`" in text
    saved(tmp_path / "one", student(1))
    assert "# A student of 1 sampling step\n" in (tmp_path / "one" / "README.md").read_text()
    saved(tmp_path / "none", student(None))
    text = (tmp_path / "none" / "README.md").read_text()
    assert "# A teacher\n" in text and "no others" not in text


def test_the_front_matter_is_yaml_that_a_hub_reads(tmp_path, student):
    saved(tmp_path / "saved", student(), teacher="x: [y\n---\n# z", method="a\n---\nlibrary_name: evil")
    front, _, _ = parts(tmp_path / "saved")
    assert front == {
        "library_name": "diffusers", "tags": ["diffusion", "distillation", "diffkd"],
        "pipeline_tag": "unconditional-image-generation",
    }  # fmt: skip


def test_the_facts_are_the_models(tmp_path, student):
    denoiser = student(classes=3)
    saved(tmp_path / "saved", denoiser, teacher="runs/teacher", method="Progressive")
    found = facts(tmp_path / "saved")
    assert found["prediction"] == "v_prediction" and found["num train timesteps"] == "1024"
    assert found["zero terminal snr"] == "True" and found["clip"] == "1.0"
    assert found["teacher"] == "runs/teacher" and found["method"] == "Progressive"
    assert int(found["parameters"]) == sum(p.numel() for p in denoiser.network.parameters())


QUOTED = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    'a" onload="x',
    "a | b | c",
    "a \\| b",
    "ends with \\",
    "two\n\n# lines",
    "| x |\n|---|\n| y |",
    "[click](https://evil.example)",
    "![picture](https://evil.example/x.png)",
    "<https://evil.example>",
    "**bold** and _thin_ and `code` and ~~gone~~",
    "&lt;b&gt; &amp; &#60;",
    "```\nfence\n```",
    "[ref]: https://evil.example",
    "runs/my_teacher_2/a*b*c",
    "C:\\models\\teacher",
]


@pytest.mark.parametrize("value", QUOTED)
def test_what_is_quoted_is_read_as_text(tmp_path, student, value):
    """By a Markdown parser: one cell, no tag in it, and its text is what was quoted."""
    quoted = record(features={"name": value}, reference={"name": value})
    saved(tmp_path / "saved", student(), teacher=value, method=value, metrics=[quoted])
    found = facts(tmp_path / "saved")
    one_line = " ".join(value.split())
    assert found["teacher"] == one_line and found["method"] == one_line
    page = parts(tmp_path / "saved")[1]
    numbers = [row for row in Cells(page).rows if len(row) == 6]
    assert len(numbers) == 2 and all(tags == [] for _, tags in numbers[1])
    assert [text for text, _ in numbers[1]] == ["4", "4", "12.346", one_line, "1797", one_line]
    assert page.count("<h1>") == 1 and page.count("<a ") == 0 and "<script" not in page and "<img" not in page


def test_features_that_are_not_inceptions_are_said_not_to_compare(tmp_path, student):
    saved(tmp_path / "digits", student(), metrics=[record()])
    saved(tmp_path / "inception", student(), metrics=[record(features={"name": "inception"})])
    saved(tmp_path / "both", student(), metrics=[record(features={"name": "inception"}), record()])
    warned = {
        f: "not comparable" in (tmp_path / f / "README.md").read_text()
        for f in ("digits", "inception", "both")
    }
    assert warned == {"digits": True, "inception": False, "both": True}


def test_the_json_comes_back_as_it_was(tmp_path, student):
    more = {"teacher": "ü <b>", "metrics": [record()], "config": {"a": [1, None, 0.1 + 0.2]}}
    card = saved(tmp_path / "saved", student(classes=3), **more)
    assert loading.card(tmp_path / "saved") == card
    assert json.loads((tmp_path / "saved" / "diffkd.json").read_text()) == card
    assert card["steps"] == 4 and card["num_classes"] == 3 and card["null_label"] is None
    model_card.write(tmp_path / "saved", {**card, "metrics": [record(), record()]})
    assert len(loading.card(tmp_path / "saved")["metrics"]) == 2


def test_a_pipeline_of_somebody_else_has_no_card(tmp_path, make_pipeline):
    folder = make_pipeline(tmp_path)
    assert loading.card(folder) == {}
    denoiser = loading.load(folder)
    assert denoiser.steps is None and denoiser.null_label is None


@pytest.mark.parametrize(
    ("total", "classes", "null_label"), [(None, None, None), (4, 4, None), (4, 3, 3), (4, 4, 0), (4, 4, 2)]
)
def test_saved_and_loaded_it_takes_the_same_labels(tmp_path, student, total, classes, null_label):
    """null_label: the last of the labels where diffkd trained the teacher, any where a config names it."""
    denoiser = student(8, classes=total)
    denoiser.num_classes, denoiser.null_label, denoiser.clip = classes, null_label, 1.5
    saved(tmp_path / "saved", denoiser)
    again = loading.load(tmp_path / "saved")
    for name in ("steps", "num_classes", "null_label", "clip", "prediction", "shape"):
        assert getattr(again, name) == getattr(denoiser, name), name
    assert torch.equal(again.schedule.alphas_cumprod, denoiser.schedule.alphas_cumprod)
    for one, other in zip(again.network.parameters(), denoiser.network.parameters(), strict=True):
        assert torch.equal(one, other)


HEAD = {
    "license": "openrail++", "license_name": "sdxl-1.0", "license_link": "https://example.org/LICENSE.md",
    "base_model": "somebody/base",
}  # fmt: skip


def test_the_head_is_what_a_hub_knows(tmp_path, student, monkeypatch):
    """Base, its license, the kind of the relation, the task: of what is on the Hub, and kept by the next one
    that learns from it; nothing of a path."""
    folder = Path(student().name)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(HEAD)}---\n# Base\n")
    local = card_head.origin(str(folder))
    assert local == {key: value for key, value in HEAD.items() if key != "base_model"}
    monkeypatch.setattr(loading, "folder_of", lambda path: folder)
    found = card_head.origin("owner/base")
    assert found == {**HEAD, "base_model": "owner/base"}
    monkeypatch.undo()
    saved(tmp_path / "first", student(), teacher="owner/base", **found)
    front = parts(tmp_path / "first")[0]
    assert {**HEAD, "base_model": "owner/base"}.items() <= front.items()
    assert front["base_model_relation"] == "finetune" and front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "unconditional-image-generation" and "widget" not in front
    assert card_head.origin(str(tmp_path / "first")) == found  # a chain's next student


@pytest.mark.parametrize(
    ("card", "relation"),
    [
        ({"export": {"kind": "int8"}, "base_model": "a/b"}, "quantized"),
        ({"lora": {"scheduler": "DDIMScheduler", "base": "a/b"}}, "adapter"),
        ({"lora": {"scheduler": "DDIMScheduler", "base": "/home/me/base"}, "base_model": "x/y"}, None),
        ({"base_model": "a/b\n---\nlicense: mit"}, None),
    ],
)
def test_the_relation_to_its_base(card, relation):
    front = yaml.safe_load("\n".join(card_head.lines({"prompts": True, **card})[1:-2]))
    assert front.get("base_model_relation") == relation and front.get("base_model") == (relation and "a/b")
    assert front["pipeline_tag"] == "text-to-image" and len(front["widget"][0]["text"]) > 10
    assert front["tags"][:3] == ["diffusion", "distillation", "diffkd"] and "license" not in front


def test_the_prompt_to_try():
    """One of the run's own, as a line; what a card from anywhere has in its place is passed over."""

    def widget(card):
        front = card_head.lines({"prompts": True, **card})[1:-2]
        return yaml.safe_load("\n".join(front))["widget"][0]["text"]

    unfit = ["", "a" * 301, "a\ud800ring", "a \x07ring"]
    found = card_head.prompt_to_try([*unfit, " a small: 'red'\n  #ring", "a star"])
    assert found == {"prompt": "a small: 'red' #ring"} and widget(found) == "a small: 'red' #ring"
    assert card_head.prompt_to_try(unfit) == {}
    for prompt in [*unfit, "a ring\n---\nlicense: mit", 3, None, ["a ring"]]:
        assert widget({"prompt": prompt}) == widget({}) == card_head.WIDGET


@pytest.mark.parametrize(
    "text", ["", "---\n[", "---\nlicense: {a: b}\n---\n", "---\nlicense: 'x y; z'\n---\n"]
)
def test_a_head_that_says_nothing_of_use_is_passed_over(tmp_path, student, text):
    folder = Path(student().name)
    (folder / "README.md").write_text(text)
    assert card_head.origin(str(folder)) == {}


def test_cards_link_nothing(tmp_path, student):
    saved(tmp_path / "saved", student(), guidance_baked_in=2.5, metrics=[record()])
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "://" not in text and "](" not in text
    assert "Guidance of weight 2.5 is baked in" in text
