import pytest
import torch
from diffusers import DDPMScheduler

from diffkd.core.consistency import check_mode, check_start, earlier, start_of
from diffkd.core.denoiser import Denoiser
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from tests.gaussian import gaussian
from tests.tiny import student

COSINE = Schedule.cosine(1024)
LINEAR = from_diffusers(DDPMScheduler())


def kappa(schedule, t):
    return (-schedule.half_log_snr(t)).exp()


@pytest.mark.parametrize("schedule", [COSINE, LINEAR])
@pytest.mark.parametrize("gap", [0.5, 0.1, 0.001])
def test_the_earlier_time(schedule, gap):
    t = torch.linspace(0.001, 1, 300, dtype=torch.float64)
    s = earlier(schedule, t, gap)
    assert ((s >= 0) & (s < t)).all()
    noise = kappa(schedule, t)
    n = 1 + 8 / (1 + noise.exp())
    # in flow time, sigma / (alpha + sigma) = kappa / (1 + kappa)
    tau, before = (1 / (1 + 1 / kappa(schedule, each)) for each in (t, s))
    assert torch.allclose(before, (tau * (1 - gap * n)).clamp(min=0), atol=1e-9)
    assert (s[n * gap > 1] == 0).all()


def test_near_the_data_it_is_that_of_the_paper_in_kappa():
    t = COSINE.time_of(torch.tensor([6.0, 7.0, 8.0]).double())
    s, noise = earlier(COSINE, t, 0.01), kappa(COSINE, t)
    assert torch.allclose(kappa(COSINE, s), noise * (1 - 0.01 * (1 + 8 * torch.sigmoid(-noise))), rtol=3e-3)


def test_the_start_of_a_state_at_time_0_is_the_state():
    """Even of a network that is not defined there."""
    teacher = gaussian(COSINE, "v_prediction")
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    t, s = torch.tensor([0.3, 0.5, 1.0]).double(), torch.tensor([0.0, 0.2, 0.0]).double()
    found = start_of(teacher, x, s, t)
    assert torch.equal(found[[0, 2]], x[[0, 2]])
    assert torch.allclose(found[1], teacher(x, t.clamp(max=0.2))[1], atol=1e-12)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "flow"])
def test_the_boundary_holds_by_the_prediction_type(prediction):
    """f(x, 0) = x for any network, as the times go to 0."""
    denoiser = student(None, prediction, LINEAR)
    x = torch.randn(4, 1, 8, 8)
    t = torch.tensor([1e-3, 1e-4, 1e-5, 1e-6]).double()
    gap = (denoiser(x, t) - x).abs().flatten(1).amax(1)
    assert (gap[1:] < gap[:-1]).all() and gap[-1] < 1e-4


def test_starts_that_do_not_fit():
    class Zero(torch.nn.Module):
        def forward(self, x, time):
            return torch.zeros_like(x)

    def start(prediction, schedule=LINEAR):
        return Denoiser(Zero(), schedule, prediction, shape=(1, 4, 4))

    check_start(start("v_prediction", COSINE), [4, 2, 1])
    check_start(start("flow"), [1])
    check_start(gaussian(from_diffusers(DDPMScheduler(beta_start=0.00085, beta_end=0.012)), "epsilon"), [1])
    with pytest.raises(UserError, match="sample.*does not return its input.*put .name: output"):
        check_start(start("sample"), [1])
    with pytest.raises(UserError, match="x0 at t = 1 is its output times 157.*put .name: output"):
        check_start(start("epsilon"), [1])
    with pytest.raises(UserError, match="3 steps does not fit"):
        check_start(start("v_prediction"), [3])
    with pytest.raises(UserError, match="null_label"):
        check_start(start("v_prediction"), [1], guidance=2.0)
    with pytest.raises(ValueError, match="guidance 2 .*set mode: distillation"):
        check_mode("training", 2.0)
    check_mode("training", 1.0)
    with pytest.raises(ValueError, match="teacher: previous is not asked .*set mode: distillation"):
        check_mode("training", 1.0, "previous")
