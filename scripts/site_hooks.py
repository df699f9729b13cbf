"""Hooks of MkDocs (mkdocs.yml): pages from outside docs/, pages made of the code, and links between all.

Links are written for the host of the repository: to ../README.md, to a folder, to a config. Here they get the
place that each has in the site, where files that are no pages lie as they are in files/.
"""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files
from pages import commands, configs, python
from pages.links import HOMES, ROOT, in_site, relinked, targets
from pages.navigation import filled
from pymdownx.slugs import slugify

MADE = {
    "reference/configs.md": configs.page,
    "reference/commands.md": commands.page,
    "reference/python.md": python.page,
}
DOCS = ROOT / "docs"


def on_config(config: Any) -> None:
    """Patterns of the navigation become pages, and headings get the anchors of the repository's host."""
    config["mdx_configs"]["toc"]["slugify"] = slugify(case="lower")
    written = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    listed = [in_site(f"docs/{folder}") for folder in _folders()]
    config["nav"] = filled(config["nav"], [*written, *listed, *HOMES.values(), *MADE])


def on_files(files: Files, config: Any) -> None:
    """Adds what lies outside docs/ or is made."""
    for name, place in HOMES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, place, content=relinked(text, name)))
    for place, make in MADE.items():
        files.append(File.generated(config, place, content=make()))
    for folder in _folders():
        files.append(File.generated(config, in_site(f"docs/{folder}"), content=_listing(folder)))
    for path in _linked():
        if (ROOT / path).is_file() and in_site(path).startswith("files/"):
            files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Moves the links of the pages in docs/; those that were added have theirs."""
    if page.file.generated_by:
        return markdown
    return relinked(markdown, f"docs/{page.file.src_uri}")


def _linked() -> list[str]:
    """What the pages link to, each once."""
    pages = [*map(ROOT.joinpath, HOMES), *DOCS.rglob("*.md")]
    found = [
        target
        for page in pages
        for target in targets(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix())
    ]
    return [*dict.fromkeys(found)]


def _folders() -> list[str]:
    """The folders of docs/ that are linked to and have no page of their own."""
    inside = [path for path in _linked() if path.startswith("docs/") and (ROOT / path).is_dir()]
    return [path.removeprefix("docs/") for path in inside if not (ROOT / path / "README.md").is_file()]


def _listing(folder: str) -> str:
    """A page of links to the pages of a folder, by number and heading."""
    lines = [f"# {folder.capitalize()}", ""]
    for path in sorted((DOCS / folder).glob("*.md")):
        heading = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        number = path.stem.partition("-")[0].lstrip("0")
        lines.append(f"- **{number}** [{heading}]({path.name})")
    return "\n".join(lines) + "\n"
