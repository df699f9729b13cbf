"""What the operating system and libraries raise, as errors of one line, by a table of error numbers."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from diffkd.errors import Unfinished, UserError


class _Cause(NamedTuple):
    """What an error number of the operating system means, and what to do. lasting: whether the user has to
    change the command, rather than the machine has to be put right and the command run again."""

    why: str
    remedy: str
    lasting: bool = True


_ROOM = "make room, and run the same command again"
_LIMIT = "raise the limit, and run the same command again"
_CAUSES = {
    "ENOSPC": _Cause("the disk is full", _ROOM, False),
    "EDQUOT": _Cause("the disk quota is used up", _ROOM, False),
    "EFBIG": _Cause("the file is larger than its file system or a limit (ulimit -f) allows", _LIMIT, False),
    "EIO": _Cause("the disk failed (input/output error)", "check it, and run the same command again", False),
    "ESTALE": _Cause("the network file system lost it", "run the same command again", False),
    "EMFILE": _Cause("too many files are open (ulimit -n)", _LIMIT, False),
    "ENFILE": _Cause("too many files are open on this machine", _LIMIT, False),
    "EAGAIN": _Cause("no more processes or threads may be started (ulimit -u)", _LIMIT, False),
    "ENOMEM": _Cause("the machine is out of memory", "free some, and run the same command again", False),
    "ENOLCK": _Cause("its file system has no locks to give", "use a place on another disk"),
    "ENAMETOOLONG": _Cause("the name is too long", "use a shorter one"),
    "EACCES": _Cause("permission denied", "use another place, or ask its owner for access"),
    "EPERM": _Cause("the operation is not permitted", "use another place, or ask its owner for access"),
    "EROFS": _Cause("its file system is read-only", "use another place"),
    "ENOENT": _Cause("there is no such file or folder", "check the path"),
    "ENOTDIR": _Cause("a part of the path is a file, not a folder", "check the path"),
    "EISDIR": _Cause("it is a folder, not a file", "check the path"),
    "EEXIST": _Cause("it exists already", "use another name"),
    "ENOTEMPTY": _Cause("the folder is not empty", "use another name"),
    "ELOOP": _Cause("its symbolic links lead round in a circle", "check the path"),
    "ENXIO": _Cause("it is a pipe, a socket or a device, not a file", "check the path"),
    "EBUSY": _Cause("it is in use", "wait for what uses it"),
    "ETXTBSY": _Cause("it is in use", "wait for what uses it"),
    "EILSEQ": _Cause("its file system does not take this name", "use a plainer one"),
    "EINVAL": _Cause("its file system does not take this name or operation", "use another place"),
    "ENOTSUP": _Cause("its file system does not support this", "use another place"),
}
CAUSES = {getattr(errno, name): cause for name, cause in _CAUSES.items() if hasattr(errno, name)}
NO_ROOM = tuple(number for number, cause in CAUSES.items() if cause.remedy == _ROOM)
_TOLD = re.compile(  # by Rust, in its two forms, and by libraries that quote Python
    r"(?:\(os error |\bOs \{ code: |\[Errno )(\d+)"
)
_IN_WORDS = {  # of Python, which raises a RuntimeError where the system gave a number
    "can't start new thread": errno.EAGAIN,
    "Symlink loop from": errno.ELOOP,
}
_SHORT_WRITE = re.compile(r"^\d+ requested and \d+ written$")  # numpy's, which hides the number
_NO_NAME = re.compile("embedded null|surrogates not allowed")
_OUT_OF_MEMORY = re.compile("can't allocate memory|not enough memory|out of memory", re.IGNORECASE)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that led to it: causes, what was being handled, members of a group."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        before = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        waiting += [*getattr(each, "exceptions", ()), *([before] if before else [])]


def system_error(error: BaseException) -> int | None:
    """The operating system's number of an error, of the libraries too that only tell it in their message.

    A disk without room is found behind an error as well: zipfile raises another one while it closes the file.
    """
    if (number := _number(error)) is not None:
        return number
    return next((found for each in chain(error) if (found := _number(each)) in NO_ROOM), None)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed because the disk or the user's quota is full."""
    return system_error(error) in NO_ROOM


def _number(error: BaseException) -> int | None:
    if not isinstance(error, Exception):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if told := _TOLD.search(text):
        return int(told[1])
    if isinstance(error, RuntimeError):
        return next((number for words, number in _IN_WORDS.items() if words in text), None)
    return errno.ENOSPC if isinstance(error, OSError) and _SHORT_WRITE.match(text) else None


def explained(error: BaseException, thing: str | None = None) -> UserError | Unfinished | None:
    """What the system or a library raised, as an error of one line; None for what nobody foresaw.

    thing: what it is about, for the message; default the file that the error names.
    """
    if isinstance(error, UserError | Unfinished):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)):
        why = f" ({text[:200]})" if text else ""
        return Unfinished(f"out of memory{why}; use a smaller batch size, fewer images or a smaller model")
    if isinstance(error, ImportError):
        return UserError(
            f"{text or 'an import failed'}; the installation is incomplete: install that package"
        )
    if isinstance(error, UnicodeEncodeError | ValueError) and _NO_NAME.search(text):
        return UserError(f"a name holds characters that no file's name can hold ({text}); use another")
    number = system_error(error)
    if number is None and not isinstance(error, OSError):
        return None
    about = f"{thing or _file_of(error)}: ".removeprefix(": ")
    if number not in CAUSES:
        return Unfinished(f"{about}{text or type(error).__name__}; mend that, and run the same command again")
    cause = CAUSES[number]
    return (UserError if cause.lasting else Unfinished)(f"{about}{cause.why}; {cause.remedy}")


def _file_of(error: BaseException) -> str:
    """The file that an error names, of two the one that was to be written; "" for none."""
    for each in chain(error):
        for name in (getattr(each, "filename2", None), getattr(each, "filename", None)):
            if isinstance(each, OSError) and isinstance(name, str | bytes | os.PathLike):
                return os.fsdecode(name)
    return ""
