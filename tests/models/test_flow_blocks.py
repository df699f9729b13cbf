"""What discriminators and interval embeddings find inside transformers of two streams."""

from __future__ import annotations

import pytest
import torch

from diffkd.core import interval
from diffkd.core.activations import capture_activations
from diffkd.core.discriminator import block_shapes
from diffkd.models import loading
from tests import flow_pipelines


@pytest.fixture(scope="module", params=["sd3", "flux"])
def denoiser(request, tmp_path_factory):
    work = tmp_path_factory.mktemp(request.param)
    made = flow_pipelines.pipeline(work / "parts", request.param)
    made.save_pretrained(work / "teacher", safe_serialization=True)
    found = loading.load(work / "teacher")
    found.fit((flow_pipelines.CHANNELS, flow_pipelines.SIDE, flow_pipelines.SIDE))
    return found


def test_blocks_are_seen_by_the_tokens_of_the_image(denoiser):
    """Blocks give text and image, the last one of Stable Diffusion 3 no text."""
    shapes = block_shapes(denoiser)
    assert len(shapes) >= 2 and {*shapes.values()} == {(16, 16)}
    x, t, cond = denoiser.example_inputs()
    name = [*shapes][0]
    with torch.no_grad(), capture_activations(denoiser.network, [name]) as found:
        denoiser(x, t, **cond)
        first = found[name]
        denoiser(x + 1, t, **cond)
    assert (found[name] - first).abs().amax(2).min() > 1e-4  # every token is of the image


@torch.no_grad()
def test_the_length_of_a_step_is_told_and_folded(denoiser):
    """Once, beside the time: blocks that are computed again know it too."""
    x, t, cond = denoiser.example_inputs()
    plain = denoiser.output(x, t, **cond)
    length = {"interval": torch.full((1,), 0.25, dtype=torch.float64)}
    interval.attach(denoiser.network)
    added = interval.attached(denoiser.network)
    assert torch.equal(denoiser.output(x, t, **cond, **length), plain)
    generator = torch.Generator().manual_seed(1)
    for parameter in added.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    told = denoiser.output(x, t, **cond, **length)
    assert (told - plain).abs().max() > 1e-3
    interval.check_recomputed(denoiser.network)
    denoiser.network = interval.folded(denoiser.network, 0.25)
    assert torch.allclose(denoiser.output(x, t, **cond), told, atol=1e-5)
