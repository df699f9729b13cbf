"""Sets of images beside what Pillow and NumPy wrote: order, labels, modes, orientation, broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from diffkd.data.digits import Digits
from diffkd.data.hub import HubDataset
from diffkd.errors import UserError
from diffkd.metrics.evaluation.image_sets import File, ImageFolder, images_of, parse
from diffkd.metrics.evaluation.image_sources import FolderSource, batches


def noise(height: int, width: int, *seed: int, channels: int | None = 3, high: int = 256) -> np.ndarray:
    shape = (height, width) if channels is None else (height, width, channels)
    dtype = np.uint8 if high == 256 else np.uint16
    return np.random.default_rng([29, height, width, *seed]).integers(0, high, shape, dtype=dtype)


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def whole(root: Path, resize: int | None = None) -> np.ndarray:
    source = FolderSource(root, resize)
    return source.read(0, len(source)).numpy()


def refused(path: Path | str, *says: str, resize: int | None = None) -> str:
    """Opened and read to the end, somewhere on the way: UserError, one line, which says all that."""
    with pytest.raises(UserError) as error:
        source = images_of(parse(str(path), resize=resize))
        source.read(0, len(source))
    message = str(error.value)
    assert "\n" not in message
    for word in says:
        assert word in message, message
    return message


# folders


def test_in_the_order_of_their_names(tmp_path):
    names = ["b.png", "a10.png", "a2.png", "Z.png", "ä.png", "c.webp", "0.PNG"]
    pixels = {name: noise(5, 7, i) for i, name in enumerate(names)}
    for name in names:
        save(tmp_path / name, pixels[name], **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    source = images_of(ImageFolder(path=tmp_path))
    assert len(source) == 7 and source.labels is None and source.name == str(tmp_path)
    read = source.read(0, 7)
    assert read.dtype == torch.uint8 and read.shape == (7, 5, 7, 3)
    for got, name in zip(read.numpy(), sorted(names), strict=True):
        assert np.array_equal(got, pixels[name]), name
    assert np.array_equal(source.read(2, 5), read[2:5])


def test_subfolders_are_labels(tmp_path):
    """Numbers by the sorted names of the first level, whatever lies below it."""
    places = ["dog/1.png", "cat/9.png", "cat/deep/er/0.png", "10/a.png", "2/a.png", "dog/0.png"]
    pixels = {place: noise(4, 4, i) for i, place in enumerate(places)}
    for place in places:
        save(tmp_path / place, pixels[place])
    (tmp_path / "empty").mkdir()
    source = FolderSource(tmp_path, None)
    number = {"10": 0, "2": 1, "cat": 2, "dog": 3}
    found = {}
    for image, label in zip(source.read(0, 6).numpy(), source.labels.tolist(), strict=True):
        found[image.tobytes()] = label
    assert found == {pixels[place].tobytes(): number[place.split("/")[0]] for place in places}
    assert source.labels.dtype == torch.int64 and source.labels.tolist() == sorted(source.labels.tolist())


def test_an_image_outside_of_the_subfolders_leaves_no_labels(tmp_path):
    for place in ("a/1.png", "b/1.png", "loose.png"):
        save(tmp_path / place, noise(4, 4))
    source = FolderSource(tmp_path, None)
    assert source.labels is None and len(source) == 3


def test_modes_are_read_as_rgb(tmp_path):
    """Grey, 1 bit, 16 bit (rounded to 8, not cut), alpha (left out), palettes."""
    grey, deep, colour, alpha = (
        noise(6, 5, 1, channels=None),
        noise(6, 5, 2, channels=None, high=65536),
        noise(6, 5, 3),
        noise(6, 5, 4, channels=4),
    )
    both = noise(6, 5, 5, channels=2)
    deep[0] = [0, 65535, 128, 129, 65406]  # 0, 255, just below and above half a level, just below 254.5
    expected = {
        "a grey": np.stack([grey] * 3, -1),
        "b deep": np.stack([np.round(deep / 257).astype(np.uint8)] * 3, -1),
        "c bits": np.stack([np.where(grey > 127, 255, 0).astype(np.uint8)] * 3, -1),
        "d colour": colour,
        "e alpha": alpha[..., :3],
        "f grey with alpha": np.stack([both[..., 0]] * 3, -1),
    }
    save(tmp_path / "a grey.png", grey)
    save(tmp_path / "b deep.png", deep)
    save(tmp_path / "c bits.png", Image.fromarray(grey > 127))
    save(tmp_path / "d colour.png", colour)
    save(tmp_path / "e alpha.png", alpha)
    save(tmp_path / "f grey with alpha.png", both)
    assert [opened(path).mode for path in sorted(tmp_path.iterdir())] == [
        "L",
        "I;16",
        "1",
        "RGB",
        "RGBA",
        "LA",
    ]
    for got, (name, image) in zip(whole(tmp_path), expected.items(), strict=True):
        assert np.array_equal(got, image), name


def test_palettes(tmp_path):
    """With and without transparency, of one index or of bytes for each: the palette's colours, no warning."""
    colours, indices = noise(1, 16, 1)[0], noise(6, 5, 2, channels=None) % 16
    image = Image.frombytes("P", (5, 6), indices.tobytes())
    image.putpalette(colours.tobytes())
    save(tmp_path / "0.png", image)
    save(tmp_path / "1.png", image, transparency=3)
    save(tmp_path / "2.png", image, transparency=bytes(range(0, 160, 10)))
    assert opened(tmp_path / "2.png").info["transparency"] == bytes(range(0, 160, 10))
    for got in whole(tmp_path):
        assert np.array_equal(got, colours[indices])


def test_transparency_of_one_colour(tmp_path):
    colour, grey = noise(6, 5, 1), noise(6, 5, 2, channels=None)
    save(tmp_path / "0.png", colour, transparency=tuple(int(c) for c in colour[0, 0]))
    save(tmp_path / "1.png", grey, transparency=int(grey[0, 0]))
    first, second = whole(tmp_path)
    assert np.array_equal(first, colour) and np.array_equal(second, np.stack([grey] * 3, -1))


def test_jpeg_as_pillow_decodes_it(tmp_path):
    smooth = np.asarray(Image.fromarray(noise(4, 4)).resize((40, 24), Image.Resampling.BICUBIC))
    save(tmp_path / "0.jpg", smooth, quality=90)
    save(tmp_path / "1.jpeg", Image.fromarray(smooth).convert("L"), quality=90)
    save(tmp_path / "2.JPG", Image.fromarray(smooth).convert("CMYK"), format="JPEG", quality=95)
    for got, path in zip(whole(tmp_path), sorted(tmp_path.iterdir()), strict=True):
        assert np.array_equal(got, np.asarray(opened(path).convert("RGB")))
        assert np.abs(got.astype(int) - smooth).mean() < 70


UPRIGHT = {  # what is to be done to the stored rows and columns (EXIF 2.32, tag 274)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_turned_upright(tmp_path, orientation, suffix):
    """Two images of one size when upright, one of them stored on its side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = noise(6, 9) if suffix != "jpg" else np.asarray(Image.fromarray(noise(2, 3)).resize((48, 32)))
    save(tmp_path / f"0.{suffix}", stored, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    if suffix == "jpg":
        stored = np.asarray(opened(tmp_path / "0.jpg"))
    upright = UPRIGHT[orientation](stored)
    save(tmp_path / "1.png", upright)
    first, second = whole(tmp_path)
    assert np.array_equal(first, upright) and np.array_equal(second, upright)


def test_on_its_side_is_another_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "0.png", noise(6, 9), exif=exif)
    save(tmp_path / "1.png", noise(6, 9))
    refused(tmp_path, "0.png is 6x9", "1.png", "9x6", "say resize")


def test_mixed_sizes(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", noise(8, 8, i))
    save(tmp_path / "sub" / "odd.png", noise(8, 9))
    message = refused(tmp_path, "0.png", "odd.png", "8x8", "9x8", "say resize")
    assert str(tmp_path) in message
    source = images_of(parse(str(tmp_path), resize=8))
    assert source.read(0, 6).shape == (6, 8, 8, 3)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (20, 13), (5, 30), (12, 12), (4, 3)])
def test_resized_as_pillow_fits(tmp_path, height, width):
    """ImageOps.fit, bicubic, of the RGB image; one that is of that size already stays as it is."""
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = noise(height, width, 2, channels=None)
    images = [noise(height, width, 1), np.stack([grey] * 3, -1), np.rot90(noise(height, width, 3), -1)]
    save(tmp_path / "0.png", images[0])
    save(tmp_path / "1.png", grey)
    save(tmp_path / "2.png", noise(height, width, 3), exif=exif)
    for got, image in zip(whole(tmp_path, 8), images, strict=True):
        expected = ImageOps.fit(
            Image.fromarray(np.ascontiguousarray(image)), (8, 8), Image.Resampling.BICUBIC
        )
        assert np.array_equal(got, np.asarray(expected))
        if image.shape == (8, 8, 3):
            assert np.array_equal(got, image)


def test_a_palette_is_resized_by_its_colours(tmp_path):
    colours, indices = noise(1, 16, 1)[0], noise(12, 12, 2, channels=None) % 16
    image = Image.frombytes("P", (12, 12), indices.tobytes())
    image.putpalette(colours.tobytes())
    save(tmp_path / "0.png", image)
    save(tmp_path / "1.png", colours[indices])
    first, second = whole(tmp_path, 5)
    assert np.array_equal(first, second) and len(np.unique(first.reshape(-1, 3), axis=0)) > 16


@pytest.mark.parametrize("resize", [None, 8])
@pytest.mark.parametrize("cut", [0.0, 0.02, 0.6])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_image_is_named(tmp_path, suffix, cut, resize):
    for i in range(2):
        save(tmp_path / f"{i}.{suffix}", noise(40, 40, i))
    path = save(tmp_path / f"odd.{suffix}", noise(40, 40, 9))
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    refused(tmp_path, f"odd.{suffix}", resize=resize)


@pytest.mark.parametrize("name", ["0odd.png", "odd.png", "odd.jpg", "deep/odd.webp"])
def test_a_text_by_that_name_is_named(tmp_path, name):
    save(tmp_path / "1.png", noise(8, 8))
    save(tmp_path / "2.png", noise(8, 8))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("hello\nworld\n" * 20)
    refused(tmp_path, name)


def test_bytes_turned_in_a_png_are_noticed(tmp_path):
    """The checksum of a chunk does not hold."""
    save(tmp_path / "0.png", noise(40, 40))
    path = save(tmp_path / "odd.png", noise(40, 40))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    refused(tmp_path, "odd.png")


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0", b"hello"]
)
def test_broken_exif_is_no_crash(tmp_path, exif):
    """Either read as it is stored, or named."""
    pixels = np.asarray(Image.fromarray(noise(2, 2)).resize((16, 16)))
    save(tmp_path / "0.png", pixels)
    save(tmp_path / "odd.jpg", pixels, exif=exif)
    try:
        read = whole(tmp_path)
    except UserError as error:
        assert "odd.jpg" in str(error)
    else:
        assert np.array_equal(read[1], np.asarray(opened(tmp_path / "odd.jpg")))


def test_orientation_that_is_no_number_of_eight(tmp_path):
    for i, orientation in enumerate((0, 9, 77)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(tmp_path / f"{i}.png", noise(6, 9, i), exif=exif)
    assert np.array_equal(whole(tmp_path), [noise(6, 9, i) for i in range(3)])


def test_a_link_that_leads_nowhere(tmp_path):
    """Named, or no image at all."""
    save(tmp_path / "0.png", noise(8, 8))
    save(tmp_path / "1.png", noise(8, 8))
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    try:
        assert len(FolderSource(tmp_path, None)) == 2
    except UserError as error:
        assert "2.png" in str(error)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(tmp_path, count):
    (tmp_path / "images").mkdir()
    if count:
        save(tmp_path / "images" / "0.png", noise(8, 8))
    refused(tmp_path / "images", "images", *(["at least 2"] if count else ["no images", ".png"]))


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (1, 4, 4, 3)])
def test_too_few_in_a_file(tmp_path, shape):
    np.savez(tmp_path / "few.npz", np.zeros(shape, np.uint8))
    refused(tmp_path / "few.npz", "few.npz", "at least 2")


def test_more_images_than_threads(tmp_path):
    pixels = [noise(4, 4, i) for i in range(61)]
    for i, image in enumerate(pixels):
        save(tmp_path / f"{i:03d}.png", image)
    assert np.array_equal(whole(tmp_path), pixels)


# files


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("how", [np.savez, np.savez_compressed])
def test_images_of_a_file(tmp_path, channels, how):
    pixels = np.stack([noise(5, 7, i, channels=channels) for i in range(6)])
    how(tmp_path / "a.npz", pixels)
    source = images_of(File(path=tmp_path / "a.npz"))
    assert len(source) == 6 and source.labels is None and source.name.endswith("a.npz")
    assert source.read(1, 4).dtype == torch.uint8
    assert np.array_equal(source.read(1, 4), pixels[1:4])


@pytest.mark.parametrize("key", ["arr_1", "labels"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, ">i4"])
def test_labels_of_a_file(tmp_path, key, dtype):
    labels = np.array([3, 1, 2, 0], dtype)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((4, 5, 5, 3), np.uint8), **{key: labels})
    source = images_of(File(path=tmp_path / "a.npz"))
    assert source.labels.dtype == torch.int64 and source.labels.tolist() == [3, 1, 2, 0]


def test_other_arrays_of_a_file_do_not_matter(tmp_path):
    np.savez(
        tmp_path / "a.npz", arr_0=np.zeros((4, 5, 5, 3), np.uint8), mu=np.zeros(2), sigma=np.eye(2),
        more=np.array("x"),
    )  # fmt: skip
    source = images_of(File(path=tmp_path / "a.npz"))
    assert len(source) == 4 and source.labels is None


FINE = np.zeros((4, 5, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": FINE}, ["arr_0", "images"]),
        ({}, ["arr_0"]),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, ["arr_0", "mu"]),
        ({"arr_0": FINE.astype(np.float32)}, ["float32", "uint8"]),
        ({"arr_0": FINE.astype(np.int64)}, ["int64", "uint8"]),
        ({"arr_0": FINE > 0}, ["bool", "uint8"]),
        ({"arr_0": FINE.transpose(0, 3, 1, 2)}, ["(4, 3, 5, 5)"]),
        ({"arr_0": FINE[0]}, ["(5, 5, 3)"]),
        ({"arr_0": FINE[..., 0]}, ["(4, 5, 5)"]),
        ({"arr_0": np.zeros((4, 5, 5, 4), np.uint8)}, ["(4, 5, 5, 4)"]),
        ({"arr_0": np.zeros((4, 0, 5, 3), np.uint8)}, ["(4, 0, 5, 3)"]),
        ({"arr_0": np.where(FINE.astype(np.float32) < 1, np.nan, 0)}, ["NaN"]),
        ({"arr_0": np.full((4, 5, 5, 3), np.inf, np.float16)}, ["NaN or infinite"]),
        ({"arr_0": np.array(["a", "b"])}, ["arr_0"]),
        ({"arr_0": np.array([None, {}], object)}, ["pickle"]),
    ],
)
def test_files_without_images(tmp_path, arrays, says):
    np.savez(tmp_path / "odd.npz", **arrays)
    refused(tmp_path / "odd.npz", "odd.npz", *says)


def test_one_nan_is_found(tmp_path):
    images = np.zeros((40, 5, 5, 3))
    images[31, 2, 3, 1] = np.nan
    np.savez(tmp_path / "odd.npz", images)
    refused(tmp_path / "odd.npz", "NaN")


# what a user names


def test_what_a_user_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "digits").mkdir()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert parse("digits") == Digits(kind="digits")
    assert parse("folder") == parse("folder/") == parse("./folder") == ImageFolder(path=Path("folder"))
    assert parse(str(tmp_path / "folder"), resize=9) == ImageFolder(path=tmp_path / "folder", resize=9)
    assert parse("a/b.npz") == File(path=Path("a/b.npz"))
    assert parse("B.NPZ") == File(path=Path("B.NPZ"))
    assert parse("owner/name", resize=9) == HubDataset(
        kind="datasets", path="owner/name", size=9, split="train"
    )
    named = parse("saved", resize=9, split="test")
    assert isinstance(named, HubDataset) and named.path == "saved" and named.split == "test"


def test_a_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    assert parse("~/pictures") == ImageFolder(path=tmp_path / "pictures")
    assert parse("~/a.npz") == File(path=tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["absent", "./absent", "a/b/c", "/absent/folder", "~/absent", "../absent"])
def test_what_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(name, name, "does not exist", "npz")


def test_other_files(tmp_path):
    refused(save(tmp_path / "one.png", noise(8, 8)), "one.png", "npz", "folder")
    (tmp_path / "ref.pkl").write_bytes(b"\x80\x04N.")
    refused(tmp_path / "ref.pkl", "ref.pkl", "pickle")
    refused(tmp_path / "absent.npz", "absent.npz", "does not exist")


def test_a_data_set_needs_a_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("owner/name", "owner/name", "add resize")


def test_nothing_named_is_not_the_folder_one_is_in(tmp_path, monkeypatch):
    """An empty variable of a script: --reference "$REF"."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        save(tmp_path / f"{i}.png", noise(8, 8, i))
    refused("")


def test_digits_are_channels_last():
    source = images_of(parse("digits"))
    assert source.read(0, 3).shape == (3, 8, 8, 1) and len(source) == len(source.labels) == 1797
    whole_images = Digits(kind="digits").load().pixels
    assert np.array_equal(source.read(5, 9)[..., 0], whole_images[5:9, 0])


# batches


class Numbered:
    """Image i is of the colour i. Notes what is read."""

    name, labels = "numbered", None

    def __init__(self, count: int) -> None:
        self.count = count
        self.reads: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> Tensor:
        assert 0 <= start < stop <= self.count
        self.reads.append((start, stop))
        return torch.arange(start, stop, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(count=st.integers(0, 60), size=st.integers(1, 50), world=st.integers(1, 7))
def test_each_image_once_over_all_processes(count, size, world):
    seen: list[int] = []
    reads: list[tuple[int, int]] = []
    for rank in range(world):
        source = Numbered(count)
        for first, images in batches(source, count, size, rank, world):
            assert images.dtype == torch.uint8 and 1 <= len(images) <= size
            assert images[:, 0, 0, 0].tolist() == list(range(first, first + len(images)))
            seen += range(first, first + len(images))
        reads += source.reads
    assert sorted(seen) == list(range(count))
    assert sorted(i for start, stop in reads for i in range(start, stop)) == list(range(count))


def test_work_is_spread_evenly():
    shares = [sum(len(x) for _, x in batches(Numbered(100), 100, 8, rank, 4)) for rank in range(4)]
    assert max(shares) - min(shares) <= 8 + 4 and sum(shares) == 100


def test_fewer_than_there_are():
    source = Numbered(50)
    taken = [i for first, x in batches(source, 13, 5) for i in range(first, first + len(x))]
    assert taken == list(range(13)) and max(stop for _, stop in source.reads) == 13


def test_one_batch_is_read_ahead_and_no_more():
    source = Numbered(60)
    for i, _ in enumerate(batches(source, 60, 5)):
        assert len(source.reads) <= i + 2
    source = Numbered(60)
    for _ in batches(source, 60, 5):
        break
    assert len(source.reads) <= 2


def test_of_a_folder(tmp_path):
    pixels = [noise(4, 4, i) for i in range(11)]
    for i, image in enumerate(pixels):
        save(tmp_path / f"{i:03d}.png", image)
    source = FolderSource(tmp_path, None)
    got = dict(pair for rank in range(3) for pair in batches(source, 11, 2, rank, 3))
    assert np.array_equal(np.concatenate([got[first] for first in sorted(got)]), pixels)


def test_an_error_ahead_is_not_lost(tmp_path):
    """The image that cannot be read is in the last batch."""
    for i in range(5):
        save(tmp_path / f"{i}.jpg", noise(64, 64, i))
    content = (tmp_path / "4.jpg").read_bytes()
    (tmp_path / "4.jpg").write_bytes(content[: len(content) // 2])
    taken = 0
    with pytest.raises(UserError, match="4.jpg"):
        for _, images in batches(FolderSource(tmp_path, None), 5, 2):
            taken += len(images)
    assert taken in (2, 4)
