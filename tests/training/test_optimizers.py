"""AdamW in 8 bits against torch's own, and an average in the host's memory; both resumed to the same bits."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from diffkd.errors import Interrupted, UserError
from diffkd.methods.base import Optimization
from diffkd.training import optimizers
from diffkd.training.config import Training
from diffkd.training.learner import Copies
from tests.training.stages import run_one, untimed, weights

EIGHT = {"optimizer": "adamw_8bit"}
HOST = {"ema_device": "cpu"}


def settings(**changes):
    return Training(batch_size=8, log_every=1, checkpoint_every=5, **changes)


needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")


@needs_torchao
def test_a_run_in_eight_bits_is_resumed_to_the_same_bits(tmp_path):
    whole, _, records = run_one(tmp_path / "whole", training=settings(**EIGHT))
    with pytest.raises(Interrupted):
        run_one(tmp_path / "parts", training=settings(**EIGHT), stop_at=7)
    path = next((tmp_path / "parts/checkpoints").glob("*0000007"))
    held = load_file(path / "student-optimizer.safetensors")
    codes = {key: value for key, value in held.items() if key.endswith(".codes")}
    shapes = {name: p.shape for name, p in whole.network.named_parameters()}
    assert codes and any(key.endswith("/exp_avg_sq") for key in held)  # small ones stay in float32
    for key, value in codes.items():
        assert value.dtype == torch.uint8 and value.shape == shapes[key.rpartition("/")[0]]
        scales = held[key.replace(".codes", ".scale")]
        assert scales.shape == (value.numel() // 256,) and scales.dtype == torch.float32
    parts, _, again = run_one(tmp_path / "parts", training=settings(**EIGHT))
    assert torch.equal(weights(whole), weights(parts)) and untimed(records) == untimed(again)


def learner(**changes):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    network[1].bias.requires_grad_(False)
    optimization = Optimization(betas=(0.9, 0.999), ema=0.9)
    return Copies(Accelerator(), network, settings(**changes), optimization, alone=True)


def flat(made):
    return torch.cat([p.detach().flatten() for p in made.network.parameters()]).clone()


def update(made, count):
    for number in range(count):
        made.set_rate(1e-2)
        rng = torch.Generator().manual_seed(number)
        made.backward(made.network(torch.randn(16, 64, generator=rng)).square().mean())
        made.step()
        made.update_average()


@needs_torchao
def test_eight_bits_learn_what_adamw_learns():
    """Over 50 updates: how far apart the weights end, as a share of how far they went."""
    torch._dynamo.utils.counters.clear()
    start, ends = flat(learner()), []
    for changes in ({}, EIGHT):
        made = learner(**changes)
        update(made, 50)
        ends.append(flat(made))
    apart = (ends[0] - ends[1]).norm() / (ends[0] - start).norm()
    print(f"apart {apart:.3f}")
    assert 0 < apart < 0.1
    assert not torch._dynamo.utils.counters["frames"]  # torchao would compile every step


@pytest.mark.parametrize("changes", [{}, pytest.param(EIGHT, marks=needs_torchao), HOST])
def test_a_state_is_restored_whole(changes):
    """What a new learner holds once it has loaded another's tensors is all of them, and it goes on alike."""
    one, other = learner(**changes), learner(**changes)
    update(one, 3)
    held = one.tensors()
    other.load(held)
    other.average.optimization_step = one.average.optimization_step
    for learned in (one, other):
        update(learned, 2)
    for kind, values in one.tensors().items():
        found = other.tensors()[kind]
        assert values.keys() == found.keys()
        assert all(torch.equal(value, found[key]) for key, value in values.items())
        assert any(not torch.equal(value, held[kind][key]) for key, value in values.items())


def test_an_average_on_the_host_is_the_same(tmp_path):
    """Weights that do not learn are in it as they are."""
    beside, host = learner(), learner(**HOST)
    with torch.no_grad():
        for made in (beside, host):
            made.network[1].bias.fill_(3.0)
    for made in (beside, host):
        update(made, 4)
    for one, other in zip(beside.average.shadow_params, host.average.shadow_params, strict=True):
        assert torch.equal(one, other) and other.device.type == "cpu"
    assert host.average.shadow_params[-1] == 3.0
    plain = run_one(tmp_path / "plain", training=settings())[0]
    with pytest.raises(Interrupted):
        run_one(tmp_path / "host", training=settings(**HOST), stop_at=7)
    resumed = run_one(tmp_path / "host", training=settings(**HOST))[0]
    assert torch.equal(weights(plain), weights(resumed))


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        (EIGHT, "FSDP", "adamw_8bit does not work under FSDP2"),
        (EIGHT, "DEEPSPEED", "adamw_8bit does not work under DeepSpeed"),
        (HOST, "FSDP", "ema_device cpu does not work under FSDP2"),
    ],
)
def test_what_an_engine_cannot_divide_is_refused(changes, kind, says):
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind])
    with pytest.raises(UserError, match=says):
        optimizers.check(settings(**changes), accelerator)
    optimizers.check(settings(), accelerator)


def test_eight_bits_without_torchao_are_refused(monkeypatch):
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="adamw_8bit needs torchao; install it"):
        optimizers.check(settings(**EIGHT), SimpleNamespace(distributed_type=DistributedType.NO))
