"""`diffkd push`: a folder of a student on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from rich.console import Console

from diffkd.errors import UserError
from diffkd.io import progress
from diffkd.io.text import counted, from_json, log, quoted, read_text, reason
from diffkd.models import loading
from diffkd.runs.reports import card_calls, markdown

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

README = "README.md"
NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
KEPT = "files that have arrived are not sent twice"
SAID = ("classes", "notes", "prompt")  # in diffkd.json: what people wrote, whatever it looks like
REMEDIES = (  # by the status that the Hub answers with
    ([401], "check the token (hf auth login, or HF_TOKEN), and push again"),
    ([403], "use a token that may write there, or another owner, and push again"),
    ([404], "check the name, and that the token may write there, and push again"),
    ([409, 412], "somebody else writes there; push again"),
    ([429], "too much was asked of the Hub; wait, and push again"),
    (range(500, 600), f"the fault is the Hub's; push again later: {KEPT}"),
    (range(1000), "check the name and the token (hf auth login, or HF_TOKEN), and push again"),
)


def push(folder: Path, repository: str, console: Console, *, private: bool = False) -> None:
    """Uploads the files as they are, in one commit; the two that describe them, `_files` writes anew.

    private: of a repository that is new. Raises UserError for what is no student, for a name that the Hub
    does not take, without a token, and where the Hub or the network refuses.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import disable_progress_bars, validate_repo_id

    card = _card(folder)
    try:
        if NAME.fullmatch(repository) is None:
            raise ValueError("it is not an owner and a name")
        validate_repo_id(repository)
    except ValueError as error:
        raise UserError(
            f"{quoted(repository)} is no name of a repository on the Hub ({reason(error)}); give owner/name, "
            "in letters, digits, -, _ and ."
        ) from error
    try:
        token = get_token()
    except Exception as error:  # of one that is to be renewed first
        raise UserError(
            f"there is no token of the Hub ({reason(error)}); run hf auth login, or set HF_TOKEN"
        ) from error
    if token is None:
        raise UserError("there is no token of the Hub; run hf auth login, or set HF_TOKEN, and push again")
    if (local := _local_base(card)) is not None:
        key, base = local
        log.warning(
            "%s names its base by a path of this machine, %s, which others do not have; name its place on "
            "the Hub as %s in %s and in %s", folder, base, key, loading.CARD, README,
        )  # fmt: skip
    message = f"A student of {counted(card['steps'], 'step')}" if card.get("steps") else "A teacher"
    files = list(_files(folder, repository))
    api = HfApi(token=token)
    if not console.is_terminal and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    try:
        place = api.create_repo(repository, private=private or None, exist_ok=True)
        api.create_commit(repository, files, commit_message=message)  # all of it, or nothing
    except Exception as error:  # the Hub's client and the network raise many types
        why, remedy = _told(error)
        raise UserError(f"{folder} could not be uploaded to {repository} ({why}); {remedy}") from error
    progress.say(console, f"{folder} is uploaded: {place}")


def _files(folder: Path, repository: str) -> Iterator[CommitOperationAdd]:
    """What is uploaded: the files that are not hidden. The two that describe it are written anew: they name
    the repository where they had a place for it, and of paths of this machine the last part alone."""
    from huggingface_hub import CommitOperationAdd

    said = from_json(read_text(folder / loading.CARD))
    places = machine_paths(said)
    content = without_paths(said, places)
    anew = {
        README: named(without_paths(read_text(folder / README), places), repository).encode(),
        loading.CARD: None if content == said else (json.dumps(content, indent=2) + "\n").encode(),
    }
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield CommitOperationAdd(name.as_posix(), anew.get(name.as_posix()) or path)


def _told(error: Exception) -> tuple[str, str]:
    """Why an upload failed, in the words of the Hub where it said any, and what to do."""
    found: Any = error
    while found is not None and getattr(found, "response", None) is None:
        found = found.__cause__
    if found is None:
        said = dict.fromkeys(reason(one) for one in (error, error.__cause__) if one is not None)
        return ": ".join(said), f"check the network, and push again: {KEPT}"
    status = found.response.status_code
    words = " ".join(str(getattr(found, "server_message", None) or "").split())
    why = f"{status} {found.response.reason_phrase}" + f": {words}" * bool(words)
    return why, next(remedy for first, remedy in REMEDIES if status in first)


def _card(folder: Path) -> dict[str, Any]:
    """The content of diffkd.json. Raises UserError for a folder that is no student's."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a student's, below students/ of a run, or an export's")
    card = loading.card(folder)
    if not card or not (folder / README).is_file():
        missing = README if card else loading.CARD
        raise UserError(
            f"{folder} is no student: it has no {missing}; give a folder below students/ of a run, or an "
            "export's"
        )
    return card


def machine_paths(content: Any) -> set[str]:
    """The values in a nested JSON that are paths from the root of a file system."""
    if isinstance(content, str):
        kinds = (PurePosixPath(content), PureWindowsPath(content))
        return {content} if any(path.is_absolute() and path.name for path in kinds) else set()
    inner: Iterable[Any] = content if isinstance(content, list) else ()
    if isinstance(content, dict):
        inner = (value for key, value in content.items() if key not in SAID)
    return {path for value in inner for path in machine_paths(value)}


def without_paths(content: Any, paths: Collection[str]) -> Any:
    """A nested JSON, or the text of a card, in which each of these paths is its last part."""
    if isinstance(content, dict):
        return {key: without_paths(value, paths) for key, value in content.items()}
    if isinstance(content, list):
        return [without_paths(value, paths) for value in content]
    if not isinstance(content, str):
        return content
    for path in sorted(paths, key=len, reverse=True):  # one may be inside of another
        name = (PurePosixPath(path) if path.startswith("/") else PureWindowsPath(path)).name
        for written, short in {path: name, markdown.escaped(path): markdown.escaped(name)}.items():
            literal = short.replace("\\", r"\\")
            content = re.sub(rf"(?<![\w./~-]){re.escape(written)}(?![\w-])", literal, content)
    return content


def _local_base(card: dict[str, Any]) -> tuple[str, Any] | None:
    """(key of diffkd.json, place) of what the card's code opens beside it, unless it is on the Hub."""
    lora, export = card.get("lora", {}), card.get("export", {})
    if "base" in lora:
        return ("base", lora["base"]) if os.path.isabs(str(lora["base"])) else None
    alone = export.get("kind") == "single-file" and not str(export.get("class")).endswith("Pipeline")
    return ("base_model", card.get("teacher")) if alone and "base_model" not in card else None


def named(text: str, repository: str) -> str:
    """A card whose code opens the repository, where it had a place for a folder."""
    downloaded = (
        f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repository}")'
    )
    return text.replace(card_calls.PLACE, f'"{repository}"').replace(card_calls.FILES, downloaded)
