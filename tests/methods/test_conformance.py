"""What holds for every method: one conformance test over the folder, and over a method of two networks."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffkd import methods
from diffkd.errors import UserError
from diffkd.methods.base import Method, Step
from diffkd.methods.progressive import Progressive
from diffkd.models import students
from diffkd.runs.method_config import parse_method
from tests.methods.conformance import check_losses, check_resumes, losses_of, nets_of, train
from tests.methods.variants import VARIANTS
from tests.parallel import method_of
from tests.two_networks import TwoNetworks

ROOT = Path(__file__).parents[2]
METHODS = [*methods.names(), "tests.two_networks", *VARIANTS]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_the_contract(name):
    check_losses(method_of(name))


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_an_unbroken_one(name, tmp_path):
    check_resumes(method_of(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_one_process_equals_two(name, tmp_path, launched):
    """Four micro-batches in one process, or two in each of two: the same up to the order of a sum."""
    found = []
    for world in (1, 2):
        job = {"folder": str(tmp_path / str(world)), "world": world, "method": name, "updates": 8}
        done = launched(world, json.dumps(job), module="tests.parallel")
        assert done.returncode == 0, done.stderr[-4000:]
        files = sorted((tmp_path / str(world)).glob("*.safetensors"))
        weights = [value.double().flatten() for file in files for value in load_file(file).values()]
        found.append(torch.cat(weights))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-6


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_one_final_class_with_a_reference_a_config_a_row_and_a_page(name):
    kind = methods.find(name)
    assert kind.__mro__[1] is Method
    assert re.search(r"\d{4}, https://", kind.reference)
    assert all(field.description for field in kind.model_fields.values())
    table = (ROOT / "docs/methods/README.md").read_text()
    row = re.search(rf"^\| \[`{name}`\]\(([\w.-]+)\) \|.*\| `(configs/\S+)` \|$", table, re.MULTILINE)
    assert row, f"docs/methods/README.md has no row of {name}"
    assert re.search(rf"\b{name}\b", (ROOT / "docs/methods" / row[1]).read_text())
    config = (ROOT / row[2]).read_text()
    assert f"name: {name}" in config or f"\n{name}:" in config


@pytest.mark.parametrize("name", methods.names())
def test_no_setting_is_a_number_that_is_none(name):
    """As `.nan` and `.inf` of a config are, which would end in the middle of a run."""
    for key in methods.find(name).model_fields:
        for number in (float("nan"), float("inf"), -float("inf")):
            for given in (number, [number], [number, 1.0], [1.0, number]):
                with pytest.raises(UserError, match=key):
                    parse_method({"name": name, key: given}, methods.find(name).kind)


@pytest.mark.parametrize(
    ("name", "settings", "calls"),
    [
        *((name, {}, None) for name in methods.names()),
        ("dmd2", {"gan": 0.1, "fake_updates": 2}, {"student": 2, "teacher": 1, "fake": 5}),
        ("dmd2", {"gan": 0.1, "fake_updates": 2, "r1": 1}, {"student": 2, "teacher": 1, "fake": 7}),
        ("f_distill", {"fake_updates": 2, "r1": 1}, {"student": 2, "teacher": 1, "fake": 7}),
        ("adversarial", {"critic_updates": 2, "r1": 1}, {"student": 2, "teacher": 7}),
        ("sid", {"fake_updates": 3}, {"student": 3, "teacher": 1, "fake": 4}),
        ("scm", {"mode": "training"}, {"student": 3}),
        ("tcm", {"mode": "distillation"}, {"student": 1.75, "first": 0.25, "teacher": 1}),
        ("imm", {"mode": "distillation"}, {"student": 2, "teacher": 1}),
        ("shortcut", {"target_decay": 0.9}, {"student": 1, "target": 0.5, "teacher": 0.75}),
    ],
)
def test_an_update_passes_its_batch_through_as_many_networks_as_it_says(name, settings, calls):
    """By the examples that each network's forward passes see; a batch of eight has whole shares, and of this
    seed two examples at the boundary of tcm."""
    method = methods.find(name)(**settings)
    nets, seen = nets_of(method), Counter()
    for key, net in nets.items():
        if hasattr(net, "network"):

            def count(module, args, kwargs, key=key):
                seen[key] += len(args[0]) / 8

            net.network.register_forward_pre_hook(count, with_kwargs=True)
    for _ in losses_of(method, nets, method.stages(nets["teacher"])[0], 12, count=8):
        pass
    assert dict(seen) == (calls or method.needs.passes)


def test_a_users_own_module_is_found(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "own.py").write_text(
        "from diffkd.methods.denoising import Denoising\nfrom diffkd.methods.base import Method, Stage\n"
        "class Mine(Method):\n"
        "    reference = 'x'\n"
        "    def stages(self, start):\n        return []\n"
        "    def losses(self, nets, batch, step, rng):\n        yield\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert methods.find("package.own").__name__ == "Mine"
    with pytest.raises(ValueError, match="'package.nothing' is unknown"):
        methods.find("package.nothing")


def test_a_network_that_would_learn_by_mistake_is_seen():
    """A target network whose gradients were not switched off: the trainer would give it an optimizer."""

    class Forgetful(Progressive):
        def networks(self, teacher, student):
            return {"target": students.copy_of(student)}

    with pytest.raises(AssertionError, match=r"no loss trains \['target'\]"):
        check_losses(Forgetful())


# two networks


def test_every_network_follows_its_own_ramp(tmp_path):
    _, records = train(TwoNetworks(learning_rate=1e-3), tmp_path)
    ramp = [1 - update / 6 for update in range(6)]
    assert [r["learning_rate"] for r in records] == pytest.approx([1e-3 * share for share in ramp])
    assert [r["judge_learning_rate"] for r in records] == pytest.approx([4e-3 * share for share in ramp])


def test_losses_follow_the_progress_of_their_stage():
    method = TwoNetworks(updates=10)
    nets = nets_of(method)
    stage = method.stages(nets["teacher"])[0]
    first, half, late = (next(losses_of(method, nets, stage, 11, update)) for update in (0, 5, 9))
    assert first.value.item() == pytest.approx(first.metrics["gap"].square().mean().item(), rel=1e-6)
    judged = half.value - first.value
    assert judged > 0 and (late.value - first.value).item() == pytest.approx(1.8 * judged.item(), rel=1e-4)
    assert [Step(stage, update).progress for update in (0, 5, 9)] == [0, 0.5, 0.9]
