"""Scores of channels beside NumPy and beside finite differences of the loss."""

import numpy as np
import pytest
import torch

from diffkd.models import students
from diffkd.models.students.channels import narrow_unet
from tests.models.unets import COSINE, denoiser_of, network, untouched


def best(scores, groups, count):
    """With NumPy: the indices of each group's highest, ascending."""
    parts = np.asarray(scores).reshape(groups, -1)
    chosen = np.sort(np.argsort(-parts, 1)[:, : count // groups], 1)
    return (chosen + np.arange(groups)[:, None] * parts.shape[1]).flatten()


def test_channels_are_chosen_by_the_norms_of_what_writes_them():
    """A residual stream's channels by all layers that write into it, hidden ones by their own layer."""
    teacher = network((16,), add_attention=False)
    by_name = {n: p.detach().double().numpy().reshape(len(p), -1) for n, p in teacher.named_parameters()}
    norms = {name: (value**2).sum(1) for name, value in by_name.items()}
    found = students.norm_scores(teacher)
    assert found.keys() == norms.keys()
    assert all(np.allclose(found[name].numpy(), norms[name], rtol=1e-12) for name in norms)
    made = narrow_unet(teacher, [8]).state_dict()

    def chosen(*layers):
        return best(sum(norms[f"{layer}.{what}"] for layer in layers for what in ("weight", "bias")), 4, 8)

    down = "down_blocks.0.resnets.0"
    stream = chosen("conv_in", f"{down}.conv2", "mid_block.resnets.0.conv2", "mid_block.resnets.1.conv2")
    hidden = chosen(f"{down}.conv1", f"{down}.time_emb_proj")
    up = chosen("up_blocks.0.resnets.1.conv2", "up_blocks.0.resnets.1.conv_shortcut")
    assert len({tuple(stream), tuple(hidden), tuple(up)}) == 3
    assert np.array_equal(made["conv_in.bias"], by_name["conv_in.bias"][stream, 0])
    old = teacher.state_dict()
    assert torch.equal(made[f"{down}.conv1.weight"], old[f"{down}.conv1.weight"][hidden][:, stream])
    assert torch.equal(made[f"{down}.conv2.weight"], old[f"{down}.conv2.weight"][stream][:, hidden])
    assert torch.equal(made["conv_out.weight"], old["conv_out.weight"][:, up])
    first = chosen("up_blocks.0.resnets.0.conv2", "up_blocks.0.resnets.0.conv_shortcut")
    both, norm = np.concatenate([first, stream + 16]), "up_blocks.0.resnets.1.norm1.weight"
    assert torch.equal(made[norm], old[norm][both])  # of what is joined: the stream, and the way around


def test_taylor_scores_are_changes_of_the_loss():
    """In float64: the loss of v with a row scaled by 1 - e and 1 + e; the sum over two batches."""
    net = network((4, 4), [False, True], norm_num_groups=2, num_class_embeds=4).double()
    teacher = denoiser_of(net)
    rng = torch.Generator().manual_seed(1)
    batches = [
        (torch.rand(3, 1, 8, 8, generator=rng).double() * 2 - 1, {"class_labels": torch.tensor([0, 2, 1])})
        for _ in range(2)
    ]
    before = {name: p.clone() for name, p in net.named_parameters()}
    found = untouched(lambda: students.taylor_scores(teacher, batches, torch.Generator().manual_seed(5)))
    assert found.keys() == before.keys()

    @torch.no_grad()
    def losses():
        rng, values = torch.Generator().manual_seed(5), []
        for x0, cond in batches:
            t = torch.randint(1, 65, (3,), generator=rng).double() / 64
            eps = torch.randn(x0.shape, generator=rng).double()
            alpha, sigma = COSINE.at(t, like=x0)
            v = net(alpha * x0 + sigma * eps, 64 * t - 1, **cond).sample
            values.append((v - (alpha * eps - sigma * x0)).square().mean().item())
        return np.array(values)

    for name, parameter in list(net.named_parameters())[::3]:
        row, sides = len(parameter) // 2, []
        for scale in (1 - 1e-3, 1 + 1e-3):
            parameter.data[row] = before[name][row] * scale
            sides.append(losses())
        parameter.data[row] = before[name][row]
        slope = (sides[1] - sides[0]) / 2e-3
        assert found[name][row].item() == pytest.approx((slope**2).sum(), rel=1e-3, abs=1e-12), name
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in net.named_parameters())
