"""Files of prompts, as editors of several systems write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffkd.errors import UserError
from diffkd.io.prompts import read_prompts


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_line_is_a_prompt_whatever_else_is_in_it(tmp_path, end, mark):
    """What Unicode calls the end of a line is a part of one; equal ones are several."""
    prompts = [
        "a red\u2028ring",
        "a\x0bb",
        "c\x0cd",
        "e\x85f",
        "g\x1ch",
        "\U0001f525 и",
        "a\tstar",
        "#x",
        "#x",
    ]
    lines = [prompts[0], "", " \t", *prompts[1:-1], f"  {prompts[-1]} "]
    (tmp_path / "prompts.txt").write_bytes((mark + end.join(lines)).encode())
    assert read_prompts(tmp_path / "prompts.txt") == prompts


def test_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a red ring")
    assert read_prompts(Path("~/prompts.txt")) == ["a red ring"]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_said(tmp_path, encoding):
    (tmp_path / "prompts.txt").write_bytes("café\n".encode(encoding))
    with pytest.raises(UserError, match=r"prompts.txt is not text in UTF-8 \(.*save it as UTF-8"):
        read_prompts(tmp_path / "prompts.txt")
