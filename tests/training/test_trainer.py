"""The training loop of a stage."""

import contextlib

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffkd.core.noise import derived_seed
from diffkd.errors import Interrupted, UserError
from diffkd.methods.base import Batch, Stage, Step
from diffkd.methods.denoising import Denoising
from diffkd.methods.progressive import Progressive
from diffkd.models import students
from diffkd.training.config import Training
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage
from tests.methods.conformance import images
from tests.tiny import student
from tests.training.stages import COSINE, Scale, run_one, untimed, weights


def test_a_stage_learns_and_leaves_the_teacher_alone(tmp_path):
    before = weights(student(3, "v_prediction", COSINE))
    pupil, teacher, records = run_one(tmp_path / "run", updates=60, learning_rate=2e-3)
    assert torch.equal(weights(teacher), before) and not torch.equal(weights(pupil), before)
    losses = [record["loss"] for record in records]
    assert sum(losses[-10:]) < 0.5 * sum(losses[5:15])
    assert all(record["grad_norm"] > 0 for record in records)


def test_the_learning_rate_falls_to_zero_within_the_stage(tmp_path):
    """It depends on the stage's update alone: no scheduler is advanced by other stages or processes."""
    _, _, records = run_one(tmp_path / "run", updates=10)
    assert [r["learning_rate"] for r in records] == pytest.approx([1e-3 * (1 - u / 10) for u in range(10)])
    stage = Stage("x", 100, 1.0, warmup=9)
    assert stage.rate(0) == pytest.approx(0.1) and stage.rate(9) == pytest.approx(0.91)
    assert stage.rate(99) == pytest.approx(0.01)


def test_the_final_student_is_the_moving_average(tmp_path):
    """Followed by hand with the decay min(ema, (1 + n) / (10 + n)) of diffusers' EMAModel, n from 0."""
    seen = []

    class Watched(Progressive):
        def after_update(self, nets, step):
            seen.append(weights(nets["student"]).double())

    method = Watched(steps=[4], updates=12, learning_rate=1e-3)
    pupil, teacher, _ = run_one(tmp_path / "run", method=method, training=Training(batch_size=8, ema=0.5))
    shadow = weights(teacher).double()
    for n, value in enumerate(seen):
        decay = 0.0 if n == 0 else min(0.5, (1 + n) / (10 + n))
        shadow = decay * shadow + (1 - decay) * value
    assert (weights(pupil).double() - shadow).abs().max() < 1e-6


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, stop_at):
    whole, _, records = run_one(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_one(tmp_path / "parts", stop_at=stop_at)
    parts, _, again = run_one(tmp_path / "parts")
    assert torch.equal(weights(whole), weights(parts)) and untimed(records) == untimed(again)


def test_a_killed_run_resumes_from_the_last_checkpoint(tmp_path):
    whole, _, records = run_one(tmp_path / "whole")
    torn = tmp_path / "parts"

    class Killed(Progressive):
        def after_update(self, nets, step):
            self.__dict__["count"] = self.__dict__.get("count", 0) + 1
            if self.__dict__["count"] == 9:  # after the checkpoint of update 5, and logged once more
                raise SystemError

    with pytest.raises(SystemError):
        run_one(torn, method=Killed(steps=[4], updates=12, learning_rate=1e-3))
    with (torn / "log.jsonl").open("a") as stream:
        stream.write('{"stage": "4-st')
    parts, _, again = run_one(torn)
    assert torch.equal(weights(whole), weights(parts)) and untimed(records) == untimed(again)


def test_micro_batches_add_up(tmp_path):
    """An update of one batch in 4 parts has the gradient of the mean of the 4 parts."""
    method = Progressive(steps=[4], updates=1, learning_rate=1e-3)
    teacher = student(3, "v_prediction", COSINE).requires_grad_(False)
    pupil = students.copy_of(teacher).requires_grad_(True)
    expected = torch.zeros_like(weights(pupil))
    for micro in range(4):
        rng = torch.Generator().manual_seed(derived_seed(0, 0, 0, micro))
        batch = Batch(*images().batch(2, rng))
        loss = next(
            method.losses(
                {"student": pupil, "teacher": teacher}, batch, Step(method.stages(teacher)[0], 0), rng
            )
        )
        grads = torch.autograd.grad(loss.value, list(pupil.network.parameters()))
        expected += torch.cat([g.flatten() for g in grads]) / 4
    training = Training(batch_size=8, micro_batches=4, log_every=1, max_grad_norm=None)
    _, _, records = run_one(tmp_path / "run", method=method, training=training)
    assert records[0]["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)


def test_batches_that_do_not_divide_evenly_are_refused(tmp_path):
    with pytest.raises(UserError, match="batch_size 8 in 3 micro-batches"):
        run_one(tmp_path / "run", training=Training(batch_size=8, micro_batches=3))


def test_dropout_resumes_where_it_stopped(tmp_path):
    """Layers draw from torch's global generator: seeded for every part of an update, and restored after."""

    def one(folder, stop_at=None):
        pupil = student(3, "v_prediction", COSINE)
        for module in pupil.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        method, run, done = Denoising(updates=12, learning_rate=1e-3, warmup=0), RunFolder(folder, {}), [0]
        before = torch.random.get_rng_state()
        with contextlib.suppress(Interrupted):
            run_stage(
                Accelerator(), method, method.stages(pupil)[0], {"student": pupil.train()}, images(),
                Training(batch_size=8, micro_batches=2), run, seed=0, stage_index=0,
                on_update=lambda update, record: done.append(update),
                should_stop=lambda: done[-1] + 1 == stop_at,
            )  # fmt: skip
        run.close()
        assert torch.equal(before, torch.random.get_rng_state())
        return weights(pupil)

    whole = one(tmp_path / "whole")
    torch.manual_seed(1)
    one(tmp_path / "parts", stop_at=5)
    assert torch.equal(whole, one(tmp_path / "parts"))


def test_only_the_named_network_gets_gradients(tmp_path):
    """A second network of the method's own, trained by its own loss, computed after the student's update."""

    class Two(Denoising):
        def losses(self, nets, batch, step, rng):
            before = weights(nets["student"]).clone()
            for loss in super().losses(nets, batch, step, rng):
                yield type(loss)("student", loss.value * nets["judge"].scale.mean(), loss.metrics)
            assert nets["judge"].scale.grad is None
            assert not torch.equal(before, weights(nets["student"]))
            yield type(loss)("judge", (nets["judge"].scale - 3).square().mean())

    judge, pupil = Scale(), student(3, "v_prediction", COSINE)
    method = Two(updates=30, learning_rate=1e-2, warmup=0)
    run = RunFolder(tmp_path / "run", {})
    run_stage(
        Accelerator(),
        method,
        method.stages(pupil)[0],
        {"student": pupil, "judge": judge},
        images(),
        Training(batch_size=8),
        run,
        seed=0,
        stage_index=0,
    )
    run.close()
    assert 1.05 < judge.scale.item() < 1.3
