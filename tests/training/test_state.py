"""What a stage prepares and a checkpoint holds: every network's own optimization, average and target."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from diffkd.core.denoiser import Denoiser
from diffkd.errors import Interrupted, UserError
from diffkd.io.files import sha256
from diffkd.methods.adversarial import Adversarial
from diffkd.methods.base import Loss, Optimization
from diffkd.methods.denoising import Denoising
from diffkd.methods.dmd2 import DMD2
from diffkd.methods.feature import Feature
from diffkd.methods.progressive import Progressive
from diffkd.methods.scm import SCM
from diffkd.methods.shortcut import Shortcut
from diffkd.methods.sid import SiD
from diffkd.models import students
from diffkd.training import state
from diffkd.training.config import Training
from diffkd.training.manifest import digest
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage
from tests import text_to_image
from tests.methods.conformance import images, nets_of
from tests.tiny import student
from tests.training.stages import COSINE, Scale, run_one, untimed, weights


class OwnOptimization(Progressive):
    """Progressive with a second network, whose gradient is the number of the update."""

    def stages(self, start):
        judge = Optimization(learning_rate=1e-2, betas=(0.5, 0.9), ema=0.5)
        return [replace(s, networks={"judge": judge}) for s in super().stages(start)]

    def networks(self, teacher, student):
        judge = self.__dict__["judge"] = Scale()
        return {"judge": judge}

    def losses(self, nets, batch, step, rng):
        yield from super().losses(nets, batch, step, rng)
        yield Loss("judge", nets["judge"].scale.sum() * (1 + step.update))


@pytest.mark.parametrize("stop_at", [None, 7])
def test_a_network_learns_by_its_own_rate_betas_and_average(tmp_path, stop_at):
    """Against torch's AdamW by hand: its own ramp, and the average that it holds at the end."""
    method = OwnOptimization(steps=[4], updates=12, learning_rate=1e-3)
    training = Training(batch_size=8, max_grad_norm=None)
    if stop_at is not None:
        with pytest.raises(Interrupted):
            run_one(tmp_path / "run", method=method, training=training, stop_at=stop_at)
    run_one(tmp_path / "run", method=method, training=training)
    weight = nn.Parameter(torch.ones(1))
    by_hand = torch.optim.AdamW([weight], betas=(0.5, 0.9), weight_decay=0)
    average = 1.0
    for update in range(12):
        by_hand.param_groups[0]["lr"] = 1e-2 * (1 - update / 12)
        weight.grad = torch.full((1,), 1.0 + update)
        by_hand.step()
        decay = 0.0 if update == 0 else min(0.5, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * weight.item()
    assert method.__dict__["judge"].scale.item() == pytest.approx(average, abs=1e-6)
    assert abs(average - weight.item()) > 1e-3


def test_a_stage_may_set_the_ema_of_the_student(tmp_path):
    class Own(Progressive):
        def stages(self, start):
            return [replace(s, networks={"student": Optimization(ema=0.5)}) for s in super().stages(start)]

    own = run_one(tmp_path / "own", method=Own(steps=[4], updates=12, learning_rate=1e-3))[0]
    config = run_one(tmp_path / "config", training=Training(batch_size=8, ema=0.5))[0]
    other = run_one(tmp_path / "other")[0]
    assert torch.equal(weights(own), weights(config)) and not torch.equal(weights(own), weights(other))


def test_a_stage_that_names_another_network_is_refused(tmp_path):
    class Misspelt(Progressive):
        def stages(self, start):
            return [replace(s, networks={"jugde": Optimization(ema=0.5)}) for s in super().stages(start)]

    with pytest.raises(UserError, match="network 'jugde' learns, which is not trained; trained are student"):
        run_one(tmp_path / "run", method=Misspelt(steps=[4], updates=1))


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path):
    """It held one average, the student's, and how many steps it took as `ema_step`."""
    whole, _, records = run_one(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_one(tmp_path / "parts", stop_at=7)
    path = next((tmp_path / "parts/checkpoints").glob("*0000007"))
    names = {file.name for file in path.iterdir()}
    assert names == {
        "checkpoint.json", "student.safetensors", "student-optimizer.safetensors", "ema.safetensors"
    }  # fmt: skip
    manifest = json.loads((path / "checkpoint.json").read_text())
    del manifest["digest"], manifest["state"]["ema_steps"]
    assert manifest["state"].keys() == {"ema_step", "watch", "meters", "scaler"} and manifest["schema"] == 2
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "digest": digest(manifest)}))
    parts, _, again = run_one(tmp_path / "parts")
    assert torch.equal(weights(whole), weights(parts)) and untimed(records) == untimed(again)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_target_network_is_in_the_checkpoint(tmp_path, precision):
    """A target network, which follows the student without learning, is where it was after a resume. It keeps
    float32, in which small steps are not lost."""

    training = Training(batch_size=8, log_every=1, checkpoint_every=5, precision=precision)

    class Follows(Progressive):
        def networks(self, teacher, student):
            return {"target": students.copy_of(student).requires_grad_(False)}

        def after_update(self, nets, step):
            with torch.no_grad():
                for slow, fast in zip(nets["target"].parameters(), nets["student"].parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
            assert all(p.dtype == torch.float32 for p in nets["target"].parameters())
            self.__dict__["seen"] = weights(nets["target"]).clone()

    def one(folder, stop_at=None):
        method = Follows(steps=[4], updates=12, learning_rate=1e-3)
        with contextlib.suppress(Interrupted):
            run_one(folder, method=method, stop_at=stop_at, training=training)
        AcceleratorState._reset_state()
        return method.__dict__["seen"]

    whole = one(tmp_path / "whole")
    one(tmp_path / "parts", stop_at=7)
    assert torch.equal(whole, one(tmp_path / "parts"))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        run_one(tmp_path / "run", stop_at=7)
    path = next((tmp_path / "run/checkpoints").glob("*0000007"))
    found = load_file(path / "student.safetensors")
    name = next(iter(found))
    found[name] = found[name][..., :1].contiguous()
    save_file(found, path / "student.safetensors")
    manifest = json.loads((path / "checkpoint.json").read_text())
    file = path / "student.safetensors"
    manifest["files"]["student.safetensors"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    del manifest["digest"]
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "digest": digest(manifest)}))
    with pytest.raises(UserError, match=f"checkpoint of stage 0 does not fit .*{name}"):
        run_one(tmp_path / "run")


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = run_one(tmp_path / "plain", training=Training(batch_size=8, log_every=1))
    less = run_one(
        tmp_path / "less", training=Training(batch_size=8, log_every=1, gradient_checkpointing=True)
    )
    assert [r["loss"] for r in plain[2]] == [r["loss"] for r in less[2]]
    assert torch.equal(weights(plain[0]), weights(less[0]))


@pytest.mark.parametrize(
    "method",
    [
        DMD2(gan=0.1, fake_updates=1, blocks=["down_blocks.0", "up_blocks.0.resnets.0"]),
        Adversarial(blocks=["mid_block.resnets.1"]), Feature(), SCM(), Shortcut(), SiD(fake_updates=1),
    ],
    ids=["dmd2", "adversarial", "feature", "scm", "shortcut", "sid"],
)  # fmt: skip
def test_nor_does_it_with_hooks_derivatives_and_small_networks(method, tmp_path):
    nets = []
    for again in (False, True):
        nets.append(nets_of(method))
        stage = replace(method.stages(nets[-1]["teacher"])[0], updates=2)
        training = Training(batch_size=8, log_every=1, gradient_checkpointing=again)
        run = RunFolder(tmp_path / str(again), {})
        run_stage(Accelerator(), method, stage, nets[-1], images(), training, run, seed=0, stage_index=0)
        run.close()
        assert nets[-1]["student"].network.is_gradient_checkpointing is again
        assert nets[-1]["teacher"].network.is_gradient_checkpointing is again
    for name, net in nets[0].items():
        for key, value in net.state_dict().items():
            assert torch.equal(value, nets[1][name].state_dict()[key]), (name, key)


def test_a_network_without_gradient_checkpointing_is_refused(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x, time, **cond):
            return self.scale * x

    pupil = Denoiser(Plain(), COSINE, "v_prediction", shape=(1, 8, 8))
    method = Denoising(updates=1)
    run = RunFolder(tmp_path / "run", {})
    with pytest.raises(UserError, match="gradient_checkpointing is not supported by Plain"):
        run_stage(
            Accelerator(), method, method.stages(pupil)[0], {"student": pupil}, images(),
            Training(batch_size=8, gradient_checkpointing=True), run, seed=0, stage_index=0,
        )  # fmt: skip
    run.close()


def test_half_precision_is_for_networks_that_are_not_trained(tmp_path):
    """The teacher's weights are bf16; the student's weights and the arithmetic of the target are not."""
    full = run_one(tmp_path / "full", updates=20)
    AcceleratorState._reset_state()
    try:
        teacher, pupil = student(3, "v_prediction", COSINE), student(3, "v_prediction", COSINE)
        method = Progressive(steps=[4], updates=20, learning_rate=1e-3)
        run = RunFolder(tmp_path / "half", {})
        run_stage(
            Accelerator(mixed_precision="bf16"), method, method.stages(teacher)[0],
            {"student": pupil, "teacher": teacher.requires_grad_(False)}, images(),
            Training(batch_size=8, log_every=1, precision="bf16"), run, seed=0, stage_index=0,
        )  # fmt: skip
        run.close()
    finally:
        AcceleratorState._reset_state()
    assert teacher.dtype == torch.bfloat16 and pupil.dtype == torch.float32
    records = [json.loads(line) for line in (tmp_path / "half/log.jsonl").read_text().splitlines()]
    for mine, theirs in zip(records, full[2], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.2)
    assert not torch.equal(weights(pupil), weights(full[0]))


@pytest.mark.filterwarnings(
    "ignore:Guards may run slower on Python 3.13.0",
    "ignore:Dynamo detected a call to a `functools.lru_cache`",
)
def test_compiled_networks_learn_the_same(tmp_path, monkeypatch):
    """As one graph each, by torch's reference compiler; the real one needs a GPU."""
    monkeypatch.setattr(state, "COMPILER", "aot_eager")
    plain = run_one(tmp_path / "plain", updates=3)
    fast = run_one(tmp_path / "fast", updates=3, training=Training(batch_size=8, log_every=1, compile=True))
    for mine, theirs in zip(fast[2], plain[2], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    names = [name for name, _ in fast[0].network.named_parameters()]
    assert names == [name for name, _ in plain[0].network.named_parameters()]


@pytest.mark.parametrize("xl", [False, True])
def test_a_network_that_repeats_blocks_is_compiled_block_by_block(monkeypatch, xl):
    """All of them, of every network of the stage, and nothing else; a network without any as a whole."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    blocks = []
    nets = {}
    for name in ("student", "teacher"):
        unet = text_to_image.network(xl=xl)
        nets[name] = Denoiser(unet, COSINE, "v_prediction").requires_grad_(name == "student")
        blocks += [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    nets["target"] = student(3, "v_prediction", COSINE).requires_grad_(False)
    stage = Progressive(steps=[4]).stages(nets["target"])[0]
    with torch._dynamo.config.patch(cache_size_limit=8):
        state.prepare(Accelerator(), nets, stage, Training(compile=True))
        assert torch._dynamo.config.cache_size_limit > 8  # it is what all shapes of a kind of block share
    assert len(blocks) > 2
    assert {id(module) for module, _ in compiled} == {id(m) for m in [*blocks, nets["target"].network]}
    assert all(options == {"backend": "inductor", "dynamic": False} for _, options in compiled)
