"""Buckets of shapes, what models are told of crops, and their latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffkd.data.bucketed_latents import BucketedLatents
from diffkd.data.buckets import BucketedImages, cropped, nearest, shapes
from diffkd.data.folder import Folder
from diffkd.errors import UserError
from diffkd.models import loading
from tests import text_to_image

SIZES = [(48, 48), (40, 80), (90, 50), (64, 64), (33, 70), (100, 100)]  # height and width


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"caption {number % 4}\n")
    return root


def test_shapes_are_within_the_area_and_aspect():
    found = shapes(1024, 64)
    assert (1024, 1024) in found and (1216, 832) in found and (832, 1216) in found
    assert len({width for _, width in found}) == len(found)
    for height, width in found:
        assert height % 64 == width % 64 == 0 and height * width <= 1024**2 < (height + 64) * width
        assert 1 / 2 <= height / width <= 2
    assert shapes(32, 32) == [(32, 32)]


def test_the_nearest_shape_is_nearest_in_the_logarithm_of_the_aspect():
    among = shapes(512, 64)
    sizes = torch.from_numpy(np.random.default_rng(1).integers(1, 4000, (200, 2)))
    for (height, width), place in zip(sizes.tolist(), nearest(sizes, among).tolist(), strict=True):
        away = [abs(np.log(height / width * w / h)) for h, w in among]
        assert away[place] == min(away)
    for place, (height, width) in enumerate(among):
        assert nearest(torch.tensor([[3 * height, 3 * width]]), among).item() == place


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (40, 24)])
def test_the_crop_is_where_the_pixels_are(shape):
    """By the coordinates themselves: an image whose pixels say where they are, resized and cropped."""
    height, width = 240, 360
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    top, left = cropped(torch.tensor([[height, width]]), shape)[0, 2:].tolist()
    scale = max(shape[0] / height, shape[1] / width)
    for values, corner in ((rows, top), (columns, left)):
        image = Image.fromarray(values).convert("F")
        first = np.asarray(ImageOps.fit(image, shape[::-1], Image.Resampling.BILINEAR))[0, 0]
        assert first * scale == pytest.approx(corner, abs=1.0)
    assert cropped(torch.tensor([[height, width]]), shape)[0, :2].tolist() == [height, width]


def test_a_turned_image_has_the_shape_that_it_is_seen_in(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "b.jpg")
    images = Folder(kind="folder", path=tmp_path, size=32, buckets=8).open()
    assert isinstance(images, BucketedImages)
    assert {part.shape for part in images.parts} == {(3, 40, 24), (3, 32, 32)}


def cache(folder, root, model, **options):
    images = Folder(kind="folder", path=root, size=32, buckets=8, **options).open()
    denoiser = loading.load(model)
    made = BucketedLatents(folder, images, denoiser.codec, denoiser.conditioner)
    made.fill(0, 1, lambda: None, lambda count: None)
    return made, denoiser


@pytest.mark.parametrize("xl", [False, True])
def test_a_batch_is_of_one_bucket(root, tmp_path, xl):
    """Of every bucket by its share, its latents those of the images as they are resized, with their own
    captions and, for SDXL, sizes and crops."""
    text_to_image.pipeline(tmp_path / "parts", xl=xl).save_pretrained(tmp_path / "model")
    made, denoiser = cache(tmp_path / "cache", root, tmp_path / "model", upscale=True)
    assert made.left() == 0 and made.shape == (4, 8, 8) and len(made) == 3
    parts = made.images.parts
    assert sorted(map(len, parts)) == [1, 2, 3] and len(made.images) == 6
    seen = torch.zeros(6)
    for seed in range(60):
        x0, cond = made.batch(5, torch.Generator().manual_seed(seed))
        indices = made.indices(5, torch.Generator().manual_seed(seed))
        seen[indices.unique()] += 1
        files = [int(part.pixels.files[i]) for part in parts for i in range(len(part))]
        chosen = [files[i] for i in indices]
        prompts = [f"caption {file % 4}" for file in chosen]
        height, width = (8 * 4 * side // 8 for side in x0.shape[2:])
        embedded = denoiser.conditioner.embed(prompts, size=(height, width))
        states = embedded["encoder_hidden_states"]
        assert torch.allclose(cond["encoder_hidden_states"], states, atol=1e-5)
        if xl:
            sizes = torch.tensor([SIZES[file] for file in chosen])
            told = torch.cat([cropped(sizes, (height, width)), torch.tensor([[height, width]] * 5)], 1)
            assert torch.equal(cond["time_ids"], told)
            assert {**cond}.keys() == {"encoder_hidden_states", "text_embeds", "time_ids"}
        if seed < 4:
            for file, latent in zip(chosen, x0, strict=True):
                image = Image.open(root / f"{file}.png")
                fitted = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
                given = torch.tensor(fitted).permute(2, 0, 1)[None].float() / 127.5 - 1
                mean, std = denoiser.codec.moments(given)
                assert ((latent - mean[0]).abs() <= 6 * std[0] + 1e-4).all()
    assert (seen > 0).all()
    shown = made.cond(torch.arange(4))
    assert torch.equal(shown["encoder_hidden_states"][3], shown["encoder_hidden_states"][0])


def test_buckets_are_for_models_of_latents(root):
    with pytest.raises(UserError, match="buckets 8 is for models of latents"):
        Folder(kind="folder", path=root, size=32, buckets=8).load()
    with pytest.raises(ValueError, match="buckets 40 is more than size 32"):
        Folder(kind="folder", path=root, size=32, buckets=40)


def test_an_image_too_small_for_its_shape(root, tmp_path):
    text_to_image.pipeline(tmp_path / "parts").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"0\.png is 48x48, smaller than size 64 \(here 64x64\)"):
        images = Folder(kind="folder", path=root, size=64, buckets=16).open()
        for part in images.parts:
            part.uint8(slice(0, len(part)))
