"""Moment matching: the discrepancy in closed form, an update by hand, the exact student's gradient."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError
from scipy.special import erfcx
from torch import nn

from diffkd.core import samplers
from diffkd.core.denoiser import Denoiser
from diffkd.core.moments import discrepancy, of_one_group
from diffkd.core.schedules import Schedule, from_diffusers
from diffkd.errors import UserError
from diffkd.methods.base import Batch, Step
from diffkd.methods.imm import IMM, moved, time_weight
from tests.gaussian import flow as exact_flow
from tests.gaussian import flow_map, gaussian
from tests.methods.flow_maps import fit, moments

COSINE = Schedule.cosine(1024)


class Curved(nn.Module):
    """A student that depends on its input, its times and its label."""

    def forward(self, x, time, interval, class_labels=None):
        t, length = (v.to(x).reshape(-1, 1, 1, 1) for v in (time / 1024, interval))
        shift = 0.0 if class_labels is None else 0.3 * class_labels.to(x).reshape(-1, 1, 1, 1)
        return torch.sin(2 * x + t + shift) + length * torch.cos(x)


def curved():
    return Denoiser(Curved(), COSINE, "v_prediction", shape=(1, 4, 4))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laplace(mean, std, scale):
    """E exp(-scale |d|) for d normal of this mean and std."""
    a, b = (scale * std**2 + sign * mean for sign in (1, -1))
    root = math.sqrt(2) * std
    return sum(0.5 * math.exp(-(mean**2) / (2 * std**2)) * erfcx(v / root) for v in (a, b))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 1.0), (0.0, 0.4)])
def test_the_discrepancy_of_two_gaussians(mean, std):
    """Against N(0, 1), with a bias of 2 / M - 2 E k / M or so from the terms of a particle and itself."""
    count, scale = 1500, 0.8
    y, x = mean + std * normal(count, 1), normal(count, 1, seed=1)
    together = torch.ones(count, count, dtype=torch.bool)
    found = discrepancy(y, x, torch.full((count,), scale).double(), together).mean().item()
    own = laplace(0.0, math.sqrt(2) * std, scale) + laplace(0.0, math.sqrt(2), scale)
    exact = own - 2 * laplace(mean, math.sqrt(1 + std**2), scale)
    bias = (2 - own) / count
    assert found == pytest.approx(exact + bias, abs=0.004 + 0.1 * exact)
    assert exact >= 0 and (exact < 1e-12) == ((mean, std) == (0.0, 1.0))


def test_the_discrepancy_is_the_papers_sum_over_groups():
    """Groups of four, three and one; each particle's share adds up to the group's."""
    sizes = [4, 3, 1]
    group = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    y, x = normal(8, 1, 2, 2), normal(8, 1, 2, 2, seed=1)
    scale = torch.tensor([0.5, 2.0, 1.0]).double()[group]
    found = discrepancy(y, x, scale, group[:, None] == group)
    for g, size in enumerate(sizes):
        rows = [i for i in range(8) if group[i] == g]

        def k(a, b, row=rows[0]):
            return math.exp(-scale[row].item() * (a - b).norm().item() / 4)

        total = sum(k(y[i], y[j]) + k(x[i], x[j]) - k(y[i], x[j]) - k(x[i], y[j]) for i in rows for j in rows)
        assert found[rows].mean().item() == pytest.approx(total / size**2, abs=1e-12)


@pytest.mark.parametrize(("count", "shape"), [(12, (3, 4, 4)), (10, (1, 10, 10))])
def test_whole_groups_are_compared_by_themselves(count, shape):
    """Block by block, with the values of all pairs of a batch; all pairs where the last is not whole."""
    group = torch.arange(count) // 4
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3])[:count]
    y, x, scale = normal(count, 1, 2, 2), normal(count, 1, 2, 2, seed=1), (1.0 + group).double()
    blocks = of_one_group(group, 4, {"class_labels": labels})
    assert blocks.shape == shape
    alike = (group[:, None] == group) & (labels[:, None] == labels)
    whole = discrepancy(y, x, scale, alike)
    assert torch.allclose(discrepancy(y, x, scale, blocks), whole, rtol=1e-12, atol=0)


def test_its_gradient_is_zero_where_the_distributions_are_one():
    """Of the mean and of the width of a Gaussian; it widens a narrow one and narrows a wide one."""
    noise, x = normal(1000, 2), 0.3 + 0.5 * normal(1000, 2, seed=1)
    together = torch.ones(1000, 1000, dtype=torch.bool)

    def gradient(mean, std):
        at = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)
        y = at[0] + at[1] * noise
        discrepancy(y, x, torch.ones(1000).double(), together).mean().backward()
        return at.grad

    exact = gradient(0.3, 0.5).abs()
    narrow, wide, left = gradient(0.3, 0.3), gradient(0.3, 0.8), gradient(0.0, 0.5)
    assert narrow[1] < 0 < wide[1] and left[0] < 0
    assert exact[1] < 0.2 * min(-narrow[1], wide[1]) and exact[0] < 0.2 * -left[0]


def test_a_step_of_no_length_changes_nothing():
    x = normal(4, 1, 4, 4)
    t, s = torch.tensor([0.0, 0.5, 1.0, 1.0]).double(), torch.tensor([0.0, 0.5, 1.0, 0.25]).double()
    found = moved(curved(), x, t, s)
    assert torch.equal(found[:3], x[:3]) and not torch.equal(found[3], x[3])
    student = flow_map(COSINE)
    assert torch.allclose(moved(student, x, t, s)[3:], exact_flow(COSINE, x, t, s)[3:], atol=1e-5)


def test_the_weight_of_a_time_is_the_papers():
    t, b, h = torch.tensor([0.1003, 0.4004, 0.9005]).double(), 5.0, 1e-6
    log_snr = [2 * COSINE.half_log_snr(t + d) for d in (-h, 0, h)]
    slope = (log_snr[2] - log_snr[0]) / (2 * h)
    expected = 0.5 * torch.sigmoid(b - log_snr[1]) * -slope * COSINE.at(t)[0]
    assert torch.allclose(time_weight(COSINE, t, b), expected, rtol=1e-3)
    end = time_weight(COSINE, torch.tensor([1.0]).double(), b)
    assert end.isfinite() and end > 0


@pytest.mark.parametrize("mode", ["distillation", "training"])
def test_an_update_by_hand(mode):
    """Algorithm 1 for two groups and a rest, whose particles are compared within their class alone."""
    teacher, student = gaussian(COSINE, "v_prediction"), curved()
    method = IMM(steps=[2, 1], mode=mode, group=4, gap=0.1, scale=2.0, b=5.0)
    x0 = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 2, 0, 1])
    nets, batch = {"student": student, "teacher": teacher}, Batch(x0, {"class_labels": labels})
    step = Step(method.stages(teacher)[0], 0)
    loss = next(method.losses(nets, batch, step, torch.Generator().manual_seed(2)))

    rng = torch.Generator().manual_seed(2)
    drawn = 1 - torch.rand(2, 3, generator=rng, dtype=torch.float64)
    torch.rand(3, generator=rng)
    torch.randint(2, (3,), generator=rng)
    torch.rand(3, generator=rng, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=rng).double()
    order = sorted(range(9), key=lambda i: (labels[i].item(), i))
    x0, labels = x0[order].double(), labels[order]
    values = []
    for i in range(9):
        t = drawn[0, i // 4].item()
        s = t * (1 - drawn[1, i // 4].item())
        r = max(s, t - 0.1)
        alpha_t, sigma_t = COSINE.numbers(t)
        alpha_r, sigma_r = COSINE.numbers(r)
        x_t = alpha_t * x0[i : i + 1] + sigma_t * eps[i : i + 1]
        x_r = alpha_r * x0[i : i + 1] + sigma_r * eps[i : i + 1]
        times = [torch.tensor([v], dtype=torch.float64) for v in (t, r, s)]
        if mode == "distillation":
            x_r = samplers.ddim(teacher, x_t, torch.stack(times[:2]))
        cond = {"class_labels": labels[i : i + 1]}
        with torch.no_grad():
            y_t = samplers.ddim(student, x_t, torch.stack(times[::2]), interval=times[0] - times[2], **cond)
            y_r = x_r if r == s else samplers.ddim(
                student, x_r, torch.stack(times[1:]), interval=times[1] - times[2], **cond
            )  # fmt: skip
        alpha_s, sigma_s = COSINE.numbers(s)
        c = alpha_s * sigma_t - sigma_s * alpha_t
        values.append((y_t, y_r, 2.0 / c, time_weight(COSINE, times[0], 5.0).item()))
    expected = []
    for i, (y_t, y_r, scale, w) in enumerate(values):
        peers = [j for j in range(9) if i // 4 == j // 4 and labels[i] == labels[j]]
        k = [
            [math.exp(-scale * (a - values[j][n]).norm().item() / 16) for j in peers]
            for a in (y_t, y_r) for n in (0, 1)
        ]  # fmt: skip
        expected.append(w * (sum(k[0]) + sum(k[3]) - sum(k[1]) - sum(k[2])) / len(peers))
    assert torch.allclose(
        loss.metrics["loss"].double(), torch.tensor(expected).double(), rtol=2e-3, atol=1e-6
    )
    assert loss.value.item() == pytest.approx(sum(expected) / 9, rel=1e-3)


def test_times_of_a_group():
    rng, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    t, r, s = IMM(gap=0.1)._times(4000, rng, cpu)
    assert ((s >= 0) & (s <= r) & (r < t) & (t <= 1)).all() and (t - r).max() < 0.1 + 1e-12
    assert t.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (s / t).mean().item() == pytest.approx(0.5, abs=0.02)
    assert ((r == s) == (t - s <= 0.1)).float().mean() > 0.999
    t, r, s = IMM(gap=0.1, grid=1.0, steps=[2, 1])._times(100, rng, cpu)
    assert {*zip(t.tolist(), s.tolist(), strict=True)} == {(1.0, 0.5), (0.5, 0.0), (1.0, 0.0)}
    assert torch.allclose(r, t - 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "group"), [("training", 64), ("distillation", 4)])
def test_a_linear_student_draws_the_datas_mean_and_spread(mode, group):
    """N(0.3, 0.5²) in one step, in two and in four of one training, a little too narrow: a particle is
    compared with its own target too, and what is handed on in strides of `gap` is handed on with that."""
    method = IMM(mode=mode, group=group, steps=[2, 1], updates=400)
    before, after = (
        [moments(student, n) for n in (1, 2, 4)] for student in fit(method, COSINE, method.updates)
    )
    assert before == [(0.0, 1.0)] * 3
    for mean, std in after:
        assert mean == pytest.approx(0.3, abs=0.03) and 0.45 < std < 0.51, after


def test_one_training_gives_students_of_every_step_count():
    (stage,) = IMM(steps=[8, 4, 1]).stages(gaussian(COSINE, "v_prediction"))
    assert (stage.name, stage.also, stage.interval, stage.drawn) == ("1-steps", (8, 4), True, "ddim")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValidationError, match="mode: training does not ask"):
        IMM(guidance=2.0)
    with pytest.raises(UserError, match="guidance needs a label"):
        IMM(mode="distillation", guidance=2.0).stages(gaussian(COSINE, "v_prediction"))
    with pytest.raises(UserError, match="x0 at t = 1 is its output times 157.*put .name: output"):
        IMM().stages(gaussian(from_diffusers(DDPMScheduler()), "epsilon"))
