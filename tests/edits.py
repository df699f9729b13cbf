"""What editors, shells, merges and users make of a file of JSON, YAML or text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ODD = (None, True, -1, 10**400, "x", "\x1b[31m\u202e", [], {}, [[]], {"a": 1})
LARGEST_VALUE = 40  # keys of one file whose values are replaced


def changed(folder: Path, path: str, **values: Any) -> None:
    """Other values at the top of a JSON file of a folder."""
    content = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps({**content, **values}))


def edits(text: str) -> Iterator[tuple[str, str]]:
    """(what, new text) of a file, as an editor, a shell or a merge leaves it."""
    yield from (("empty", ""), ("blank", "\n\n"), ("half", text[: len(text) // 2]), ("torn", text[:-2]))
    yield from (("BOM", "\ufeff" + text), ("DOS", text.replace("\n", "\r\n")), ("nulls", "\0" * 80))
    yield from (("merge", f"<<<<<<< ours\n{text}=======\n>>>>>>> theirs\n"), ("a note", f"{text}my note\n"))
    yield from (("deep", "[" * 100_000), ("aliases", "a: &a [1]\nb: [*a, *a]\n"), ("twice", text * 2))
    for closing in "]}":
        if closing in text:
            at = text.rindex(closing)
            yield f"comma before {closing}", f"{text[:at]},{text[at:]}"
    yield from ((f"only {value!r}"[:20], json.dumps(value)) for value in (*ODD, 3, 1.5))
    yield from (("NaN", "NaN"), ("an infinity", "[1e999]"))
    try:
        content = json.loads(text)
    except ValueError:
        return
    yield "one line", json.dumps(content)
    if isinstance(content, list):
        yield from (
            (f"and {value!r}"[:20], json.dumps([*content, value])) for value in (*ODD, {"note": "mine"})
        )
        yield "doubled", json.dumps(content * 2)
        yield "reversed", json.dumps(content[::-1])
    record = content[-1] if isinstance(content, list) else content
    for key in list(record)[:LARGEST_VALUE]:
        for value in (*ODD, "left out"):
            changed = {
                k: value if k == key else v for k, v in record.items() if (k, value) != (key, "left out")
            }
            new = [*content[:-1], changed] if isinstance(content, list) else changed
            yield f"{key} {value!r}"[:40], json.dumps(new)
