"""Where the files of the repository lie in the site, and links between them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOMES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing/index.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)\s]+)(?=\))")
FENCE = re.compile(r"^ *(`{3,})")


def in_site(path: str) -> str:
    """The place in the site of a file or folder, named from the root of the repository."""
    if path in HOMES:
        return HOMES[path]
    place = path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}"
    if (ROOT / path).is_dir():
        place += "/README.md" if (ROOT / path / "README.md").is_file() else "/index.md"
    return place


def relinked(text: str, page: str) -> str:
    """The Markdown of a page of the repository with its links as the site needs them."""
    here = posixpath.dirname(in_site(page))

    def moved(target: str) -> str:
        path, mark, anchor = target.partition("#")
        if not path or ":" in path:
            return target
        there = in_site(posixpath.normpath(posixpath.join(posixpath.dirname(page), path)))
        return posixpath.relpath(there, here or ".") + mark + anchor

    return "".join(LINK.sub(lambda found: found[1] + moved(found[2]), part) if prose else part
                   for prose, part in parts_of(text))  # fmt: skip


def targets(text: str, page: str) -> Iterator[str]:
    """The files and folders that a page links to, named from the root of the repository."""
    for prose, part in parts_of(text):
        for found in LINK.finditer(part) if prose else ():
            path = found[2].partition("#")[0]
            if path and ":" not in path:
                yield posixpath.normpath(posixpath.join(posixpath.dirname(page), path))


def parts_of(text: str) -> Iterator[tuple[bool, str]]:
    """Lines, and whether each is prose, or inside a block of code."""
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if fence:
            yield False, line
            fence = "" if mark and mark[1] == fence else fence
        else:
            fence = mark[1] if mark else ""
            yield not mark, line
