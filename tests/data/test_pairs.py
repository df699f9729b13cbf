"""Pairs on disk: whose noise they are of, what is kept, what is refused, what is mended."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffkd.data import pairs
from diffkd.data.pairs import PairCache, Recipe
from diffkd.errors import UserError

RECIPE = Recipe("a" * 64, "ddim", 8, 1.5, 1000, [1, 1, 2], (2, 4, 4))


def images(numbers: range) -> torch.Tensor:
    """Pair i's is i + 1 everywhere."""
    return (torch.tensor([*numbers]).float() + 1)[:, None, None, None].expand(-1, 2, 4, 4)


def labels(numbers: range) -> torch.Tensor:
    return torch.tensor([*numbers]) % 3


def fill(cache: PairCache) -> list[int]:
    """Writes what is missing; the numbers of those shards."""
    cache.begin()
    missing = cache.missing()
    for number in missing:
        cache.write(number, images(cache.shards()[number]), labels(cache.shards()[number]))
    assert cache.missing() == []
    return missing


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(pairs, "IN_SHARD", 8)


@pytest.fixture
def cache(tmp_path, small_shards) -> PairCache:
    made = PairCache(tmp_path / "pairs", RECIPE, 20)
    assert fill(made) == [0, 1, 2]
    return made


def test_noise_labels_and_images_of_a_batch_belong_together(cache):
    x0, found, noise = cache.batch(256, torch.Generator().manual_seed(0))
    numbers = (x0[:, 0, 0, 0] - 1).long()
    assert x0.shape == noise.shape == (256, 2, 4, 4) and x0.dtype == noise.dtype == torch.float32
    assert {*numbers.tolist()} == {*range(20)} and torch.equal(found["class_labels"], numbers % 3)
    for i, one in zip(numbers.tolist(), noise, strict=True):
        generator = torch.Generator("cpu").manual_seed(RECIPE.seed + i)
        assert torch.equal(one, torch.randn(1, 2, 4, 4, generator=generator)[0])


def test_a_batch_depends_on_its_generator_alone_and_draws_its_indices_first(cache, tmp_path):
    again = PairCache(tmp_path / "pairs", RECIPE, 20)
    assert again.missing() == []
    one, other = (each.batch(16, torch.Generator().manual_seed(5)) for each in (cache, again))
    assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
    assert torch.equal(one[1]["class_labels"], other[1]["class_labels"])
    indices = cache.indices(16, torch.Generator().manual_seed(5))
    assert torch.equal(indices, (one[0][:, 0, 0, 0] - 1).long())


def test_noise_is_not_stored_and_shards_are_sized_by_bytes(cache, monkeypatch, tmp_path):
    files = sorted((tmp_path / "pairs").glob("*.safetensors"))
    assert [len(load_file(file)["x0"]) for file in files] == [8, 8, 4]
    assert all(load_file(file).keys() == {"x0", "labels"} for file in files)
    monkeypatch.setattr(pairs, "SHARD_BYTES", 3 * 2 * 4 * 4 * 4)
    assert PairCache(tmp_path / "other", RECIPE, 20).shards()[:2] == [range(3), range(3, 6)]


def test_what_is_there_is_not_made_again_and_more_can_be_added(cache, tmp_path):
    more = PairCache(tmp_path / "pairs", RECIPE, 30)
    assert fill(more) == [2, 3]  # the third was not full
    fewer = PairCache(tmp_path / "pairs", RECIPE, 5)
    assert fewer.missing() == [] and int(fewer.batch(500, torch.Generator())[0].max()) == 5


@pytest.mark.parametrize("damage", ["torn", "altered", "empty", "other"])
def test_a_damaged_shard_is_made_again(cache, tmp_path, caplog, damage):
    path = tmp_path / "pairs" / "000001.safetensors"
    if damage == "other":
        save_file({"x0": torch.zeros(8, 1, 4, 4)}, path)
    else:
        content = path.read_bytes()
        cut = {"torn": content[:-9], "altered": content[:-9] + b"\1" + content[-8:], "empty": b""}
        path.write_bytes(cut[damage])
    assert fill(PairCache(tmp_path / "pairs", RECIPE, 20)) == [1]
    assert "000001.safetensors cannot be used" in caplog.text


@pytest.mark.parametrize(
    "change",
    [{"teacher": "b" * 64}, {"sampler": "heun"}, {"steps": 4}, {"guidance": 1.0}, {"seed": 1},
     {"classes": [1, 1]}, {"classes": []}, {"shape": (1, 4, 4)}],
)  # fmt: skip
def test_pairs_of_another_recipe_are_refused(cache, tmp_path, change):
    (key,) = change
    with pytest.raises(UserError, match=f"are of another {key}.*use another folder") as refused:
        PairCache(tmp_path / "pairs", dataclasses.replace(RECIPE, **change), 20)
    assert len(str(refused.value).splitlines()) == 1 and "b" * 13 not in str(refused.value)


@pytest.mark.parametrize("content", ["[]", "{", '{"schema": 2}', None])
def test_a_folder_of_something_else_is_refused(tmp_path, content):
    place = tmp_path / "pairs"
    place.mkdir()
    (place / ("notes.txt" if content is None else "pairs.json")).write_text(content or "mine")
    with pytest.raises(UserError, match="use another folder"):
        PairCache(place, RECIPE, 20)


def test_an_unconditional_models_pairs_have_no_labels(tmp_path, small_shards):
    made = PairCache(tmp_path, dataclasses.replace(RECIPE, classes=[]), 4)
    made.begin()
    made.write(0, images(range(4)), None)
    assert made.missing() == [] and made.batch(2, torch.Generator())[1] == {}
    assert json.loads((tmp_path / "pairs.json").read_text())["classes"] == []
