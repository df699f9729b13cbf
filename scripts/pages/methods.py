"""Which page each method has."""

from __future__ import annotations

import re
from pathlib import Path

TABLE = Path(__file__).parents[2] / "docs/methods/README.md"


def pages_of_methods() -> dict[str, str]:
    """Name -> file in docs/methods, by the table there."""
    rows = re.findall(r"^\| \[`(\w+)`\]\(([\w-]+\.md)\)", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows)
