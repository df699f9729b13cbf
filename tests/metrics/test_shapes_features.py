"""The shipped network of shapes: how well it reads pictures, and prompt accuracy by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkd.data import shapes
from diffkd.data.shapes import Scene, Shape
from diffkd.errors import UserError
from diffkd.metrics.base import Batch
from diffkd.metrics.features import describe, load
from diffkd.metrics.features.shapes import SHAPES_WEIGHTS, asked
from diffkd.metrics.prompt_accuracy import Shown

COUNT = 400


@pytest.fixture(scope="module")
def network():
    return load("shapes")


@pytest.fixture(scope="module")
def pictures():
    """(N, H, W, 3) uint8, captions and scenes that the network did not see."""
    found = [shapes.example(77, i) for i in range(COUNT)]
    pixels = torch.from_numpy(np.stack([pixels.transpose(1, 2, 0) for pixels, _, _ in found]))
    return pixels, [text for _, text, _ in found], [scene for _, _, scene in found]


def features_of(network, pixels):
    return network(pixels.permute(0, 3, 1, 2))


def accuracy(network, pixels, prompts):
    shown = Shown(network, torch.device("cpu"))
    for part, words in ((slice(0, 100), prompts[:100]), (slice(100, None), prompts[100:])):
        shown.update(Batch(part.start, pixels[part], features_of(network, pixels[part]), prompts=words))
    shown.merge_across(lambda x: x)
    wanted, found = shown.sums.tolist()
    return found / wanted


def test_it_reads_what_pictures_show(network, pictures):
    assert SHAPES_WEIGHTS.stat().st_size < 1_000_000
    pixels, captions, scenes = pictures
    told = network.read(features_of(network, pixels))
    expected = torch.tensor([asked(scene) for scene in scenes])
    said = expected >= 0
    right = (told == expected)[said].float().mean()
    assert right > 0.99
    assert accuracy(network, pixels, captions) > 0.99


def test_prompt_accuracy_falls_with_what_is_wrong(network, pictures):
    """With every caption that of the next picture it is about that of guessing."""
    pixels, captions, scenes = pictures
    moved = [*captions[1:], captions[0]]
    expected, shown = (
        torch.tensor([asked(shapes.read_caption(text)) for text in texts]) for texts in (moved, captions)
    )
    by_chance = (expected == torch.tensor([asked(scene) for scene in scenes]))[expected >= 0].float().mean()
    found = accuracy(network, pixels, moved)
    assert shown.shape == expected.shape and abs(found - by_chance.item()) < 0.03 and found < 0.4


def test_the_first_shape_of_a_caption_may_be_the_lower_one():
    red, blue = Shape("ring", "red", "small"), Shape("square", "blue", None)
    assert asked(Scene((red, blue), "above")) == asked(Scene((blue, red), "below"))
    assert asked(Scene((red, blue), "left of")) == asked(Scene((blue, red), "right of"))
    assert asked(Scene((red, blue), "above")) != asked(Scene((red, blue), "below"))
    assert asked(Scene((red,), None)) == [-1, 4, 0, 0, -1, -1, -1]


def test_other_sizes_and_grey_pictures(network, pictures):
    pixels, _, scenes = pictures
    large = pixels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    told = network.read(features_of(network, large))
    expected = torch.tensor([asked(scene) for scene in scenes])
    assert (told == expected)[expected >= 0].float().mean() > 0.97
    assert features_of(network, pixels[..., :1]).shape == (COUNT, 96)
    assert describe("shapes", network)["num_features"] == 96


def test_a_prompt_of_another_kind_is_refused(network, pictures):
    pixels, captions, _ = pictures
    with pytest.raises(UserError, match="prompts about shapes.*'a cat'"):
        accuracy(network, pixels, ["a cat", *captions[1:]])
