"""Students that are adapters where diffkd is not installed: the stock pipeline of their base, with their
scheduler and load_lora_weights, draws what `diffkd sample` does, and so does the fused pipeline."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffkd.core.denoiser import Denoiser
from diffkd.models import loading, saving
from diffkd.models.lora_files import KOHYA, unprefixed
from diffkd.models.source import ADAPTER
from diffkd.models.students import lora
from diffkd.runs.reports import model_card
from tests import flow_pipelines, masked_pipelines, text_to_image
from tests.lora import adapted
from tests.stock import Prompted, stock_pictures_of_prompts

PROMPT, SEED, STEPS = "a small red ring above a large blue square", 5, 4
CONVOLVED = {"sd-conv": "sd", "xl-conv": "xl"}  # adapters of convolutions too, and the pipelines of these
TARGETS = ["to_q", "conv1", "conv2", "conv_shortcut", "proj_in", "time_emb_proj", "downsamplers.0.conv"]
BY_DEFAULT = ("sd", "xl", "sd3", "flux", *CONVOLVED)
OTHERS = tuple(kind for kind in masked_pipelines.KINDS if not kind.startswith("pixart"))
STUDENTS = {**dict.fromkeys((*BY_DEFAULT, *OTHERS), "ddim"), "xl": "renoise"}  # their samplers


def save_base(kind: str, work: Path) -> None:
    if (work / kind).exists():
        return
    parts = work / "parts" / kind
    if kind in masked_pipelines.KINDS:
        masked_pipelines.save(masked_pipelines.pipeline(parts, kind), kind, work / kind)
        return
    if kind in ("sd", "xl"):
        made = text_to_image.pipeline(parts, xl=kind == "xl", prediction="v_prediction")
    else:
        made = flow_pipelines.pipeline(parts, kind)
    made.save_pretrained(work / kind, safe_serialization=True)


def save_student(base: Path, folder: Path, sampler: str, **options: Any) -> None:
    teacher = loading.load(base)
    if base.name not in ("sd", "xl"):
        teacher.fit((flow_pipelines.CHANNELS, flow_pipelines.SIDE, flow_pipelines.SIDE))
    student = adapted(teacher, rank=2, **{"scale": 0.5, **options})
    student.steps, student.sampler, student.clip = STEPS, sampler, None
    saving.save(student, folder)
    model_card.write(folder, model_card.describe(student))


class Drawn(NamedTuple):
    """What stock drew: with an adapter, by kohya's file where stock opens that, with the fused pipeline."""

    folder: Path
    pictures: dict[str, Any]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """drawn(kind), a group of kinds at once by one process, which cannot import diffkd."""

    @cache
    def of(kinds: tuple[str, ...]) -> dict[str, Drawn]:
        work = tmp_path_factory.mktemp("students")
        asked: dict[tuple[str, str], Prompted] = {}
        for kind in kinds:
            base = work / CONVOLVED.get(kind, kind)
            save_base(base.name, work)
            folder, fused = work / f"{kind}-student", work / f"{kind}-fused"
            more = {"scale": 0.2, "targets": TARGETS} if kind in CONVOLVED else {}
            save_student(base, folder, STUDENTS[kind], **more)
            whole = loading.load(folder)
            saving.save(whole, fused)
            card, steps = json.loads((folder / "diffkd.json").read_text()), {"num_inference_steps": STEPS}
            given = card["lora"]["base"], PROMPT, SEED, {**steps, **card.get("call", {})}
            asked[kind, "adapter"] = Prompted(*given, lora=folder)
            if base.name in ("sd", "xl"):
                asked[kind, "kohya"] = Prompted(*given, lora=folder, named={"weight_name": KOHYA})
            asked[kind, "fused"] = Prompted(fused, PROMPT, SEED, {**steps, **saving.stock_call(whole)})
        found = dict(zip(asked, stock_pictures_of_prompts([*asked.values()], work), strict=True))
        return {
            kind: Drawn(
                work / f"{kind}-student", {way: one for (of, way), one in found.items() if of == kind}
            )
            for kind in kinds
        }

    return lambda kind: of(next(group for group in (BY_DEFAULT, OTHERS) if kind in group))[kind]


@pytest.mark.parametrize(
    "kind", [*BY_DEFAULT, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]
)
def test_the_stock_pipeline_of_the_base_draws_the_student(drawn, tmp_path, cli, kind):
    one = drawn(kind)
    out = tmp_path / "out.npz"
    outcome = cli("sample", one.folder, "--out", out, "--prompt", PROMPT, "-n", 1, "--seed", SEED)
    assert (outcome.code, outcome.stderr) == (0, "")
    with np.load(out) as content:
        picture = content["arr_0"][0].astype(int)
    assert picture.std() > 5
    for way, stock in one.pictures.items():
        assert np.abs(picture - stock["picture"]).max() <= 1, way
    # and what is drawn is neither the base nor a part of the adapter
    student, base = loading.load(one.folder), loading.load(one.folder.with_name(CONVOLVED.get(kind, kind)))
    assert far(student, base)
    if kind in CONVOLVED:
        weights = unprefixed(load_file(one.folder / ADAPTER))
        assert all(any(f".{end}." in key for key in weights) for end in TARGETS)
        assert {value.ndim for key, value in weights.items() if "_blocks.0.resnets.0.conv1" in key} == {4}
        lora.add(base.network, {key: value for key, value in weights.items() if ".to_q." in key})
        assert far(student, base)


def far(one: Denoiser, other: Denoiser) -> bool:
    x, t, cond = one.example_inputs()
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        ours, theirs = (model.output(x, t, **cond) for model in (one, other))
    return bool((ours - theirs).abs().max() > 0.05 * theirs.abs().max())
