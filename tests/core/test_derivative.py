"""Derivatives along a direction: closed forms, one against the other, what has none."""

import copy

import pytest
import torch

from diffkd.core import adapters, interval
from diffkd.core.derivative import STEP, directional
from diffkd.core.schedules import Schedule
from diffkd.errors import UserError
from tests.lora import adapted
from tests.tiny import student


def inputs():
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, v, torch.rand(4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("how", "error"), [("jvp", 1e-12), ("difference", 10 * STEP**2)])
def test_a_closed_form(how, error):
    """f(x, t) = sin(t x): df = cos(t x) (t dx + x dt)."""
    x, v, t = inputs()
    found = directional(lambda x, t: (t[:, None] * x).sin(), (x, t), (v, torch.ones_like(t)), how)
    exact = (t[:, None] * x).cos() * (t[:, None] * v + x)
    assert (found - exact).abs().max() < error


def test_a_difference_is_of_second_order():
    """Its error follows the third derivative: that of x³ is h² v³."""
    x, v, _ = inputs()
    found = directional(lambda x: x**3, (x,), (v,), "difference")
    assert torch.allclose(found - 3 * x**2 * v, STEP**2 * v**3, atol=1e-10)


def test_a_difference_goes_no_further_ahead_than_there_is_room():
    """Of x², its error is then half of what the two sides differ by, times the second derivative."""
    x, v, _ = inputs()
    room, reached = torch.tensor([0.0, 0.05, 0.1, 1.0]).double(), []

    def square(x):
        reached.append(x)
        return x**2

    ahead = room.clamp(max=0.1)
    found = directional(square, (x,), (v,), "difference", step=(torch.full_like(ahead, 0.1), ahead))
    ahead = ahead[:, None]
    assert torch.allclose(reached[0], x + ahead * v) and torch.allclose(reached[1], x - 0.1 * v)
    assert torch.allclose(found, 2 * x * v + (ahead - 0.1) * v**2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_a_whole_network(dtype):
    """A UNet with attention, group norms and an embedded interval; both ways agree."""
    made = student(3, "v_prediction", Schedule.cosine(64)).to(dtype)
    interval.attach(made.network)
    torch.nn.init.normal_(interval.attached(made.network).second.weight, std=0.1)
    assert any("Attention" in type(module).__name__ for module in made.network.modules())
    generator = torch.Generator().manual_seed(1)
    x, v = (torch.randn(2, 1, 8, 8, generator=generator, dtype=dtype) for _ in range(2))
    t, labels = torch.tensor([0.4, 0.8]).double(), torch.tensor([0, 2])

    def output(x, t):
        return made.output(x, t, class_labels=labels, interval=t - 0.2)

    found = directional(output, (x, t), (v, torch.ones_like(t)))
    assert found.dtype == dtype and not found.requires_grad
    close = directional(output, (x, t), (v, torch.ones_like(t)), "difference")
    assert (found - close).abs().max() < 0.05 * found.abs().max()  # of the fast waves in the embedded time
    # by reverse-mode differentiation: the sum of a direction's derivative is a product of gradients
    x.requires_grad_(True)
    t.requires_grad_(True)
    by_x, by_t = torch.autograd.grad(output(x, t).sum(), (x, t))
    expected = (by_x * v).sum() + by_t.sum()
    assert torch.allclose(
        found.double().sum(), expected.double(), rtol=1e-6 if dtype == torch.float64 else 1e-3
    )


def test_no_gradients_and_full_precision_under_autocast():
    made = student(3, "v_prediction", Schedule.cosine(64)).requires_grad_(True)
    x, v = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    t, labels = torch.tensor([0.4, 0.8]).double(), torch.tensor([0, 2])

    def output(x):
        return made.output(x, t, class_labels=labels)

    plain, network = directional(output, (x,), (v,)), made.network
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = directional(output, (x,), (v,))
        assert output(x).dtype == torch.bfloat16  # which is in force again
    assert torch.equal(plain, under) and plain.dtype == torch.float32 and not under.requires_grad
    # as accelerate prepares a network
    network._original_forward = network.forward
    network.forward = torch.autocast("cpu", dtype=torch.bfloat16)(network.forward)
    assert torch.equal(plain, directional(output, (x,), (v,), network=network))
    assert output(x).dtype == torch.bfloat16
    assert all(p.grad is None for p in made.parameters())


def test_the_base_of_an_adapter_in_half_precision_is_float32_meanwhile():
    """As a run in bfloat16 has it: rounded, and then rounded no further. Between a call and its gradients."""
    pupil = adapted(student(3, "v_prediction", Schedule.cosine(64))).requires_grad_(True)
    own = adapters.own(pupil.network)
    for name, parameter in pupil.network.named_parameters():
        if name not in own:
            parameter.data = parameter.data.bfloat16()
    x, v = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    t, labels = torch.tensor([0.4, 0.8]).double(), torch.tensor([0, 2])

    def derivative(made, how):
        def output(x, t):
            return made.output(x, t, class_labels=labels)

        return directional(output, (x, t), (v, torch.ones_like(t)), how, network=made.network)

    whole = copy.deepcopy(pupil)
    for parameter in whole.network.parameters():
        parameter.data = parameter.data.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pupil.output(x, t, class_labels=labels).float().square().mean()
        for how in ("jvp", "difference"):
            found = derivative(pupil, how)
            assert found.dtype == torch.float32 and torch.equal(found, derivative(whole, how))
    dtypes = {name: parameter.dtype for name, parameter in pupil.network.named_parameters()}
    assert all((dtype == torch.float32) == (name in own) for name, dtype in dtypes.items())
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in own.values())


def test_a_part_without_a_derivative_is_named_with_the_remedy():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    x, v, _ = inputs()
    with pytest.raises(UserError, match=r"part without a forward-mode derivative.*derivative to difference"):
        directional(Opaque.apply, (x,), (v,))
    assert torch.allclose(directional(Opaque.apply, (x,), (v,), "difference"), 2 * v)


def test_an_error_of_the_function_itself_is_not_laid_on_the_derivative():
    def wrong(x: torch.Tensor) -> torch.Tensor:
        return x @ torch.ones(5, 2, dtype=x.dtype)

    x = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="shapes"):
        directional(wrong, [x], [x])
