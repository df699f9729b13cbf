"""Heads on any network's blocks; losses of discriminators against what they are least at."""

import pytest
import torch
from torch import nn

from diffkd.core import discriminator
from diffkd.core.denoiser import Denoiser
from diffkd.core.discriminator import Heads, block_shapes, middle, seen
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from tests.core.test_scores import TIMES
from tests.gaussian import marginal
from tests.saved import counted
from tests.tiny import student

COSINE = Schedule.cosine(64)
TEACHER, STUDENT = (0.3, 0.5), (-0.2, 0.8)  # mean and std of one pixel


class Tokens(nn.Module):
    """A network of blocks on tokens, (B, L, C), one of which is not called, one of which makes numbers, and
    one of which sees a prompt alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 12, 2, stride=2)
        self.transformer_blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.context_refiner = nn.ModuleList([nn.Linear(12, 12)])
        self.pooled = nn.Linear(12, 5)
        self.idle = nn.Linear(12, 12)

    def forward(self, x, time, **cond):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.context_refiner[0](torch.ones(len(x), 4, 12)).mean(1, keepdim=True)
        for block in self.transformer_blocks:
            tokens = tokens + block(tokens)
        self.pooled(tokens.mean(1))
        return x * tokens.mean()


def tokens(size=6):
    torch.manual_seed(0)
    return Denoiser(Tokens(), COSINE, "sample", shape=(1, size, size))


# blocks


def test_by_default_every_block_of_a_unet_in_the_order_of_calls():
    shapes = block_shapes(student(3, "v_prediction", COSINE))
    assert shapes == {
        "down_blocks.0": (8, 4, 4), "down_blocks.1": (16, 4, 4), "mid_block": (16, 4, 4),
        "up_blocks.0": (16, 8, 8), "up_blocks.1": (8, 8, 8),
    }  # fmt: skip
    assert middle(shapes) == {"mid_block": (16, 4, 4)}
    assert block_shapes(student(3, "v_prediction", COSINE), ["conv_in"]) == {"conv_in": (8, 8, 8)}


def test_by_default_every_block_of_a_transformer_that_sees_the_image():
    assert block_shapes(tokens()) == {f"transformer_blocks.{i}": (9, 12) for i in range(3)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["mid_blocks"],
            "names 'mid_blocks', which the network does not have; it has transformer_blocks.0, ",
        ),
        (["transformer_blocks.0", "idle"], "names 'idle', which the network does not call; name a module"),
        (["pooled"], "names 'pooled', which outputs no features of an image"),
        (["context_refiner.0"], "names 'context_refiner.0', which outputs no features of an image"),
    ],
)
def test_blocks_that_cannot_have_a_head_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        block_shapes(tokens(), names)


def test_a_network_without_lists_of_blocks_needs_names():
    plain = Denoiser(nn.Conv2d(1, 1, 3, padding=1), COSINE, "sample", shape=(1, 8, 8))
    with pytest.raises(UserError, match=r"no lists of blocks; name its modules in method\.blocks"):
        block_shapes(plain)


# heads


def test_heads_give_a_logit_for_each_block_and_image_of_any_size():
    shapes = {"map": (8, 16, 12), "one": (3, 1, 1), "tokens": (9, 12), "prime": (7, 10)}
    heads = Heads(shapes)
    features = [torch.randn(5, *shape) for shape in shapes.values()]
    logits = heads(features)
    assert logits.shape == (5, 4)
    for i in range(5):  # every image on its own
        assert torch.allclose(logits[i : i + 1], heads([f[i : i + 1] for f in features]), atol=1e-5)


def test_heads_are_the_same_in_every_process_and_leave_the_generator_alone():
    torch.manual_seed(1)
    first, state = Heads({"a": (8, 8, 8)}), torch.get_rng_state()
    torch.manual_seed(2)
    second = Heads({"a": (8, 8, 8)})
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_are_seen_as_the_map_that_they_are():
    tokens = torch.arange(12.0).reshape(1, 6, 2)
    seen_as = discriminator._as_map(tokens)
    assert seen_as.shape == (1, 2, 2, 3) and torch.equal(seen_as[0, 0], tokens[0, :, 0].reshape(2, 3))


def test_what_heads_see_is_the_blocks_output_without_guidance():
    net = student(4, "v_prediction", COSINE)
    net.num_classes, net.null_label = 3, 3
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.75]).double(), torch.tensor([0, 2])
    heads = Heads(middle(block_shapes(net)))
    plain, features = seen(net, heads, x, t, class_labels=labels)
    guided, same = seen(net, heads, x, t, guidance=2.0, class_labels=labels)
    assert torch.equal(plain, net(x, t, class_labels=labels)) and not torch.allclose(plain, guided)
    assert torch.allclose(features[0], same[0], atol=1e-5) and features[0].shape == (2, 16, 4, 4)
    assert seen(net, None, x, t, class_labels=labels)[1] == []


def test_beyond_the_last_head_nothing_is_kept_for_gradients():
    """Those through the features are the same to the bit, and the prediction is."""
    net = student(None, "v_prediction", COSINE)
    shapes = block_shapes(net, ["down_blocks.0", "mid_block"])
    found, kept = [], []
    for learns in (True, False):
        x, t = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8).requires_grad_(), torch.tensor([0.5, 0.75])
        with counted() as bytes_kept:
            denoised, features = seen(net, Heads(shapes), x, t.double(), learns=learns)
        assert denoised.requires_grad == learns and torch.is_grad_enabled()
        early = net.network.conv_in.weight
        found.append([denoised, *torch.autograd.grad(sum(f.sin().sum() for f in features), [x, early])])
        kept.append(sum(bytes_kept))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert 0.3 * kept[0] < kept[1] < 0.6 * kept[0]
    with counted() as nothing:
        assert not seen(net, None, x, t.double())[0].requires_grad
    assert not nothing and net(x, t.double()).requires_grad  # the hook is gone


# losses, of Gaussians of one pixel


def table(loss, logits):
    """E of a discriminator's loss over real and drawn images, where it is a table of logits over x."""
    p, q, x = densities()
    never = torch.full_like(logits, 1e9)  # where neither loss charges anything
    parts = (loss(logits[:, None], -never[:, None]), loss(never[:, None], logits[:, None]))
    return sum(torch.trapezoid(density * part, x) for density, part in zip((p, q), parts, strict=True))


def densities():
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    schedule = Schedule.cosine(1024)
    return (*(marginal(schedule, 0.5, *which).log_prob(x).exp() for which in (TEACHER, STUDENT)), x)


def exact_gradient(divergence):
    """Of a function of the student's (mean, std)."""
    at = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in STUDENT]
    return torch.stack(torch.autograd.grad(divergence(*at), at))


def f_divergence(t, f):
    """D_f of the teacher's noised images from the student's, by quadrature: a function of (mean, std)."""
    schedule = Schedule.cosine(1024)
    p = marginal(schedule, t, *TEACHER)
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)

    def divergence(mean, std):
        q = marginal(schedule, t, mean, std)
        ratio = (p.log_prob(x) - q.log_prob(x)).exp().clamp(min=1e-280)
        return torch.trapezoid(q.log_prob(x).exp() * f(ratio), x)

    return divergence


@pytest.mark.parametrize("name", ["hinge", "logistic"])
def test_a_discriminators_loss_is_least_where_it_should_be(name):
    """The hinge at sign(p - q), where it is 2 less twice the total variation; the logistic at log(p / q),
    where it is 2 log 2 less the Jensen-Shannon divergence."""
    p, q, x = densities()
    loss = getattr(discriminator, name)
    best = (p - q).sign() if name == "hinge" else p.log() - q.log()
    middle_of = (p + q) / 2
    least = {
        "hinge": 2 - torch.trapezoid((p - q).abs(), x),
        "logistic": 2 * torch.tensor(2.0).log()
        - torch.trapezoid(p * (p / middle_of).log() + q * (q / middle_of).log(), x),
    }[name]
    assert table(loss, best).item() == pytest.approx(least.item(), rel=1e-5)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = best + 0.3 * torch.randn(best.shape, generator=rng, dtype=torch.float64)
        assert table(loss, other) > table(loss, best) + 1e-3


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("minus_logit", lambda r: -r.log()),  # the reverse KL
        ("non_saturating", lambda r: (r + 1) * ((r + 1) / (2 * r)).log()),  # its softened form
    ],
)
def test_against_the_best_logistic_discriminator_the_student_descends_a_divergence(name, f, t):
    """The discriminator is fixed at log(p / q); the gradient in the student's mean and std by quadrature."""
    schedule = Schedule.cosine(1024)
    alpha, sigma = schedule.numbers(t)
    p, q = marginal(schedule, t, *TEACHER), marginal(schedule, t, *STUDENT)
    z = torch.linspace(-9, 9, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(z, z)
    weights = torch.exp(-grid.square().sum(1) / 2)

    def loss(mean, std):
        x_t = alpha * (mean + std * grid[:, 0]) + sigma * grid[:, 1]
        logits = p.log_prob(x_t) - q.log_prob(x_t)
        losses = getattr(discriminator, name)(logits[:, None])
        return (weights * losses).sum() / weights.sum()

    assert torch.allclose(exact_gradient(loss), exact_gradient(f_divergence(t, f)), rtol=1e-4, atol=1e-7)


def test_against_the_best_hinge_discriminator_the_student_descends_the_total_variation():
    """The loss is linear in the student's density, and the discriminator, sign(p - q), is fixed."""
    schedule = Schedule.cosine(1024)
    p, q, x = densities()
    best = (p - q).sign()

    def loss(mean, std):
        density = marginal(schedule, 0.5, mean, std).log_prob(x).exp()
        return torch.trapezoid(density * discriminator.minus_logit(best[:, None]), x)

    def twice_variation(mean, std):
        return torch.trapezoid((p - marginal(schedule, 0.5, mean, std).log_prob(x).exp()).abs(), x)

    assert torch.allclose(exact_gradient(loss), exact_gradient(twice_variation), rtol=1e-6)


def test_the_finite_penalty_is_the_square_of_a_linear_discriminators_slope():
    rng = torch.Generator().manual_seed(0)
    x, slope = torch.randn(100_000, 4, generator=rng), torch.tensor([[1.0], [-2.0], [0.5], [0.0]])
    noise = 0.1 * torch.randn(x.shape, generator=rng)
    penalty = discriminator.finite_r1(x @ slope, (x + noise) @ slope)
    assert penalty.mean().item() == pytest.approx(0.01 * slope.square().sum().item(), rel=0.03)


def test_accuracy_counts_heads():
    real, drawn = torch.tensor([[1.0, -1.0], [2.0, 3.0]]), torch.tensor([[-1.0, -1.0], [1.0, -2.0]])
    assert discriminator.accuracy(real, drawn).tolist() == [0.75, 0.75]
