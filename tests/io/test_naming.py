"""Messages call a setting as the user at hand gives it: an option, a config's key, an argument in Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

import diffkd
from diffkd.data.folder import Folder
from diffkd.errors import UserError
from diffkd.io import naming
from diffkd.metrics import features
from diffkd.metrics.evaluation import image_sets
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.image_sources import DataSource
from diffkd.metrics.evaluation.image_stream import stored_images
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.evaluation.targets import Target, opened
from diffkd.metrics.features.inception_weights import find_weights
from diffkd.training.run_folder import RunFolder

COMMANDS = (  # what no config and no library call reaches: their messages may name options
    "cli/", "runs/record_file.py", "runs/evaluate.py", "runs/evaluate_options.py", "runs/stats.py",
    "runs/repeat.py", "runs/measurement.py", "runs/fid.py", "runs/feature_training.py", "runs/fuse.py",
    "runs/export.py", "runs/push.py", "models/exports/",
    "generation/sample.py", "generation/writer.py", "generation/folder_writer.py", "generation/npz_writer.py",
    "generation/labels.py", "metrics/evaluation/records.py", "io/environment.py", "io/naming.py",
)  # fmt: skip
ANOTHER = re.compile(  # of a command that the message names, or where there is no other surface
    r"(diffkd|python|pip|git) [\w ]*(TEACHER )?--|--tiles|use --allow"
)


def test_no_message_that_several_reach_names_an_option_itself():
    found = []
    for path in Path(diffkd.__file__).parent.rglob("*.py"):
        place = str(path.relative_to(Path(diffkd.__file__).parent))
        if place.startswith(COMMANDS):
            continue
        tree = ast.parse(path.read_text())
        docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in docs else None
            if isinstance(text, str) and re.search(r"(?<![\w-])--[a-z]", ANOTHER.sub("", text)):
                found.append(f"{place}:{node.lineno} {text}")
    assert found == []


def _weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("DIFFKD_INCEPTION", raising=False)

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    find_weights()


def _few(tmp_path, monkeypatch):
    stored_images(DataSource(diffkd.data.Digits(kind="digits").load()), Evaluation(samples=5000))


def _upscaled(tmp_path, monkeypatch):
    Reference(Folder(kind="folder", path=tmp_path / "images", size=32))


def _resized(tmp_path, monkeypatch):
    (tmp_path / "images" / "larger").mkdir()
    from PIL import Image

    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "images" / "larger" / "x.png")
    image_sets.images_of(image_sets.ImageFolder(path=tmp_path / "images"))


def _steps(tmp_path, monkeypatch):
    digits = Reference(image_sets.parse("digits"))
    next(opened(Target(str(tmp_path / "pipeline")), Evaluation(), digits, torch.device("cpu")))


def _guided_stock(tmp_path, monkeypatch):
    digits = Reference(image_sets.parse("digits"))
    target = Target(str(tmp_path / "pipeline"), stock=True, guidance=2)
    next(opened(target, Evaluation(), digits, torch.device("cpu")))


def _dtype(tmp_path, monkeypatch):
    features.load("digits", dtype="float64")


def _resize(tmp_path, monkeypatch):
    features.load("digits", resize="clean")


SAID = {  # the names on a command line, in a config, in Python
    _weights: ("neither --weights nor", "neither evaluation.weights nor", "neither weights nor"),
    _few: ("(--samples)", "(evaluation.samples)", "(samples)"),
    _upscaled: ("than --resize 32; use a", "set evaluation.reference.upscale: true", "size 32"),
    _resized: ("say --resize to", "say evaluation.reference.resize to", "say resize to"),
    _steps: ("say --steps", "say steps", "say steps"),
    _guided_stock: ("leave out --guidance", "stock: true draws", "leave out guidance"),
    _dtype: ("--dtype 'float64'", "evaluation.dtype 'float64'", "dtype 'float64'"),
    _resize: ("--feature-resize 'clean'", "evaluation.resize 'clean'", "resize 'clean'"),
}


@pytest.mark.parametrize("fault", SAID, ids=lambda fault: fault.__name__[1:])
@pytest.mark.parametrize("surface", ["command", "config", "python"])
def test_a_setting_is_called_as_it_was_given(
    tmp_path, monkeypatch, image_folder, make_pipeline, surface, fault
):
    image_folder(tmp_path)
    make_pipeline(tmp_path)
    naming.speak(surface)
    with pytest.raises(UserError) as error:
        fault(tmp_path, monkeypatch)
    said = SAID[fault][["command", "config", "python"].index(surface)]
    assert said in str(error.value)
    if surface != "command":
        assert " --" not in str(error.value)


def test_the_ways_on_without_inception(tmp_path, monkeypatch):
    """For whoever has no network: other features, or nothing measured at all where there is more to do."""
    naming.speak("config")
    with pytest.raises(UserError, match="or evaluation: null to measure nothing"):
        _weights(tmp_path, monkeypatch)
    naming.speak("command")
    with pytest.raises(UserError, match=r"use other --features, your own or, for handwritten digits, "):
        _weights(tmp_path, monkeypatch)


def test_a_benchmark_offers_no_option_that_it_has_not(tmp_path):
    RunFolder(tmp_path / "run", {"evaluation": {"samples": 4}}).close()
    for allow, offered in ((None, False), (False, True)):
        with pytest.raises(UserError) as error:
            RunFolder(tmp_path / "run", {"evaluation": {"samples": 5}}, allow=allow)
        assert ("--allow" in str(error.value)) is offered
