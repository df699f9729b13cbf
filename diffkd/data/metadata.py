"""The metadata files of a folder of images, as Hugging Face's imagefolder has them: labels and captions."""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffkd.errors import UserError
from diffkd.io.text import counted, from_json, log, quoted, reason, without_surrogates

METADATA = ("metadata.jsonl", "metadata.csv")  # as Hugging Face's imagefolder names them
CAPTIONS = ("text", "caption")  # their keys for a caption; the first that says something


def read_metadata(root: Path, files: list[Path], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What metadata files say of each image: {its path from the root: its label and caption, as far as they
    are there}. They name images relative to themselves."""
    known = {*names} if files else set[str]()
    about, absent, captioned = dict[str, dict[str, Any]](), list[tuple[Path, str]](), False
    base = os.path.abspath(root)
    for file in sorted(files):
        folder = os.path.abspath(file.parent)
        for line, row in _rows(file):
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                raise UserError(f"{file}, line {line}: it has no file_name; every row names an image by it")
            try:
                caption = _caption_in(row)
            except TypeError as error:
                raise UserError(
                    f"{file}, line {line}: its caption is no text ({error}); give text, or a list of texts"
                ) from error
            captioned |= caption is not None
            path = _from_root(base, folder, name, known)
            if path is None:
                absent.append((file, name))
            elif path in about:
                raise UserError(f"{file}, line {line}: {quoted(name)} is there twice; keep one of the two")
            else:
                about[path] = {key: row[key] for key in ("label",) if key in row}
                about[path] |= {} if caption is None else {"caption": caption}
    if absent:
        some = ", ".join(name for _, name in absent[:3]) + ", ..." * (len(absent) > 3)
        lost, are = counted(len(absent), "image"), "is" if len(absent) == 1 else "are"
        if captioned:
            raise UserError(
                f"{lost} that {absent[0][0]} has captions of {are} not there ({some}); bring what is "
                "missing, or take it out of the file"
            )
        log.warning("%s that %s names %s not there (%s)", lost, absent[0][0], are, some)
    if files and not about and not absent:
        raise UserError(f"{files[0]} is empty; give a row for each image, or remove it")
    return about


def _from_root(base: str, folder: str, name: str, known: Collection[str]) -> str | None:
    """The path from the root, base, of an image that a metadata file in a folder names, in whichever way:
    with ./ or .., absolute, with the separators of Windows, or with accents composed otherwise, as macOS has
    them. None for one that is not there."""
    composed = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    for written in (name, name.replace("\\", "/"), *composed):
        path = os.path.normpath(os.path.join(folder, written)).removeprefix(f"{base.rstrip(os.sep)}{os.sep}")
        if path in known:
            return path
    return None


def _caption_in(row: dict[str, Any]) -> str | None:
    """The first caption of a row that says something; None where it has no key for one. Raises TypeError for
    what is no text."""
    given = [caption_of(row[key]) for key in CAPTIONS if key in row]
    return next((text for text in given if text), "") if given else None


def caption_of(value: Any) -> str:
    """The text of a caption, of several the first; "" for none. Raises TypeError for what is no text."""
    if isinstance(value, list):
        value = value[0] if value else None
    if value is not None and not isinstance(value, str):
        raise TypeError(f"it is {quoted(value, 60)}")
    return without_surrogates(value or "")


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a metadata file. Labels of a .csv that are digits are numbers."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}); repair it, or move it away") from error
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in reader:
                named: dict[str, Any] = {k: v for k, v in row.items() if isinstance(k, str) and v is not None}
                label = named.get("label", "")
                yield reader.line_num, named | ({"label": int(label)} if _is_number(label) else {})
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num}: it is not CSV ({reason(error)})") from error
        return
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                row = from_json(content)
            except ValueError as error:
                raise UserError(f"{file}, line {line}: it is not JSON ({reason(error)})") from error
            if not isinstance(row, dict):
                raise UserError(f'{file}, line {line}: it is not an object such as {{"file_name": ...}}')
            yield line, row


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
