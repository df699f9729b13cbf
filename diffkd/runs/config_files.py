"""Config files read into the typed objects of a run, and written back in full."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from diffkd import methods
from diffkd.core.classifier import Classifier
from diffkd.errors import UserError
from diffkd.io import naming, plugins
from diffkd.io.config import Strict, validation_message
from diffkd.io.strict_yaml import read_yaml
from diffkd.io.text import quoted, reason
from diffkd.runs.classification.config import DistillClassifier
from diffkd.runs.config import Distill, Train
from diffkd.runs.latent_teacher.config import KINDS, TrainLatent

Config = TypeVar("Config", bound=Strict)


def load(path: Path, kind: type[Config], overrides: Sequence[str] = ()) -> Config:
    """A config file with `key.sub=value` overrides.

    Raises UserError, which for an unknown key names the nearest known one.
    """
    with plugins.beside(path.parent):
        return _validated(_read(path, overrides), kind)


def load_train(path: Path, overrides: Sequence[str] = ()) -> Train | TrainLatent:
    """A config of `diffkd train`, of the kind that its model is."""
    content = _read(path, overrides)
    model = content.get("model")
    named = model.get("kind") if isinstance(model, Mapping) else None
    if named is not None and named not in KINDS:
        raise UserError(
            f"config key model.kind is {quoted(named)}; use one of {', '.join(KINDS)}, or leave it out for a "
            "UNet2DModel of pixels"
        )
    with plugins.beside(path.parent):
        return _validated(content, Train) if named is None else _validated(content, KINDS[named])


def load_distill(path: Path, overrides: Sequence[str] = ()) -> Distill | DistillClassifier:
    """A config of `diffkd distill`, which distils what its method distils."""
    content = _read(path, overrides)
    given = content.get("method")
    with plugins.beside(path.parent):
        for method in given if isinstance(given, list) else [given]:
            name = method.get("name") if isinstance(method, Mapping) else None
            if isinstance(name, str) and methods.find(name).kind is Classifier:
                return _validated(content, DistillClassifier)
        return _validated(content, Distill)


def distill_of(content: Mapping[str, Any]) -> Distill:
    """The config of a distillation from values in Python, as if it were a file in the current folder."""
    place = Path.cwd()
    with naming.spoken("config"), plugins.beside(place):
        return _validated(_from(place, _plain(content)), Distill)


def resolved(config: Strict) -> dict[str, Any]:
    """The config as plain data, every default written out; the run folder keeps it."""
    return config.model_dump(mode="json")


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    naming.speak("config")
    return _from(path.parent, read_yaml(path, overrides))


def _from(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content of a config in a folder, its teacher's config named by a path that holds from any other."""
    teacher = content.get("teacher")
    if isinstance(teacher, dict) and isinstance(teacher.get("train"), str):
        try:
            teacher["train"] = os.path.realpath(folder / teacher["train"])
        except ValueError as error:
            raise UserError(
                f"config key teacher.train is {quoted(teacher['train'])}, not a valid path ({reason(error)})"
            ) from error
    return content


def _plain(value: Any) -> Any:
    """The value as YAML would have it."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _validated(content: dict[str, Any], kind: type[Config]) -> Config:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(validation_message(error, kind)) from error
