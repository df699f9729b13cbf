"""What a folder of images holds: its image files; classes by subfolder or metadata, captions by metadata or
text files of the same names."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffkd.data.decoding import SUFFIXES
from diffkd.data.metadata import METADATA, read_metadata
from diffkd.data.packed import PackedPaths, PackedStrings
from diffkd.errors import UserError
from diffkd.io.text import quoted, reason

MAX_CLASSES = 100_000  # of labels that are numbers
PARTED = "\0"  # in place of / while names are sorted: a folder comes before files that begin with its name
ClassOrder = Literal["name", "number"]


@dataclass(frozen=True)
class Listing:
    """paths: the image files, sorted. labels: of each, by metadata or else by subfolder; None where some have
    none. classes: their names. captions: of each, "" for none; empty where no image has one. loose: how many
    images lie in the folder itself. passed_over: files that are no images by their suffix."""

    paths: PackedPaths
    labels: list[int] | None
    classes: list[str]
    captions: PackedStrings
    loose: int
    passed_over: PackedPaths


def list_folder(root: Path, class_order: ClassOrder = "name", *, labelled: bool = True) -> Listing:
    """The images below a folder.

    Hidden files and folders (.name) are not data. Links to folders are followed, each folder once in a class.
    Raises UserError for a folder or a metadata file that cannot be read, and for one without images.
    """
    metadata, images, others = list[Path](), list[str](), list[str]()
    for folder, names in _folders(root):
        before = f"{folder}/".replace("/", PARTED) if folder else ""
        metadata += [root / folder / name for name in names if name in METADATA]
        for name in names:
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                images.append(before + name)
            elif name not in METADATA:
                others.append(before + name)
    if not images:
        raise UserError(
            f"{root} holds no images ({', '.join(SUFFIXES)}), neither in itself nor in subfolders"
        )
    images.sort()
    others.sort()
    paths = _packed(root, images)
    about = read_metadata(root, metadata, paths.names)
    loose = sum(PARTED not in name for name in images)
    labels: list[int] | None = None
    classes: list[str] = []
    if not labelled:
        pass
    elif any("label" in row for row in about.values()):
        labels, classes = _numbered(paths, about, class_order)
    elif not loose:
        classes = sorted_classes({name.partition(PARTED)[0] for name in images}, class_order, root)
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[name.partition(PARTED)[0]] for name in images]
    if any("caption" in row for row in about.values()):
        captions = PackedStrings(about.get(name, {}).get("caption", "") for name in paths.names)
    else:
        captions, used = _texts(root, images, others)
        others = [name for name, is_text in zip(others, used, strict=True) if not is_text]
    return Listing(paths, labels, classes, captions, loose, _packed(root, others))


def _packed(root: Path, names: Iterable[str]) -> PackedPaths:
    return PackedPaths(root, PackedStrings(name.replace(PARTED, "/") for name in names))


def _texts(root: Path, images: Sequence[str], others: Sequence[str]) -> tuple[PackedStrings, bytearray]:
    """The captions of images by text files of their names, and which of the others these are."""
    used = bytearray(len(others))

    def caption(image: str) -> str:
        name = f"{os.path.splitext(image)[0]}.txt"
        place = bisect_left(others, name)
        if place == len(others) or others[place] != name:
            return ""
        used[place] = True
        return _caption(f"{root}/{name.replace(PARTED, '/')}")  # no Path: Python keeps its parts for a while

    if not any(name.endswith(".txt") for name in others):
        return PackedStrings(()), used
    captions = PackedStrings(map(caption, images))
    return captions if any(used) else PackedStrings(()), used


def _caption(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return " ".join(file.read().split())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a caption ({reason(error)}); repair or remove it"
        ) from error


def sorted_classes(names: set[str], order: ClassOrder, where: object) -> list[str]:
    """By name, or by the number that each name is. Raises UserError for names that are none."""
    if order == "name":
        return sorted(names)
    wrong = next((name for name in sorted(names) if not (name.isascii() and name.isdigit())), None)
    if wrong is not None:
        raise UserError(
            f"class_order number is for classes named by numbers, and {where} has {quoted(wrong)}; use name"
        )
    return sorted(names, key=lambda name: (int(name), name))


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each visible folder, as its path from the root, "" for that itself, and the names of its visible files.
    Nothing else of them is held: there may be a million in one folder."""
    names, inside = _entries(root)
    yield "", names
    for first in inside:
        seen, waiting = {_identity(root)}, [first]  # links may lead around in a circle
        while waiting:
            folder = waiting.pop()
            if (identity := _identity(root / folder)) in seen:
                continue
            seen.add(identity)
            names, within = _entries(root / folder)
            waiting += [f"{folder}/{name}" for name in within]
            yield folder, names


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """The names of a folder's visible files and folders, the latter sorted."""
    files, folders = list[str](), list[str]()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    folders.append(entry.name)
                elif _is_file(entry):
                    files.append(entry.name)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({reason(error)}); make it readable") from error
    return files, sorted(folders)


def _identity(folder: Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Links that lead nowhere too: whoever reads an image by that name says so."""
    return entry.is_symlink() or entry.is_file()


def _numbered(
    paths: PackedPaths, about: dict[str, dict[str, Any]], order: ClassOrder
) -> tuple[list[int], list[str]]:
    """Labels and class names from metadata: numbers as they are, or names, which are numbered in order."""
    given: list[Any] = [about.get(name, {}).get("label") for name in paths.names]
    names = isinstance(given[0], str)
    for path, label in zip(paths, given, strict=True):
        fits = isinstance(label, str) and label if names else type(label) is int and 0 <= label < MAX_CLASSES
        if not fits:
            raise UserError(
                f"{path}: its label in the metadata is {quoted(label)}; give every image a name, or every "
                f"one a number from 0 to {MAX_CLASSES - 1}"
            )
    if not names:
        return given, [str(i) for i in range(max(given) + 1)]
    classes = sorted_classes(set(given), order, "the metadata")
    number = {name: i for i, name in enumerate(classes)}
    return [number[label] for label in given], classes
