"""Buckets of shapes, what models are told of crops, and their latents."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from diffkd.data.bucketed_latents import BucketedLatents
from diffkd.data.buckets import BucketedImages, bucket_shapes, cropped, nearest
from diffkd.data.decoding import open_image, upright
from diffkd.data.folder import Folder
from diffkd.data.on_demand import OnDemand
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
    found = bucket_shapes(1024, 64)
    assert (1024, 1024) in found and (1216, 832) in found and (832, 1216) in found
    assert len({width for _, width in found}) == len(found)
    for height, width in found:
        assert height % 64 == width % 64 == 0 and height * width <= 1024**2 < (height + 64) * width
        assert 1 / 2 <= height / width <= 2
    assert bucket_shapes(32, 32) == [(32, 32)]


def test_the_nearest_shape_is_nearest_in_the_logarithm_of_the_aspect():
    among = bucket_shapes(512, 64)
    sizes = torch.from_numpy(np.random.default_rng(1).integers(1, 4000, (200, 2)))
    for (height, width), place in zip(sizes.tolist(), nearest(sizes, among).tolist(), strict=True):
        away = [abs(np.log(height / width * w / h)) for h, w in among]
        assert away[place] == min(away)
    for place, (height, width) in enumerate(among):
        assert nearest(torch.tensor([[3 * height, 3 * width]]), among).item() == place


@pytest.mark.parametrize("size", [(240, 360), (360, 240), (301, 301)])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (40, 24)])
def test_the_crop_is_where_the_pixels_are(shape, size):
    """By the coordinates themselves: an image whose pixels say where they are, resized and cropped."""
    height, width = size
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    top, left = cropped(torch.tensor([[height, width]]), shape)[0, 2:].tolist()
    scale = max(shape[0] / height, shape[1] / width)
    for values, corner in ((rows, top), (columns, left)):
        image = Image.fromarray(values + 0.5)  # the middle of each pixel
        first = np.asarray(ImageOps.fit(image, shape[::-1], Image.Resampling.BOX))[0, 0]
        assert first * scale - 0.5 == pytest.approx(corner, abs=0.51)
    assert cropped(torch.tensor([[height, width]]), shape)[0, :2].tolist() == [height, width]


def turned(path: Path, by: str) -> None:
    """An image of 80x40 that lies on its side, by EXIF data, by XMP, or by both."""
    exif, more = Image.Exif(), dict[str, Any]()
    if "exif" in by or by == "profile":
        exif[0x0112] = 6
        more = {"exif": exif}
    xmp = '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    if by == "profile":  # as ImageMagick writes it
        text, more = PngInfo(), {}
        text.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes())}\n{exif.tobytes().hex()}")
        more = {"pnginfo": text}
    elif "xmp" in by and path.suffix == ".png":
        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp)
        more |= {"pnginfo": text}
    elif "xmp" in by and path.suffix == ".tif":
        more |= {"tiffinfo": {700: xmp.encode(), **({0x0112: 6} if "exif" in by else {})}}
        more.pop("exif", None)
    elif "xmp" in by:
        more |= {"xmp": xmp.encode()}
    Image.fromarray(np.zeros((40, 80, 3), np.uint8)).save(path, **more)


@pytest.mark.parametrize(
    ("kind", "by"),
    [
        *((kind, by) for kind in ("jpg", "png", "tif", "webp") for by in ("exif", "xmp", "exif and xmp")),
        ("png", "profile"),
    ],
)
def test_a_turned_image_has_the_shape_that_it_is_seen_in(tmp_path, monkeypatch, kind, by):
    """By the head of its file alone: no pixels are read to put it into its bucket."""
    turned(tmp_path / f"a.{kind}", by)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / f"b.{kind}")
    with open_image(tmp_path / f"a.{kind}") as opened:
        assert upright(opened, 3).size == (40, 80)
    with monkeypatch.context() as patch:
        for one in (PngImageFile, JpegImageFile, TiffImageFile, WebPImageFile):
            patch.setattr(one, "load", lambda self: pytest.fail("pixels were read"))
        images = Folder(kind="folder", path=tmp_path, size=32, buckets=8).open()
    assert isinstance(images, BucketedImages)
    assert {part.shape for part in images.parts} == {(3, 40, 24), (3, 32, 32)}
    for part in images.parts:
        pixels, readable, sizes = part.read(slice(0, 1))
        assert readable.all() and sizes[0].tolist() == ([80, 40] if part.shape[1] == 40 else [64, 64])


def test_unreadable_images_are_counted_over_all_buckets(model, root, tmp_path):
    """One that is alone in its bucket takes it away; its caption is not shown."""
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("square")
    Image.fromarray(rng.integers(0, 256, (40, 80, 3), dtype=np.uint8)).save(tmp_path / "9.png")
    (tmp_path / "9.txt").write_text("wide")
    content = (tmp_path / "9.png").read_bytes()
    (tmp_path / "9.png").write_bytes(content[: len(content) // 2])
    made, _ = cache(tmp_path / "cache", tmp_path, model)
    made.check()
    assert made.unreadable() == 1 and len(made.images) == 4
    kept = made.readable_images()
    assert len(kept) == 3 and {*kept.captions} == {"square"}
    for seed in range(20):
        assert made.batch(2, torch.Generator().manual_seed(seed))[0].shape[2:] == (8, 8)


def test_a_file_that_is_gone_is_said(tmp_path):
    """And not put into another bucket, as if it were no image."""
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"a\.png cannot be read \(No such file"):
        Folder(kind="folder", path=tmp_path, size=32, buckets=8).open()


@pytest.fixture
def model(tmp_path_factory):
    work = tmp_path_factory.mktemp("sd")
    text_to_image.pipeline(work / "parts").save_pretrained(work / "model")
    return work / "model"


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


def test_an_image_too_small_for_its_shape(tmp_path):
    Image.fromarray(np.zeros((33, 70, 3), np.uint8)).save(tmp_path / "a.png")
    images = Folder(kind="folder", path=tmp_path, size=64, buckets=16).open()
    with pytest.raises(UserError, match=r"a\.png is 70x33, smaller than size 64 \(here 80x48\)"):
        images.uint8(slice(0, 1))


def test_sizes_are_read_once(model, root, tmp_path, monkeypatch):
    """Kept beside the latents; those of other files, and damaged ones, are read anew."""
    root = Path(shutil.copytree(root, tmp_path / "images"))
    data = Folder(kind="folder", path=root, size=32, buckets=8, upscale=True)
    made, _ = cache(tmp_path / "cache", root, model, upscale=True)
    (file,) = (tmp_path / "cache" / "sizes").glob("*/*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(OnDemand, "sizes", lambda self: pytest.fail("heads were read"))
        again = data.open(tmp_path / "cache")
    assert [part.pixels.files.tolist() for part in again.parts] == [
        part.pixels.files.tolist() for part in made.images.parts
    ]
    assert again.digest() == made.images.digest() == data.open().digest()
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert data.open(tmp_path / "cache").digest() == again.digest()
    Image.fromarray(np.zeros((90, 40, 3), np.uint8)).save(root / "another.png")
    assert len(data.open(tmp_path / "cache")) == len(again) + 1
