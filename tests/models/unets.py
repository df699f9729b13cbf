"""Small UNets of random weights, and functions to compare them."""

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule
from diffkd.models.families import sd

COSINE = Schedule.cosine(64)


def network(channels=(8, 16), attention=None, *, seed=0, **config):
    """A UNet far from its initialisation, in every bias and norm too. attention: at each resolution."""
    attends = attention or [False] * len(channels)
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 4, "block_out_channels": tuple(channels),
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)), **config,
    }  # fmt: skip
    return disturbed(UNet2DModel, config, seed)


XL = {  # what SDXL's network has beside
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
    "projection_class_embeddings_input_dim": 6 * 4 + 5,
}  # fmt: skip


def prompted(channels=(8, 16), attention=(True, True), *, seed=0, **config):
    """The same of a UNet that takes prompts, of width 6: attention at each resolution, in heads of 4."""
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 6, "attention_head_dim": [width // 4 for width in channels],
        "block_out_channels": tuple(channels),
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        **config,
    }  # fmt: skip
    return disturbed(UNet2DConditionModel, config, seed)


def disturbed(kind, config, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = kind(**config).eval()
        for parameter in found.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return found


def denoiser_of(net):
    if isinstance(net, UNet2DConditionModel):
        return Denoiser(net, COSINE, "v_prediction", call=sd.call).train(net.training)
    classes = net.config.num_class_embeds
    null = {} if classes is None else {"num_classes": classes - 1, "null_label": classes - 1}
    return Denoiser(net, COSINE, "v_prediction", **null).train(net.training)


@torch.no_grad()
def outputs(net):
    """Its outputs for some images, times and labels, or prompts."""
    rng = torch.Generator().manual_seed(7)
    x, t = torch.randn(3, 1, 8, 8, generator=rng).to(net.dtype), torch.tensor([0.0, 17.0, 63.0])
    if isinstance(net, UNet2DConditionModel):
        given = {"encoder_hidden_states": torch.randn(3, 5, 6, generator=rng).to(net.dtype)}
        if net.config.addition_embed_type:
            sizes = torch.randn(3, 6, generator=rng), torch.randn(3, 5, generator=rng)
            given["added_cond_kwargs"] = dict(zip(("time_ids", "text_embeds"), sizes, strict=True))
        if width := net.config.time_cond_proj_dim:
            given["timestep_cond"] = torch.randn(3, width, generator=rng)
        return net(x, t, **given).sample
    labels = None if net.config.num_class_embeds is None else torch.tensor([0, 1, 2])
    return net(x, t, class_labels=labels).sample


def max_difference(x, y):
    return (x - y).abs().max().item()


def config_of(net):
    return {key: value for key, value in net.config.items() if not key.startswith("_")}


def untouched(make):
    """make(), after checking that it leaves the global random state unchanged."""
    before = torch.get_rng_state()
    found = make()
    assert torch.equal(torch.get_rng_state(), before)
    return found
