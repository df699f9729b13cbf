"""The folder of families: every file keeps the contract, and a file that is added is a family."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import diffusers
import pytest
from torch import nn

from diffkd.errors import UserError
from diffkd.models import families, loading, saving

PAGE = Path(__file__).parents[2] / "docs" / "contributing" / "family.md"


@pytest.mark.parametrize("family", families.families(), ids=lambda family: family.__name__.split(".")[-1])
def test_every_file_keeps_the_contract(family):
    assert all(hasattr(diffusers, name) for name in family.PIPELINES)
    assert issubclass(family.NETWORK, nn.Module) and callable(family.load) and callable(family.save)
    for name in family.PIPELINES:
        assert {*family.CALL} <= {*inspect.signature(getattr(diffusers, name).__call__).parameters}


def test_no_two_families_load_the_same_pipeline():
    names = [name for family in families.families() for name in family.PIPELINES]
    assert len(set(names)) == len(names)


@pytest.fixture
def added(tmp_path, monkeypatch):
    """added(text): a family in a file of the folder."""
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    yield lambda text: (tmp_path / "of_the_future.py").write_text(text)
    sys.modules.pop("diffkd.models.families.of_the_future", None)


def test_a_family_that_the_installed_diffusers_lacks_is_left_out(added, tmp_path):
    added("from diffusers import FutureTransformer2DModel")
    assert families.of_newer_diffusers() == ["of_the_future"] and len(families.families()) > 5
    (tmp_path / "model_index.json").write_text('{"_class_name": "FuturePipeline"}')
    with pytest.raises(UserError, match="FuturePipeline, .* with a newer diffusers of_the_future"):
        loading.load(tmp_path)


def test_a_family_that_cannot_be_imported_for_another_reason_says_so(added):
    added("from diffkd.models import nonsense")
    with pytest.raises(ImportError, match="nonsense"):
        families.families()


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The files of the page about adding a family, by path; the family's own is in the folder of families."""
    files = dict(re.findall(r"### `(\S+\.py)`\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    for name, source in files.items():
        (tmp_path / Path(name).name).write_text(source)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    yield {name: tmp_path / Path(name).name for name in files}
    sys.modules.pop("diffkd.models.families.pixel_mlp", None)


def test_the_example_of_the_page_works(example, monkeypatch):
    """The page's own test, run by pytest."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    family, test = example.values()
    assert family.name in {f"{f.__name__.split('.')[-1]}.py" for f in families.families()}
    assert pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(test.parent), str(test)]) == 0


def test_the_example_is_distilled(cli, example, tmp_path, monkeypatch):
    """The whole way: `diffkd distill` of its pipeline, the student's own images, and `diffkd sample`."""
    import torch

    from diffkd.core.denoiser import Denoiser
    from diffkd.core.schedules import Schedule

    pixel_mlp = next(f for f in families.families() if f.__name__.endswith("pixel_mlp"))
    saving.save(Denoiser(pixel_mlp.NETWORK(), Schedule.cosine(64), "v_prediction"), tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "out: run\nteacher: {path: teacher}\ndata: {kind: digits}\n"
        "method: {name: progressive, steps: [1], updates: 2}\ntraining: {batch_size: 8}\nevaluation: null\n"
    )
    assert cli("distill", "run.yaml").code == 0
    assert cli("sample", "run/students/1-steps", "-n", 3, "--out", "images.npz").code == 0
    x0 = pixel_mlp.PixelMLPPipeline(Path("run/students/1-steps"))(torch.randn(2, 1, 8, 8), 1)
    assert x0.shape == (2, 1, 8, 8) and x0.isfinite().all()
