"""The notebooks in examples/ run from top to bottom, at a tiny size, and are kept without their outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from rich import console

BOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
TINY = {  # in place of the cell of parameters
    "digits": {
        "TEACHER_UPDATES": 4, "UPDATES": 2, "SAMPLES": 16, "TEACHER_STEPS": 8, "CHANNELS": [16, 16],
    },
    "own_images": {"IMAGES": 60, "UPDATES": 5},
}  # fmt: skip


def cells(path: Path) -> list[dict[str, Any]]:
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 4)
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def run(source: str, names: dict[str, Any]) -> Any:
    """Executes a cell; the value of its last line, if that is an expression."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path))
    assert path.stem in TINY


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """shown(path) -> what the cells of a notebook show below them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_is_jupyter", lambda: True)

    def of(path: Path) -> list[Any]:
        names: dict[str, Any] = {"__name__": "__main__"}
        found = []
        for cell in cells(path):
            found.append(run("".join(cell["source"]), names))
            if "parameters" in cell["metadata"].get("tags", []):
                tiny = TINY[path.stem]
                assert names.keys() >= tiny.keys()
                names |= tiny
        return found

    return of


def test_digits(shown, capsys):
    _, students, _, one, eight, (count, size) = shown(BOOKS[0])
    assert [*students] == [8, 4, 2, 1] and (count, size) == (10, (8, 8))
    assert one.size == eight.size == (270, 168) and one._repr_png_() != eight._repr_png_()
    table = [line for line in capsys.readouterr().out.splitlines() if "steps: FID" in line]
    assert [line.split()[:2] for line in table] == [
        ["teacher", "8"], ["teacher", "4"], *(["student", str(n)] for n in (8, 4, 2, 1))
    ]  # fmt: skip


def test_own_images(shown, capsys):
    _, kinds, file, (images, features), notes, reference = shown(BOOKS[1])
    assert kinds == ["circle", "cross", "ring", "square", "star", "triangle"]
    assert (images, features) == (60, 64) and file.name == "features.safetensors" and notes
    assert reference["count"] == 60 and "upside down" in capsys.readouterr().out
