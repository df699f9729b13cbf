import itertools
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from diffkd import engine, students
from diffkd.base import UserError
from diffkd.data import Images
from diffkd.denoiser import Denoiser
from diffkd.engine import Interrupted, Training, derived_seed, run_stage
from diffkd.meter import NonFinite
from diffkd.method import Stage
from diffkd.methods.denoising import Denoising
from diffkd.methods.progressive import Progressive
from diffkd.runs import Run
from diffkd.schedules import Schedule
from tests.test_models import student

COSINE = Schedule.cosine(64)


def images(count=64):
    generator = torch.Generator().manual_seed(9)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8).numpy()
    return Images("noise", pixels, torch.arange(count) % 3, ["a", "b", "c"])


def stage_of(method, denoiser, **changes):
    stage = method.stages(denoiser)[0]
    return Stage(**{**stage.__dict__, **changes})


def run_one(folder, *, updates=12, training=None, method=None, stop_at=None, seed=0, learning_rate=1e-3):
    """One stage on random images; the student and the run."""
    method = method or Progressive(steps=[4], updates=updates, learning_rate=learning_rate)
    training = training or Training(batch_size=8, log_every=1, checkpoint_every=5)
    teacher = student(3, "v_prediction", COSINE)
    pupil = students.copy_of(teacher)
    run = Run(folder, {"seed": seed})
    done = []
    try:
        run_stage(
            Accelerator(),
            method,
            method.stages(teacher)[0],
            {"student": pupil, "teacher": teacher.requires_grad_(False)},
            images(),
            training,
            run,
            seed=seed,
            stage_index=0,
            on_update=lambda n, record: done.append(n),
            should_stop=lambda: bool(done) and done[-1] == stop_at,
        )
    finally:
        run.close()
    return pupil, teacher, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(denoiser):
    return torch.cat([p.detach().flatten() for p in denoiser.network.parameters()])


def untimed(records):
    measured = ("images_per_second", "peak_memory_gb")
    return [{key: value for key, value in record.items() if key not in measured} for record in records]


def test_a_stage_learns_and_leaves_the_teacher_alone(tmp_path):
    before = weights(student(3, "v_prediction", COSINE))
    pupil, teacher, records = run_one(tmp_path / "run", updates=60, learning_rate=2e-3)
    assert torch.equal(weights(teacher), before) and not torch.equal(weights(pupil), before)
    losses = [record["loss"] for record in records]
    assert sum(losses[-10:]) < 0.5 * sum(losses[5:15])
    assert all(record["grad_norm"] > 0 for record in records)


def test_the_learning_rate_falls_to_zero_within_the_stage(tmp_path):
    """It is a function of the stage's update, not of a scheduler that other stages or processes advance."""
    _, _, records = run_one(tmp_path / "run", updates=10)
    assert [r["learning_rate"] for r in records] == pytest.approx([1e-3 * (1 - u / 10) for u in range(10)])
    stage = Stage("x", 100, 1.0, warmup=9)
    assert stage.rate(0) == pytest.approx(0.1) and stage.rate(9) == pytest.approx(0.91)
    assert stage.rate(99) == pytest.approx(0.01)


def test_the_student_that_is_left_is_the_moving_average(tmp_path):
    """Followed by hand with the decay min(ema, (1 + n) / (10 + n)) of diffusers' EMAModel, n from 0."""
    seen = []

    class Watched(Progressive):
        def after_update(self, nets, stage):
            seen.append(weights(nets["student"]).double())

    method = Watched(steps=[4], updates=12, learning_rate=1e-3)
    pupil, teacher, _ = run_one(tmp_path / "run", method=method, training=Training(batch_size=8, ema=0.5))
    shadow = weights(teacher).double()
    for n, value in enumerate(seen):
        decay = 0.0 if n == 0 else min(0.5, (1 + n) / (10 + n))
        shadow = decay * shadow + (1 - decay) * value
    assert (weights(pupil).double() - shadow).abs().max() < 1e-6


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, stop_at):
    whole, _, records = run_one(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_one(tmp_path / "parts", stop_at=stop_at)
    parts, _, again = run_one(tmp_path / "parts")
    assert torch.equal(weights(whole), weights(parts)) and untimed(records) == untimed(again)


def test_a_run_that_was_killed_goes_on_from_the_last_checkpoint(tmp_path):
    whole, _, records = run_one(tmp_path / "whole")
    torn = tmp_path / "parts"

    class Killed(Progressive):
        def after_update(self, nets, stage):
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
        x0, labels = images().batch(2, rng)
        from diffkd.method import Batch

        batch = Batch(x0, {"class_labels": labels})
        loss = next(
            method.losses({"student": pupil, "teacher": teacher}, batch, method.stages(teacher)[0], rng)
        )
        grads = torch.autograd.grad(loss.value, list(pupil.network.parameters()))
        expected += torch.cat([g.flatten() for g in grads]) / 4
    training = Training(batch_size=8, micro_batches=4, log_every=1, max_grad_norm=None)
    _, _, records = run_one(tmp_path / "run", method=method, training=training)
    assert records[0]["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)


def test_batches_that_do_not_split(tmp_path):
    with pytest.raises(UserError, match="batch_size 8 in 3 micro-batches"):
        run_one(tmp_path / "run", training=Training(batch_size=8, micro_batches=3))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    class Broken(Progressive):
        def losses(self, nets, batch, stage, rng):
            for loss in super().losses(nets, batch, stage, rng):
                if torch.rand((), generator=rng) < 0.3:
                    value = loss.metrics["loss"].clone()
                    value[3] = float("nan")
                    self.__dict__.setdefault("t", loss.metrics["t"][3].item())
                    yield type(loss)(loss.network, loss.value * float("nan"), {**loss.metrics, "loss": value})
                else:
                    yield loss

    method = Broken(steps=[4], updates=40)
    with pytest.raises(NonFinite) as caught:
        run_one(
            tmp_path / "run", method=method, training=Training(batch_size=8, log_every=50, checkpoint_every=1)
        )
    message = str(caught.value)
    assert "stage 4-steps" in message and f"t = {method.__dict__['t']:.4g}" in message
    update = int(message.split("update ")[1].split(",")[0])
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert update > 1 and kept[-1].endswith(f"{update - 1:07d}")


def test_noise_bins_sort_by_t(tmp_path):
    _, _, records = run_one(tmp_path / "run", updates=40, training=Training(batch_size=8, log_every=40))
    bins = records[0]["loss_by_noise"]
    assert bins[0] is None and all(b > 0 for b in bins[1:])  # t is 1/4, 1/2, 3/4 or 1: none in (0, 1/5]


def test_seeds_are_apart():
    seeds = {derived_seed(*parts) for parts in itertools.product(range(4), range(4), range(20), range(4))}
    assert len(seeds) == 4 * 4 * 20 * 4 and all(0 <= s < 2**63 for s in seeds)


def test_only_the_named_network_gets_gradients(tmp_path):
    """A second network of the method's own, trained by its own loss, computed after the student's update."""

    class Judge(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    class Two(Denoising):
        def losses(self, nets, batch, stage, rng):
            before = weights(nets["student"]).clone()
            for loss in super().losses(nets, batch, stage, rng):
                yield type(loss)("student", loss.value * nets["judge"].scale.mean(), loss.metrics)
            assert nets["judge"].scale.grad is None
            assert not torch.equal(before, weights(nets["student"]))
            yield type(loss)("judge", (nets["judge"].scale - 3).square().mean())

    judge, pupil = Judge(), student(3, "v_prediction", COSINE)
    method = Two(updates=30, learning_rate=1e-2, warmup=0)
    run = Run(tmp_path / "run", {})
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


def test_the_log_is_what_was_kept(tmp_path):
    """Losses wait to be added up: however long an interval is, its means are the means of the updates."""
    single = run_one(tmp_path / "single", updates=130)[2]
    whole = run_one(tmp_path / "whole", updates=130, training=Training(batch_size=8, log_every=130))[2]
    assert len(single) == 130 and len(whole) == 1
    for key in ("loss", "gap", "grad_norm"):
        mean = sum(record[key] for record in single) / 130
        assert whole[0][key] == pytest.approx(mean, rel=1e-9)
    assert 0.05 < whole[0]["peak_memory_gb"] < 100
    bins = [[record["gap_by_noise"][k] for record in single] for k in range(5)]
    assert [value is None for value in whole[0]["gap_by_noise"]] == [set(b) == {None} for b in bins]


def test_checkpointed_gradients_are_the_same(tmp_path):
    plain = run_one(tmp_path / "plain", training=Training(batch_size=8, log_every=1))
    less = run_one(
        tmp_path / "less", training=Training(batch_size=8, log_every=1, gradient_checkpointing=True)
    )
    assert [r["loss"] for r in plain[2]] == [r["loss"] for r in less[2]]
    assert torch.equal(weights(plain[0]), weights(less[0]))


def test_a_network_without_checkpointing_is_named(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x, time, **cond):
            return self.scale * x

    pupil = Denoiser(Plain(), COSINE, "v_prediction", shape=(1, 8, 8))
    method = Denoising(updates=1)
    run = Run(tmp_path / "run", {})
    with pytest.raises(UserError, match="gradient_checkpointing is not for a Plain"):
        run_stage(
            Accelerator(), method, method.stages(pupil)[0], {"student": pupil}, images(),
            Training(batch_size=8, gradient_checkpointing=True), run, seed=0, stage_index=0,
        )  # fmt: skip
    run.close()


def test_half_precision_halves_what_is_not_trained(tmp_path):
    """bf16: the teacher's weights are, the student's and the target's arithmetic are not."""
    full = run_one(tmp_path / "full", updates=20)
    AcceleratorState._reset_state()
    try:
        teacher, pupil = student(3, "v_prediction", COSINE), student(3, "v_prediction", COSINE)
        method = Progressive(steps=[4], updates=20, learning_rate=1e-3)
        run = Run(tmp_path / "half", {})
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


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_networks_learn_the_same(tmp_path, monkeypatch):
    """As one graph each, by torch's reference compiler; what the real one makes of it is for a GPU to say."""
    monkeypatch.setattr(engine, "COMPILER", "aot_eager")
    plain = run_one(tmp_path / "plain", updates=3)
    fast = run_one(tmp_path / "fast", updates=3, training=Training(batch_size=8, log_every=1, compile=True))
    for mine, theirs in zip(fast[2], plain[2], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    names = [name for name, _ in fast[0].network.named_parameters()]
    assert names == [name for name, _ in plain[0].network.named_parameters()]
