"""Weightings in closed form; the knowledge-distillation loss beside NumPy in float64, torch's kl_div, and
its gradient by hand."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.losses import (
    cross_entropy,
    knowledge_distillation,
    soft_kl,
    squared_error,
    weight,
    weighting_for,
)
from diffkd.core.predictions import PREDICTIONS, write_prediction
from diffkd.core.schedules import EDMSchedule, FlowSchedule, Preconditioned, Shift
from diffkd.errors import UserError

# weightings and distances ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("snr", [0.0, 0.5, 3.0, 40.0]),
        ("truncated_snr", [1.0, 1.0, 3.0, 40.0]),
        ("snr_plus_one", [1.0, 1.5, 4.0, 41.0]),
        ("min_snr", [0.0, 0.5, 3.0, 5.0]),
        ("flow", [1.0, (1 + 0.5**0.5) ** 2, (1 + 3.0**0.5) ** 2, (1 + 40.0**0.5) ** 2]),
        ("edm", [4.0, 4.5, 7.0, 44.0]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_weights(name, expected):
    snr = torch.tensor([0.0, 0.5, 3.0, 40.0], dtype=torch.float64)
    assert weight(name, snr, gamma=5.0, width=0.5).tolist() == pytest.approx(expected, rel=1e-15)


def test_weights_of_x0_are_errors_of_eps_and_v():
    """snr times the error in x0 is the error in eps; (snr + 1) times it is the error in v."""
    generator = torch.Generator().manual_seed(3)
    x0, other, eps = torch.randn(3, 5, 1, 4, 4, generator=generator, dtype=torch.float64)
    alpha = torch.rand(5, generator=generator, dtype=torch.float64).reshape(-1, 1, 1, 1) * 0.9 + 0.05
    sigma = (1 - alpha**2).sqrt()
    x_t = alpha * x0 + sigma * eps
    eps_of_other = (x_t - alpha * other) / sigma
    snr = (alpha**2 / sigma**2).flatten()
    error = squared_error(other, x0)
    assert torch.allclose(weight("snr", snr) * error, squared_error(eps_of_other, eps))
    v_of_other = alpha * eps_of_other - sigma * other
    assert torch.allclose(
        weight("snr_plus_one", snr) * error, squared_error(v_of_other, alpha * eps - sigma * x0)
    )


@pytest.mark.parametrize("schedule", [FlowSchedule(Shift(2.0)), EDMSchedule(sigma_data=0.7)])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_weight_of_a_denoiser_is_the_error_of_its_network(schedule, preconditioned):
    """Of a velocity, and of the network F inside EDM's preconditioning: D's error is c_out F's."""
    if preconditioned and not isinstance(schedule, EDMSchedule):
        schedule = EDMSchedule()
    outputs = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    how = {"call": Preconditioned(schedule)} if preconditioned else {}
    t, x_t = torch.rand(5, dtype=torch.float64), torch.randn(5, 1, 4, 4, dtype=torch.float64)
    made = [
        Denoiser(_Constant(output), schedule, "sample" if preconditioned else "flow", **how)
        for output in outputs
    ]
    w = weight(made[0].weighting, schedule.snr(t), width=schedule.width)
    error = squared_error(made[0](x_t, t), made[1](x_t, t))
    assert torch.allclose(w * error, squared_error(*outputs), rtol=1e-5)


class _Constant(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, time):
        return self.output


@pytest.mark.parametrize("alpha_of", [lambda sigma: 1 - sigma, lambda sigma: (1 - sigma**2).sqrt()])
def test_weights_of_x0_are_errors_of_what_a_network_outputs(alpha_of):
    """Of every prediction type, on the straight path and on one that preserves variance."""
    generator = torch.Generator().manual_seed(3)
    x0, other, eps = torch.randn(3, 5, 1, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.rand(5, generator=generator, dtype=torch.float64).reshape(-1, 1, 1, 1) * 0.9 + 0.05
    alpha = alpha_of(sigma)
    x_t = alpha * x0 + sigma * eps
    snr, error = (alpha**2 / sigma**2).flatten(), squared_error(other, x0)
    preserved = torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha))
    for prediction in PREDICTIONS:
        if prediction != "v_prediction" or preserved:
            theirs, ours = (write_prediction(prediction, x_t, one, alpha, sigma) for one in (x0, other))
            of_output = squared_error(ours, theirs)
            assert torch.allclose(weight(weighting_for(prediction), snr) * error, of_output)


def test_the_error_is_a_mean_and_does_not_change_with_size():
    x = torch.full((2, 3, 4, 4), 0.5)
    assert squared_error(x, torch.zeros_like(x)).tolist() == [0.25, 0.25]
    big = torch.full((2, 3, 32, 32), 0.5)
    assert squared_error(big, torch.zeros_like(big)).tolist() == [0.25, 0.25]


# knowledge distillation -----------------------------------------------------------------------------------

SHAPES = {"flat": (7, 5), "dense": (2, 4, 3, 5)}
both = pytest.mark.parametrize("direction", ["reverse", "forward"])
shaped = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def logits(shape: tuple[int, ...], *seed: int, scale: float = 2.0) -> np.ndarray:
    return scale * np.random.default_rng([31, *shape, *seed]).standard_normal(shape)


def indices(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([32, *shape]).integers(0, shape[1], (shape[0], *shape[2:]))


def one_hot(y: np.ndarray, classes: int) -> np.ndarray:
    return np.moveaxis(np.eye(classes)[y], -1, 1)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(x))


def soft(s: np.ndarray, z: np.ndarray, t: float, direction: str) -> np.ndarray:
    """T² KL of each example (pixel); in "reverse" the student's is the distribution averaged over."""
    p, q = (s, z) if direction == "reverse" else (z, s)
    return t**2 * (softmax(p / t) * (log_softmax(p / t) - log_softmax(q / t))).sum(1)


def hard(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -(one_hot(y, s.shape[1]) * log_softmax(s)).sum(1)


def slope(s: np.ndarray, z: np.ndarray, t: float, direction: str) -> np.ndarray:
    """d (T² KL) / dS. Forward: T (softmax(S/T) - softmax(Z/T)). Reverse: with q = softmax(S/T),
    (diag q - q qᵀ)(S - Z): the T of log q - log p = (S - Z)/T + const and that of S/T cancel T²."""
    if direction == "forward":
        return t * (softmax(s / t) - softmax(z / t))
    q, d = softmax(s / t), s - z
    return q * (d - (q * d).sum(1, keepdims=True))


def tensor(x: np.ndarray, grad: bool = False) -> torch.Tensor:
    return torch.tensor(x, requires_grad=grad)


def kd(s: np.ndarray, z: np.ndarray, y: np.ndarray, **options: object) -> tuple[float, np.ndarray]:
    """The loss and its gradient with respect to the student's logits."""
    student = tensor(s, grad=True)
    loss = knowledge_distillation(student, tensor(z), tensor(y), **options)
    assert loss.shape == () and loss.dtype == student.dtype
    loss.backward()
    return loss.item(), student.grad.numpy()


def test_two_classes_by_hand():
    """Student (1/2, 1/2), teacher (1/4, 3/4), label 1, T = 1."""
    s, z, y = np.zeros((1, 2)), np.log([[1.0, 3.0]]), np.array([1])
    kl = {"reverse": math.log(4 / 3) / 2, "forward": math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4}
    assert abs(kl["reverse"] - kl["forward"]) > 0.01
    for options, which in (({}, "reverse"), *[({"direction": d}, d) for d in kl]):
        ours, _ = kd(s, z, y, alpha=0.25, temperature=1, **options)
        assert ours == pytest.approx(0.75 * math.log(2) + 0.25 * kl[which], rel=1e-14)


@both
@shaped
@pytest.mark.parametrize(("alpha", "t"), [(0.3, 1.0), (0.9, 4.0), (0.5, 0.5)])
def test_beside_numpy(shape, direction, alpha, t):
    s, z = (logits(shape, k).astype(np.float32).astype(float) for k in (1, 2))
    y = indices(shape)
    value, grad = kd(s, z, y, alpha=alpha, temperature=t, direction=direction)
    expected = (1 - alpha) * hard(s, y).mean() + alpha * soft(s, z, t, direction).mean()
    assert value == pytest.approx(expected, rel=1e-12)
    rows = (1 - alpha) * (softmax(s) - one_hot(y, shape[1])) + alpha * slope(s, z, t, direction)
    np.testing.assert_allclose(grad, rows / y.size, rtol=1e-10, atol=1e-14)
    kl = soft_kl(tensor(s).float(), tensor(z).float(), t, direction)
    ce = cross_entropy(tensor(s).float(), tensor(y), -100)
    assert kl.dtype == ce.dtype == torch.float64
    np.testing.assert_allclose(kl.numpy(), soft(s, z, t, direction), rtol=1e-11)
    np.testing.assert_allclose(ce.numpy(), hard(s, y), rtol=1e-12)


@shaped
@pytest.mark.parametrize("t", [0.7, 1.0, 6.0])
def test_beside_kl_div(shape, t):
    """kl_div(input, target) is KL(target || input), both as logarithms and the second distribution first:
    Hinton's loss is kl_div(student, teacher), and the reverse one kl_div(teacher, student)."""
    s, z, y = logits(shape, 3), logits(shape, 4), indices(shape)
    student, teacher = F.log_softmax(tensor(s) / t, 1), F.log_softmax(tensor(z) / t, 1)
    ce = F.cross_entropy(tensor(s), tensor(y)).item()
    theirs = {
        "reverse": F.kl_div(teacher, student, reduction="sum", log_target=True).item() / y.size,
        "forward": F.kl_div(student, teacher, reduction="sum", log_target=True).item() / y.size,
    }
    assert abs(theirs["reverse"] / theirs["forward"] - 1) > 0.005  # else the order would not be told apart
    for direction, kl in theirs.items():
        ours, _ = kd(s, z, y, alpha=0.6, temperature=t, direction=direction)
        assert ours == pytest.approx(0.4 * ce + 0.6 * t**2 * kl, rel=1e-12)


@shaped
def test_labels_as_distributions(shape):
    s, z, y, options = logits(shape, 5), logits(shape, 6), indices(shape), {"alpha": 0.4, "temperature": 3}
    value, grad = kd(s, z, y, **options)
    same, same_grad = kd(s, z, one_hot(y, shape[1]), **options)
    assert same == pytest.approx(value, rel=1e-14)
    np.testing.assert_allclose(same_grad, grad, rtol=1e-12, atol=1e-16)
    mixed = softmax(logits(shape, 7, scale=1.0))
    ours, ce = kd(s, z, mixed, **options)[0], -(mixed * log_softmax(s)).sum(1).mean()
    assert ours == pytest.approx(0.6 * ce + 0.4 * soft(s, z, 3, "reverse").mean(), rel=1e-12)
    assert ce == pytest.approx(F.cross_entropy(tensor(s), tensor(mixed)).item(), rel=1e-12)
    assert abs(ours - value) > 1e-2


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_integers_of_any_width(kind):
    """156 is -100 in 8 bits, and 300 classes are 44."""
    s, z, y = tensor(logits((4, 300), 1)), tensor(logits((4, 300), 2)), torch.tensor([156, 3, 255, 60])
    ours = knowledge_distillation(s, z, y.to(kind), alpha=0, temperature=1).item()
    assert ours == pytest.approx(hard(s.numpy(), y.numpy()).mean(), rel=1e-12)


@both
@shaped
def test_either_term_alone(shape, direction):
    """To the last bit, with no trace of the other term."""
    s, z, y = logits(shape, 8), logits(shape, 9), indices(shape)
    ce, ce_grad = kd(s, z, y, alpha=0, temperature=2, direction=direction)
    other, other_grad = kd(s, 3 * z + 1, y, alpha=0.0, temperature=9, direction=direction)
    assert other == ce == cross_entropy(tensor(s), tensor(y), -100).mean().item()
    kl, kl_grad = kd(s, z, y, alpha=1, temperature=2, direction=direction)
    another, another_grad = kd(s, z, (y + 1) % shape[1], alpha=1.0, temperature=2, direction=direction)
    assert another == kl == soft_kl(tensor(s), tensor(z), 2, direction).mean().item()
    assert np.array_equal(other_grad, ce_grad) and np.array_equal(another_grad, kl_grad)
    assert ce == pytest.approx(hard(s, y).mean(), rel=1e-12)
    assert kl == pytest.approx(soft(s, z, 2, direction).mean(), rel=1e-12)


@shaped
@pytest.mark.parametrize("ignored", [-100, 255, 0])
def test_ignored_labels(shape, ignored):
    """They leave the CE and its mean; the KL is over all. One of the classes may be the one ignored."""
    s, z, y = logits(shape, 10), logits(shape, 11), indices(shape)
    y.flat[::3] = ignored
    keep, known = y != ignored, np.where(y == ignored, 0, y)
    options = {"temperature": 2, "ignore_index": ignored}
    kl, ce = soft(s, z, 2, "reverse").mean(), hard(s, known)[keep].mean()
    kl_rows = slope(s, z, 2, "reverse") / y.size
    ce_rows = (softmax(s) - one_hot(known, shape[1])) * keep[:, None] / keep.sum()
    theirs = F.cross_entropy(tensor(s), tensor(y), ignore_index=ignored).item()
    assert 0 < keep.sum() < y.size and ce == pytest.approx(theirs, rel=1e-12)
    value, grad = kd(s, z, y, alpha=0.2, **options)
    assert value == pytest.approx(0.8 * ce + 0.2 * kl, rel=1e-12)
    np.testing.assert_allclose(grad, 0.8 * ce_rows + 0.2 * kl_rows, rtol=1e-9, atol=1e-14)
    value, grad = kd(s, z, np.full_like(y, ignored), alpha=0.2, **options)
    assert value == pytest.approx(0.2 * kl, rel=1e-12)
    np.testing.assert_allclose(grad, 0.2 * kl_rows, rtol=1e-9, atol=1e-14)


@both
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_temperature_keeps_the_gradient(direction, scale):
    """Its size is |d|, d = S - Z centred, times what is between the least and the largest eigenvalue of
    diag p - p pᵀ off the constant vector: p = softmax(S/T) in reverse, those between the two in forward.

    The least is >= min p, as the variance of d under p is >= min p |d|²; log p is concave along a line, its
    minimum at an end. The largest is <= max p <= exp(r/T) / C, r the range of the logits, and <= 1/2. So
    |g(20)| / |g(1)| is within [low(20) / high(1), high(20) / low(1)], and 1/400 of itself without T².
    Measured over the examples, least, median and most: at scale 0.1, within [0.56, 1.44], 0.90, 0.99, 1.10
    (reverse) and 0.96, 0.99, 1.06 (forward); at scale 1, within [0.17, 73], 0.47, 0.98, 1.92 and 0.61, 0.97,
    1.51. Without T² the medians are 0.0024 to 0.0025.
    """
    s, z = (logits((64, 10), k, scale=scale) for k in (12, 13))
    d = np.linalg.norm((s - z) - (s - z).mean(1, keepdims=True), axis=1)
    r = np.maximum(np.ptp(s, 1), np.ptp(z, 1))
    size, plain, low, high = {}, {}, {}, {}
    for t in (1, 20):
        grad = kd(s, z, indices((64, 10)), alpha=1, temperature=t, direction=direction)[1]
        size[t] = 64 * np.linalg.norm(grad, axis=1)
        low[t] = np.minimum(softmax(s / t).min(1), softmax(z / t).min(1)) * d
        high[t] = np.minimum(np.exp(r / t) / 10, 0.5) * d
        assert (low[t] <= size[t]).all() and (size[t] <= high[t]).all()
        student = tensor(s, grad=True)
        pair = F.log_softmax(student / t, 1), F.log_softmax(tensor(z) / t, 1)
        F.kl_div(*pair[:: 1 if direction == "forward" else -1], reduction="sum", log_target=True).backward()
        plain[t] = np.linalg.norm(student.grad.numpy(), axis=1)
    ratio, least = size[20] / size[1], low[20] / high[1]
    assert (least <= ratio).all() and (ratio <= high[20] / low[1]).all() and 0.96 < np.median(ratio) < 1
    np.testing.assert_allclose(plain[20] / plain[1], ratio / 400, rtol=1e-8)
    assert (plain[20] / plain[1] < least / 10).all()


@both
def test_hot_limit(direction):
    """T² KL -> |d|² / 2C with d = S - Z centred, its gradient -> d / C. KL(a || b) is the Bregman divergence
    of logsumexp, whose cubic term m3/6 (third central moment) gives the error its 1/T coefficient."""
    shape = (6, 8)
    s, z = (x - x.mean(1, keepdims=True) for x in (logits(shape, 14), logits(shape, 15)))
    a, b = (s, z) if direction == "reverse" else (z, s)
    limit = ((s - z) ** 2).sum(1) / 16
    first = ((b**3).mean(1) - (a**3).mean(1) - 3 * (a**2 * (b - a)).mean(1)) / 6
    assert (np.abs(first) > 0.05).all()
    value, slopes = {}, {}
    for t in (50, 100, 200, 400):
        value[t] = soft_kl(tensor(s + 5), tensor(z - 3), t, direction).numpy()
        loss, grad = kd(s, z, indices(shape), alpha=1, temperature=t, direction=direction)
        assert loss == pytest.approx(value[t].mean(), rel=1e-8)
        slopes[t] = 6 * grad
    for t in (50, 100, 200):
        for order, tolerance, off in (
            (1, 0.2, lambda u: value[u].mean() - limit.mean()),
            (1, 0.1, lambda u: slopes[u] - (s - z) / 8),
            (2, 0.1, lambda u: value[u] - limit - first / u),
        ):
            drop = np.linalg.norm(off(t)) / np.linalg.norm(off(2 * t))
            assert np.log2(drop) == pytest.approx(order, abs=tolerance)
    np.testing.assert_allclose(value[400], limit, rtol=0.02)
    np.testing.assert_allclose(slopes[400], (s - z) / 8, atol=0.01)


@both
@shaped
@pytest.mark.parametrize("t", [0.5, 3.0])
def test_gradcheck(shape, direction, t):
    y, options = indices(shape), {"alpha": 0.6, "temperature": t, "direction": direction}
    y.flat[1] = -100
    s, z = tensor(logits(shape, 16), grad=True), tensor(logits(shape, 17))
    for labels in (tensor(y), tensor(softmax(logits(shape, 18)))):
        loss = partial(knowledge_distillation, teacher_logits=z, labels=labels, **options)
        assert torch.autograd.gradcheck(loss, (s,), rtol=1e-5, atol=1e-8)


@both
@shaped
def test_only_the_student_has_a_gradient(shape, direction):
    s, z = tensor(logits(shape, 19), grad=True), tensor(logits(shape, 20), grad=True)
    y = tensor(softmax(logits(shape, 21)), grad=True)
    knowledge_distillation(s, z, y, alpha=0.5, temperature=2, direction=direction).backward()
    assert z.grad is None and y.grad is None and s.grad.abs().min() > 0


@both
@shaped
@pytest.mark.parametrize("t", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_logits(shape, direction, t, dtype):
    """±1e4, with ties and near-ties so that softmaxes are not all 0 and 1. Value and gradient are the float64
    ones rounded once. T² KL reaches 2e4 T: where that is over 65504, float16 has no other value than inf."""
    rng, y = np.random.default_rng([33, *shape]), indices(shape)
    s, z = (tensor(rng.choice([-1e4, 0.0, 1e4, 9990.0], shape)).to(dtype) for _ in range(2))
    s.requires_grad_()
    loss = knowledge_distillation(s, z, tensor(y), alpha=0.5, temperature=t, direction=direction)
    loss.backward()
    assert loss.dtype == s.grad.dtype == dtype
    a, b = s.detach().double().numpy(), z.double().numpy()
    each, once = soft(a, b, t, direction), 0.51 * torch.finfo(dtype).eps
    assert each.max() > 1e3 * t
    np.testing.assert_allclose(soft_kl(s.detach(), z, t, direction).numpy(), each, rtol=1e-11, atol=1e-9)
    expected = (hard(a, y).mean() + each.mean()) / 2
    fits = expected < torch.finfo(dtype).max
    assert loss.item() == pytest.approx(expected if fits else math.inf, rel=once)
    assert fits or (dtype == torch.float16 and t == 100)
    rows = (softmax(a) - one_hot(y, shape[1]) + slope(a, b, t, direction)) / (2 * y.size)
    np.testing.assert_allclose(s.grad.double().numpy(), rows, rtol=once, atol=3.1e-8)


@both
@shaped
def test_shifts_of_logits(shape, direction):
    """A constant per example (pixel) is in no softmax: the teacher plus one is a perfect student."""
    s, z, y = logits(shape, 22), logits(shape, 23), indices(shape)
    a, b = (logits((shape[0], 1, *shape[2:]), k, scale=20.0) for k in (24, 25))
    options = {"temperature": 2.5, "direction": direction}
    value, grad = kd(s, z, y, alpha=0.5, **options)
    shifted, shifted_grad = kd(s + a, z + b, y, alpha=0.5, **options)
    assert shifted == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(shifted_grad, grad, rtol=1e-9, atol=1e-13)
    none, no_grad = kd(z + a, z, y, alpha=1, **options)
    assert abs(none) < 1e-13 and np.abs(no_grad).max() < 1e-14
    assert value > 0.1 and np.abs(grad).max() > 1e-3


@both
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(*[st.floats(-50, 50)] * 2), min_size=2, max_size=6), st.floats(0.1, 100), st.booleans()
)
def test_never_negative(direction, pairs, t, near):
    """Pinsker's inequality asks more than 0: KL >= |p - q|₁² / 2, up to rounding."""
    s, z = np.array(pairs).T[:, None]
    z = s + 1e-3 * z if near else z
    ours = soft_kl(tensor(s), tensor(z), t, direction).item()
    rounding = 1e-15 * t**2 * (2 + np.abs([s, z]).max() / t)
    assert ours >= t**2 * np.abs(softmax(s / t) - softmax(z / t)).sum() ** 2 / 2 - rounding
    assert ours == pytest.approx(soft(s, z, t, direction).item(), rel=1e-10, abs=rounding)


@both
@pytest.mark.parametrize(("shape", "times"), [((1, 5), (6, 1)), ((1, 4, 1, 1), (2, 1, 1, 3))])
def test_mean_over_examples(shape, times, direction):
    """Six times the same example, or six the same pixel."""
    s, z, y = logits(shape, 26), logits(shape, 27), indices(shape)
    options = {"alpha": 0.7, "temperature": 2, "direction": direction}
    one, one_grad = kd(s, z, y, **options)
    many, grad = kd(np.tile(s, times), np.tile(z, times), np.tile(y, times[:1] + times[2:]), **options)
    assert many == pytest.approx(one, rel=1e-13)
    np.testing.assert_allclose(6 * grad, np.tile(one_grad, times), rtol=1e-12)


FINE = dict(student_logits=(3, 6), teacher_logits=(3, 6), labels=[0, 5, 1], alpha=0.5, temperature=2)
DENSE = dict.fromkeys(("student_logits", "teacher_logits"), (1, 6, 2, 2))
BAD = [
    *[({"alpha": v}, f"alpha.*{v}") for v in (-0.25, 1.5, math.nan, math.inf)],
    *[({"temperature": v}, f"temperature.*{v}") for v in (0.0, -1.5, math.nan, math.inf)],
    ({"direction": "sideways"}, "sideways.*reverse.*forward"),
    ({"labels": [0, 8, 1]}, r"label.*\b8\b"),
    ({"labels": [0, 6, 1]}, r"label 6\b"),
    ({"labels": [0, -1, 1]}, r"label.*-1\b"),
    ({"labels": [0, -100, 1], "ignore_index": 255}, "label.*-100"),
    ({"labels": [0, 1, 2, 3]}, r"labels.*\b4\b.*3x6"),
    ({"labels": [[0, 1, 2]] * 3}, "labels.*3x3.*3x6"),
    ({"labels": [[1 / 7] * 7] * 3}, "labels.*3x7.*3x6"),
    (DENSE | {"labels": [[[0] * 3] * 2]}, "labels.*1x2x3.*1x6x2x2"),
    ({"student_logits": (3,), "teacher_logits": (3,)}, r"logits.*\b3\b"),
    ({"teacher_logits": (3, 7)}, "logits.*3x6.*3x7"),
    ({"teacher_logits": (4, 6)}, "logits.*3x6.*4x6"),
    ({"labels": [[0.25] * 6] * 3}, r"distribution.*1\.5"),
    ({"labels": [[-0.5, 1.5, 0.0, 0.0, 0.0, 0.0]] * 3}, r"distribution.*-0\.5"),
    ({"labels": [[math.nan] * 6] * 3}, "distribution.*nan"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[m for _, m in BAD])
def test_refusals(wrong, message):
    def call(**given: object) -> float:
        made = {k: torch.zeros(v) if "logits" in k else v for k, v in given.items()}
        return knowledge_distillation(**made | {"labels": torch.tensor(made["labels"])}).item()

    assert call(**FINE) > 0
    with pytest.raises(UserError, match=message) as refusal:
        call(**FINE | wrong)
    assert isinstance(refusal.value, ValueError) and "\n" not in str(refusal.value)
