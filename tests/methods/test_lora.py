"""Methods whose networks are adapters on one base: they keep the contract and know nothing of it."""

import pytest
import torch
from safetensors.torch import load_file

from diffkd.core import adapters
from diffkd.models.students.config import Lora
from tests.methods import conformance
from tests.methods.conformance import check_losses, check_resumes, nets_of
from tests.parallel import method_of
from tests.tiny import student

METHODS = ["progressive", "dmd2", "consistency", "shortcut", "meanflow", "imm"]
ALSO = [
    "dmd2-ddim", "dmd2-gan", "adversarial", "f_distill", "sid", "lcm", "scm", "tcm", "feature", "output",
    "reflow", "regression", "shortcut-target", "meanflow-jvp",
]  # fmt: skip


def by_default(chosen):
    """These, and the others as slow tests."""
    others = [name for name in (*METHODS, *ALSO) if name not in chosen]
    return [*chosen, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.fixture(autouse=True)
def _adapted(monkeypatch):
    """Every copy of a teacher is an adapter on it."""

    def marked(*args, **options):
        made = student(*args, **options)
        Lora(kind="lora", rank=2).mark(made)
        return made

    monkeypatch.setattr(conformance, "student", marked)


@pytest.mark.parametrize("name", by_default(METHODS))
def test_a_method_keeps_the_contract(name):
    check_losses(method_of(name))


@pytest.mark.parametrize("name", by_default(["dmd2-ddim", "shortcut-target"]))
def test_a_resumed_run_has_the_same_bits_and_checkpoints_hold_adapters_alone(name, tmp_path):
    """And the embedding of a step's length, of a method that has one."""
    check_resumes(method_of(name), tmp_path)
    (checkpoint, *_) = sorted((tmp_path / "parts" / "checkpoints").iterdir())
    nets = nets_of(method_of(name))
    for file in checkpoint.glob("*.safetensors"):
        network = file.stem.removesuffix("-optimizer").removesuffix("-ema").replace("ema", "student")
        if network in nets and adapters.own(nets[network]):
            own = {key.partition("/")[0].removeprefix("network.") for key in load_file(file)}
            network = getattr(nets[network], "network", nets[network])
            assert own == {*adapters.own(network)}, file.name


def test_distribution_matching_has_one_base_in_memory():
    nets = nets_of(method_of("dmd2"))
    sizes = {p.data_ptr(): p.numel() for net in nets.values() for p in net.parameters()}
    own = [sum(p.numel() for p in adapters.own(net).values()) for net in nets.values()]
    base = sum(p.numel() for p in nets["teacher"].parameters())
    assert {*nets} == {"teacher", "student", "fake"} and own[0] == 0 and own[1] == own[2] > 0
    assert sum(sizes.values()) == base + own[1] + own[2]
    learn = {p.data_ptr() for net in nets.values() for p in net.parameters() if p.requires_grad}
    assert learn == {p.data_ptr() for net in nets.values() for p in adapters.own(net).values()}
    assert not any(torch.equal(a, b) for a, b in zip(
        adapters.own(nets["student"]).values(), adapters.own(nets["fake"]).values(), strict=True
    ))  # fmt: skip
