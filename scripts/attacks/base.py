"""What an attack is, where it runs, and values that nobody expects."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECRET = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"  # looks like a token, and must not be shown
NAMES = [
    "../../evil", "../outside/evil", "evil\x1b[31m", "a\nb", "e" * 300, "..", "", "C:\\evil", "é",
    "\u202egnp",
    "[/red]", "%s", "{0}", SECRET,
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
    10**9, -(10**9), 2**31, 2**63, -(2**70), 10**400, [], {}, [[]], [None], [True], ["x"], {"a": {}},
    [10**9] * 3, [1] * 500, [0.5, 2], "true", "1e-4", "nan", "8", "x", "\ud800", *NAMES,
]  # fmt: skip


@dataclass
class Place:
    """The folder of one attack: the command runs in `here`, and nothing may change in `outside`."""

    root: Path
    here: Path = field(init=False)
    outside: Path = field(init=False)

    def __post_init__(self) -> None:
        self.here, self.outside = self.root / "here", self.root / "outside"
        for folder in (self.here, self.outside, self.root / "home", self.root / "tmp"):
            folder.mkdir(parents=True)
        (self.outside / "precious").write_text("precious\n")
        (self.outside / "folder").mkdir()
        (self.outside / "folder" / "kept").write_text("kept\n")

    def bring(self, scene: Path, *names: str) -> None:
        """Copies parts of the scene into `here`."""
        for name in names:
            source, target = scene / name, self.here / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copy(source, target)


@dataclass
class Attack:
    """A command and what is odd about it.

    may: exit statuses that are right here; 1 and 2 come with one line. silent: whether 1 may come without.
    inside: called in the command's process before it begins. environment: added; None removes a variable.
    named: places outside that the attack itself names as an output. again: called after the command, which
    must then succeed when it is repeated. end: called at last.
    """

    arguments: Sequence[str]
    what: str
    may: Sequence[int] = (0, 2)
    silent: bool = False
    inside: Callable[[], None] | None = None
    environment: dict[str, str | None] = field(default_factory=dict)
    stdout: str | None = None
    stderr: str | None = None
    encoding: str = "utf-8"
    named: Sequence[str] = ()
    again: Callable[[], None] | None = None
    end: Callable[[], None] | None = None


def edited(rng: random.Random, content: Any, odd: Sequence[Any] = ODD) -> tuple[Any, str]:
    """A JSON value with one to three of its values replaced, left out or added, and what was done."""
    content, done = json.loads(json.dumps(content)), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        node, path = content, "$"
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            path += f".{key}"
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
                node = node[key]
            elif rng.random() < 0.15:
                del node[key]
                done.append(f"without {path}")
                break
            else:
                node[key] = json.loads(json.dumps(rng.choice(odd)))
                done.append(f"{path} = {short(node[key])}")
                break
    return content, ", ".join(done)


def short(value: Any) -> str:
    """A value's repr, or its start."""
    text = value if isinstance(value, str) else str(value)[:80]
    return ascii(text[:60])


def damaged(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """The bytes cut short, with flipped bits, or a stretch left out, doubled or overwritten."""
    how = rng.choice(["cut", "bits", "zeros", "out", "double", "noise"])
    at, length = rng.randrange(len(content) or 1), rng.randint(1, 64)
    if how == "cut":
        return content[:at], f"cut at byte {at}"
    if how == "bits":
        turned = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            if turned:
                turned[rng.randrange(min(len(turned), rng.choice([200, len(turned)])))] ^= 1 << rng.randrange(
                    8
                )
        return bytes(turned), "bits flipped"
    middle = {"zeros": bytes(length), "out": b"", "double": content[at : at + length] * 2}
    new = middle.get(how, rng.randbytes(length))
    return content[:at] + new + content[at + length :], f"{how}, {length} bytes at {at}"


def odd_json(rng: random.Random, content: Any) -> tuple[bytes, str]:
    """JSON text of the content in a form that a reader may stumble over."""
    text = json.dumps(content, indent=2)
    first = next(iter(content), "x") if isinstance(content, dict) else "x"
    forms: dict[str, bytes] = {
        "empty": b"", "a note": text.encode() + b"\n# mine\n", "NUL": b"\0" + text.encode(),
        "trailing comma": text.rstrip()[:-1].encode() + b"," + text.rstrip()[-1:].encode(),
        "UTF-8 with BOM": text.encode("utf-8-sig"), "UTF-16": text.encode("utf-16"),
        "latin-1": text.encode()[:-2] + b'\n,"\xff": 1}', "a list": b"[" + text.encode() + b"]",
        "nothing but null": b"null", "a number": b"3", "a string": b'"x"',
        "CRLF": text.replace("\n", "\r\n").encode(),
        "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "a long number": json.dumps({"x": 1})[:-2].encode() + b"9" * 10_000 + b"}",
        "a key given twice": f'{{"{first}": 7, {text.lstrip()[1:]}'.encode(), "binary": rng.randbytes(500),
        "a long string": json.dumps({**content, first: "x" * 200_000} if isinstance(content,
            dict) else "x").encode(),
    }  # fmt: skip
    how = rng.choice([*forms, "damaged", "damaged"])
    if how == "damaged":
        return damaged(rng, text.encode())
    return forms[how], how
