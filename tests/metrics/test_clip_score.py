"""CLIP score against transformers' own CLIPModel, tokenizer and image processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffkd.errors import UserError
from diffkd.metrics.base import Batch, FeatureSet, Inputs
from diffkd.metrics.clip_score import ClipScore, scores
from diffkd.metrics.features import describe, load
from diffkd.metrics.features.clip_score import CLIPTextImage
from diffkd.metrics.statistics import Statistics
from tests import text_to_image

transformers = pytest.importorskip("transformers")
WORDS = ["a red ring", "two crosses", "a star above a square", "nothing at all", "the moon, rising", "a"]
LONG = "the ring and the star and the cross " * 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("clip")
    network = text_to_image.clip(folder)
    network.folder = folder
    return network


@pytest.fixture(scope="module")
def network(model: Any) -> CLIPTextImage:
    return CLIPTextImage(model.folder)


@pytest.fixture
def copy(model: Any, tmp_path: Path) -> Path:
    """Of the folder, which a test may spoil."""
    return Path(shutil.copytree(model.folder, tmp_path / "clip"))


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    """(N, H, W, 3) uint8, random."""
    rng = np.random.default_rng([count, height, width])
    return torch.from_numpy(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def prompts(count: int) -> list[str]:
    return [f"{WORDS[i % len(WORDS)]} {i}" for i in range(count)]


def processed(images: torch.Tensor, **options: bool) -> torch.Tensor:
    """What CLIP's stock image processor makes of them, by Pillow."""
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = kind(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, **options)
    opened = [Image.fromarray(one.numpy()) for one in images]
    return processor(opened, return_tensors="pt").pixel_values


def stock(model: Any, images: torch.Tensor, texts: list[str]) -> np.ndarray:
    """100 max(cos, 0) by transformers alone, fed as its documentation does."""
    pixels = processed(images)
    tokens = transformers.CLIPTokenizer.from_pretrained(model.folder)(
        texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    found = model(**tokens, pixel_values=pixels)
    cosines = found.logits_per_image.diagonal().double() / model.logit_scale.double().exp()
    return 100 * cosines.clamp(min=0).numpy()


def measured(
    network: CLIPTextImage, images: torch.Tensor, texts: list[str], parts: list[list[int]]
) -> tuple[float, list[str]]:
    """The score and the notes by batches of these indices, those of two processes added up at the end."""
    metric = ClipScore()
    every = [metric.running(network, len(images), torch.device("cpu")) for _ in range(2)]
    for number, part in enumerate(parts):
        features = network(images[part].permute(0, 3, 1, 2))
        every[number % 2].update(Batch(part[0], images[part], features, prompts=[texts[i] for i in part]))
    own = [one.sums.clone() for one in every]
    every[0].merge_across(lambda x: sum(own[1:], own[0]))
    blank = FeatureSet(Statistics(network.num_features, torch.device("cpu")))
    inputs = Inputs(blank, None, metric.options(len(images), None), "digits", every[0])
    return metric.compute(inputs)["clip_score"], list(metric.notes(inputs))


def test_it_is_the_stock_one_of_images_of_the_networks_size(model, network):
    images, texts = pictures(24, 56, 56), prompts(24)
    expected = stock(model, images, texts)
    assert 0 < (expected == 0).sum() < 24 and expected.max() > 5  # cosines of both signs
    embeddings, cut = network.embed(texts)
    found = scores(network(images.permute(0, 3, 1, 2)), embeddings)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    value, notes = measured(network, images, texts, [list(range(24))])
    assert value == pytest.approx(expected.mean(), rel=1e-5)
    assert cut == 0 and notes == []


@pytest.mark.parametrize("size", [(64, 64), (120, 90), (90, 121), (32, 32), (20, 41)])
def test_images_of_other_sizes_are_resized_and_cropped_as_the_stock_processor_does(model, network, size):
    """Pillow computes in fixed point, so a few pixels differ by a grey level."""
    images = pictures(6, *size)
    theirs = processed(images, do_normalize=False, do_rescale=False)
    ours = network.resized(images.permute(0, 3, 1, 2))
    difference = (ours - theirs).abs()
    assert ours.shape == theirs.shape and difference.max() <= 2 and difference.mean() < 0.02
    texts = prompts(6)
    value, _ = measured(network, images, texts, [list(range(6))])
    assert value == pytest.approx(stock(model, images, texts).mean(), rel=2e-3)


def test_batches_processes_and_order_do_not_matter(network):
    images, texts = pictures(17, 56, 56), prompts(17)
    whole, _ = measured(network, images, texts, [list(range(17))])
    for parts in ([[i] for i in range(17)], [[0, 1, 2, 3, 4], [5], [*range(6, 17)]], [[*range(16, -1, -1)]]):
        assert measured(network, images, texts, parts)[0] == pytest.approx(whole, rel=1e-6)
    moved = texts[1:] + texts[:1]
    assert abs(measured(network, images, moved, [list(range(17))])[0] - whole) > 1e-3


def test_a_score_is_between_0_and_100():
    x = torch.nn.functional.normalize(torch.randn(9, 24, generator=torch.Generator().manual_seed(1)), dim=1)
    assert scores(x, x).tolist() == pytest.approx([100.0] * 9, abs=1e-4)
    assert scores(x, -x).tolist() == [0.0] * 9
    y = torch.nn.functional.normalize(torch.randn(9, 24, generator=torch.Generator().manual_seed(2)), dim=1)
    assert ((scores(x, y) >= 0) & (scores(x, y) <= 100)).all()


def test_a_prompt_of_more_than_77_tokens_is_cut(model, network):
    images, texts = pictures(3, 56, 56), [LONG, "a ring", LONG + "and more"]
    value, notes = measured(network, images, texts, [[0, 1, 2]])
    assert value == pytest.approx(stock(model, images, texts).mean(), rel=1e-5)
    assert notes == ["2 images with a prompt of more than 77 tokens, cut for the CLIP score"]
    one, other = network.embed([LONG])[0], network.embed([LONG + "and more"])[0]
    assert torch.equal(one, other)


def test_what_it_is_by_is_recorded(model, network, copy):
    described = describe("clip_score", network)
    assert described["name"] == "clip_score" and described["size"] == 56 and described["tokens"] == 77
    assert described["num_features"] == 24 and described["weights"] == str(model.folder)
    assert "antialiased" in described["resize"] and "crop" in described["resize"]
    words = json.loads((copy / "tokenizer.json").read_text())
    words["model"]["vocab"]["zzzz"] = len(words["model"]["vocab"])
    (copy / "tokenizer.json").write_text(json.dumps(words))
    other = load("clip_score", weights=str(copy)).describe()
    assert other["sha256"] == described["sha256"] and other["vocabulary"] != described["vocabulary"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer in .* cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "T.from_pretrained"),
        (
            lambda f: (f / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}'),
            r"image_mean \[0.5, 0.5, 0.5\], and clip_score normalises",
        ),
    ],
)
def test_weights_that_cannot_give_it(copy, spoil, says):
    spoil(copy)
    with pytest.raises(UserError, match=says) as refusal:
        CLIPTextImage(copy)
    assert "\n" not in str(refusal.value)


def test_the_stock_image_processor_of_clip_is_accepted(copy):
    usual = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (copy / "preprocessor_config.json").write_text(json.dumps(usual))
    assert CLIPTextImage(copy).size == 56
