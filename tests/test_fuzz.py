"""Malformed files of every kind: each loader reads them or raises UserError, and does nothing else.

No other error, no pickle opened (each would leave `exploded`), nothing written outside the folder given, less
than a gigabyte of memory and 20 seconds of processor time. Hypothesis makes the inputs, the same ones each
time: a tenth of INPUTS by default, all of them in the exhaustive pass.
"""

from __future__ import annotations

import inspect
import io
import json
import pickle
import shutil
import signal
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from diffkd.core.classifier import Classifier
from diffkd.core.schedules import Schedule
from diffkd.data.decoding import SUFFIXES
from diffkd.data.folder import Folder
from diffkd.data.hub import HubDataset
from diffkd.errors import UserError
from diffkd.io.environment import peak_rss
from diffkd.metrics.evaluation import image_sets, image_sources, records
from diffkd.metrics.evaluation.config import Evaluation
from diffkd.metrics.evaluation.reference import Reference
from diffkd.metrics.statistics import Statistics
from diffkd.models import loading
from diffkd.runs import benchmark_config, config, config_files, evaluate_options
from diffkd.runs.classification import networks
from diffkd.runs.classification.config import DistillClassifier
from diffkd.runs.repeat import repeat
from diffkd.runs.reports import model_card, tables
from tests.measuring import measure

INPUTS = {
    "config text": 900, "config values": 1200, "damaged arrays": 1200, "made archives": 900,
    "odd statistics": 750, "damaged images": 1000, "made-up images": 450, "damaged pipelines": 480,
    "edited pipelines": 600, "cards": 600, "records": 1200, "classifiers": 600,
}  # fmt: skip
SECONDS, MEMORY = 20, 1 << 30  # processor time of one input, memory of all
TRIED: Counter[str] = Counter()
FUZZ = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning"),
]


class Hung(BaseException):
    """A BaseException, so that no loader handles it."""


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all inputs, deep enough that a file written to ../../evil is found."""
    folder = tmp_path_factory.mktemp("fuzz") / "one" / "two" / "three"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _no_side_effects(place: Path) -> Iterator[None]:
    def around() -> set[str]:
        inside = {str(p) for p in place.parents[2].rglob("*") if place not in p.parents}
        return inside | {str(p) for p in [*Path("/").iterdir(), *Path.cwd().iterdir()] if "evil" in p.name}

    before, memory = around(), peak_rss()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", unreachable)
        yield
    assert around() == before
    assert not exploded(place).exists()
    grown = peak_rss() - memory
    assert grown < MEMORY, f"{grown >> 20} MiB"


def unreachable(*_: object, **__: object) -> str:
    raise OSError("no hub in a test")


def exploded(place: Path) -> Path:
    return place.parent / "exploded"


def tried(what: str, call: Callable[[], Any]) -> Any:
    """The call's result, or the UserError that it raised, which must be one printable line."""
    TRIED[what] += 1

    def hung(*_: object) -> None:
        raise Hung(what)

    before = signal.signal(signal.SIGPROF, hung)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return call()
    except UserError as error:
        assert str(error).isprintable() and 10 < len(str(error)) < 3000
        return error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(what: str) -> Any:
    """Decorates a test that draws its inputs from `data`: run with a tenth of INPUTS[what], or with all."""

    def made(test: Any) -> Any:
        few, many = INPUTS[what] // 10, INPUTS[what]

        @pytest.mark.parametrize("inputs", [few, pytest.param(many, marks=pytest.mark.exhaustive)])
        def run(inputs: int, **fixtures: Any) -> None:
            before = TRIED[what]
            settings(FUZZ, max_examples=inputs)(given(data=st.data())(test))(**fixtures)
            assert TRIED[what] - before >= 0.9 * inputs  # some spaces hold fewer
            assert "place" not in fixtures or not exploded(fixtures["place"]).exists()

        *fixtures, _ = inspect.signature(test).parameters  # the last is `data`, by hypothesis
        run.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("inputs", *fixtures)]
        )
        run.__doc__ = test.__doc__
        return run

    return made


# strategies -----------------------------------------------------------------------------------------------

NAMES = ["../../evil", "/evil", "evil\x1b[31m", "a\nb", "e" * 300, "\udcff", "..", "", "C:\\evil", "\0"]
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.floats(),
    st.sampled_from([10**9, -(10**9), 2**31, 2**63, -(2**70), 10**400, 1e-320, 0.5]),
    st.sampled_from(NAMES), st.text(max_size=6), st.lists(st.integers(-2, 70), max_size=4),
    st.sampled_from([[], {}, [[]], [None], [True], ["x"], {"a": {}}, [10**9] * 3, [1] * 500, "true", "1e-4"]),
)  # fmt: skip


def damaged(draw: Any, content: bytes) -> bytes:
    """The bytes cut short, bits flipped, or a stretch left out, doubled or overwritten."""
    kind = draw(st.sampled_from(["cut", "bits", "bits", "zeros", "out", "double", "text"]))
    at, length = draw(st.integers(0, len(content) - 1)), draw(st.integers(1, 64))
    if kind == "cut":
        return content[:at]
    if kind == "bits":
        turned = bytearray(content)
        near = draw(st.booleans())  # a header is where it matters
        for _ in range(draw(st.integers(1, 8))):
            turned[draw(st.integers(0, min(len(content), 200) - 1 if near else len(content) - 1))] ^= 1 << (
                draw(st.integers(0, 7))
            )
        return bytes(turned)
    middle = {
        "zeros": bytes(length), "out": b"", "double": content[at : at + length] * 2,
        "text": draw(st.binary(min_size=1, max_size=16)),
    }[kind]  # fmt: skip
    return content[:at] + middle + content[at + length :]


def edited(draw: Any, content: Any, odd: Any = ODD) -> Any:
    """The same objects with one to three values replaced or left out."""
    content = deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 5)):
                node = node[key]
                continue
            if draw(st.integers(0, 5)) == 0:
                del node[key]
            else:
                node[key] = deepcopy(draw(odd))  # else the next edit is of what is drawn
            break
    return content


# configs --------------------------------------------------------------------------------------------------

KINDS = (config.Train, config.Distill, benchmark_config.Benchmark, DistillClassifier)
CONFIGS: list[tuple[Any, dict[str, Any]]] = [
    (config.Train, {
        "out": "run", "seed": 1, "data": {"kind": "folder", "path": "x", "size": 8, "channels": 1},
        "model": {"channels": [8, 16], "layers": 1, "attention": [False, True]},
        "schedule": {"num_train_timesteps": 16}, "denoising": {"updates": 2},
        "training": {"batch_size": 4}, "evaluation": {"metrics": ["fid", "kid"], "labels": [1, 2]},
    }),
    (config.Distill, {
        "out": "run", "teacher": {"path": "x", "null_label": 3}, "data": {"kind": "digits"},
        "method": [{"name": "progressive", "steps": [4, 2], "updates": 1}], "training": {"batch_size": 4},
        "evaluation": {"reference": {"kind": "npz", "path": "x.npz"}, "samples": 50}, "pictures": 0,
    }),
    (config.Distill, {
        "out": "run", "teacher": {"train": "teacher.yaml"},
        "data": {"kind": "datasets", "path": "a/b", "size": 4},
        "method": {"steps": [8]}, "training": {},
    }),
    (DistillClassifier, {
        "out": "run", "repeats": 2, "data": {"kind": "digits"}, "held_out": 97, "labelled": 40,
        "teacher": {"model": {"arguments": {"channels": [8]}}, "updates": 2},
        "students": {"small": {"name": "cnn", "arguments": {"channels": [4, 6]}}},
        "method": {"name": "logits", "alpha": 0.5, "noisy": True}, "schedule": {"num_train_timesteps": 16},
        "sweep": {"student": "small", "alpha": [0.5], "temperature": [1, 3]},
    }),
    (benchmark_config.Benchmark, {
        "out": "run", "models": [{"path": "a/b", "steps": [1, 2], "guidance": 2.0}],
        "teacher": {"path": "t"}, "evaluation": {"reference": "digits", "metrics": ["fid", "agreement"]},
    }),
]  # fmt: skip
PIECES = [
    "out: run\n", "seed: ", "data:\n", "  kind: digits\n", "  kind: folder\n", "&a ", "*a", "<<: *a\n", "? ",
    "- ", "[", "]", "{", "}", ": ", ", ", "|\n", ">-\n", "!!int ", "!!python/object/apply:os.system [x]\n",
    "!!binary ", "!!timestamp ", "2020-13-45", "0x_", "1:1:1", "~", "'", '"', "\t", "\n", "  ", "%YAML 9.9\n",
    "---\n", "...\n", "# x\n", "\x00", "\ufeff", "\x85", "é", "method: {name: progressive}\n", "true",
    "[" * 60, "{a: " * 60, "9" * 5000, ".inf", "1e999", "!!float _", "!!set {a, b}", "!!omap [a: 1]", "=",
]  # fmt: skip


def loaded(path: Path, kind: Any, overrides: list[str]) -> None:
    found = config_files.load(path, kind, overrides)
    assert config_files.resolved(found)["out"] is not None


@fuzz("config text")
def test_a_config_of_any_text(place, data):
    kind, content = data.draw(st.sampled_from(CONFIGS))
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14)))
    whole = yaml.safe_dump(content)
    how = data.draw(st.integers(0, 2))
    path = place / "config.yaml"
    if how == 0:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
    elif how == 1:
        at = data.draw(st.integers(0, len(whole)))
        path.write_text(whole[:at] + text + whole[at:], encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(damaged(data.draw, whole.encode()))
    override = [data.draw(st.sampled_from(["seed=", "data.", "a.b=", ""])) + text] if how == 0 else []
    tried("config text", lambda: loaded(path, kind, override))


@fuzz("config values")
def test_a_config_with_odd_values(place, data):
    kind, content = data.draw(st.sampled_from(CONFIGS))
    path = place / "config.yaml"
    path.write_text(yaml.safe_dump(edited(data.draw, content, ODD)), encoding="utf-8")
    tried("config values", lambda: loaded(path, kind, []))


# arrays ---------------------------------------------------------------------------------------------------


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


X = np.random.default_rng(0).standard_normal((30, 4))
PIXELS = np.random.default_rng(1).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
STATISTICS: dict[str, Any] = {
    "mu": X.mean(0), "sigma": np.cov(X, rowvar=False), "num_samples": np.asarray(30),
    "protocol": np.asarray(json.dumps({"features": {"name": "digits"}, "sha256": "ab"})),
    "features": X, "labels": np.arange(30) % 3,
}  # fmt: skip
FILES = [npz(**STATISTICS), npz(arr_0=PIXELS, arr_1=np.arange(6)), npz(**STATISTICS, arr_0=PIXELS)]


def opened(path: Path) -> None:
    """Open it as a reference, as images to evaluate, and as statistics."""
    reference = tried_quietly(lambda: Reference(image_sets.File(path=path)))
    if reference is not None:
        tried_quietly(lambda: evaluate_options.default_features(reference))
        json.dumps(reference.describe())
    tried_quietly(lambda: image_sets.images_of(image_sets.File(path=path)).read(0, 2))
    tried_quietly(lambda: Statistics.load(path).gaussian())


def tried_quietly(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except UserError as error:
        assert str(error).isprintable()
        return None


def damaged_within(draw: Any, content: bytes) -> bytes:
    """An intact archive of damaged arrays, which its checksums cannot tell."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(list(found)))
    found[name] = damaged(draw, found[name])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for key, value in found.items():
            archive.writestr(key, value)
    return stream.getvalue()


@fuzz("damaged arrays")
def test_damaged_arrays(place, data):
    content = data.draw(st.sampled_from(FILES))
    how = data.draw(st.integers(0, 9))
    if how == 0:
        harmed = data.draw(st.binary(max_size=60))
    else:
        harmed = (damaged if how < 4 else damaged_within)(data.draw, content)
    path = place / "arrays.npz"
    path.write_bytes(harmed)
    tried("damaged arrays", lambda: opened(path))


def header(shape: Any, descr: str = "<f8", version: int = 1) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def objects(canary: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Canary(canary)], object), allow_pickle=True)
    return stream.getvalue()


@st.composite
def members(draw: Any) -> tuple[str, Any]:
    name = draw(st.sampled_from(
        ["mu", "mu", "sigma", "arr_0", "num_samples", "protocol", "features", "labels", *NAMES[:5]]
    ))  # fmt: skip
    shapes = [
        (4,), (4, 4), (2, 4, 4, 3), (10**10,), (10**30,), (-1,), (2**62, 2), (0,), (0, 10**12), (), "(4",
        "(4.5,)",
        "(True,)", "({},)", "x", "(" * 200,
    ]  # fmt: skip
    kind = draw(st.sampled_from(["array", "array", "header", "header", "objects", "zip", "text", "pickle"]))
    if kind == "header":
        made = header(
            draw(st.sampled_from(shapes)),
            draw(st.sampled_from(["<f8", "|O", "|u1", "<U9", "|V0", "<U0", "f8,f8", "<M8[ns]", "zz"])),
            draw(st.sampled_from([1, 1, 2, 3, 9])),
        )
        return name, made + draw(st.binary(max_size=8)) + bytes(draw(st.sampled_from([0, 32, 128])))
    if kind == "array":
        stream = io.BytesIO()
        np.save(
            stream,
            draw(st.sampled_from([*STATISTICS.values(), PIXELS, np.float32(3), np.zeros((4, 4), "c16")])),
        )
        return name, stream.getvalue()
    return name, {"objects": None, "zip": FILES[0], "text": b"hello", "pickle": b"\x80\x04N."}[kind]


@fuzz("made archives")
def test_hand_made_archives(place, data):
    found = data.draw(st.lists(members(), max_size=5))
    packed = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    suffixed = data.draw(st.integers(0, 3))
    path = place / "made.npz"
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, content in found:
            info = zipfile.ZipInfo(name.replace("\udcff", "?") + (".npy" if suffixed else ""))
            archive.writestr(info, objects(exploded(place)) if content is None else content, packed)
    tried("made archives", lambda: opened(path))


@fuzz("odd statistics")
def test_statistics_of_odd_arrays(place, data):
    odd = [
        np.zeros(4), np.zeros(0), np.eye(4), -np.eye(4), np.full((4, 4), np.nan), np.full(4, 1e308),
        np.eye(4) * 1e-320, np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4)), np.array("x"), np.array(True),
        np.array([[30]]), np.array([2.5]), np.array(2**63, np.uint64), np.array(-1), np.array(np.inf),
        np.zeros(4, [("a", "f8")]), np.zeros(4, "M8[s]"), np.zeros((30, 4), np.float16), np.arange(30) - 9,
        np.zeros(30, np.int8), np.asarray("[" * 5000), np.asarray('{"features": {"name": "os.path"}}'),
        np.asarray('{"features": {"name": "\\u001b[31m"}, "sha256": 3}'), np.zeros((0, 4, 4, 3), np.uint8),
        np.asarray('{"features": {"name": ["digits"]}}'), np.zeros((3, 4, 4, 2), np.uint8), np.longdouble(3),
    ]  # fmt: skip
    arrays = dict(STATISTICS) | ({"arr_0": PIXELS} if data.draw(st.booleans()) else {})
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from([*STATISTICS, "arr_0", "arr_1"]))
        arrays[key] = data.draw(st.sampled_from(odd))
        if data.draw(st.integers(0, 4)) == 0:
            del arrays[key]
    np.savez(place / "odd.npz", **arrays)
    tried("odd statistics", lambda: opened(place / "odd.npz"))


# images ---------------------------------------------------------------------------------------------------


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(2).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = Image.new(mode, (12, 10)) if mode in ("I;16", "F", "LAB") else image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


PAGES = {"save_all": True, "append_images": [Image.new("RGB", (12, 10), "red"), Image.new("RGB", (12, 10))]}
IMAGES = {
    ".png": [encoded("PNG"), encoded("PNG", "P"), encoded("PNG", "I;16"), encoded("PNG", **PAGES)],
    ".jpg": [encoded("JPEG"), encoded("JPEG", "CMYK"), encoded("JPEG", "L", progressive=True)],
    ".webp": [encoded("WEBP", lossless=True), encoded("WEBP"), encoded("WEBP", **PAGES)],
    ".bmp": [encoded("BMP"), encoded("BMP", "1")], ".ppm": [encoded("PPM")], ".pgm": [encoded("PPM", "L")],
    ".tif": [encoded("TIFF"), encoded("TIFF", "F"), encoded("TIFF", "LAB"), encoded("TIFF", "CMYK"),
             encoded("TIFF", compression="tiff_lzw"), encoded("TIFF", **PAGES)],
}  # fmt: skip
OTHERS = [
    encoded("GIF"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", encoded("ICO"), encoded("TGA"), b"",
    b"GIF89a", b"\x89PNG\r\n\x1a\n", b"P5 99999 99999 255\n", b"P6 4 4 255\n", b"II*\0\x08\0\0\0",
]  # fmt: skip


def both_readers(place: Path, name: str, content: bytes) -> None:
    """Training's reader and evaluation's give the same pixels, or both refuse."""
    root = place / "images"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    path = root / name
    try:
        path.write_bytes(content)
    except (OSError, ValueError):
        return  # not a name that this file system takes
    spec = Folder(kind="folder", path=root, size=6, channels=3, upscale=True)
    trained = tried_quietly(lambda: spec.load().pixels.transpose(0, 2, 3, 1))
    measured = tried_quietly(lambda: image_sources.FolderSource(root, 6).read(0, 1).numpy())
    assert (trained is None) == (measured is None)
    if trained is not None:
        np.testing.assert_array_equal(trained, measured)


@fuzz("damaged images")
def test_damaged_images(place, data):
    suffix = data.draw(st.sampled_from(list(IMAGES)))
    content = damaged(data.draw, data.draw(st.sampled_from(IMAGES[suffix])))
    tried("damaged images", lambda: both_readers(place, f"x{suffix}", content))


@fuzz("made-up images")
def test_files_that_are_not_images(place, data):
    name = data.draw(st.sampled_from(["x", "\x1b[31m", "a\nb", "e" * 200, "\udcff\udcfe", "-rf", "*", " "]))
    suffix = data.draw(st.sampled_from(SUFFIXES))
    whole = [one for several in IMAGES.values() for one in several]
    start = data.draw(st.sampled_from([b"", *OTHERS, *whole]))
    content = start if data.draw(st.booleans()) else start[:24] + data.draw(st.binary(max_size=200))
    tried("made-up images", lambda: both_readers(place, name + suffix, content))


# pipelines ------------------------------------------------------------------------------------------------

PARTS = [
    "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors", "diffkd.json",
]  # fmt: skip
CARD = {"steps": 4, "num_classes": None, "null_label": None, "num_train_timesteps": 1024, "clip": 1.0,
        "prediction": "v_prediction", "parameters": 9, "class_counts": [3, 4], "metrics": []}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(place, make_pipeline) -> Path:
    """Canaries lie wherever a loader might look for weights or code."""
    folder = make_pipeline(place)
    (folder / "diffkd.json").write_text(json.dumps(CARD))
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "x.ckpt", "x.pkl"):
        for where in (folder, folder / "unet", folder / "scheduler"):
            (where / name).write_bytes(pickle.dumps(Canary(exploded(place))))
    code = f"from pathlib import Path\nPath({str(exploded(place))!r}).touch()\n"
    for name in ("pipeline.py", "unet/my.py", "unet/unet.py", "my.py", "modeling.py"):
        (folder / name).write_text(code + "class Mine: ...\n")
    return folder


def with_file(folder: Path, name: str, content: bytes) -> None:
    """Open the pipeline both ways with one of its files replaced, then restore that file."""
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        found = tried_quietly(lambda: loading.load(folder))
        if found is not None:
            assert found.schedule.alphas_cumprod.isfinite().all()
        if name != "unet/diffusion_pytorch_model.safetensors":
            tried_quietly(lambda: loading.open_stock(folder))
    finally:
        path.write_bytes(before)


@fuzz("damaged pipelines")
def test_damaged_pipelines(pipeline, data):
    name = data.draw(st.sampled_from([*PARTS, PARTS[3]]))
    content = damaged(data.draw, (pipeline / name).read_bytes())
    tried("damaged pipelines", lambda: with_file(pipeline, name, content))


@fuzz("edited pipelines")
def test_edited_pipelines(pipeline, data):
    name = data.draw(st.sampled_from([*PARTS[:3], PARTS[1], PARTS[2], PARTS[2]]))
    content = edited(data.draw, json.loads((pipeline / name).read_text()))
    if name == PARTS[0] and data.draw(st.booleans()):
        content["unet"] = data.draw(st.sampled_from(
            [["my", "Mine"], ["unet", "Mine"], ["os", "system"], ["transformers", "AutoModel"], ["my"], [3]]
        ))  # fmt: skip
        content["_class_name"] = data.draw(
            st.sampled_from([content.get("_class_name"), ["pipeline", "Mine"], "my"])
        )
    text = json.dumps(content).encode()
    tried("edited pipelines", lambda: with_file(pipeline, name, text))


@fuzz("cards")
def test_edited_cards(place, record, data):
    content = edited(data.draw, {**CARD, "metrics": [record]})
    (place / "card").mkdir(exist_ok=True)
    (place / "card" / "diffkd.json").write_text(json.dumps(content))

    def rewritten() -> None:
        known = loading.card(place / "card")
        model_card.write(place / "card", {**known, "metrics": [*known.get("metrics", []), record]})
        (place / "card" / "README.md").read_text(encoding="utf-8")

    tried("cards", rewritten)


@fuzz("classifiers")
def test_damaged_and_edited_classifiers(place, data):
    folder = place / "classifier"
    if not folder.exists():
        folder.mkdir()
        network = networks.Network(arguments={"channels": [2, 4]})
        built = Classifier(
            network.build((1, 4, 4), 3, timed=True), 3, shape=(1, 4, 4), schedule=Schedule.cosine(16)
        )
        networks.save(built, network, folder)
    name = data.draw(st.sampled_from(["diffkd.json", "diffkd.json", "model.safetensors"]))
    before = (folder / name).read_bytes()
    if name == "diffkd.json" and data.draw(st.booleans()):
        content = json.dumps(edited(data.draw, json.loads(before))).encode()
    else:
        content = damaged(data.draw, before)
    (folder / name).write_bytes(content)
    try:
        found = tried("classifiers", lambda: networks.load(folder))
    finally:
        (folder / name).write_bytes(before)
    if isinstance(found, Classifier):
        assert all(bool(p.isfinite().all()) for p in found.parameters())


# records --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(place) -> dict[str, Any]:
    """A real record, of random images."""
    (place / "measured.npz").write_bytes(FILES[1])
    (place / "reference.npz").write_bytes(npz(arr_0=PIXELS[::-1], arr_1=np.arange(6)))
    config = Evaluation(features="digits", metrics=["fid", "kid", "prdc"], precision_k=1, density_k=1)
    found = measure(place / "measured.npz", place / "reference.npz", config, place / "record.json")
    assert repeat(place / "record.json", Console(file=io.StringIO()))
    return found


@fuzz("records")
def test_edited_records(place, record, data):
    path = place / "edited.json"
    if data.draw(st.integers(0, 3)):
        path.write_text(json.dumps(edited(data.draw, [record])))
    else:
        path.write_bytes(damaged(data.draw, json.dumps(record).encode()))

    def used() -> None:
        quiet = Console(file=io.StringIO())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "set_num_threads", lambda count: None)
            patch.setattr(HubDataset, "_opened", unreachable_rows)
            tried_quietly(lambda: repeat(path, quiet))
        tried_quietly(lambda: tables.compare(path, place / "record.json", quiet))
        assert records.load(path)

    tried("records", used)


def unreachable_rows(self: Any) -> Any:
    raise UserError("no datasets in a test")


# the canary -----------------------------------------------------------------------------------------------


def test_the_canary_itself_works(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()
    (tmp_path / "objects.npy").write_bytes(objects(tmp_path / "again"))
    np.load(tmp_path / "objects.npy", allow_pickle=True)
    assert (tmp_path / "again").exists()
