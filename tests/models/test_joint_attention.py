"""Many like tokens of a context as one: the network of the whole context, with its gradients."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch

from diffkd.models.joint_attention import repeat_last


def network(**options):
    torch.manual_seed(0)
    made = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=4, **options,
    )  # fmt: skip
    for parameter in made.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made.double()


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": "rms_norm"}, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}]
)
def test_one_token_stands_for_many(options):
    """Of Stable Diffusion 3, and of 3.5 with its norms and its second attention."""
    whole = network(**options)
    short = copy.deepcopy(whole)
    repeat_last(short, 256)
    x, time = torch.randn(2, 4, 4, 4).double(), torch.tensor([30.0, 900.0]).double()
    prompt, pooled = torch.randn(2, 5, 12).double(), torch.randn(2, 6).double()
    made = []
    for one, absent in ((whole, 256), (short, 1)):
        states = torch.cat([prompt, torch.zeros(2, absent, 12).double()], 1)
        made.append(one(x, states, pooled, time, return_dict=False)[0])
        made[-1].square().sum().backward()
    assert made[0].std() > 0.1 and torch.allclose(*made, atol=1e-10)
    for name, parameter in whole.named_parameters():
        other = short.get_parameter(name).grad
        assert (parameter.grad is None) == (other is None), name
        assert other is None or torch.allclose(parameter.grad, other, atol=1e-7), name
    # and the number is not without effect
    repeat_last(short, 2)
    few = torch.cat([prompt, torch.zeros(2, 1, 12).double()], 1)
    assert (short(x, few, pooled, time, return_dict=False)[0] - made[0]).abs().max() > 1e-3
