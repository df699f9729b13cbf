"""Adapters that learn with the length of their steps, or a guidance weight, as an input: what is saved is
merged, a stock pipeline."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from diffkd.core import adapters, samplers
from diffkd.core.denoiser import GUIDANCE
from diffkd.errors import UserError
from diffkd.methods.guidance import Guidance
from diffkd.methods.meanflow import MeanFlow
from diffkd.models import loading, packing, saving
from diffkd.models.students.config import Lora
from diffkd.runs import distill as job
from diffkd.runs.reports import model_card
from tests import exports, flow_pipelines
from tests.refusals import refuse
from tests.runs.tiny import network

PROMPT, SEED, STEPS = "a small red ring above a large blue square", 5, [4, 2]
METHODS = {"length": MeanFlow(steps=STEPS), "weight": Guidance(range=(1.0, 5.0))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind, method) -> what was trained, an adapter on its base; the folder of both."""

    @cache
    def get(kind: str, name: str = "length") -> tuple[Any, Any]:
        work = tmp_path_factory.mktemp(kind)
        teacher = loading.load(exports.teacher(work, kind))
        if kind not in ("sd", "xl"):
            teacher.fit((flow_pipelines.CHANNELS, flow_pipelines.SIDE, flow_pipelines.SIDE))
        method = METHODS[name]
        (stage,) = method.stages(teacher)
        student = Lora(kind="lora", rank=2).build(teacher, 0)
        student = job.networks_of(method, stage, teacher, student)["student"]
        generator = torch.Generator().manual_seed(1)
        for parameter in adapters.own(student.network).values():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        for one in stage.students:
            drawn = job._as_drawn(student, one, main=True)
            saving.save(drawn, work / one.name)
            card = model_card.describe(drawn, **model_card.of_merged(student))
            model_card.write(work / one.name, card)
        return student, work

    return get


@torch.no_grad()
def drawn(denoiser, steps, **more):
    """What our own sampler draws, as it trained: the adapter on its base, told how long its steps are, or how
    much they are guided."""
    noise = torch.randn(1, *denoiser.shape, generator=torch.Generator().manual_seed(SEED))
    cond = denoiser.conditioner.embed([PROMPT], (32, 32))
    if denoiser.guidance_range is not None and not more.keys() & {GUIDANCE}:
        more |= denoiser.guided_by(denoiser.usual_guidance, 1)
    return samplers.sample(denoiser, noise, steps, **cond, **more)


def length(of):
    return {"interval": torch.tensor([of], dtype=torch.float64)}


SLOW = [
    pytest.param(kind, marks=pytest.mark.slow) for kind in ("xl", "flux", "sana", "lumina2", "qwen_image")
]


@pytest.mark.parametrize("kind", ["sd", "sd3", *SLOW])
def test_stock_draws_the_adapter_on_its_base(saved, kind):
    student, work = saved(kind)
    base = network(work / f"{kind}-teacher")
    kept = {name.replace(".base_layer.", "."): p for name, p in student.network.state_dict().items()}
    assert all(torch.equal(kept[name], weight) for name, weight in base.items())
    for steps in STEPS:
        folder = work / f"{steps}-steps"
        card = json.loads((folder / "diffkd.json").read_text())
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": card["steps"], **card.get("call", {})}
        generator = torch.Generator().manual_seed(SEED)
        theirs = pipeline(PROMPT, generator=generator, output_type="latent", **call).images
        theirs = packing.unpack(theirs, *student.shape[1:]) if kind in ("flux", "qwen_image") else theirs
        ours = drawn(student, steps, **length(1 / steps))
        size = ours.abs().max()
        assert (ours - theirs).abs().max() <= 1e-5 * max(1, size)
        # which another length would not have drawn, nor the adapter without any, nor the base
        for other in (length(1.0), {}):
            assert (drawn(student, steps, **other) - ours).abs().max() > 1e-2 * size
        assert base.keys() <= network(folder).keys() and not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["sd", pytest.param("xl", marks=pytest.mark.slow)])
def test_stock_takes_the_weight_that_an_adapter_learned_to_take(saved, kind):
    """By an embedding that the base has not, and that is the adapter's alone."""
    student, work = saved(kind, "weight")
    base = network(work / f"{kind}-teacher")
    kept = {name.replace(".base_layer.", "."): p for name, p in student.network.state_dict().items()}
    assert all(torch.equal(kept[name], weight) for name, weight in base.items())
    assert [n for n in kept.keys() - base.keys() if ".lora_" not in n] == ["time_embedding.cond_proj.weight"]
    (folder,) = (path.parent for path in work.glob("*/diffkd.json") if path.parent.name != f"{kind}-teacher")
    assert not list(folder.glob("*.safetensors"))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    for weight in (1.5, 4.0):
        generator = torch.Generator().manual_seed(SEED)
        call = {"num_inference_steps": 4, "guidance_scale": weight, "output_type": "latent"}
        theirs = pipeline(PROMPT, generator=generator, **call).images
        ours = drawn(student, 4, **student.guided_by(weight, 1))
        size = max(1, ours.abs().max())
        assert (ours - theirs).abs().max() <= 1e-5 * size
        seen.append(ours)
    assert (seen[0] - seen[1]).abs().max() > 1e-2


def test_its_card_says_how_it_learned_and_it_is_no_adapter(saved, cli, tmp_path):
    student, work = saved("sd")
    folder = work / "4-steps"
    card = json.loads((folder / "diffkd.json").read_text())
    learned = sum(p.numel() for p in student.network.parameters() if p.requires_grad)
    assert card["merged_lora"] == {
        "rank": 2, "targets": [*student.adapter.targets], "parameters": learned
    } and "lora" not in card  # fmt: skip
    why = (
        "is saved merged, as it learned with one more number as an input, for which no LoRA file has weights"
    )
    assert f"It learned as an adapter (LoRA) of rank 2 and {why}." in (folder / "README.md").read_text()
    refuse(cli, tmp_path, "fuse", folder, "--out", tmp_path / "x", says=[why, "use it as it is"])
    for to in ("lora", "kohya"):
        says = [f"--to {to}, which holds an adapter alone", why, "there are single-file, onnx"]
        refuse(cli, tmp_path, "export", folder, "--to", to, says=says)
    card["merged_lora"] = {"rank": "2"}
    (tmp_path / "diffkd.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="has merged_lora .*, which describes no adapter; repair or remove"):
        loading.card(tmp_path)
