"""The site: pages made of the code say all that the code has, and links and navigation lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import typer
import yaml

import diffkd
from diffkd import metrics
from diffkd.cli.app import app
from diffkd.io.config import Strict
from diffkd.methods.progressive import Progressive
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.runs.config import Distill
from diffkd.training.config import Training

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))
import draw_steps  # noqa: E402
from pages import commands, configs, examples, links, navigation, python  # noqa: E402

NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


@pytest.fixture(scope="module")
def config_page() -> str:
    return configs.page()


def subclasses(kind: type) -> Iterator[type]:
    for inner in kind.__subclasses__():
        yield inner
        yield from subclasses(inner)


def test_every_config_key_has_a_description():
    kinds = {kind for kind in subclasses(Strict) if kind.__module__.startswith("diffkd.")}
    assert len(kinds) > 60 and {Training, Progressive, Evaluation, *metrics.kinds().values()} <= kinds
    missing = [
        f"{kind.__module__}.{kind.__name__}.{key}"
        for kind in kinds
        for key, field in kind.model_fields.items()
        if not field.description and not (key == "kind" and len(get_args(field.annotation)) == 1)
    ]
    assert missing == []


def rows(page: str, anchor: str) -> dict[str, tuple[str, str, str]]:
    """The table of a section: key -> type, default, text."""
    section = re.split(r"\n##", page.partition(f"{{ #{anchor} }}")[2])[0]
    cells = (line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `"))
    return {key.strip("`"): (kind, default, said) for key, kind, default, said in cells}


@pytest.mark.parametrize("kind", [Training, Evaluation, Progressive])
def test_the_page_has_each_key_with_its_default(config_page, kind):
    found = rows(config_page, kind.__name__)
    written = kind().model_dump(mode="json")
    assert {key: yaml.safe_load(default.strip("`")) for key, (_, default, _) in found.items()} == written
    assert all(said for _, _, said in found.values())


def test_types_are_in_words_with_their_bounds(config_page):
    found = rows(config_page, "Training")
    assert found["batch_size"][0] == "whole number (1 or more, at most 1,048,576)"
    assert found["max_grad_norm"][0] == "number or null (above 0)"
    assert found["betas"][0] == r"\[number (0 or more, below 1), number (0 or more, below 1)\]"
    assert found["precision"][0] == "`float32`, `bf16`, `fp16`"
    found = rows(config_page, "Distill")
    assert found["method"][:2] == ("list of [a method](#methods) (1 of them or more)", "**required**")
    assert found["student"][1] == "`{kind: copy}`" and found["training"][1] == "its keys' own"
    assert found["teacher"][0] == "[keys](#Teacher)" and "[`lora`](#Lora)" in found["student"][0]


def test_links_of_the_page_lead_to_its_sections(config_page):
    there = re.findall(r"\{ #(\w+) \}", config_page)
    assert len(there) == len({*there}) and {*Distill.model_fields} <= {*rows(config_page, "Distill")}
    assert {*re.findall(r"\]\(#(\w+)\)", config_page)} <= {*there}
    for page in re.findall(r"\]\(\.\./(methods/[\w-]+\.md)\)", config_page):
        assert (ROOT / "docs" / page).is_file()


def test_every_option_of_every_command_is_on_its_page():
    page = commands.page()
    for name, command in typer.main.get_command(app).commands.items():
        section = page.partition(f"## `diffkd {name}`\n")[2].partition("\n## ")[0]
        wanted = {one for parameter in command.params for one in parameter.opts if one.startswith("-")}
        assert {*re.findall(r"`(--?[\w-]+)`", section)} >= wanted - {"--help"}, name
        assert "```bash\ndiffkd " in section
    assert "130 interrupted" in page


def test_examples_in_docstrings_are_blocks_of_code():
    text = "Draws.\n\n>>> [(1, 2)][0]\n(1, 2)\n\nMore."
    assert examples.fenced(text) == "Draws.\n\n```pycon\n>>> [(1, 2)][0]\n(1, 2)\n```\n\nMore."


def test_every_public_name_is_on_the_page_of_python():
    page = python.page()
    homes = dict(re.findall(r'^::: (\S+)\n    options:\n      heading: "([\w.]+)"', page, re.MULTILINE))
    named = {name for name in diffkd.__all__ if not inspect.ismodule(getattr(diffkd, name))}
    assert {f"diffkd.{name}" for name in named} <= {*homes.values()} and "distill" in named
    assert all(f"## diffkd.{name} " in page for name in {*diffkd.__all__} - named)
    assert {"diffkd.samplers.ddim_step", "diffkd.schedules.from_diffusers"} <= {*homes.values()}
    assert {f"diffkd.metrics.{name}" for name in metrics.__all__} - {"diffkd.metrics.Evaluation"} <= {
        *homes.values()
    }
    for home, name in homes.items():
        module, _, attribute = home.rpartition(".")
        there = getattr(importlib.import_module(module), attribute)
        shown: object = diffkd
        for part in name.split(".")[1:]:
            shown = getattr(shown, part)
        assert there is shown


def test_the_picture_of_the_steps_is_what_its_script_draws():
    assert (ROOT / "docs/steps.svg").read_text(encoding="utf-8") == draw_steps.picture()


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("README.md", "[a](docs/methods/choosing.md#x)", "[a](methods/choosing.md#x)"),
        ("README.md", "![p](docs/quickstart.png)", "![p](quickstart.png)"),
        ("README.md", "[a](https://x.org/a.md)", "[a](https://x.org/a.md)"),
        (
            "README.md",
            "[a](docs/decisions) [b](docs/methods)",
            "[a](decisions/index.md) [b](methods/README.md)",
        ),
        ("README.md", "[a](CONTRIBUTING.md)", "[a](contributing/index.md)"),
        ("README.md", "[a](CITATION.cff)", "[a](files/CITATION.cff)"),
        ("CONTRIBUTING.md", "[a](docs/contributing/family.md)", "[a](family.md)"),
        ("docs/architecture.md", "[a](../README.md#where) [b](#here)", "[a](index.md#where) [b](#here)"),
        ("docs/methods/dmd2.md", "[a](../../configs/x.yaml)", "[a](../files/configs/x.yaml)"),
        ("docs/a/x.md", "```\n[a](../../README.md)\n```\n", "```\n[a](../../README.md)\n```\n"),
    ],
)
def test_links_are_those_of_the_site(page, text, expected):
    assert links.relinked(text, page) == expected


def test_patterns_of_the_navigation_are_filled_and_no_page_is_left_out():
    nav = [{"A": ["a.md", {"B": ["b/*.md"]}]}, {"C": ["c/*.md"]}, {"Rest": ["**"]}]
    pages = ["a.md", "b/2.md", "b/1.md", "z.md", "d/x/y.md"]
    expected = [{"A": ["a.md", {"B": ["b/1.md", "b/2.md"]}]}, {"Rest": ["d/x/y.md", "z.md"]}]
    assert navigation.filled(nav, pages) == expected
    written = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    filled = [*navigation.named(navigation.filled(NAV, written))]
    assert len(filled) == len({*filled}) and {*written} <= {*filled}
    made = {page for page in filled if page.startswith("reference/")} | {"decisions/index.md"}
    assert {*filled} - {*written} == made | {*links.HOMES.values()}
