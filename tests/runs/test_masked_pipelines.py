"""`diffkd distill` of PixArt, SANA, Lumina 2, Z-Image and Qwen-Image: captions and latents cached, students
that open in stock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml

import diffkd
from diffkd.core.activations import capture_activations
from diffkd.core.discriminator import block_shapes
from tests import masked_pipelines
from tests.masked_pipelines import KINDS, PIXELS
from tests.runs.adapters import assert_trained
from tests.runs.tiny import OF_LATENTS, network

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a red ring", "a star above a square", "two crosses", "a small circle", "a ring"]
ONE: dict[str, Any] = {"steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "consistency": {"steps": [2, 1]},
    "dmd2": {**ONE, "fake_updates": 1},
    "lcm": {"steps": [2, 1], "guidance": 3.0},
    "reflow": {"steps": [2], "pairs": 6, "pair_steps": 2},
    "shortcut": {"steps": [2, 1]},
}
BY_DEFAULT = {  # one for each kind; the others are slow
    "pixart_alpha": "reflow", "pixart_sigma": "dmd2", "sana": "shortcut", "lumina2": "consistency",
    "z_image": "dmd2", "qwen_image": "lcm",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind) -> a folder of a teacher and captioned images."""
    folders: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            masked_pipelines.teacher_and_images(folders[kind], kind, CAPTIONS)
        return folders[kind]

    return get


@pytest.fixture
def here(made, kind, tmp_path, monkeypatch):
    for name in ("teacher", "images"):
        (tmp_path / name).symlink_to(made(kind) / name)
    monkeypatch.chdir(tmp_path)
    config = {**OF_LATENTS, "data": {**OF_LATENTS["data"], "size": PIXELS[kind]}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def stock_images(folder: Path, prompts: list[str]) -> np.ndarray:
    """uint8 images of the stock pipeline, called as the student's card says."""
    card = json.loads((folder / "diffkd.json").read_text())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(len(prompts))]
    images = pipeline(
        [*prompts], generator=generators, num_inference_steps=card["steps"], output_type="np", **card["call"]
    ).images
    return np.rint(images * 255)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_captions_to_students(cli, here, kind):
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    cached = here / "run" / "cache"
    assert len([*cached.glob("latents/*/000000.safetensors")]) == 1
    assert len([*cached.glob("embeddings/*/embeddings.json")]) == 1
    for steps in (4, 2):
        folder = here / "run" / "students" / f"{steps}-steps"
        student = diffkd.load(folder)
        assert (student.guidance_baked_in, student.steps) == (3.0, steps)
        (ours,) = diffkd.generate(student, 2, prompts=CAPTIONS[:2], seed=5)
        assert np.abs(ours.numpy().astype(int) - stock_images(folder, CAPTIONS[:2])).max() <= 1
        before, after = network(here / "teacher"), network(folder)
        assert before.keys() == after.keys() and any((before[key] != after[key]).any() for key in before)
    call, card = json.loads((folder / "diffkd.json").read_text())["call"], (folder / "README.md").read_text()
    assert all(f"{key}={value}" in card for key, value in call.items())


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, method, marks=[] if BY_DEFAULT[kind] == method else pytest.mark.slow)
        for kind in KINDS
        for method in METHODS
        if (kind, method) != ("z_image", "shortcut")
    ],
)
def test_methods_know_no_family(cli, here, kind, method):
    asked = [{"name": method, "updates": 1, **METHODS[method]}]
    if kind.startswith("pixart"):  # an epsilon teacher's x0 of pure noise is only its error
        asked = [{"name": "output", "prediction": "v_prediction", "updates": 1}, *asked]
    outcome = cli("distill", "run.yaml", f"method={json.dumps(asked)}", "pictures=0")
    assert outcome.code == 0, outcome.stderr
    for folder in (here / "run" / "students").iterdir():
        found = network(folder)
        assert found and all(value.isfinite().all() for value in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_adapters(cli, here, kind, monkeypatch):
    """The prompt's part of Qwen-Image's last block is thrown away."""
    last = "transformer_blocks.1.attn."
    idle = [f"{last}add_q_proj", f"{last}to_add_out"] if kind == "qwen_image" else []
    assert_trained(cli, monkeypatch, here, idle)


@pytest.mark.parametrize("kind", ["z_image"])
def test_a_network_that_cannot_be_told_the_length_of_a_step(cli, here, kind):
    """Its embedding of the time is not diffusers' own."""
    outcome = cli("distill", "run.yaml", "method={name: shortcut, steps: [2], updates: 1}")
    assert outcome.code == 2 and "no time embedding that a second time could be added to" in outcome.stderr


@pytest.mark.parametrize(("kind", "name"), [("pixart_sigma", "pixart"), ("sana", "sana")])
def test_the_config_for_public_models_runs(cli, here, kind, name):
    """Two updates of every stage."""
    changes = {
        "teacher.path": "teacher", "data.path": "images", "data.size": PIXELS[kind], "method.updates": 2,
        "training.batch_size": 4, "training.micro_batches": 2, "evaluation": None, "pictures": 0,
    }  # fmt: skip
    if name == "pixart":
        changes["method.updates_v"] = 2
    config = ROOT / "configs" / name / "progressive.yaml"
    outcome = cli("distill", config, *(f"{key}={json.dumps(value)}" for key, value in changes.items()))
    assert outcome.code == 0, outcome.stderr
    for steps in (8, 4, 2, 1):
        folder = here / f"runs/{name}-progressive/students" / f"{steps}-steps"
        (ours,) = diffkd.generate(diffkd.load(folder), 2, prompts=CAPTIONS[:2], seed=5)
        assert np.abs(ours.numpy().astype(int) - stock_images(folder, CAPTIONS[:2])).max() <= 1


@pytest.mark.parametrize("kind", [kind for kind in ("lumina2", "z_image") if kind in KINDS])
def test_a_discriminator_on_the_image_alone(cli, here, kind):
    """The blocks before those that see prompt and image together."""
    asked = {
        "name": "dmd2",
        **ONE,
        "updates": 1,
        "fake_updates": 1,
        "gan": 1e-3,
        "blocks": ["noise_refiner.0"],
    }
    outcome = cli("distill", "run.yaml", f"method={json.dumps(asked)}", "pictures=0")
    assert outcome.code == 0, outcome.stderr
    teacher = diffkd.load("teacher")
    if kind == "lumina2":  # Z-Image's are padded to a multiple of 32
        assert block_shapes(teacher, ["noise_refiner.0"]) == {"noise_refiner.0": (16, 16)}
    (few, many) = (
        block_shapes_of(teacher, prompt)
        for prompt in ("a", "a long prompt of many more words than one of 32")
    )
    assert few["noise_refiner.0"] == many["noise_refiner.0"] and few["layers.0"] != many["layers.0"]


def block_shapes_of(teacher, prompt):
    names = ["noise_refiner.0", "layers.0"]
    x, t, _ = teacher.example_inputs()
    with torch.no_grad(), capture_activations(teacher.network, names) as found:
        teacher(x, t, **teacher.conditioner.embed([prompt]))
    return {name: tuple(value.shape[1:]) for name, value in found.items()}
