"""Networks of NVlabs' EDM2 made of what their pickles hold (Karras et al. 2024).

There every weight w is normalised whenever it is used, w / |w| with a row for each output, and scaled by the
square root of its inputs, so that magnitudes are preserved (equations 47 and 66). What is used is what is
kept here: a network of plain weights that computes the same. Its two kinds of gains are multiplied in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffkd.errors import UserError
from diffkd.io.text import quoted
from diffkd.models.edm2_unet import EDM2UNet, normalized

# arguments of its networks: what they are called here, and what they are where nothing is said
READ: dict[str, tuple[str, Any]] = {
    "img_resolution": ("sample_size", None),
    "img_channels": ("in_channels", None),
    "model_channels": ("model_channels", 192),
    "channel_mult": ("channel_mult", [1, 2, 3, 4]),
    "num_blocks": ("num_blocks", 3),
    "attn_resolutions": ("attention", [16, 8]),
    "channels_per_head": ("head_channels", 64),
    "dropout": ("dropout", 0.0),
    "label_dim": ("num_class_embeds", None),
    "label_balance": ("label_balance", 0.5),
    "concat_balance": ("concat_balance", 0.5),
    "res_balance": ("res_balance", 0.3),
    "attn_balance": ("attn_balance", 0.3),
    "clip_act": ("clip", 256),
}
FIXED: dict[str, Any] = {  # of the published networks: what a converted one has, and no other
    "channel_mult_noise": None, "channel_mult_emb": None, "resample_filter": [1, 1],
}  # fmt: skip
ELSEWHERE = ("use_fp16", "sigma_data", "logvar_channels")  # of the preconditioning around it
LOGVAR = "logvar_"  # of the head that tells how uncertain a prediction is, which only the loss asks


def network_of(given: Mapping[str, Any], weights: Mapping[str, Tensor]) -> EDM2UNet:
    """The network of its arguments there, and of its weights by their names there.

    Raises UserError for arguments that say something else than is read, and RuntimeError for weights that are
    not those of the arguments.
    """
    if unknown := sorted(map(str, given.keys() - READ.keys() - FIXED.keys() - {*ELSEWHERE})):
        raise UserError(f"an argument {quoted(unknown[0])}, which is of no network read so far")
    for key, value in FIXED.items():
        if key in given and given[key] not in (value, tuple(value) if isinstance(value, list) else value):
            raise UserError(f"{key} {quoted(given[key])}; read so far is {value!r}")
    config = {name: given.get(key, default) for key, (name, default) in READ.items()}
    with torch.device("meta"):  # its weights take no memory before they are known to be these
        network = EDM2UNet(**config | {"num_class_embeds": config["num_class_embeds"] or None})
    network.load_state_dict(plain(weights), assign=True)
    return network.requires_grad_(True)


def plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as they are used. A block's gain is of how its embedding scales, the network's of its last
    layer."""
    found = dict[str, Tensor]()
    for name, value in weights.items():
        layer = name.removesuffix(".weight")
        if layer == name:
            if not name.endswith("_gain"):
                found[name] = value  # a frequency or a phase
            continue
        rows = value.flatten(1)
        used = normalized(rows, 1).reshape(value.shape) / math.sqrt(rows.shape[1])
        block, _, last = layer.rpartition(".")
        gain = {"emb_linear": f"{block}.emb_gain", "out_conv": "out_gain"}.get(last)
        found[name] = used if gain is None else used * weights[gain]
    return found
