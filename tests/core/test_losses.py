import pytest
import torch

from diffkd.core.losses import squared_error, weight


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("snr", [0.0, 0.5, 3.0, 40.0]),
        ("truncated_snr", [1.0, 1.0, 3.0, 40.0]),
        ("snr_plus_one", [1.0, 1.5, 4.0, 41.0]),
        ("min_snr", [0.0, 0.5, 3.0, 5.0]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_weights(name, expected):
    snr = torch.tensor([0.0, 0.5, 3.0, 40.0], dtype=torch.float64)
    assert weight(name, snr, gamma=5.0).tolist() == expected


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


def test_the_error_is_a_mean_and_does_not_change_with_size():
    x = torch.full((2, 3, 4, 4), 0.5)
    assert squared_error(x, torch.zeros_like(x)).tolist() == [0.25, 0.25]
    big = torch.full((2, 3, 32, 32), 0.5)
    assert squared_error(big, torch.zeros_like(big)).tolist() == [0.25, 0.25]
