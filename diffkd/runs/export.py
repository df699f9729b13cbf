"""`diffkd export`: a student in another form, with its scheduler and its card."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from diffkd.errors import UserError
from diffkd.io import progress
from diffkd.io.files import new_folder
from diffkd.io.places import check_writable
from diffkd.io.text import format_bytes
from diffkd.models import exports, loading, lora_files
from diffkd.models.exports import Student
from diffkd.models.source import MERGED
from diffkd.runs.reports import model_card

OF_ADAPTERS = ("lora", "kohya")  # whose cards are those of their students
DESCRIBED_ANEW = ("call", "lora")  # of the card of an adapter that is exported whole


def export(student: str, to: str, out: Path | None, console: Console) -> Path:
    """Writes the folder, whole or not at all. out: default beside the student, by its name and the kind.
    Raises UserError."""
    if to not in exports.KINDS:
        (near,) = difflib.get_close_matches(to, exports.KINDS, n=1, cutoff=0)
        raise UserError(
            f"--to {to} is unknown; there are {', '.join(exports.KINDS)}, the nearest {near} (docs/export.md)"
        )
    exports.check_installed(to)
    place = Path(os.path.abspath(student) if os.path.isdir(student) else student)
    out = out or (place.parent if place.is_absolute() else Path()) / f"{place.name}-{to}"
    check_writable(out, "--out", folder=True)
    if out.exists():
        raise UserError(f"--out {out} exists already; use another")
    found = _opened(student, to)
    kind = exports.find(to)
    if not kind.fits(found):
        there, why = exports.fitting(found), kind.TAKES
        if to in OF_ADAPTERS and MERGED in found.card:
            why = f"which holds an adapter alone, and it is saved merged, as {lora_files.WHY_MERGED}"
        raise UserError(
            f"{student} cannot be exported --to {to}, {why}; for it there "
            + (f"{'is' if len(there) == 1 else 'are'} {', '.join(there)}" if there else "is none")
        )
    with new_folder(out) as temporary:
        model_card.write(temporary, _card(found, to, kind.write(found, temporary)))
        if out.exists():
            raise UserError(f"--out {out} was made by another program while this was written; use another")
    size = format_bytes(sum(path.stat().st_size for path in out.rglob("*") if path.is_file()))
    progress.say(console, f"{student} as {to}, {size}: {out}")
    return out


def _opened(student: str, to: str) -> Student:
    """Raises UserError for what is no student, and for an export of one."""
    folder = loading.folder_of(student)
    card = loading.card(folder)
    if not card:
        raise UserError(
            f"{student} is no student of diffkd: it has no {loading.CARD}; give a folder below students/ "
            "of a run"
        )
    if "export" in card:
        raise UserError(
            f"{student} is an export already ({card['export'].get('kind')}); give the student that it was "
            "made of"
        )
    return Student(student, folder, card, loading.load(student, dtype=exports.find(to).DTYPE))


def _card(student: Student, to: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Of an adapter that of the student; else described as it is now, whole. facts: of the kind."""
    said = dict(student.card)
    if to not in OF_ADAPTERS:
        said = {key: value for key, value in said.items() if key not in DESCRIBED_ANEW}
        said |= model_card.describe(student.denoiser)
    return {**said, **facts, "export": {"kind": to, **facts["export"]}}
