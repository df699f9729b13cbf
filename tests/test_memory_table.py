"""scripts/memory_table.py counts what torch allocates, for fake tensors what it does for real ones."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import ProfilerActivity, profile

from diffkd.methods.base import Optimization
from diffkd.models.families import sd
from diffkd.training.config import Training
from diffkd.training.learner import Copies

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import memory_table  # noqa: E402
from memory.networks import SD15, SDXL, SMALL, fake, normalised_in_float32  # noqa: E402
from memory.passes import Pass, passed  # noqa: E402
from memory.updates import Graphs, Networks  # noqa: E402

PLAIN, _, LEAN = memory_table.SETTINGS


def small(*, checkpointing=False):
    network = SMALL.network().train()
    normalised_in_float32(network)
    if checkpointing:
        network.enable_gradient_checkpointing()
    return network


@pytest.mark.parametrize(("layout", "parameters"), [(SD15, 859_520_964), (SDXL, 2_567_463_684)])
def test_the_networks_at_full_size_are_the_published_ones(layout, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in layout.network().parameters()) == parameters


def test_what_is_saved_is_what_torch_allocated():
    """By torch's own profiler: what a forward pass took of its allocator and had not given back. Its first
    pass also takes what kernels keep."""
    network = small()
    x, time, cond = torch.zeros(2, *SMALL.shape), torch.zeros(2), SMALL.cond(2)
    sd.call(network, x, time, cond)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        output = sd.call(network, x, time, cond)[0]
    allocated = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    assert passed(network, SMALL, 2, half=False).saved == pytest.approx(allocated, rel=1e-4)
    assert allocated > 100 * output.nbytes


@pytest.mark.parametrize("half", [False, True])
def test_fake_tensors_take_what_real_ones_do(half):
    counted = []
    for checkpointing in (False, True):
        real = passed(small(checkpointing=checkpointing), SMALL, 2, half=half)
        with fake():
            assert passed(small(checkpointing=checkpointing), SMALL, 2, half=half) == real
        counted.append(real)
    plain, again = counted
    assert again.saved < plain.saved and again.most < plain.most


def test_weights_and_their_state_take_what_the_arithmetic_says():
    """Those of a learner between backward pass and step, beside a teacher in bf16."""
    pytest.importorskip("torchao")
    count = 64 * 64
    for settings, options in ((PLAIN, {}), (LEAN, {"optimizer": "adamw_8bit", "ema_device": "cpu"})):
        optimization = Optimization(betas=(0.9, 0.999), ema=0.9)
        network = nn.Linear(64, 64, bias=False)
        made = Copies(Accelerator(), network, Training(**options), optimization, alone=True)
        for _ in range(2):
            made.step()
            made.set_rate(1e-3)
            made.backward(made.network(torch.ones(1, 64)).sum())
        held = made.tensors()
        kept = [*held["network"].values(), *held["optimizer"].values(), *(p.grad for p in made.params)]
        if settings.average:
            kept += held["ema"].values()
        steps = sum(t.nbytes for key, t in held["optimizer"].items() if key.endswith("/step"))
        found = sum(tensor.nbytes for tensor in kept) - steps + 2 * count
        one = Networks(learn=count, largest=count, follow=0, averaged=count)
        assert found == memory_table.fixed_bytes(settings, count, Pass(fixed=0, image=1), one)


def test_the_largest_batch_fits_and_one_more_does_not():
    room = memory_table.USED * 24 * 2**30
    fit = memory_table.largest_batch(24, 10e9, 1.3e9)
    assert 10e9 + fit * 1.3e9 <= room < 10e9 + (fit + 1) * 1.3e9
    assert memory_table.largest_batch(24, 30e9, 1.3e9) == 0


@pytest.mark.parametrize(
    ("name", "more"), [("progressive", 0), ("dmd2", 1), ("sid", 1), ("scm", 0), ("adversarial", 0)]
)
def test_a_method_has_the_networks_that_it_makes(name, more):
    """Its own, by the small network's size; heads and the like are a part of one."""
    student = sum(p.numel() for p in SMALL.network().parameters())
    found = Networks.of(name, SMALL, student)
    assert more <= (found.learn - student) / student < more + 1
    assert found.largest == found.averaged == student and found.follow == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "learning", "frozen"), [("progressive", 1, 0), ("adversarial", 1, 1), ("sid", 2, 2)]
)
def test_the_activations_of_an_update(name, learning, frozen):
    """Graphs through networks that learn, and through the teacher, twice where it is guided: those keep less,
    as its weights need no gradients. All of them are checkpointed."""
    found = Graphs.of(name)
    assert learning + 0.5 * frozen - 0.05 <= found.all <= learning + frozen + 0.05
    assert 0 <= found.plain <= 0.05


@pytest.mark.slow
def test_what_a_method_keeps_is_not_checkpointed():
    """The feature maps that are matched."""
    found = Graphs.of("feature")
    assert 1.05 <= found.all <= 1.5 and 0.05 <= found.plain <= 0.2


def test_checkpointing_is_for_what_networks_compute():
    found = Graphs(all=3.0, plain=1.0)
    assert (
        found.bytes(10.0, 2.0, checkpointing=False) == 30 and found.bytes(10.0, 2.0, checkpointing=True) == 14
    )
