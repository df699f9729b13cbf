"""Students made from their teacher, S = C(T): a copy, an adapter, fewer layers, fewer channels, or
another architecture. Its files are imported when they are first used, as most import diffusers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffkd.models.students.blocks import drop_blocks, keep_spread
    from diffkd.models.students.channels import narrow
    from diffkd.models.students.copies import copy_of, from_config, merged, reinitialized, with_network
    from diffkd.models.students.hidden import narrow_hidden
    from diffkd.models.students.importance import norm_scores, taylor_scores

_HOMES = {
    "drop_blocks": "blocks",
    "keep_spread": "blocks",
    "narrow": "channels",
    "copy_of": "copies",
    "from_config": "copies",
    "merged": "copies",
    "reinitialized": "copies",
    "with_network": "copies",
    "narrow_hidden": "hidden",
    "norm_scores": "importance",
    "taylor_scores": "importance",
}
__all__ = [
    "copy_of", "drop_blocks", "from_config", "keep_spread", "merged", "narrow", "narrow_hidden",
    "norm_scores", "reinitialized", "taylor_scores", "with_network",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
