"""Students of tiny pipelines to export, and READMEs whose code is run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffkd.models import edm2 as conversion
from diffkd.models import guidance_input, loading, saving
from diffkd.models.song_unet import SongUNet
from diffkd.runs.reports import card_calls, model_card
from tests import dit, edm, edm2, flow_pipelines, ldm, masked_pipelines, text_to_image
from tests.lora import adapted

STEPS = 4
OF_DIFFKD = ("song", "edm2")  # networks of no stock class


def teacher(work: Path, kind: str) -> Path:
    """A stock pipeline of one of the kinds of tests.text_to_image, tests.flow_pipelines, masked_pipelines,
    tests.dit, tests.ldm (ldm) and tests.edm (edm), or one of OF_DIFFKD; it says that it was read from `work`,
    as pipelines do that were read from a folder and saved."""
    folder = work / f"{kind}-teacher"
    if not folder.exists():
        _save(folder, work / "parts" / kind, kind)
        for file, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
            for path in folder.rglob(file):
                path.write_text(json.dumps({**json.loads(path.read_text()), key: str(work / "base")}))
    return folder


def _save(folder: Path, parts: Path, kind: str) -> None:
    if kind in masked_pipelines.KINDS:
        masked_pipelines.save(masked_pipelines.pipeline(parts, kind), kind, folder)
        return
    if kind == "edm":
        edm.save(folder, edm.network(num_class_embeds=3), diffusers.EDMEulerScheduler())
        return
    if kind in OF_DIFFKD:
        network_of_diffkd(kind).save_pretrained(folder, safe_serialization=True)
        diffusers.EDMEulerScheduler(sigma_data=0.6).save_pretrained(folder)
        return
    if kind in ("sd", "xl"):
        made = text_to_image.pipeline(parts, xl=kind == "xl", prediction="v_prediction")
    elif kind == "dit":
        made = dit.pipeline(prediction="v_prediction", classes=3)
    elif kind == "ldm":
        made = ldm.pipeline(prediction="v_prediction")
    else:
        made = flow_pipelines.pipeline(parts, kind)
    made.save_pretrained(folder, safe_serialization=True)


def network_of_diffkd(kind: str) -> Any:
    """Of a few thousand weights and three labels, far from its initialisation."""
    if kind == "edm2":
        return conversion.network_of(edm2.MADE, edm2.network(edm2.MADE).float().state_dict()).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = SongUNet(edm.SIDE, 3, 8, (1, 2), 1, (4,), 0.1, 3, 0)
        for parameter in made.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval()


def student(
    work: Path, kind: str, *, rank: int | None = None, sampler: str = "ddim", guided: bool = False
) -> Path:
    """A student of such a pipeline with its card: an adapter of this rank, or its teacher as it is. guided:
    whether it takes the weight of guidance as an input, which a UNet has a place for."""
    folder = work / (f"{kind}-guided" if guided else kind if rank is None else f"{kind}-lora")
    made = loading.load(teacher(work, kind))
    if guided:
        guidance_input.attach(made.network, 16)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.nn.init.normal_(made.network.time_embedding.cond_proj.weight, std=0.2)
        made.guidance_range = (1.0, 9.0)
    if kind in ("sd3", "flux"):
        made.fit((flow_pipelines.CHANNELS, flow_pipelines.SIDE, flow_pipelines.SIDE))
    if rank is not None:
        made = adapted(made, rank=rank, scale=0.5)
    made.steps, made.sampler, made.clip = STEPS, sampler, None
    saving.save(made, folder)
    model_card.write(folder, model_card.describe(made, teacher=str(work / f"{kind}-teacher")))
    return folder


def code_of(folder: Path) -> str:
    """The Python of its card, with the folder in its place."""
    found = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (code,) = found
    assert card_calls.PLACE in code or card_calls.FILES in code
    return str(
        code.replace(card_calls.PLACE, repr(str(folder))).replace(
            card_calls.FILES, f"folder = {str(folder)!r}"
        )
    )


def run_card(folder: Path, changes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The names that are there once the code has run. changes: of words in it, each of which it has."""
    code, names = code_of(folder), dict[str, Any]()
    for old, new in (changes or {}).items():
        assert old in code, code
        code = code.replace(old, new)
    exec(code, names)
    return names
