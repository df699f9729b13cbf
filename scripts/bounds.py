"""Prints the oldest version of each package that pyproject.toml allows, as constraints for pip.

    python scripts/bounds.py EXTRA...

The packages are those of diffkd itself, of these extras and of the build. Where an extra asks for a newer
version of what diffkd needs anyway, the newer is the oldest.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
UNBOUND = {"types-PyYAML"}  # follows PyYAML's own versions


def bounds(extras: list[str], project: dict[str, Any] | None = None) -> dict[str, str]:
    """The oldest version by package's name. Raises ValueError for a package that has none."""
    project = project or tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    groups = project["project"]["optional-dependencies"]
    needs = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    queue, found = list(extras), {}
    while queue:
        needs += groups[queue.pop()]
        queue += [name for need in needs if need.startswith("diffkd[") for name in need[7:-1].split(",")]
        needs = [need for need in needs if not need.startswith("diffkd[")]
    for need in needs:
        parts = re.fullmatch(r"([\w.-]+)>=([\d.]+)", need)
        if parts is not None:
            found[parts[1]] = max(found.get(parts[1], "0"), parts[2], key=_numbers)
        elif need not in UNBOUND:
            raise ValueError(f"{need!r} names no oldest version, as name>=version")
    return found


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


if __name__ == "__main__":
    for package, version in bounds(sys.argv[1:]).items():
        print(f"{package}=={version}")
