"""`diffkd fuse`: a student that is an adapter becomes a whole pipeline."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from diffkd.errors import UserError
from diffkd.io import progress
from diffkd.io.files import new_folder
from diffkd.io.places import check_writable
from diffkd.models import loading, lora_files, saving
from diffkd.models.source import MERGED
from diffkd.runs.reports import model_card

DESCRIBED_ANEW = ("call", "lora")  # of a card; the call of a whole pipeline is another


def fuse(student: str, out: Path, console: Console) -> Path:
    """Writes the pipeline of the base with the adapter in its weights, and the student's card. Raises
    UserError."""
    check_writable(out, "--out", folder=True)
    if out.exists():
        raise UserError(f"--out {out} exists already; use another")
    folder = loading.folder_of(student)
    if MERGED in loading.card(folder):
        raise UserError(
            f"{student} learned as an adapter and is saved merged, as {lora_files.WHY_MERGED}; use it as it "
            "is, a whole pipeline"
        )
    denoiser = loading.load(folder)
    if not denoiser.fused:
        raise UserError(f"{student} is no adapter, and is whole as it is; give a student of kind lora")
    kept = {key: value for key, value in loading.card(folder).items() if key not in DESCRIBED_ANEW}
    with new_folder(out) as temporary:
        saving.save(denoiser, temporary)
        model_card.write(temporary, {**kept, **model_card.describe(denoiser)})
    progress.say(console, f"{student} with its base, a whole pipeline: {out}")
    return out
