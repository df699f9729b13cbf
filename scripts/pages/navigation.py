"""The order of the pages: entries of mkdocs.yml, with patterns such as methods/*.md filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any


def filled(nav: Sequence[Any], pages: Sequence[str]) -> list[Any]:
    """nav with each pattern replaced by the pages that it fits and that stand nowhere else, in the order of
    their names. * is anything within a folder, ** anything. A section that is left with none is dropped."""
    free = [page for page in sorted({*pages}) if page not in {*named(nav)}]

    def fill(entries: Sequence[Any]) -> Iterator[Any]:
        for entry in entries:
            if isinstance(entry, str) and "*" in entry:
                fitting = [page for page in free if fits(page, entry)]
                free[:] = [page for page in free if page not in fitting]
                yield from fitting
            elif isinstance(entry, dict):
                ((title, inner),) = entry.items()
                inner = [*fill(inner)] if isinstance(inner, list) else inner
                if inner:
                    yield {title: inner}
            else:
                yield entry

    return [*fill(nav)]


def fits(page: str, pattern: str) -> bool:
    """Whether a pattern is of this page."""
    within = (re.escape(part).replace(r"\*", "[^/]*") for part in pattern.split("**"))
    return re.fullmatch(".*".join(within), page) is not None


def named(nav: Sequence[Any]) -> Iterator[str]:
    """The pages that entries name themselves."""
    for entry in nav:
        for inner in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(inner, list):
                yield from named(inner)
            else:
                yield inner
