"""Strict YAML: a config file and its overrides as plain values; what is wrong is reported with its line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from diffkd.errors import UserError
from diffkd.io.text import is_number, reason

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1 << 20, 100_000, 50  # of a config, which usually fills a page


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a config file after `key.sub=value` overrides. Raises UserError for invalid YAML."""
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
        content = _parse(text)
    except OSError as error:
        raise UserError(f"config {path} cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config {path} is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"config {path} holds no keys; see configs/ for examples")
    for override in overrides:
        _override(content, override)
    return content


class _Loader(yaml.SafeLoader):
    """YAML's plain values. Duplicate keys and documents that would expand beyond all bounds are errors."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth == MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels of nesting, {_line(self.peek_event())}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_document(self, node: Any) -> Any:
        self._expanded_size(node, {})
        return super().construct_document(node)

    def _expanded_size(self, node: Any, sizes: dict[int, int]) -> int:
        """The number of values in a node once its aliases are expanded. sizes: of nodes already counted, by
        id; 0 while one is being counted."""
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise yaml.YAMLError(f"an alias inside the value that it refers to, {_line(node)}")
            return sizes[id(node)]
        sizes[id(node)] = 0
        if isinstance(node, yaml.MappingNode):
            _check_duplicates(node)
            children = [child for pair in node.value for child in pair]
        else:
            children = [] if isinstance(node, yaml.ScalarNode) else node.value
        size = 1 + sum(self._expanded_size(child, sizes) for child in children)
        if size > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values once aliases are expanded, {_line(node)}")
        sizes[id(node)] = size
        return size


def _check_duplicates(node: yaml.MappingNode) -> None:
    keys: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in keys:
                raise yaml.YAMLError(f"key {key.value} is given twice, {_line(key)}; keep one of them")
            keys.add(key.value)


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"


def _parse(text: bytes | str) -> Any:
    """Raises yaml.YAMLError or ValueError."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES >> 20} MiB")
    loader = _Loader(text.decode() if isinstance(text, bytes) else text)
    try:
        return loader.get_single_data()
    except (AttributeError, LookupError, TypeError, OverflowError) as error:  # from PyYAML, as for "!!int ''"
        raise ValueError(f"an invalid value: {reason(error)}") from error
    finally:
        loader.dispose()


def _override(content: dict[str, Any], override: str) -> None:
    """Sets key.sub in place; lists are indexed by number, missing mappings are created."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key.sub=value")
    place: Any = content
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(place, list) and is_number(parent) and int(parent) < len(place):
            place = place[int(parent)]
            continue
        if not isinstance(place, dict):
            raise UserError(f"override {override!r}: {parent} is inside a value that has no keys")
        if not isinstance(place.get(parent), dict | list):
            place[parent] = {}
        place = place[parent]
    try:
        parsed = _parse(value)
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"override {override!r} has a value that is not valid YAML ({why})") from error
    if isinstance(place, list):
        if not is_number(last) or int(last) >= len(place):
            raise UserError(f"override {override!r}: a list is indexed by 0 to {len(place) - 1}")
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise UserError(f"override {override!r}: {key} is inside a value that has no keys")
