"""EDM2's networks as their publication lays them out: what their pickles hold, and what that computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, HEAD = 8, 8
MADE: dict[str, Any] = {
    "img_resolution": SIDE, "img_channels": 3, "label_dim": 3, "use_fp16": True, "model_channels": 8,
    "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": HEAD,
    "dropout": 0.1, "label_balance": 0.4, "concat_balance": 0.45, "res_balance": 0.25, "attn_balance": 0.35,
}  # fmt: skip


def blocks(given: Mapping[str, Any]) -> Iterator[tuple[str, int, int, bool]]:
    """Of each block: its name, the channels that it is given and makes, and whether it has attention."""
    widths = [given["model_channels"] * mult for mult in given["channel_mult"]]
    sides = [SIDE >> level for level in range(len(widths))]
    width = widths[0]
    kept = [width]
    for level, outer in enumerate(widths):
        for name in ["down"] * (level > 0) + [f"block{i}" for i in range(given["num_blocks"])]:
            inner, made = width, width if name == "down" else outer
            attends = name != "down" and sides[level] in given["attn_resolutions"]
            yield f"enc.{sides[level]}x{sides[level]}_{name}", inner, made, attends
            kept.append(width := made)
    yield f"dec.{sides[-1]}x{sides[-1]}_in0", width, width, True
    yield f"dec.{sides[-1]}x{sides[-1]}_in1", width, width, False
    for level, outer in reversed([*enumerate(widths)]):
        if level < len(widths) - 1:
            yield f"dec.{sides[level]}x{sides[level]}_up", width, width, False
        for i in range(given["num_blocks"] + 1):
            attends = sides[level] in given["attn_resolutions"]
            yield f"dec.{sides[level]}x{sides[level]}_block{i}", width + kept.pop(), outer, attends
            width = outer


def network(given: Mapping[str, Any], seed: int = 0) -> torch.nn.Module:
    """Modules of random weights by their published names, which nothing has normalised, in half precision."""
    generator, root = torch.Generator().manual_seed(seed), torch.nn.Module()

    def place(name: str) -> torch.nn.Module:
        found = root
        for part in name.split("."):
            if part not in found._modules:
                found.add_module(part, torch.nn.Module())
            found = found._modules[part]  # type: ignore[assignment]
        return found

    def layer(name: str, *shape: int) -> None:
        weight = 3 * torch.randn(shape, generator=generator)
        place(name).weight = torch.nn.Parameter(weight)

    def gain(where: torch.nn.Module, name: str) -> None:
        setattr(where, name, torch.nn.Parameter(0.5 + torch.rand([], generator=generator)))

    first = given["model_channels"] * given["channel_mult"][0]
    embedded = given["model_channels"] * max(given["channel_mult"])
    fourier = place("emb_fourier")
    fourier.register_buffer("freqs", 2 * math.pi * torch.randn(first, generator=generator))
    fourier.register_buffer("phases", 2 * math.pi * torch.rand(first, generator=generator))
    layer("emb_noise", embedded, first)
    if given["label_dim"]:
        layer("emb_label", embedded, given["label_dim"])
    layer(f"enc.{SIDE}x{SIDE}_conv", first, given["img_channels"] + 1, 3, 3)
    for name, inner, outer, attends in blocks(given):
        gain(place(name), "emb_gain")
        layer(f"{name}.conv_res0", outer, outer if name.startswith("enc") else inner, 3, 3)
        layer(f"{name}.emb_linear", outer, embedded)
        layer(f"{name}.conv_res1", outer, outer, 3, 3)
        if inner != outer:
            layer(f"{name}.conv_skip", outer, inner, 1, 1)
        if attends:
            layer(f"{name}.attn_qkv", 3 * outer, outer, 1, 1)
            layer(f"{name}.attn_proj", outer, outer, 1, 1)
    layer("out_conv", given["img_channels"], first, 3, 3)
    gain(root, "out_gain")
    return root.half().eval()


def reference(
    weights: Mapping[str, Tensor], x: Tensor, c_noise: Tensor, labels: Tensor | None, given: Mapping[str, Any]
) -> Tensor:
    """One operation at a time, in float64: the weights are normalised where they are used."""
    w = {key: value.double() for key, value in weights.items()}
    x, c_noise = x.double(), c_noise.double()

    def unit(v: Tensor, dims: list[int]) -> Tensor:
        return v / (v.pow(2).mean(dims, keepdim=True).sqrt() + 1e-4)

    def conv(name: str, v: Tensor, gain: Any = 1.0) -> Tensor:
        kernel = w[f"{name}.weight"]
        kernel = unit(kernel, [*range(1, kernel.ndim)]) * (gain / kernel[0].numel() ** 0.5)
        return v @ kernel.T if kernel.ndim == 2 else F.conv2d(v, kernel, padding=kernel.shape[-1] // 2)

    def silu(v: Tensor) -> Tensor:
        return v * v.sigmoid() / 0.596

    def together(a: Tensor, b: Tensor, t: float) -> Tensor:
        return (a + t * (b - a)) / ((1 - t) ** 2 + t**2) ** 0.5

    def joined(a: Tensor, b: Tensor, t: float) -> Tensor:
        total = ((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2)) ** 0.5
        return torch.cat([total * (1 - t) / a.shape[1] ** 0.5 * a, total * t / b.shape[1] ** 0.5 * b], 1)

    def block(name: str, v: Tensor) -> Tensor:
        if name.endswith("_down"):
            v = F.conv2d(v, torch.full((v.shape[1], 1, 2, 2), 0.25).double(), stride=2, groups=v.shape[1])
        if name.endswith("_up"):
            v = v.repeat_interleave(2, 2).repeat_interleave(2, 3)
        down, skips = name.startswith("enc"), f"{name}.conv_skip.weight" in w
        if down:
            v = unit(conv(f"{name}.conv_skip", v) if skips else v, [1])
        h = conv(f"{name}.conv_res0", silu(v))
        scale = conv(f"{name}.emb_linear", embedding, w[f"{name}.emb_gain"]) + 1
        h = conv(f"{name}.conv_res1", silu(h * scale[:, :, None, None]))
        if not down and skips:
            v = conv(f"{name}.conv_skip", v)
        v = together(v, h, given["res_balance"])
        if f"{name}.attn_qkv.weight" in w:
            b, c, height, width = v.shape
            all_three = conv(f"{name}.attn_qkv", v).reshape(b, c // HEAD, HEAD, 3, height * width)
            q, k, u = unit(all_three, [2]).unbind(3)
            share = torch.einsum("nhcq,nhck->nhqk", q, k / HEAD**0.5).softmax(3)
            h = torch.einsum("nhqk,nhck->nhcq", share, u).reshape(b, c, height, width)
            v = together(v, conv(f"{name}.attn_proj", h), given["attn_balance"])
        return v.clamp(-256, 256)

    angles = c_noise[:, None] * w["emb_fourier.freqs"] + w["emb_fourier.phases"]
    embedding = conv("emb_noise", 2**0.5 * angles.cos())
    if labels is not None:
        one_hot = torch.eye(given["label_dim"]).double()[labels] * given["label_dim"] ** 0.5
        embedding = together(embedding, conv("emb_label", one_hot), given["label_balance"])
    embedding = silu(embedding)
    x = conv(f"enc.{SIDE}x{SIDE}_conv", torch.cat([x, torch.ones_like(x[:, :1])], 1))
    kept = [x]
    for name, *_ in blocks(given):
        if name.startswith("enc"):
            kept.append(x := block(name, x))
        else:
            x = block(name, joined(x, kept.pop(), given["concat_balance"]) if "block" in name else x)
    return conv("out_conv", x, w["out_gain"])


def denoised(
    weights: Mapping[str, Tensor], x: Tensor, sigma: Tensor, labels: Tensor | None, given: Mapping[str, Any]
) -> Tensor:
    """D(x, sigma) of EDM with the sigma_data 0.6 of `edm_pickles`, in float64."""
    x, sigma = x.double(), sigma.double().reshape(-1, 1, 1, 1)
    total = sigma**2 + 0.36
    raw = reference(weights, x / total.sqrt(), sigma.flatten().log() / 4, labels, given)
    return 0.36 / total * x + sigma * 0.6 / total.sqrt() * raw
