"""The reference of config keys: key, type, default and meaning of each, from the typed objects."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
import yaml
from pydantic_core import to_jsonable_python

from diffkd import methods
from diffkd.io.config import Strict
from diffkd.methods.base import Method
from diffkd.runs.benchmark_config import Benchmark
from diffkd.runs.classification.config import DistillClassifier
from diffkd.runs.config import Distill, Train
from diffkd.runs.latent_teacher.config import TrainDiT, TrainSD3, TrainTextToImage
from pages.methods import pages_of_methods
from pages.text import escaped, paragraph

INTRO = """# Config keys

Every key of every config, made of the typed objects that read them. A key that is not here stops a run, and
its message names the nearest. `diffkd distill CONFIG --dry-run` prints a config with all its defaults. Any
value can be given on the command line as well: `training.batch_size=64`, `method.0.updates=1000` of a list.
"""
CONFIGS: dict[str, type[Strict]] = {
    "`diffkd distill`": Distill,
    "`diffkd distill` of classifiers": DistillClassifier,
    "`diffkd train`": Train,
    "`diffkd train` of a Stable Diffusion": TrainTextToImage,
    "`diffkd train` of a DiT": TrainDiT,
    "`diffkd train` of a Stable Diffusion 3": TrainSD3,
    "`diffkd benchmark`": Benchmark,
}
WORDS = {
    int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", Any: "anything",
    types.NoneType: "null",
}  # fmt: skip


def page() -> str:
    """The whole page, in Markdown."""
    parts = [INTRO]
    of_methods = {methods.find(name): name for name in methods.names()}
    known: set[type[Strict]] = {*of_methods}
    for title, config in CONFIGS.items():
        parts += [f"## {title} {{ #{config.__name__} }}", about(config), table(config)]
        for key, kind in below(config, known):
            tag = f" of kind `{tag_of(kind)}`" if tag_of(kind) else ""
            parts += [f"### `{key}`{tag} {{ #{kind.__name__} }}", about(kind), table(kind)]
            known.add(kind)
    pages = pages_of_methods()
    parts.append("## Methods { #methods }")
    for kind, name in of_methods.items():
        more = f"[The method](../methods/{pages[name]})."
        parts += [f"### `{name}` {{ #{kind.__name__} }}", f"{about(kind)} {more}", table(kind)]
    return "\n\n".join(parts) + "\n"


def below(config: type[Strict], known: Set[type[Strict]]) -> Iterator[tuple[str, type[Strict]]]:
    """The objects in a config that are not known, each with the key that holds it, before those in it."""
    met = {*known, config}
    waiting = [(key, kind) for key, kind in held(config)]
    while waiting:
        key, kind = waiting.pop(0)
        if kind not in met:
            met.add(kind)
            yield key, kind
            waiting = [*held(kind), *waiting]


def held(config: type[Strict]) -> Iterator[tuple[str, type[Strict]]]:
    """The typed objects that its keys may hold."""
    for key, field in config.model_fields.items():
        for kind in objects_in(field.annotation):
            yield key, kind


def objects_in(annotation: Any) -> Iterator[type[Strict]]:
    if get_origin(annotation) is None and isinstance(annotation, type):
        if issubclass(annotation, Strict) and not inspect.isabstract(annotation):
            yield annotation
    else:
        for inner in get_args(annotation):
            yield from objects_in(inner)


def about(kind: type[Strict]) -> str:
    """The first paragraph of its docstring."""
    return escaped(paragraph(kind.__doc__))


def table(kind: type[Strict]) -> str:
    """A row for each key."""
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for key, field in kind.model_fields.items():
        said = field.description or ("names this kind" if is_tag(key, field) else "")
        type_ = words(field.annotation) + limits(field.metadata)
        lines.append(f"| `{key}` | {type_} | {default(field)} | {escaped(said)} |")
    return "\n".join(lines) if len(lines) > 2 else "It has no keys."


def is_tag(key: str, field: Any) -> bool:
    """Whether its one value chooses the class among others."""
    return key == "kind" and len(get_args(field.annotation)) == 1


def tag_of(kind: type[Strict]) -> str | None:
    """The value of `kind` that chooses this class."""
    field = kind.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None and is_tag("kind", field) else None


def words(annotation: Any) -> str:
    """A type in the words of whoever writes a config."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(inside[0]) + limits(inside[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(words, inside)))
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in inside)
    if origin is list:
        return f"list of {words(inside[0])}"
    if origin is tuple:
        return f"\\[{', '.join(map(words, inside))}\\]"
    if origin is dict:
        return f"mapping of names to {words(inside[1])}"
    if annotation is Method:
        return "[a method](#methods)"
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        tag = tag_of(annotation)
        return f"[{f'`{tag}`' if tag else 'keys'}](#{annotation.__name__})"
    return WORDS[annotation]


def limits(metadata: Iterable[Any]) -> str:
    """The bounds of a value, in parentheses; "" for none."""
    said = []
    for one in metadata:
        for bound in getattr(one, "metadata", [one]):  # of a Field inside a list
            match bound:
                case bounds.Ge(ge=low):
                    said.append(f"{low:,} or more")
                case bounds.Gt(gt=low):
                    said.append(f"above {low:,}")
                case bounds.Le(le=high):
                    said.append(f"at most {high:,}")
                case bounds.Lt(lt=high):
                    said.append(f"below {high:,}")
                case bounds.MultipleOf(multiple_of=unit):
                    said.append(f"a multiple of {unit:,}")
                case bounds.MinLen(min_length=count):
                    said.append(f"{count:,} of them or more")
                case bounds.MaxLen(max_length=count):
                    said.append(f"at most {count:,} of them")
    return f" ({', '.join(said)})" if said else ""


def default(field: Any) -> str:
    """What a key is where a config does not have it."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Strict):
        own = {"name": methods.name_of(type(value))} if field.annotation is Method else {}
        tag = {"kind": tag_of(type(value))} if tag_of(type(value)) else {}
        value = {**own, **tag, **value.model_dump(mode="json", exclude_defaults=True)}
        if not value:
            return "its keys' own"
    text = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=1000, sort_keys=False)
    return f"`{text.strip().removesuffix('...').strip()}`"
