"""`diffkd distill` of unconditional latents: cached before they are quantised; students open in stock."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import diffkd
from diffkd.models import loading
from tests import ldm
from tests.runs.adapters import assert_trained
from tests.runs.tiny import OF_LATENTS
from tests.stock import stock_pictures

CONFIG = {
    **OF_LATENTS,
    "data": {"kind": "folder", "path": "images", "size": 16},
    "method": {"name": "progressive", "steps": [2], "updates": 2, "learning_rate": 1e-3},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    ldm.teacher_and_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def test_a_run_from_images_to_students(cli, here):
    """The cache; `diffkd sample` of the student beside stock, in a process without diffkd."""
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    (file,) = (here / "run" / "cache").glob("latents/*/000000.safetensors")
    kept = load_file(file)
    vqvae = diffusers.VQModel.from_pretrained(here / "teacher", subfolder="vqvae")
    images = diffkd.data.Folder(kind="folder", path=here / "images", size=16).load()
    with torch.no_grad():
        encoded = vqvae.encode(images.uint8(slice(0, 8)).float() / 127.5 - 1).latents
    assert torch.allclose(kept["mean"], encoded * vqvae.config.scaling_factor, atol=1e-5)
    folder = here / "run" / "students" / "2-steps"
    before, after = (diffkd.load(place).network.state_dict() for place in (here / "teacher", folder))
    assert any((before[key] != after[key]).any() for key in before)
    (stock,) = stock_pictures([(folder, 2)], here, 4, None)
    assert (str(stock["kind"]), str(stock["scheduler"])) == ("LDMPipeline", "DDIMScheduler")
    assert stock["pictures"].std() > 5
    drawn = cli("sample", folder, "--out", "out.npz", "-n", 4, "--seed", 5)
    assert (drawn.code, drawn.stderr) == (0, "")
    with np.load("out.npz") as content:
        assert np.abs(content["arr_0"].astype(int) - stock["pictures"]).max() <= 1
    card = (folder / "README.md").read_text()
    assert "batch_size=16" in card and "num_inference_steps=2" in card
    assert type(loading.open_stock(folder)).__name__ == "LDMPipeline"


@pytest.mark.slow
def test_adapters(cli, here, monkeypatch):
    assert_trained(cli, monkeypatch, here)


@pytest.mark.parametrize("name", ["consistency", "dmd2"])
def test_other_methods_know_no_family(cli, here, name):
    """Students by renoise in two steps: first noise of each generator, fresh noise of the global one."""
    more = {"fake_updates": 1} if name == "dmd2" else {}
    method = {"name": name, "steps": 2 if more else [2], "updates": 2, "learning_rate": 1e-3, **more}
    (here / "run.yaml").write_text(yaml.safe_dump({**CONFIG, "method": method, "pictures": 0}))
    outcome = cli("distill", "run.yaml")
    assert outcome.code == 0, outcome.stderr
    folder = here / "run/students/2-steps"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    assert "global" in (folder / "README.md").read_text()
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(2, num_inference_steps=2, output_type="np").images
    assert pictures.shape == (2, 16, 16, 3) and pictures.std() > 0.02
