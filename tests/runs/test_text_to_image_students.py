"""`diffkd distill` of text-to-image teachers into smaller students, which open in stock pipelines."""

from __future__ import annotations

import json
import re

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import diffkd
from tests import text_to_image
from tests.refusals import refuse

CAPTIONS = ["a red ring", "two crosses"]
LAYOUTS = {
    "sd": {
        "block_out_channels": (8, 16, 16), "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "xl": {
        "block_out_channels": (8, 16), "layers_per_block": 2, "attention_head_dim": (1, 2),
        "transformer_layers_per_block": (1, 2), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip
CONFIG = {
    "data": {"kind": "folder", "path": "images", "size": 32}, "out": "run", "evaluation": None, "pictures": 0,
    "training": {"batch_size": 4, "log_every": 1},
}  # fmt: skip
METHODS = {
    "progressive": {"name": "progressive", "steps": [2], "updates": 2, "guidance": 3.0},
    "feature": {"name": "feature", "updates": 2},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Teachers of both layouts, and a folder of captioned images."""
    work = tmp_path_factory.mktemp("work")
    for name, layout in LAYOUTS.items():
        made = text_to_image.pipeline(work / "parts", xl=name == "xl", prediction="v_prediction", **layout)
        made.save_pretrained(work / name, safe_serialization=True)
    (work / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(work / "images" / f"{i}.png")
        (work / "images" / f"{i}.txt").write_text(CAPTIONS[i % 2])
    return work


@pytest.fixture
def here(work, tmp_path, monkeypatch):
    for name in (*LAYOUTS, "images"):
        (tmp_path / name).symlink_to(work / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def options(layout, method, **student):
    values = {"teacher": {"path": layout}, "method": METHODS[method], "student": student}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def dropped(blocks):
    return {"kind": "drop_blocks", "blocks": blocks}


def narrowed(*channels, **more):
    return {"kind": "narrow", "channels": channels, **more}


RUNS = [
    ("sd", "progressive", dropped("base")),
    ("sd", "progressive", dropped("small")),
    ("sd", "progressive", dropped("tiny")),
    ("sd", "progressive", narrowed(4, 8, 8)),
    ("sd", "feature", dropped("base")),
    ("sd", "feature", dropped("small")),
    ("sd", "feature", dropped("tiny")),
    ("sd", "feature", narrowed(4, 8, 8, importance="taylor")),
    ("xl", "progressive", dropped("base")),
    ("xl", "progressive", narrowed(4, 8)),
    ("xl", "feature", dropped("small")),
    ("xl", "feature", narrowed(4, 8, importance="taylor")),
]
BY_DEFAULT = (2, 4, 11)


@pytest.mark.parametrize(
    ("layout", "method", "student"),
    [r if i in BY_DEFAULT else pytest.param(*r, marks=pytest.mark.slow) for i, r in enumerate(RUNS)],
)
def test_a_smaller_student_opens_in_stock(cli, here, layout, method, student):
    outcome = cli("distill", "run.yaml", *options(layout, method, **student))
    assert outcome.code == 0, outcome.stderr
    (folder,) = (here / "run" / "students").iterdir()
    ours, whole = diffkd.load(folder), diffkd.load(layout)
    counts = [sum(p.numel() for p in one.network.parameters()) for one in (ours, whole)]
    assert counts[0] < 0.8 * counts[1]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    guided = {} if method == "progressive" else {"guidance_scale": 1.0}
    theirs = pipeline(
        CAPTIONS, num_inference_steps=2, generator=generators, output_type="np", height=32, width=32, **guided
    ).images
    (drawn,) = diffkd.generate(ours, 2, prompts=CAPTIONS, seed=5, steps=2)
    assert np.abs(drawn.numpy().astype(int) - np.rint(theirs * 255)).max() <= 1 and drawn.float().std() > 1


REFUSED = [
    ("xl", dropped("tiny"), "down_blocks.1 has 16 channels and down_blocks.0 has 8: the remaining blocks"),
    ("sd", dropped("large"), "student.blocks is 'large', which is no architecture of BK-SDM; use base"),
    (
        "sd",
        dropped(["mid_block.resnets.1"]),
        "'mid_block.resnets.1', which this network does not have; it has",
    ),
    ("sd", dropped(["down_blocks.0.resnets.1"]), "0 of up_blocks.2; the two blocks of a resolution have one"),
    ("sd", narrowed(4, 12, 12), "channels 12 is not a multiple of 8 .*attention heads of 8 channels"),
    ("sd", {"kind": "from_config", "model": {}}, "takes no prompts, and .* use drop_blocks or narrow"),
]


@pytest.mark.parametrize(("layout", "student", "message"), REFUSED)
def test_what_does_not_fit_is_refused(cli, here, layout, student, message):
    said = refuse(cli, here, "distill", "run.yaml", *options(layout, "feature", **student))
    assert re.search(message, said)
