"""Students made from their teacher, S = C(T): a copy, an adapter, fewer layers, fewer channels, or
another architecture."""

from diffkd.models.students.blocks import drop_blocks, keep_spread
from diffkd.models.students.channels import narrow
from diffkd.models.students.copies import copy_of, from_config, merged, reinitialized, with_network
from diffkd.models.students.hidden import narrow_hidden
from diffkd.models.students.importance import norm_scores, taylor_scores

__all__ = [
    "copy_of", "drop_blocks", "from_config", "keep_spread", "merged", "narrow", "narrow_hidden",
    "norm_scores", "reinitialized", "taylor_scores", "with_network",
]  # fmt: skip
