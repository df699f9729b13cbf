"""Images in, numbers out: each kind of data beside what scikit-learn, numpy and Pillow say of it."""

from __future__ import annotations

import io
import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from sklearn.datasets import load_digits

from diffkd.data import Data, images
from diffkd.data.digits import Digits
from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset
from diffkd.data.images import Images
from diffkd.errors import UserError

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _noise_does_not_depend_on_the_tests_before():
    RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state


def folder(path, **fields) -> Images:
    return Folder(kind="folder", path=path, **{"size": 8, "channels": 1} | fields).load()


def hub(path, **fields) -> Images:
    return HubDataset(kind="datasets", path=str(path), **{"size": 8, "channels": 1} | fields).load()


def noise(height: int, width: int, channels: int | None = None) -> np.ndarray:
    shape = (height, width) if channels is None else (height, width, channels)
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def mode(path) -> str:
    with Image.open(path) as image:
        return image.mode


def bicubic(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W) -> the middle (size, size) of it, shrunk or grown until its short side is size, in float64.

    Keys' cubic with a = -1/2, stretched over the input where that shrinks, cut off at the image's edges.
    """
    scale = min(image.shape) / size

    def matrix(n: int) -> np.ndarray:
        centre = (n - min(image.shape)) / 2 + (np.arange(size) + 0.5) * scale
        x = np.abs((np.arange(n) + 0.5 - centre[:, None]) / max(scale, 1))
        inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        w = np.where(x < 1, inner, np.where(x < 2, outer, 0))
        return w / w.sum(1, keepdims=True)

    height, width = image.shape
    return (matrix(height) @ (image @ matrix(width).T).clip(0, 255)).clip(0, 255)


def test_digits_are_scikit_learns():
    images, source = Digits(kind="digits").load(), load_digits()
    assert images.pixels.shape == (1797, 1, 8, 8) and images.pixels.dtype == np.uint8
    levels = [
        0,
        16,
        32,
        48,
        64,
        80,
        96,
        112,
        128,
        143,
        159,
        175,
        191,
        207,
        223,
        239,
        255,
    ]  # 255 / 16 * 0, 1, ..., 16
    assert np.array_equal(images.pixels[:, 0], np.array(levels, np.uint8)[source.images.astype(int)])
    assert images.labels.dtype == torch.int64 and np.array_equal(images.labels.numpy(), source.target)
    assert images.classes == list("0123456789") and images.num_classes == 10
    assert images.shape == (1, 8, 8) and len(images) == 1797 and not images.flip


def test_class_folders_are_labels_in_sorted_order(tmp_path, image_folder):
    root = image_folder(tmp_path, classes=["b", "a", "10", "2"], count=3)
    (root / "empty").mkdir()
    (root / "a" / "notes.txt").write_text("no image")
    (root / "2" / "deeper").mkdir()
    (root / "2" / "002.png").rename(root / "2" / "deeper" / "002.PNG")
    images = folder(root)
    assert images.classes == ["10", "2", "a", "b"] and images.num_classes == 4
    assert images.labels.tolist() == [n for n in range(4) for _ in range(3)]
    for n, name in enumerate(images.classes):
        files = {f.read_bytes() for f in (root / name).rglob("*.[pP][nN][gG]")}
        expected = {np.asarray(Image.open(io.BytesIO(f))).tobytes() for f in files}
        assert {images.pixels[i, 0].tobytes() for i in np.flatnonzero(images.labels.numpy() == n)} == expected


def test_labelled_false_leaves_the_classes_out(tmp_path, image_folder):
    root = image_folder(tmp_path, classes=["a", "b"])
    images = folder(root, labelled=False)
    assert images.labels is None and images.num_classes is None and images.classes == []
    assert np.array_equal(images.pixels, folder(root).pixels)


def test_loose_images_are_in_the_order_of_their_names(tmp_path):
    arrays = {name: noise(8, 8) for name in ("b.png", "a.png", "c.webp", "A.png")}
    for name, pixels in arrays.items():
        Image.fromarray(pixels).convert("RGB").save(tmp_path / name, lossless=True)
    images = folder(tmp_path)
    assert images.labels is None
    assert np.array_equal(images.pixels[:, 0], [arrays[name] for name in sorted(arrays)])


def test_images_beside_class_folders_are_refused(tmp_path, image_folder):
    root = image_folder(tmp_path, classes=["a"])
    Image.fromarray(noise(8, 8)).save(root / "loose.png")
    with pytest.raises(UserError, match=r"both images and class folders \(a"):
        folder(root)


@pytest.mark.parametrize("shape", [(24, 72), (72, 24), (20, 31), (9, 8), (16, 16)])
def test_the_short_side_is_fitted_and_the_centre_kept(tmp_path, shape):
    """A picture whose outer parts are white and black, so that a crop off the centre is seen."""
    height, width = shape
    pixels = noise(height, width)
    border = (max(shape) - min(shape)) // 2
    along = pixels if width > height else pixels.T
    along[:, :border], along[:, along.shape[1] - border :] = 255, 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.abs(folder(tmp_path).pixels[0, 0] - bicubic(pixels, 8)).max() < 1.2  # Pillow rounds twice


def test_an_image_of_the_right_size_is_left_as_it_is(tmp_path):
    pixels = noise(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(folder(tmp_path, channels=3).pixels[0], pixels.transpose(2, 0, 1))


def test_upscaling_only_where_asked_for(tmp_path):
    pixels = noise(5, 5)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"small\.png is 5x5, smaller than data\.size 8; .*upscale"):
        folder(tmp_path)
    assert np.abs(folder(tmp_path, upscale=True).pixels[0, 0] - bicubic(pixels, 8)).max() < 1.2


@pytest.mark.parametrize("size", [(8, 7), (7, 80)])
def test_the_short_side_is_what_counts(tmp_path, size):
    Image.fromarray(noise(*size)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"{size[1]}x{size[0]}"):
        folder(tmp_path)


def test_grey_of_colour_is_luma_and_colour_of_grey_is_grey(tmp_path):
    colour, grey = noise(8, 8, 3), noise(8, 8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "b.png")
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    found = folder(tmp_path)
    assert np.abs(found.pixels[0, 0] - luma).max() <= 1
    assert np.array_equal(found.pixels[1, 0], grey)
    assert np.array_equal(folder(tmp_path, channels=3).pixels[1], np.stack([grey] * 3))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".jpeg", ".PNG", ".Jpg"])
def test_formats(tmp_path, suffix):
    """Of a smooth picture, so that JPEG has little to lose."""
    ramp = np.linspace(40, 200, 16)[:, None] + np.linspace(0, 40, 16)
    pixels = np.stack([ramp, ramp[::-1], np.full((16, 16), 90)], -1).round().astype(np.uint8)
    lossy = suffix.lower().startswith(".j")
    Image.fromarray(pixels).save(
        tmp_path / f"a{suffix}", **({"quality": 98} if lossy else {"lossless": True})
    )
    found = folder(tmp_path, size=16, channels=3).pixels[0].astype(int)
    assert np.abs(found - pixels.transpose(2, 0, 1)).max() <= (8 if lossy else 0)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.T),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).T),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_turns_the_image_upright(tmp_path, orientation, upright):
    pixels = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(folder(tmp_path, size=16).pixels[0, 0], upright(pixels))


def test_exif_of_a_jpeg(tmp_path):
    """A landscape that the camera says is a portrait: the centre of the portrait, rows running down it."""
    pixels = np.repeat(np.linspace(0, 255, 48).astype(np.uint8)[None], 16, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    found = folder(tmp_path, size=16).pixels[0, 0].astype(int)
    assert np.abs(found - pixels[0, 16:32, None].astype(int)).max() <= 3


def test_16_bit_grey_keeps_its_range(tmp_path):
    eight = noise(8, 8)
    eight[0, :2] = 0, 255
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert mode(tmp_path / "a.png").startswith("I")
    assert np.array_equal(folder(tmp_path).pixels[0, 0], eight)
    assert np.array_equal(folder(tmp_path, channels=3).pixels[0], np.stack([eight] * 3))


def test_alpha_is_dropped(tmp_path):
    rgba, la = noise(8, 8, 4), noise(8, 8, 2)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    Image.fromarray(la, "LA").save(tmp_path / "b.png")
    found = folder(tmp_path, channels=3).pixels
    assert np.array_equal(found[0], rgba[..., :3].transpose(2, 0, 1))
    assert np.array_equal(found[1], np.stack([la[..., 0]] * 3))
    assert np.array_equal(folder(tmp_path).pixels[1, 0], la[..., 0])


@pytest.mark.parametrize("transparency", [None, 3, bytes([255, 128, 0, 7])])
def test_palettes(tmp_path, transparency):
    palette, index = noise(4, 3), RNG.integers(0, 4, (8, 8), dtype=np.uint8)
    image = Image.fromarray(index, "L")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    assert mode(tmp_path / "a.png") == "P"
    assert np.array_equal(folder(tmp_path, channels=3).pixels[0], palette[index].transpose(2, 0, 1))
    luma = palette[index] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(folder(tmp_path).pixels[0, 0] - luma).max() <= 1


def test_black_and_white(tmp_path):
    bits = RNG.integers(0, 2, (8, 8)).astype(bool)
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert np.array_equal(folder(tmp_path).pixels[0, 0], bits * np.uint8(255))


def test_cmyk_jpeg(tmp_path):
    """One colour all over: R = 255 (1 - C)(1 - K), and so on."""
    cmyk = np.array([40, 120, 200, 60], np.uint8)
    Image.fromarray(np.tile(cmyk, (16, 16, 1)), "CMYK").save(tmp_path / "a.jpg", quality=100)
    expected = 255 * (1 - cmyk[:3] / 255) * (1 - cmyk[3] / 255)
    found = folder(tmp_path, size=16, channels=3).pixels[0]
    assert np.abs(found - expected[:, None, None]).max() <= 3


def broken(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_labels_stay_with_their_images_after_a_broken_one(tmp_path, image_folder, caplog):
    root = image_folder(tmp_path, classes=["a", "b"], count=60)
    whole = folder(root)
    broken(root / "a" / "007.png")
    with caplog.at_level(logging.WARNING, "diffkd"):
        images = folder(root)
    kept = [i for i in range(120) if i != 7]
    assert np.array_equal(images.pixels, whole.pixels[kept])
    assert torch.equal(images.labels, whole.labels[kept])
    assert [str(root / "a" / "007.png") in r.message for r in caplog.records] == [True]


def test_one_in_a_hundred_may_be_broken_and_no_more(tmp_path, image_folder, caplog):
    root = image_folder(tmp_path, count=100)
    broken(root / "010.png")
    assert len(folder(root)) == 99
    (root / "020.png").write_bytes(b"")
    caplog.clear()
    with pytest.raises(UserError, match=r"2 of 100 images .* cannot be read"):
        folder(root)
    assert "010.png" in caplog.text and "020.png" in caplog.text


def test_a_batch_is_pixels_over_127_5_less_one():
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    images = Images("all", pixels, torch.arange(4), list("abcd"))
    x0, labels = images.batch(64, torch.Generator().manual_seed(0))
    assert x0.shape == (64, 1, 8, 8) and x0.dtype == torch.float32 and len(set(labels.tolist())) == 4
    expected = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(x0.numpy(), expected[labels.numpy()])
    assert x0.min() == -1 and x0.max() == 1


def numbered(count: int, *, flip: bool = False) -> Images:
    """Images that no mirror leaves as they are; image i is labelled i."""
    pixels = np.random.default_rng(3).integers(0, 256, (count, 3, 4, 4), dtype=np.uint8)
    return Images("numbered", pixels, torch.arange(count), [str(i) for i in range(count)], flip)


def test_a_batch_depends_on_its_generator_alone():
    images = numbered(50, flip=True)
    first = images.batch(32, torch.Generator().manual_seed(5))
    torch.manual_seed(123)
    np.random.seed(123)
    images.batch(7, torch.Generator().manual_seed(6))
    again = numbered(50, flip=True).batch(32, torch.Generator().manual_seed(5))
    other = images.batch(32, torch.Generator().manual_seed(7))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_every_image_is_as_likely():
    labels = torch.cat([numbered(10).batch(1000, torch.Generator().manual_seed(s))[1] for s in range(10)])
    chi2 = float(((torch.bincount(labels, minlength=10) - 1000.0) ** 2 / 1000).sum())
    assert chi2 < 28  # 9 degrees of freedom: 0.1%


def test_flips_are_half_of_the_images_mirrored_exactly():
    images, straight = numbered(50, flip=True), torch.from_numpy(numbered(50).pixels).float() / 127.5 - 1
    x0, labels = images.batch(4000, torch.Generator().manual_seed(0))
    mirrored = (x0 == straight[labels].flip(-1)).flatten(1).all(1)
    as_it_was = (x0 == straight[labels]).flatten(1).all(1)
    assert bool((mirrored ^ as_it_was).all())
    assert abs(mirrored.float().mean() - 0.5) < 0.03  # 3.8 standard deviations
    share = torch.zeros(50).index_add_(0, labels, mirrored.float()) / torch.bincount(labels, minlength=50)
    assert bool(((share > 0.2) & (share < 0.8)).all())  # of each image, not of some


def test_no_flips_where_they_were_not_asked_for():
    images = numbered(50)
    x0, labels = images.batch(500, torch.Generator().manual_seed(0))
    assert torch.equal(x0, (torch.from_numpy(images.pixels).float() / 127.5 - 1)[labels])


def test_flip_comes_from_the_config(tmp_path, image_folder):
    root = image_folder(tmp_path)
    assert folder(root, flip=True).flip and not folder(root).flip
    saved = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(noise(8, 8))]}, datasets.Features(image=datasets.Image())
    )
    saved.save_to_disk(tmp_path / "saved")
    assert hub(tmp_path / "saved", flip=True).flip and not hub(tmp_path / "saved").flip


def test_pixels_beyond_the_limit_are_mapped_from_a_file(tmp_path, image_folder, monkeypatch):
    root = image_folder(tmp_path, classes=["a", "b"], count=60)
    broken(root / "a" / "001.png")
    in_memory = folder(root)
    assert not isinstance(in_memory.pixels, np.memmap)
    monkeypatch.setattr(images, "IN_MEMORY", 100)
    mapped = folder(root)
    assert isinstance(mapped.pixels, np.memmap) and len(mapped) == 119
    assert np.array_equal(mapped.pixels, in_memory.pixels)
    one, other = (i.batch(16, torch.Generator().manual_seed(1)) for i in (mapped, in_memory))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(mapped.uint8(slice(100, 300)), torch.from_numpy(in_memory.pixels[100:]))


def test_what_a_batch_gives_may_be_written_to(tmp_path):
    images = numbered(4)
    before = images.pixels.copy()
    images.batch(4, torch.Generator().manual_seed(0))[0].zero_()
    images.uint8(torch.tensor([0, 1])).zero_()
    assert np.array_equal(images.pixels, before)


ARRAYS = [noise(8, 8) for _ in range(4)]


def saved(path, **columns):
    kinds = datasets.Features(
        {
            "name": datasets.Value("string"),
            "picture": datasets.Image(),
            "sort": datasets.ClassLabel(names=["zebra", "ant", "bee"]),
            "number": datasets.Value("int64"),
        }
    )
    content = {
        "name": list("abcd"),
        "picture": [Image.fromarray(a) for a in ARRAYS],
        "sort": [2, 0, 1, 2],
        "number": [5, 0, 3, 1],
    }
    return datasets.Dataset.from_dict(content | columns, features=kinds)


def test_a_saved_data_set(tmp_path):
    saved(tmp_path).save_to_disk(tmp_path / "set")
    images = hub(tmp_path / "set")
    assert np.array_equal(images.pixels[:, 0], ARRAYS)
    assert images.labels.tolist() == [2, 0, 1, 2] and images.classes == ["zebra", "ant", "bee"]
    assert images.num_classes == 3
    unlabelled = hub(tmp_path / "set", labelled=False)
    assert unlabelled.labels is None and unlabelled.classes == []


def test_columns_by_name(tmp_path):
    saved(tmp_path).save_to_disk(tmp_path / "set")
    images = hub(tmp_path / "set", image="picture", label="number")
    assert images.labels.tolist() == [5, 0, 3, 1] and images.classes == list("012345")
    with pytest.raises(UserError, match="no column 'colour'; it has name, picture, sort, number"):
        hub(tmp_path / "set", label="colour")
    with pytest.raises(UserError, match="no image column 'photo'; it has name, picture, sort, number"):
        hub(tmp_path / "set", image="photo")


@pytest.mark.parametrize(
    "fields", [{"image": "number"}, {"image": "name"}, {"label": "name"}, {"label": "picture"}]
)
def test_columns_of_another_type_are_named(tmp_path, fields, caplog):
    """One message about the column, not one about each row."""
    saved(tmp_path).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=f"column '?{next(iter(fields.values()))}"):
        hub(tmp_path / "set", **fields)
    assert caplog.records == []


def test_the_split_of_a_data_set_dict(tmp_path):
    whole = saved(tmp_path)
    both = datasets.DatasetDict({"train": whole.select([0, 1, 2]), "test": whole.select([3])})
    both.save_to_disk(tmp_path / "set")
    assert np.array_equal(hub(tmp_path / "set").pixels[:, 0], ARRAYS[:3])
    test = hub(tmp_path / "set", split="test")
    assert np.array_equal(test.pixels[:, 0], ARRAYS[3:]) and test.labels.tolist() == [2]
    with pytest.raises(UserError, match=r"split valid.*train.*test"):
        hub(tmp_path / "set", split="valid")


def test_a_broken_row_is_skipped_with_its_label(tmp_path, caplog):
    """Images as bytes, of which one is no image."""
    good = io.BytesIO()
    Image.fromarray(ARRAYS[0]).save(good, "PNG")
    rows = [{"bytes": good.getvalue() if i != 30 else b"no image", "path": None} for i in range(120)]
    table = datasets.Dataset.from_dict(
        {"image": rows, "label": [i % 7 for i in range(120)]},
        features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=7)),
    )
    table.save_to_disk(tmp_path / "set")
    images = hub(tmp_path / "set")
    assert images.labels.tolist() == [i % 7 for i in range(120) if i != 30] and len(images) == 119
    assert len(caplog.records) == 1 and "[30]" in caplog.text


def test_a_data_set_with_no_rows_is_refused(tmp_path, monkeypatch):
    saved(tmp_path).save_to_disk(tmp_path / "set")
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: saved(path).select([]))
    with pytest.raises(UserError, match="no images"):
        hub(tmp_path / "set")


def test_unlabelled_rows_are_refused_by_name(tmp_path):
    """Hidden test labels are -1 in many data sets: no class of any model."""
    saved(tmp_path, sort=[2, -1, 1, 0]).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=r"label.*-1|-1.*label"):
        hub(tmp_path / "set")


def test_kind_chooses_the_class():
    parse = TypeAdapter(Data).validate_python
    assert type(parse({"kind": "digits"})) is Digits
    assert type(parse({"kind": "folder", "path": "x", "size": 8})) is Folder
    assert type(parse({"kind": "datasets", "path": "x", "size": 8})) is HubDataset
