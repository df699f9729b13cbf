"""What lies beside a saved model: README.md (its model card) and diffkd.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffkd.core import adapters, guidance_kinds
from diffkd.core.denoiser import Denoiser
from diffkd.io.files import new_file, write_json
from diffkd.io.text import counted
from diffkd.metrics.evaluation.records import formatted
from diffkd.models import lora_files, saving, sizes, students
from diffkd.models.loading import CARD
from diffkd.models.source import MERGED
from diffkd.models.students import lora
from diffkd.runs.reports import card_calls, card_head, markdown, teacher_sampling

PIPELINE_FACTS = (
    "sampler", "prediction", "num_train_timesteps", "zero_terminal_snr", "parameters", "macs", "bytes",
    "clip", "teacher", "teacher_sampler", "guidance_baked_in", "guidance_range", "guidance_kind", "method",
)  # fmt: skip
NAMED = 50  # classes that a card lists
CLASSIFIER_FACTS = (
    "role", "accuracy", "held_out", "parameters", "alpha", "temperature", "direction", "seed",
)  # fmt: skip


def describe(denoiser: Denoiser, **more: Any) -> dict[str, Any]:
    """The content of a pipeline's diffkd.json: what no config of diffusers says."""
    schedule = denoiser.schedule
    merged = students.merged(denoiser)  # as it is drawn
    return {
        "steps": denoiser.steps,
        "sampler": denoiser.sampler,
        "prediction": denoiser.prediction,
        "num_train_timesteps": schedule.num_train_timesteps,
        "zero_terminal_snr": schedule.zero_terminal_snr,
        "clip": denoiser.clip,
        "num_classes": denoiser.num_classes,
        "null_label": denoiser.null_label,
        **({} if denoiser.conditioner is None else {"prompts": True}),
        **({"absent": [*absent]} if (absent := getattr(denoiser.conditioner, "absent", ())) else {}),
        **({} if saving.is_stock(denoiser) else {"stock": False}),
        **({"call": call} if (call := saving.stock_call(denoiser)) else {}),
        **({"global_noise": True} if _draws_other_noise(denoiser) else {}),
        **({} if denoiser.guidance_range is None else {"guidance_range": [*denoiser.guidance_range]}),
        **({} if denoiser.label_dropout is None else {"label_dropout": denoiser.label_dropout}),
        **({} if denoiser.shape is None else sizes.denoiser_size(merged)._asdict()),
        **({} if merged is denoiser else {"lora": _adapter(denoiser)}),
        **more,
    }


def _adapter(denoiser: Denoiser) -> dict[str, Any]:
    """Of a student's adapter; scheduler: the class of the one in its folder, left out where the folder is a
    whole pipeline."""
    assert denoiser.adapter is not None
    weights = sum(p.numel() for p in adapters.own(denoiser.network).values())
    alone = saving.lora_keys(denoiser) is not None
    scheduler = {"scheduler": type(saving.stock_scheduler(denoiser)).__name__} if alone else {}
    return {**lora_files.facts(denoiser.adapter), "parameters": weights, **scheduler}


def of_merged(trained: Denoiser) -> dict[str, Any]:
    """What the card of a student says beside, where what was trained is an adapter that is saved merged, else
    {}. parameters: that learned."""
    if trained.adapter is None or not lora.is_more(trained.network):
        return {}
    learned = sum(p.numel() for p in adapters.own(trained.network).values())
    rank, targets = trained.adapter.rank, [*trained.adapter.targets]
    return {MERGED: {"rank": rank, "targets": targets, "parameters": learned}}


def _draws_other_noise(denoiser: Denoiser) -> bool:
    several = denoiser.sampler == "renoise" and (denoiser.steps or 1) > 1
    return several and saving.has_global_noise(denoiser)


def write(folder: Path, card: Mapping[str, Any]) -> None:
    """Both files, into a model's folder.

    card: of a pipeline by `describe`, with "metrics" once it was measured; of a classifier with "kind".
    README.md comes first, so that both say what diffkd.json says, whenever the process ends.
    """
    lines = _classifier(card) if card.get("kind") == "classifier" else _pipeline(card)
    with new_file(folder / "README.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / CARD, dict(card))


# pipelines


def _pipeline(card: Mapping[str, Any]) -> list[str]:
    steps, stock = card.get("steps"), card.get("stock") is not False
    count = steps or _example_steps(card.get("num_train_timesteps") or 1000)
    title = f"A student of {steps} sampling step{'s' * (steps != 1)}" if steps else "A teacher"
    lines = [*card_head.lines(card), f"# {title}", "", *card_calls.lines(card, title, count)]
    export = card.get("export", {})
    other = "inputs" in export or bool(export.get("comfy_alone"))  # than a stock pipeline draws with it
    if steps and stock:
        advice = f"Use `num_inference_steps={steps}`" if not other else f"Take {counted(steps, 'step')}"
        lines += [f"{advice}: it was trained for these {steps} steps and no others.", ""]
    if (merged := card.get(MERGED)) is not None:
        lines += [
            f"It learned as an adapter (LoRA) of rank {merged['rank']} and is saved merged, as "
            f"{lora_files.WHY_MERGED}.",
            "",
        ]
    baked = card.get("guidance_baked_in", 1.0)
    if baked != 1.0:
        lines += [f"Guidance of weight {baked:g} is baked in: it is drawn without any.", ""]
    if not other and (scale := card.get("call", {}).get("guidance_scale")) is not None:
        lines += [
            f"Name `guidance_scale={scale}`: by default the pipeline guides it on top, to another image.",
            "",
        ]
    if card.get("global_noise") and not other:
        lines += [
            "Between its steps the pipeline draws noise from torch's global generator, whatever `generator` "
            "is: the same seeds give other images than diffkd's, of the same distribution.",
            "",
        ]
    kind = card.get("guidance_kind")
    said = {} if kind is None else {"guidance_kind": guidance_kinds.in_words(kind)}
    lines += markdown.facts({**card, **said}, PIPELINE_FACTS)
    lines += _class_names(card)
    measured = [row for row in map(_measured, card.get("metrics", [])) if row is not None]
    if measured:
        titles = ["steps", "nfe", "FID", "features", "samples", "reference"]
        lines += ["", *markdown.table(titles, [cells for cells, _ in measured])]
        lines += ["", "The whole protocol of each number is in `diffkd.json`."]
        if "export" in card:
            lines += ["They are of the student in float32, before it was exported."]
        if any(features != "inception" for _, features in measured):
            lines += ["FID by these features is not comparable with FID by Inception features."]
        lines += _teacher_beside(card)
    return lines


def _class_names(card: Mapping[str, Any]) -> list[str]:
    """In the order of the labels; of many the first, and where the rest are."""
    names = card.get("classes")
    if not isinstance(names, list) or not names or not card.get("num_classes"):
        return []
    shown = ", ".join(f"{label} {markdown.escaped(name)}" for label, name in enumerate(names[:NAMED]))
    more = f", ... ({len(names)} in all, in `{CARD}`)" if len(names) > NAMED else ""
    return ["", f"Class labels and their names: {shown}{more}."]


def _teacher_beside(card: Mapping[str, Any]) -> list[str]:
    """What its teacher was measured at, and what that is worth."""
    teacher, records = card.get("teacher_measured"), card.get("metrics", [])
    if not isinstance(teacher, Mapping) or (found := _measured(teacher)) is None:
        return []
    (steps, _, numbers, *_), _ = found
    sampler = markdown.escaped(teacher["protocol"].get("sampler", "ddim"))
    doubts = [doubt for record in records if (doubt := teacher_sampling.doubt(record, teacher))]
    return [
        "", f"Its teacher, best in {steps} steps of {sampler}: FID {numbers}.",
        *(f"{markdown.escaped(doubt)}." for doubt in doubts[:1]),
    ]  # fmt: skip


def _measured(record: Mapping[str, Any]) -> tuple[list[str], str] | None:
    """The cells of a record and its features; None for what is not a record: diffkd.json may come from
    anywhere."""
    try:
        protocol, numbers = record["protocol"], formatted(record)
        features, reference = str(protocol["features"]["name"]), protocol["reference"]["name"]
        samples, target = protocol["samples"], dict(protocol.get("target") or {})
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return None
    fid = numbers.pop("FID", "")
    others = "".join(f"<br>{title} {number}" for title, number in numbers.items())
    steps, nfe = (markdown.escaped(record.get(key, "")) for key in ("steps", "nfe"))
    steps += ", int8" * (target.get("quantize") == "int8")
    return [steps, nfe, f"{fid}{others}", *map(markdown.escaped, (features, samples, reference))], features


def _example_steps(timesteps: int) -> int:
    """A teacher's step count for the example: the most up to 64 that divide its time steps."""
    return max(n for n in range(1, 65) if timesteps % n == 0)


# classifiers


def _classifier(card: Mapping[str, Any]) -> list[str]:
    timed = card["schedule"] is not None
    argument = ", network=your_module" * (card["network"]["name"] != "cnn")  # the user's own code
    record = card.get("record", {})
    facts = {"parameters": card["parameters"], **record, **record.get("method", {})}
    return [
        f"# A classifier{' of noised images' * timed}, {card['num_classes']} classes",
        "",
        f"Made by diffkd. It takes images of {'x'.join(map(str, card['shape']))} in [-1, 1]:",
        "",
        *card_calls.code(
            "from diffkd import classifiers",
            "",
            f'classifier = classifiers.load("path/to/this/folder"{argument})',
            "logits = classifier(x_t, t)  # t: (B,) float64 in (0, 1]" if timed else "logits = classifier(x)",
        ),
        *markdown.facts({k: v for k, v in facts.items() if v is not None}, CLASSIFIER_FACTS),
        *_class_names(card),
    ]
