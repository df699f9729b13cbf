"""Broken images, arrays, statistics and records, for the commands that read them; odd values of options."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

from attacks.base import Attack, Place, damaged, edited, odd_json, short
from attacks.pipelines import Canary

OPTIONS: dict[str, list[str]] = {
    "--samples": ["0", "1", "2", "3", "17", "-1", "1e3", "x", "9" * 30, ""],
    "--steps": ["0", "1,0", "1,,2", ",", "1.5", "x", "9" * 30, "1024", "1,1", "-1", "1 2", "3"],
    "--metrics": ["", ",", "x", "fid,fid", "fid,x", "FID", "kid", "is", "prdc", "fd_inf",
                  "fid,kid,is,prdc,fd_inf", "agreement", "cmmd", "clip_score", "fd_dino", " fid", "all"],
    "--features": ["inception", "clip", "x", "os.system", "", "digits ", "torch.nn.Identity", "dinov2"],
    "--dtype": ["float16", "float64", "x", ""],
    "--feature-resize": ["x", "tf1", "clean", "bilinear", ""],
    "--resize": ["0", "1", "7", "8", "100000", "9" * 30, "x", "-8"],
    "--classes": ["x", "0-", "-0", "5-2", "0-99999999999", "1,,2", "balanced", "data", "", "9" * 30,
                  "0-9,0-9", "\u0663", "1.5"], "--seed": ["-1", "9" * 30, str(2**63), str(2**64),
                      str(2**64 - 1), "x", "1e3", ""],
    "--batch-size": ["0", "-1", "9" * 30, "x", "1"], "--device": ["cuda", "cuda:99", "x", "", "cpu:1", "meta",
        "mps", "cpu:0:0", "xla", "vulkan", "privateuseone", "CPU"],
    "--guidance": ["nan", "inf", "-1", "1e308", "x", "2"], "--bootstrap": ["0", "1", "2", "-1", "x",
        "9" * 30], "--null-label": ["0", "-1", "9" * 30], "--sampler": ["x", "stock", "heun", "", "DDIM"],
    "--quantize": ["int4", "int8", "", "x"], "--teacher-steps": ["0", "1", "9" * 30],
    "--teacher-guidance": ["nan", "-1"], "--split": ["x", "", "train[:1%]"],
    "--eta": ["nan", "2", "-0", "0.5"], "-n": ["0", "-1", "9" * 30, "1e3", "x", "1", str(10**12)],
    "--mode": ["graph", "x", ""], "--format": ["webp", "jpg", "x", "", "PNG"],
    "--workers": ["0", "1", "65", "-1", "x"], "--stop-after": ["", "0s", "x", "1", "-1s", "9" * 30 + "d",
        "1.5h", "1s1m", "\u0663s", "0d", "1H"],
}  # fmt: skip
WITH_OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "evaluate": (["evaluate", "plain", "--reference", "ref.npz"],
                 ["--samples", "--steps", "--metrics", "--features", "--dtype", "--feature-resize",
                  "--resize", "--classes", "--seed", "--batch-size", "--device", "--guidance",
                 "--bootstrap", "--null-label", "--sampler", "--quantize", "--teacher-steps",
                 "--teacher-guidance", "--split"]),
    "images": (["evaluate", "images", "--reference", "images.npz", "--features", "digits"],
               ["--samples", "--metrics", "--dtype", "--feature-resize", "--resize", "--seed", "--batch-size",
                "--device", "--bootstrap"]),
    "sample": (["sample", "plain", "--out", "new"], ["-n", "--classes", "--seed", "--steps", "--sampler",
        "--eta", "--guidance", "--batch-size", "--dtype", "--mode", "--format", "--workers", "--device",
        "--quantize"]),
    "stats": (["stats", "images", "--out", "new.npz", "--features", "digits"],
              ["--dtype", "--feature-resize", "--resize", "--batch-size", "--device", "--split"]),
    "train": (["train", "train.yaml", "evaluation=null", "pictures=0"], ["--stop-after"]),
    "distill": (["distill", "distill.yaml", "evaluation=null", "pictures=0"], ["--stop-after"]),
}  # fmt: skip


def options(rng: random.Random, place: Place) -> tuple[list[str], str]:
    arguments, known = rng.choice(list(WITH_OPTIONS.values()))
    given: list[str] = []
    for option in rng.sample(known, min(len(known), rng.choice([1, 1, 2]))):
        given += [option, rng.choice(OPTIONS[option])]
    if arguments[0] == "sample" and "-n" not in given:
        given += ["-n", "2"]
    if "plain" in arguments and "--steps" not in given:
        given += ["--steps", "1"]
    if "plain" in arguments and arguments[0] == "evaluate" and "--samples" not in given:
        given += ["--samples", "4"]
    return [*arguments, *given], " ".join(given)


def images(rng: random.Random, place: Place) -> tuple[list[str], str]:
    """A folder with a file that is no good image, or not one of its kind."""
    import numpy as np
    from PIL import Image

    folder = place.here / "images"
    paths = sorted(folder.rglob("*.png"))
    path = rng.choice(paths)
    name = rng.choice(
        [
            "x.png",
            "x.PNG",
            "x.jpg",
            ".hidden.png",
            "x\udcff.png",
            "a\nb.png",
            "\x1b[31m.png",
            "e" * 251 + ".png",
            "x.gif",
            "x.tiff",
            "x.webp",
            "x.svg",
            "-x.png",
        ]
    )
    where = path.with_name(name)
    how = rng.choice(
        [
            "damaged",
            "empty",
            "text",
            "huge",
            "size",
            "mode",
            "gif",
            "fifo",
            "loop",
            "dangling",
            "folder",
            "zero",
            "one",
            "none",
            "deep",
            "ico",
            "svg",
            "animated",
            "sixteen",
            "bomb",
        ]
    )
    pixels = np.zeros((8, 8, 3), np.uint8)
    if how == "damaged":
        path.write_bytes(damaged(rng, path.read_bytes())[0])
    elif how in ("empty", "text", "svg"):
        os.fsencode(where)
        where.write_bytes({"empty": b"", "text": b"hello", "svg": b"<svg/>"}[how])
    elif how == "size":
        Image.new("L", rng.choice([(9, 8), (1, 1), (8, 1), (300, 200)])).save(where, "PNG")
    elif how == "mode":
        Image.new(rng.choice(["RGB", "RGBA", "LA", "P", "1", "I;16", "CMYK", "F"]), (8, 8)).save(
            where, "TIFF"
        )
    elif how in ("gif", "ico"):
        Image.fromarray(pixels).save(where, how.upper())
    elif how == "animated":
        Image.fromarray(pixels).save(
            where, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
        )
    elif how == "sixteen":
        Image.fromarray(np.full((8, 8), 60_000, np.uint16)).save(where, "PNG")
    elif how == "bomb":
        header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
        where.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + b"\0\0\0\0")
    elif how == "huge":
        with where.open("wb") as stream:
            stream.truncate(1 << 38)
    elif how == "fifo":
        os.mkfifo(where)
    elif how == "folder":
        where.mkdir()
    elif how in ("one", "none"):
        for extra in paths[1 if how == "one" else 0 :]:
            extra.unlink()
    elif how == "deep":
        (folder / ("d/" * 60)).mkdir(parents=True)
        path.rename(folder / ("d/" * 60) / "x.png")
    else:
        where.symlink_to({"loop": name, "dangling": "../gone", "zero": "/dev/zero"}[how])
    return _reads(rng, "images"), f"images: {how} {ascii(name[:20])}"


def _reads(rng: random.Random, name: str) -> list[str]:
    """A command that reads images or statistics of that name."""
    return rng.choice([
        ["evaluate", name, "--reference", "right.npz", "--features", "digits", "--batch-size", "5"],
        ["evaluate", "right.npz", "--reference", name, "--features", "digits", "--metrics",
         rng.choice(["fid", "fid,kid,prdc", "fid,is", "fd_inf"])],
        ["stats", name, "--out", "new.npz", "--features", "digits"],
        ["train", "train.yaml", "data={kind: folder, path: images, size: 8, channels: 1}", "out=runs/new",
         "evaluation=null", "pictures=0"] if name == "images"
        else ["train", "train.yaml", f"evaluation.reference={name}", "out=runs/new"],
        ["evaluate", "plain", "--reference", name, "--steps", "1", "--samples", "4", "--features", "digits"],
        ["fid", name, "right.npz", "--features", "digits"] if FID else ["evaluate", name, "--reference", name,
            "--features", "digits"],
    ])  # fmt: skip


FID = False  # whether there is that command


def _npy(shape: Any, descr: str, content: bytes, version: int = 1) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + content


def _variants(whole: Any) -> list[tuple[str, Any]]:
    """An array in other shapes and types."""
    found = [("transposed", whole.T), ("flat", whole.ravel())]
    if whole.ndim:
        found += [("half", whole[: len(whole) // 2]), ("first", whole[:1])]
    if whole.dtype.kind in "fiu":
        found += [("float", whole.astype("f4")), ("NaN", whole * float("nan"))]
    return found


def arrays(rng: random.Random, place: Place) -> tuple[list[str], str]:
    """An .npz of images or statistics with odd arrays, or no .npz."""
    import numpy as np

    name = rng.choice(["images.npz", "ref.npz"])
    path = place.here / name
    how = rng.choice(
        [
            "damaged",
            "damaged within",
            "values",
            "values",
            "values",
            "header",
            "pickle",
            "text",
            "names",
            "zero",
            "bomb",
            "encrypted",
            "empty",
        ]
    )
    with np.load(path) as found:
        content: dict[str, Any] = dict(found)
    odd = [np.zeros(4), np.zeros(0), np.eye(4), np.full((8, 8), np.nan), np.full(8, 1e308),
           np.eye(8) * 1e-320, np.zeros((4, 8, 8, 1), np.uint8), np.zeros((4, 8, 8, 4), np.uint8),
           np.zeros((4, 1, 8, 8), np.uint8), np.array("x"),
           np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 1)), np.zeros((4, 8, 8, 3), np.int64),
           np.array(-1), np.array(2**63, np.uint64), np.array(np.inf), np.zeros(4, [("a", "f8")]),
           np.zeros(4, "M8[s]"), np.arange(16) - 9, np.arange(16) * 10**15,
           np.asarray("[" * 5000), np.asarray('{"features": {"name": "os.system"}}'),
           np.asarray('{"features": 3}'), np.zeros((0, 8, 8, 1), np.uint8), np.zeros((1, 8, 8, 1), np.uint8),
           np.longdouble(3), np.zeros((4, 4), "c16"), np.array(b"x"), np.array("\ud800")]  # fmt: skip
    done = how
    if how == "damaged":
        path.write_bytes(damaged(rng, path.read_bytes())[0])
    elif how == "values":
        for _ in range(rng.choice([1, 1, 2])):
            key = rng.choice(
                [*content, "arr_0", "arr_1", "mu", "sigma", "num_samples", "protocol", "features", "labels"]
            )
            value = rng.choice(odd)
            if key in content and rng.random() < 0.3:
                kind, value = rng.choice(_variants(content[key]))
                done += f" {key} {kind}"
            else:
                done += f" {key} = {short(value)} {value.dtype} {value.shape}"
            content[key] = value
            if rng.random() < 0.2:
                del content[key]
                done += " left out"
        with contextlib.suppress(UnicodeEncodeError):
            np.savez(path, **content)
    elif how in ("text", "empty"):
        path.write_bytes(b"hello" if how == "text" else b"")
    elif how == "pickle":
        np.savez(path, arr_0=np.array([Canary(place.outside / "exploded")] * 4, object), allow_pickle=True)
    elif how == "zero":
        path.unlink()
        path.symlink_to("/dev/zero")
    else:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, zipfile.ZipFile(path) as old:
            members = {n: old.read(n) for n in old.namelist()}
            key = rng.choice(list(members))
            if how == "damaged within":
                members[key] = damaged(rng, members[key])[0]
            elif how == "header":
                shape = rng.choice(
                    [
                        (10**10,),
                        (10**30,),
                        (-1,),
                        (2**62, 2),
                        (0, 10**12),
                        "(4",
                        "({},)",
                        "x",
                        (4.5,),
                        "(" * 200,
                        (16, 8, 8, 1),
                    ]
                )
                members[key] = _npy(
                    shape,
                    rng.choice(["<f8", "|O", "|u1", "<U9", "|V0", "f8,f8", "zz"]),
                    bytes(64),
                    rng.choice([1, 2, 9]),
                )
            elif how == "names":
                members |= {
                    "../../../outside/evil.npy": members[key],
                    "/evil.npy": members[key],
                    "a\nb.npy": members[key],
                    "\x1b[31m.npy": members[key],
                }
            elif how == "bomb":
                members[key] = _npy((1 << 31,), "|u1", bytes(1 << 28))
            for member, data in members.items():
                archive.writestr(member, data)
        data = bytearray(stream.getvalue())
        if how == "encrypted":
            for magic, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
                data[data.index(magic) + at] |= 1
        path.write_bytes(data)
    return _reads(rng, name), f"{name}: {done}"


def records(rng: random.Random, place: Place) -> tuple[list[str], str]:
    path = place.here / "record.json"
    content = json.loads(path.read_text())
    if rng.random() < 0.3:
        new, done = odd_json(rng, content)
    else:
        edit, done = edited(rng, content)
        new = json.dumps(edit).encode()
    path.write_bytes(new)
    return rng.choice(
        [
            ["compare", "record.json", "record2.json"],
            ["compare", "record2.json", "record.json"],
            ["evaluate", "--repeat", "record.json"],
        ]
    ), done


def cache(rng: random.Random, place: Place) -> tuple[list[str], str]:
    """Features that the scene's commands kept in the user's cache: harmed, they cost time and no more."""
    home = place.root / "home"
    shutil.copytree(place.root.parent / "home", home, dirs_exist_ok=True)
    features = home / ".cache/diffkd/features"
    path = rng.choice([features, *sorted(features.glob("*.npz")) * 3])
    how = rng.choice(
        ["damaged", "swapped", "pickle", "gone", "file", "loop", "dangling", "fifo", "zero", "outside"]
    )
    if how == "damaged" and path.is_file():
        path.write_bytes(damaged(rng, path.read_bytes())[0])
    elif how == "swapped" and path.is_file():
        path.write_bytes(rng.choice(sorted(features.glob("*.npz"))).read_bytes())
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if how == "pickle":
            path.write_bytes(pickle.dumps(Canary(place.outside / "exploded")))
        elif how == "file":
            path.write_text("x")
        elif how == "fifo":
            os.mkfifo(path)
        elif how in ("loop", "dangling", "zero"):
            path.symlink_to({"loop": path.name, "dangling": "../gone", "zero": "/dev/zero"}[how])
    arguments = rng.choice([
        ["stats", "images", "--out", "new.npz", "--features", "digits", "--store-features"],
        ["evaluate", "images.npz", "--reference", "ref.npz"],
        ["evaluate", "plain", "--reference", "images.npz", "--features", "digits", "--steps", "1",
         "--samples", "8"],
    ])  # fmt: skip
    return arguments, f"cache: {path.name[:12]} {how}"


def attack(rng: random.Random, number: int, place: Place, scene: Path) -> Attack:
    global FID
    from attacks.names import parameters

    FID = any(command == "fid" for command, *_ in parameters())
    place.bring(
        scene,
        "plain",
        "images",
        "images.npz",
        "ref.npz",
        "record.json",
        "record2.json",
        "train.yaml",
        "distill.yaml",
    )
    (place.here / "right.npz").write_bytes((scene / "images.npz").read_bytes())
    kinds = (options, images, arrays, records, cache)
    arguments, what = kinds[number % len(kinds)](rng, place)
    silent = "compare" in arguments or "--repeat" in arguments
    may = (0,) if what.startswith("cache") else (0, 1, 2) if silent else (0, 2)
    return Attack(arguments, what, may=may, silent=silent)
