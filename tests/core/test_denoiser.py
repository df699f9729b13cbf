from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import PREDICTIONS, Schedule, from_diffusers
from diffkd.errors import UserError
from tests.gaussian import gaussian

COSINE = Schedule.cosine(64)
LINEAR = from_diffusers(DDPMScheduler())


class Labelled(nn.Module):
    """x0 = label / 10, whatever the input."""

    def forward(self, x, time, class_labels):
        return torch.ones_like(x) * class_labels.to(x).reshape(-1, 1, 1, 1) / 10


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_type_gives_the_same_x0(prediction):
    schedule = Schedule.cosine(64) if prediction != "epsilon" else LINEAR
    x_t = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.25, 0.5, 0.75, 0.9375, 1.0 if prediction != "epsilon" else 0.5], dtype=torch.float64)
    expected = gaussian(schedule, "sample")(x_t, t)
    assert torch.allclose(gaussian(schedule, prediction)(x_t, t), expected, atol=1e-10)


def test_x0_and_eps_explain_the_state():
    denoiser = gaussian(COSINE, "v_prediction")
    x_t, t = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.rand(4).double()
    x0, eps = denoiser.predict(x_t, t)
    alpha, sigma = COSINE.at(t, like=x_t)
    assert torch.allclose(alpha * x0 + sigma * eps, x_t, atol=1e-12)


def test_an_epsilon_network_is_refused_at_zero_terminal_snr():
    with pytest.raises(UserError, match="alpha = 0.*64 steps.*use prediction_type v_prediction"):
        Denoiser(Labelled(), COSINE, "epsilon")
    with pytest.raises(UserError, match="'noise' is unknown; use one of epsilon"):
        Denoiser(Labelled(), COSINE, "noise")


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: SimpleNamespace(sample=x)])
def test_what_a_network_may_return(wrap):
    class Network(nn.Module):
        def forward(self, x, time):
            return wrap(x * 2)

    x_t = torch.randn(2, 1, 4, 4)
    assert torch.equal(Denoiser(Network(), COSINE, "sample")(x_t, torch.ones(2)), x_t * 2)


def test_guidance_is_uncond_plus_w_times_the_difference():
    denoiser = Denoiser(Labelled(), COSINE, "sample", num_classes=4, null_label=4)
    x_t, t, labels = torch.randn(3, 1, 4, 4), torch.full((3,), 0.5), torch.tensor([0, 1, 3])
    guided = denoiser(x_t, t, guidance=2.5, class_labels=labels)
    expected = 0.4 + 2.5 * (labels / 10 - 0.4)
    assert torch.allclose(guided.mean((1, 2, 3)), expected)
    assert torch.allclose(denoiser(x_t, t, guidance=1.0, class_labels=labels).mean((1, 2, 3)), labels / 10)
    assert torch.allclose(denoiser(x_t, t, guidance=0.0, class_labels=labels), torch.tensor(0.4))


def test_guidance_needs_a_null_label():
    denoiser = Denoiser(Labelled(), COSINE, "sample", num_classes=4)
    with pytest.raises(UserError, match="null_label"):
        denoiser(torch.randn(1, 1, 4, 4), torch.ones(1), guidance=2.0, class_labels=torch.zeros(1).long())


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_states_keep_their_dtype_and_the_network_its_own(state, weights):
    seen = []

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x, time):
            seen.append((x.dtype, time.dtype))
            return x * self.scale

    denoiser = Denoiser(Network().to(weights), COSINE, "v_prediction")
    x0, eps = denoiser.predict(torch.randn(2, 1, 4, 4, dtype=state), torch.rand(2))
    assert x0.dtype == eps.dtype == state and seen == [(weights, torch.float32)]


def test_a_time_between_nodes_reaches_the_network():
    """UNet2DModel truncates Python floats to integers; a tensor is passed on as it is."""
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        add_attention=False,
    )
    denoiser = Denoiser(network, COSINE, "sample")
    x_t = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        at = [denoiser(x_t, torch.tensor([i / 64]).double()) for i in (10.0, 10.5, 11.0)]
        assert torch.equal(network(x_t, 9.5).sample, network(x_t, 9).sample)  # the trap itself
    assert not torch.equal(at[0], at[1]) and not torch.equal(at[1], at[2])


def test_the_shape_is_read_from_the_networks_config():
    network = UNet2DModel(
        sample_size=(8, 16),
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    assert Denoiser(network, COSINE, "sample").shape == (2, 8, 16)
    assert Denoiser(Labelled(), COSINE, "sample").shape is None
