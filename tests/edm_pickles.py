"""Pickles as NVlabs' EDM and EDM2 write their networks: what they name would run code, were it called."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import convert_edm  # noqa: E402
import edm_reader  # noqa: E402

__all__ = ["convert_edm", "edm_reader", "encoder", "stand_in", "write"]


class Persistent(torch.nn.Module):
    """Pickled as the classes of EDM's networks.py are: a function's name, and what it makes of a dict."""

    kind = "?"

    def __reduce__(self):
        source = "import os\nos.environ['EDM_PICKLE_RAN'] = 'yes'\n"
        meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": self.kind,
            "state": self.__dict__,
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


def persistent(kind, module, **state):
    """A module of torch as one of these, its parts too."""
    made = Persistent()
    own = {key: module.__dict__[key] for key in ("training", "_parameters", "_buffers")}
    made.__dict__.update({**own, **state})
    made._modules = {
        name: torch.nn.ModuleDict({k: persistent("Part", v) for k, v in part.items()})
        if isinstance(part, torch.nn.ModuleDict)
        else persistent("Part", part)
        for name, part in module._modules.items()
    }
    made.kind = kind
    return made


def stand_in(monkeypatch: Any) -> None:
    """In place of EDM's own module, whose function no reader may call."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the pickle's own function was called")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


def write(
    path: Path,
    network: torch.nn.Module,
    kind: str,
    inner: str,
    given: Mapping[str, Any],
    *positional: Any,
    part: str = "model",
    beside: Mapping[str, torch.nn.Module] | None = None,
    encoder: Any = None,
) -> Path:
    """The pickle of a network `inner`, called `part`, within the preconditioning `kind`, made with these
    arguments. beside: other parts of that. encoder: EDM2's, of its images."""
    model = persistent(inner, network, _init_args=positional, _init_kwargs=given)
    whole = persistent(kind, torch.nn.Module(), _init_args=(), _init_kwargs=given, sigma_data=0.6)
    whole._modules = {part: model} | {key: persistent("Part", one) for key, one in (beside or {}).items()}
    content = {"ema": whole, "dataset_kwargs": {"resolution": given["img_resolution"]}}
    if encoder is not None:
        content["encoder"] = encoder
    path.write_bytes(pickle.dumps(content))
    return path


def encoder(kind: str, **state: Any) -> Persistent:
    """What EDM2 pickles beside a network."""
    made = Persistent()
    made.__dict__.update(state)
    made.kind = kind
    return made
