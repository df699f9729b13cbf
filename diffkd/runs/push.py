"""`diffkd push`: a folder of a student on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from diffkd.errors import UserError
from diffkd.io import progress
from diffkd.io.text import log, quoted, read_text, reason
from diffkd.models import loading
from diffkd.runs.reports import card_calls

README = "README.md"
NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def push(folder: Path, repository: str, console: Console, *, private: bool = False) -> None:
    """Uploads the files as they are, but that the card names the repository where it has a place for it.

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
    if os.path.isabs(base := card.get("lora", {}).get("base", "")):
        log.warning(
            "%s names its base by a path of this machine, %s, which others do not have; name its place on "
            "the Hub as base in %s and in %s", folder, base, loading.CARD, README,
        )  # fmt: skip
    message = f"A student of {card['steps']} steps" if card.get("steps") else "A teacher"
    api = HfApi(token=token)
    if not console.is_terminal and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    try:
        place = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, ignore_patterns=[README, ".*"]
        )
        api.upload_file(
            path_or_fileobj=named(read_text(folder / README), repository).encode(), path_in_repo=README,
            repo_id=repository, commit_message="Its card",
        )  # fmt: skip
    except Exception as error:  # the Hub's client and the network raise many types
        why = ": ".join(reason(one) for one in (error, error.__cause__) if one is not None)
        raise UserError(
            f"{folder} could not be uploaded to {repository} ({why}); check the name, the token (hf auth "
            "login, or HF_TOKEN) and the network, and push again: what has arrived is kept"
        ) from error
    progress.say(console, f"{folder} is uploaded: {place}")


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


def named(text: str, repository: str) -> str:
    """A card whose code opens the repository, where it had a place for a folder."""
    downloaded = (
        f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repository}")'
    )
    return text.replace(card_calls.PLACE, f'"{repository}"').replace(card_calls.FILES, downloaded)
