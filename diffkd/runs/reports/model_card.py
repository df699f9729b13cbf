"""What lies beside a saved pipeline: README.md (its model card) and diffkd.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffkd.core.denoiser import Denoiser
from diffkd.io.files import new_file, write_json
from diffkd.metrics.evaluation.records import shown
from diffkd.models import sizes
from diffkd.models.loading import CARD


def describe(denoiser: Denoiser, **more: Any) -> dict[str, Any]:
    """The content of diffkd.json: what no config of diffusers says."""
    schedule = denoiser.schedule
    return {
        "steps": denoiser.steps,
        "sampler": "ddim",
        "prediction": denoiser.prediction,
        "num_train_timesteps": schedule.num_train_timesteps,
        "zero_terminal_snr": schedule.zero_terminal_snr,
        "clip": denoiser.clip,
        "num_classes": denoiser.num_classes,
        "null_label": denoiser.null_label,
        **({} if denoiser.shape is None else sizes.denoiser_size(denoiser)._asdict()),
        **more,
    }


def write(folder: Path, card: Mapping[str, Any]) -> None:
    """Both files, into a pipeline's folder. card: of `describe`, with "metrics" where it was measured.

    README.md comes first: what diffkd.json says, both have, at whatever moment the process ends.
    """
    with new_file(folder / "README.md") as temporary:
        temporary.write_text(_readme(card), encoding="utf-8")
    write_json(folder / CARD, dict(card))


def _readme(card: Mapping[str, Any]) -> str:
    steps, classes = card.get("steps"), card.get("num_classes")
    call = (
        "pipeline(batch_size=16"
        + (f", class_labels=[i % {classes} for i in range(16)]" if classes else "")
        + f", num_inference_steps={steps or _many(card.get('num_train_timesteps') or 1000)})"
    )
    what = f"A student of {steps} sampling step{'s' * (steps != 1)}" if steps else "A teacher"
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [diffusion, distillation, diffkd]",
        "---",
        "",
        f"# {what}",
        "",
        f"{what} made by [diffkd](https://pypi.org/project/diffkd/), a stock diffusers pipeline:",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")',
        f"images = {call}.images",
        "```",
        "",
    ]
    if steps:
        lines += [
            f"Use `num_inference_steps={steps}`: it was trained for these {steps} steps and no others.",
            "",
        ]
    lines += ["| | |", "|---|---|"]
    for key in (
        "prediction",
        "num_train_timesteps",
        "zero_terminal_snr",
        "parameters",
        "macs",
        "bytes",
        "clip",
        "teacher",
        "method",
    ):
        if key in card:
            lines.append(f"| {key.replace('_', ' ')} | {escaped(card[key])} |")
    rows = [row for row in map(_row, card.get("metrics", [])) if row is not None]
    if rows:
        lines += ["", "| steps | nfe | FID | features | samples | reference |", "|---|---|---|---|---|---|"]
        lines += [line for line, _ in rows]
        lines += ["", "The whole protocol of each number is in `diffkd.json`."]
        if any(features != "inception" for _, features in rows):
            lines += ["FID by these features is not comparable with FID by Inception features."]
    return "\n".join(lines) + "\n"


def _row(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """A record's line of the table and its features; None for what is no record: diffkd.json may be of
    anybody's making."""
    try:
        protocol, numbers = record["protocol"], shown(record)
        features, reference = str(protocol["features"]["name"]), protocol["reference"]["name"]
        samples, target = protocol["samples"], dict(protocol.get("target") or {})
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None
    fid = numbers.pop("FID", "")
    more = "".join(f"<br>{title} {number}" for title, number in numbers.items())
    before = [escaped(record.get(key, "")) for key in ("steps", "nfe")]
    before[0] += ", int8" * (target.get("quantize") == "int8")
    cells = [*before, f"{fid}{more}", *map(escaped, (features, samples, reference))]
    return f"| {' | '.join(cells)} |", features


def _many(total: int) -> int:
    """A teacher's step count for the example: the most up to 64 that fit its time steps."""
    return max(n for n in range(1, 65) if total % n == 0)


def escaped(value: Any) -> str:
    """Text for a table's cell: no markup of the quoted value survives, HTML's or Markdown's."""
    return "".join(c if c.isalnum() or c in " /,-" else f"&#{ord(c)};" for c in " ".join(str(value).split()))
