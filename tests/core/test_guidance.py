"""Forms of guidance: formulas written by hand in float64, and the loops of stock pipelines bit by bit."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from diffkd.core import guidance
from diffkd.core.guidance import Kind, rescaled
from diffkd.errors import UserError

FORMS = [guidance.plain, guidance.from_given, guidance.row_norms, guidance.token_norms]


def outputs(count=2, channels=3, height=4, width=6, dtype=torch.float64):
    """Without condition, and with it."""
    rng = torch.Generator().manual_seed(0)
    null, given = torch.randn(2, count, channels, height, width, generator=rng, dtype=dtype)
    return null, given


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_of_one_is_the_prediction_with_the_condition(form):
    null, given = outputs()
    assert torch.allclose(form(null, given, 1.0), given, rtol=1e-12)
    assert not torch.allclose(form(null, given, 1.1), given, rtol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_of_each_example(form):
    null, given = outputs()
    together = form(null, given, torch.tensor([1.5, 4.0], dtype=torch.float64).reshape(2, 1, 1, 1))
    for i, w in enumerate((1.5, 4.0)):
        alone = form(null[i : i + 1], given[i : i + 1], w)
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-12)


def test_the_two_linear_forms_by_hand():
    null, given = outputs()
    expected = torch.empty_like(null)
    for i, (a, b) in enumerate(zip(null.flatten().tolist(), given.flatten().tolist(), strict=True)):
        expected.view(-1)[i] = a + 2.5 * (b - a)
    for form in FORMS[:2]:
        assert torch.allclose(form(null, given, 2.5), expected, rtol=1e-12)


def test_rows_and_tokens_keep_their_norms_and_the_guided_direction():
    null, given = outputs()
    plain = null + 3.0 * (given - null)
    rows, tokens = guidance.row_norms(null, given, 3.0), guidance.token_norms(null, given, 3.0)
    for i in range(2):
        for h in range(4):
            for c in range(3):  # a row of width
                ratio = given[i, c, h].norm() / plain[i, c, h].norm()
                assert torch.allclose(rows[i, c, h], ratio * plain[i, c, h], rtol=1e-12)
        for h in range(0, 4, 2):
            for w in range(0, 6, 2):  # 2 x 2 latents of all channels
                place = (i, slice(None), slice(h, h + 2), slice(w, w + 2))
                ratio = given[place].norm() / plain[place].norm()
                assert torch.allclose(tokens[place], ratio * plain[place], rtol=1e-12)


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescaling_by_hand_and_as_diffusers_does(phi):
    null, given = outputs()
    guided = null + 4.0 * (given - null)
    found = rescaled(guided, given, phi)
    for i in range(2):
        deviations = [(x[i] - x[i].mean()).square().sum().div(3 * 4 * 6 - 1).sqrt() for x in (given, guided)]
        expected = (phi * deviations[0] / deviations[1] + 1 - phi) * guided[i]
        assert torch.allclose(found[i], expected, rtol=1e-12)
    for x, y in ((guided, given), (guided.float(), given.float())):
        assert torch.equal(rescaled(x, y, phi), rescale_noise_cfg(x, y, guidance_rescale=phi))


def test_no_share_is_the_plain_form():
    null, given = outputs()
    assert torch.equal(Kind().combined(guidance.plain, null, given, 4.0), guidance.plain(null, given, 4.0))
    assert torch.allclose(rescaled(null, given, 0.0), null, rtol=1e-12)


def test_only_what_is_inside_is_guided():
    null, given = outputs()
    inside = torch.tensor([True, False])
    found = Kind(rescale=0.5).combined(guidance.row_norms, null, given, 3.0, inside)
    alone = Kind(rescale=0.5).combined(guidance.row_norms, null[:1], given[:1], 3.0)
    assert torch.equal(found[1], given[1]) and torch.equal(found[:1], alone)


# the loops of stock pipelines, whose network says what it is told to


class Network(nn.Module):
    """A transformer that answers with given outputs; the pipeline reads the rest off it."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, answers, channels):
        super().__init__()
        self.answers, self.in_channels = iter(answers), channels
        self.config = SimpleNamespace(in_channels=channels, guidance_embeds=False, sample_size=8)

    def cache_context(self, name):
        return torch.no_grad()

    def forward(self, *args, **options):
        return (next(self.answers),)


def stepped(kind, answers, *, channels=4, **call):
    """What a pipeline hands to its scheduler in its only step."""
    if not hasattr(diffusers, kind):
        pytest.skip(f"this diffusers has no {kind}")
    given, scheduler = [], FlowMatchEulerDiscreteScheduler()
    step = scheduler.step
    scheduler.step = lambda output, *args, **options: given.append(output) or step(output, *args, **options)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "transformer": Network(answers, channels)}
    pipeline = getattr(diffusers, kind)(scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(height=64, width=96, num_inference_steps=1, output_type="latent", **call)
    return given[0]


def test_rows_as_lumina2_does():
    null, given = outputs(2, 4, 8, 12, torch.float32)
    embeds, mask = torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.long)
    handed = stepped(
        "Lumina2Pipeline", [given, null], guidance_scale=4.0, prompt_embeds=embeds,
        prompt_attention_mask=mask, negative_prompt_embeds=embeds, negative_prompt_attention_mask=mask,
    )  # fmt: skip
    assert torch.equal(-handed, guidance.row_norms(null, given, 4.0))


def packed(x):
    """As Qwen-Image's tokens, of 2x2 latents."""
    tokens = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    return tokens.flatten(3).flatten(1, 2)


def test_tokens_as_qwen_image_does():
    null, given = outputs(2, 16, 8, 12, torch.float32)
    embeds, mask = torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.long)
    handed = stepped(
        "QwenImagePipeline", [packed(given), packed(null)], channels=64, true_cfg_scale=4.0,
        prompt_embeds=embeds, prompt_embeds_mask=mask, negative_prompt_embeds=embeds,
        negative_prompt_embeds_mask=mask,
    )  # fmt: skip
    assert torch.equal(handed, packed(guidance.token_norms(null, given, 4.0)))


def test_from_the_condition_as_z_image_does():
    """Its guidance_scale 3 is our weight 4."""
    null, given = outputs(2, 4, 8, 12, torch.float32)
    listed = [*given.unsqueeze(2), *null.unsqueeze(2)]
    handed = stepped(
        "ZImagePipeline", [listed], guidance_scale=3.0, prompt_embeds=[torch.zeros(3, 8)] * 2,
        negative_prompt_embeds=[torch.zeros(3, 8)] * 2,
    )  # fmt: skip
    assert torch.equal(-handed, guidance.from_given(null, given, 4.0))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"interval": (2.0, 2.0)}, "guidance interval 2 to 2 is no range of noise levels"),
        ({"interval": (5.0, 0.3)}, "guidance interval 5 to 0.3 is no range"),
        ({"interval": (-1.0, 0.3)}, "give the least, from 0 on, then a larger one"),
        ({"interval": (0.3, float("inf"))}, "guidance interval 0.3 to inf is no range"),
        ({"interval": (float("nan"), 1.0)}, "guidance interval nan to 1 is no range"),
        ({"rescale": 1.5}, "guidance rescale 1.5 is no share; use 0 .none. to 1"),
        ({"rescale": -0.1}, "guidance rescale -0.1 is no share"),
        ({"rescale": float("nan")}, "guidance rescale nan is no share"),
    ],
)
def test_what_is_refused(values, says):
    with pytest.raises(UserError, match=says):
        Kind(**values)
