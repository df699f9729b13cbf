"""Tiny denoisers of the true transformer classes, without autoencoders and encoders, of random weights."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch

from diffkd.core.denoiser import Denoiser
from diffkd.core.flow_schedule import FlowSchedule, Shift
from diffkd.core.guidance import row_norms
from diffkd.core.schedules import Schedule
from tests import dit, flow_pipelines, masked_pipelines

KINDS = ("dit", "sd3", "flux", *(kind for kind in masked_pipelines.KINDS if kind != "pixart_alpha"))
LISTS = {  # of the blocks: their sizes here
    **dict.fromkeys(KINDS, {"transformer_blocks": 4}),
    "flux": {"transformer_blocks": 2, "single_transformer_blocks": 3},
    "lumina2": {"layers": 4},
    "z_image": {"layers": 4},
}
DEEP = {  # arguments that make them
    **dict.fromkeys(KINDS, {"num_layers": 4}),
    "sd3": {"num_layers": 4, "dual_attention_layers": (0, 2)},
    "flux": {"num_layers": 2, "num_single_layers": 3},
    "z_image": {"n_layers": 4},
}
CLASSES, TOKENS = 3, 6  # of a prompt
WIDTHS = {"sd3": (48, 36), "flux": (24, 16)}  # of states and of what is pooled; the others have 16 of states


def network(kind: str, *, seed: int = 0, **options: Any) -> Any:
    """Of four blocks, or of two and three, far from its initialisation."""
    make: Any = {
        "dit": partial(dit.network, classes=CLASSES), "sd3": flow_pipelines.sd3_network,
        "flux": flow_pipelines.flux_network,
    }.get(kind, partial(masked_pipelines.network, kind))  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = make(**{**DEEP[kind], **options})
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


def cond_of(kind: str, count: int, seed: int = 1, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Labels, or prompts, each shorter than the one before it where padding is masked."""
    if kind == "dit":
        return {"class_labels": torch.arange(count) % CLASSES}
    rng = torch.Generator().manual_seed(seed)
    width, pooled = WIDTHS.get(kind, (masked_pipelines.WIDTH, 0))
    cond = {"encoder_hidden_states": torch.randn(count, tokens, width, generator=rng)}
    if pooled:
        cond["pooled_projections"] = torch.randn(count, pooled, generator=rng)
    else:
        lengths = tokens - torch.arange(count) * (tokens // (count + 1))
        cond["encoder_attention_mask"] = (torch.arange(tokens) < lengths[:, None]).float()
    if kind == "flux":
        cond["guidance_scale"] = torch.linspace(1, 4, count)
    return cond


def denoiser(kind: str, network: Any) -> Denoiser:
    """Around such a network, guided as its family is."""
    name = "pixart" if kind.startswith("pixart") else kind
    call = importlib.import_module(f"diffkd.models.families.{name}").call
    if name == "pixart":
        call = partial(call, factor=4)
    flow = kind != "dit" and name != "pixart"
    made = Denoiser(
        network, FlowSchedule(Shift(3.0)) if flow else Schedule.cosine(64),
        "flow" if flow else "v_prediction", shape=(4, 8, 8), call=call,
        num_classes=CLASSES if kind == "dit" else None, null_label=CLASSES if kind == "dit" else None,
        guidance_range=(1.0, 4.0) if kind == "flux" else None,
        example={key: value for key, value in cond_of(kind, 1).items() if key != "class_labels"},
        **({"guide": row_norms} if kind == "lumina2" else {}),
    )  # fmt: skip
    if kind not in ("dit", "flux"):
        made.set_null(cond_of(kind, 1, seed=7))
    return made.eval()


def output(made: Denoiser, kind: str, count: int = 2) -> torch.Tensor:
    """What it makes of noise."""
    rng = torch.Generator().manual_seed(5)
    x_t = torch.randn(count, 4, 8, 8, generator=rng)
    with torch.no_grad():
        return made.output(x_t, torch.linspace(0.3, 0.9, count).double(), **cond_of(kind, count))
