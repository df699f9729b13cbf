import contextlib
import itertools
import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from diffkd.core.denoiser import Denoiser
from diffkd.core.noise import derived_seed
from diffkd.core.schedules import Schedule
from diffkd.errors import Interrupted, UserError
from diffkd.io.files import sha256
from diffkd.methods.base import Batch, Loss, Optimization, Stage, Step
from diffkd.methods.denoising import Denoising
from diffkd.methods.progressive import Progressive
from diffkd.models import students
from diffkd.training import checkpoints, state
from diffkd.training.config import Training
from diffkd.training.divergence import DivergenceMonitor, NonFinite
from diffkd.training.log import TrainingLog
from diffkd.training.run_folder import RunFolder
from diffkd.training.trainer import run_stage
from tests.methods.conformance import images
from tests.tiny import student

COSINE = Schedule.cosine(64)


def run_one(folder, *, updates=12, training=None, method=None, stop_at=None, seed=0, learning_rate=1e-3):
    """One stage on random images; the student and the run."""
    method = method or Progressive(steps=[4], updates=updates, learning_rate=learning_rate)
    training = training or Training(batch_size=8, log_every=1, checkpoint_every=5)
    teacher = student(3, "v_prediction", COSINE)
    pupil = students.copy_of(teacher)
    run = RunFolder(folder, {"seed": seed})
    done = []
    try:
        run_stage(
            Accelerator(),
            method,
            method.stages(teacher)[0],
            {
                "student": pupil,
                "teacher": teacher.requires_grad_(False),
                **method.networks(teacher, pupil),
            },
            images(),
            training,
            run,
            seed=seed,
            stage_index=0,
            on_update=lambda n, record: done.append(n),
            should_stop=lambda: (done[-1] if done else 0) + 1 == stop_at,
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
        x0, labels = images().batch(2, rng)

        batch = Batch(x0, {"class_labels": labels})
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


def test_batches_that_do_not_split(tmp_path):
    with pytest.raises(UserError, match="batch_size 8 in 3 micro-batches"):
        run_one(tmp_path / "run", training=Training(batch_size=8, micro_batches=3))


def broken(at, kind="loss", example=3):
    """Progressive whose loss is no number at these updates (counted from 1), for one example of a batch."""

    class Broken(Progressive):
        def losses(self, nets, batch, step, rng):
            update = self.__dict__["n"] = self.__dict__.get("n", 0) + 1
            for loss in super().losses(nets, batch, step, rng):
                if update not in at:
                    yield loss
                elif kind == "loss":
                    value = loss.metrics["loss"].clone()
                    value[example] = float("nan")
                    self.__dict__.setdefault("t", loss.metrics["t"][example].item())
                    yield type(loss)(loss.network, loss.value * float("nan"), {**loss.metrics, "loss": value})
                else:  # a loss of 1 whose gradient is infinite
                    zero = loss.value - loss.value.detach()
                    yield type(loss)(loss.network, torch.sqrt(zero) + 1, loss.metrics)

    return Broken(steps=[4], updates=12, learning_rate=1e-3)


def drawn_at(update, batch_size=8):
    """The images of an update, counted from 1, of one micro-batch."""
    rng = torch.Generator().manual_seed(derived_seed(0, 0, update - 1, 0))
    return torch.randint(64, (batch_size,), generator=rng).tolist()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_an_update_that_is_no_number_is_skipped(tmp_path, kind):
    """Weights, moments and average are as if the update had not been; the learning rate goes on."""
    seen = []

    def after(self, nets, stage):
        seen.append(weights(nets["student"]))

    method = broken({5, 6}, kind)
    type(method).after_update = after
    pupil, teacher, records = run_one(tmp_path / "run", method=method)
    skipped = [r for r in records if r.get("event") == "skipped"]
    logged = [r for r in records if "loss" in r]
    assert [r["update"] for r in skipped] == [5, 6] and len(seen) == 10
    assert all(w.isfinite().all() for w in seen) and weights(pupil).isfinite().all()
    rates = {r["update"]: r["learning_rate"] for r in logged}
    assert rates == pytest.approx({u: 1e-3 * (1 - (u - 1) / 12) for u in range(1, 13) if u not in (5, 6)})
    shadow = weights(teacher).double()
    for n, value in enumerate(seen):
        decay = 0.0 if n == 0 else min(0.99, (1 + n) / (10 + n))
        shadow = decay * shadow + (1 - decay) * value.double()
    assert (weights(pupil).double() - shadow).abs().max() < 1e-6
    first = skipped[0]
    assert first["network"] == "student" and first["stage"] == "4-steps"
    if kind == "loss":
        low, high = first["noise_bin"]
        assert first["t"] == method.__dict__["t"] and low < first["t"] <= high
        assert first["images"] == [drawn_at(5)[3]]
    else:
        assert first["images"] == drawn_at(5)


def test_dropout_goes_on_where_it_stopped(tmp_path):
    """Layers draw from torch's own generator: seeded for every part of an update, and put back after."""

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


def test_an_interval_of_which_only_the_beginning_was_good():
    """Resumed by more processes: all of them know that there is something to be exchanged."""
    first = TrainingLog(torch.device("cpu"))
    first.add([Loss("student", torch.tensor(2.0), {"t": torch.tensor([0.5]), "gap": torch.tensor([3.0])})],
              torch.tensor(4.0))  # fmt: skip
    states = json.loads(json.dumps([first.state()]))
    again = [TrainingLog(torch.device("cpu")) for _ in range(2)]
    for rank, meter in enumerate(again):
        meter.load(states, rank, 2)
    assert all(meter.has_any for meter in again)
    assert again[0].sums.keys() == again[1].sums.keys() == first.sums.keys()
    for key, value in first.sums.items():
        assert (again[0].sums[key] + again[1].sums[key] == value).all() and not again[1].sums[key].any()


def test_what_a_model_that_knows_no_noise_logs():
    """Without t there are no bins; the mean is of all examples, the loss that of the values."""
    meter = TrainingLog(torch.device("cpu"))
    for value in (2.0, 4.0):
        loss = Loss(
            "student", torch.tensor(value), {"loss": torch.zeros(3), "right": torch.full((3,), value)}
        )
        meter.add([loss], torch.tensor(1.0))
    record = meter.read(Accelerator(), 3)
    assert (record["loss"], record["right"], record["grad_norm"]) == (3, 3, 1)
    assert not [key for key in record if key.endswith("_by_noise")]


def test_a_second_network_that_is_no_number(tmp_path):
    """The student moved before: its average goes on with it. The second network stays as it was."""
    judge, seen, shadow = Scale(), [], []

    class Two(Progressive):
        def networks(self, teacher, student):
            return {"judge": judge}

        def losses(self, nets, batch, step, rng):
            yield from super().losses(nets, batch, step, rng)
            seen.append(weights(nets["student"]).double())
            shadow.append(judge.scale.item())
            value = (judge.scale - 3).square().mean()
            yield Loss("judge", value * float("nan") if len(seen) == 5 else value)

    method = Two(steps=[4], updates=12, learning_rate=1e-3)
    pupil, teacher, records = run_one(tmp_path / "run", method=method)
    skipped = [r for r in records if r.get("event") == "skipped"]
    assert [(r["update"], r["network"]) for r in skipped] == [(5, "judge")]
    average = weights(teacher).double()
    for n, value in enumerate(seen):
        decay = 0.0 if n == 0 else min(0.99, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * value
    assert (weights(pupil).double() - average).abs().max() < 1e-6
    assert shadow[5] == shadow[4] and shadow[6] != shadow[5]


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class OwnOptimization(Progressive):
    """With a second network whose gradient is the number of the update."""

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


def test_the_average_of_the_student_may_be_its_stage_s_own(tmp_path):
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
    """It had the student's average alone, and its count as `ema_step`."""
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
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "digest": checkpoints._digest(manifest)}))
    parts, _, again = run_one(tmp_path / "parts")
    assert torch.equal(weights(whole), weights(parts)) and untimed(records) == untimed(again)


def test_too_many_in_a_row_stop_the_run(tmp_path):
    method = broken({3, 5, 6, 7, 8, 9})
    training = Training(batch_size=8, log_every=50, checkpoint_every=1, max_skipped=3)
    with pytest.raises(NonFinite) as caught:
        run_one(tmp_path / "run", method=method, training=training)
    message = str(caught.value)
    for words in (
        "network student in stage 4-steps became NaN or infinite at update 8, noise level t = ",
        "(bin ", f"images {drawn_at(8)[3]};", "3 updates in a row were skipped before (training.max_skipped)",
    ):  # fmt: skip
        assert words in message
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1].endswith("0000007")  # whole, of the weights of update 4
    with pytest.raises(NonFinite, match="at update 2"):
        run_one(tmp_path / "none", method=broken({2}), training=Training(batch_size=8, max_skipped=0))


def test_skipped_updates_are_counted_across_a_stop(tmp_path):
    whole = tmp_path / "whole"
    training = Training(batch_size=8, log_every=1, checkpoint_every=50)
    with pytest.raises(NonFinite, match="at update 6"):
        run_one(whole, method=broken({3, 4, 5, 6}), training=training)
    with pytest.raises(Interrupted):
        run_one(tmp_path / "parts", method=broken({3, 4, 5, 6}), training=training, stop_at=5)
    with pytest.raises(NonFinite, match="at update 6"):
        run_one(tmp_path / "parts", method=broken({1, 2, 3}), training=training)  # counted from the stop


def test_a_loss_that_leaves_its_path_is_told_once(caplog):
    monitor = DivergenceMonitor("4-steps", 3)
    for update in range(1, 101):
        monitor.completed(1.0 + 0.01 * (update % 7), update, warn=True)
    for update in range(101, 150):  # 49 updates
        monitor.completed(20.0, update, warn=True)
    monitor.completed(1.0, 150, warn=True)
    assert not caplog.records
    again = DivergenceMonitor("4-steps", 3)
    again.load(json.loads(json.dumps(monitor.state())))
    for update in range(151, 300):
        again.completed(20.0, update, warn=True)
    assert len(caplog.records) == 1
    assert "stage 4-steps: the loss has been more than 10 times its median (1." in caplog.text
    assert "up to update 200 (20)" in caplog.text


def test_a_loss_that_is_large_from_the_start_is_nothing_to_tell(caplog):
    monitor = DivergenceMonitor("4-steps", 3)
    for update in range(1, 300):
        monitor.completed(1e6 if update < 10 else 1e6 + update, update, warn=True)
    assert not caplog.records


def test_a_log_interval_goes_on_where_it_stopped(tmp_path):
    """The means of an interval that a stop cut in two are, to the bit, those of an unbroken one."""
    training = Training(batch_size=8, log_every=12, checkpoint_every=50)
    whole = run_one(tmp_path / "whole", training=training)[2]
    with pytest.raises(Interrupted):
        run_one(tmp_path / "parts", training=training, stop_at=7)
    parts = run_one(tmp_path / "parts", training=training)[2]
    assert len(whole) == 1 and untimed(whole) == untimed(parts)


def test_a_network_that_a_method_moves_is_kept_too(tmp_path):
    """A target network that does not learn, and follows the student: where it was, a resumed run goes on."""

    class Follows(Progressive):
        def networks(self, teacher, student):
            return {"target": students.copy_of(student).requires_grad_(False)}

        def after_update(self, nets, step):
            with torch.no_grad():
                for slow, fast in zip(nets["target"].parameters(), nets["student"].parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
            self.__dict__["seen"] = weights(nets["target"]).clone()

    def one(folder, stop_at=None):
        method = Follows(steps=[4], updates=12, learning_rate=1e-3)
        with contextlib.suppress(Interrupted):
            run_one(folder, method=method, stop_at=stop_at)
        return method.__dict__["seen"]

    whole = one(tmp_path / "whole")
    one(tmp_path / "parts", stop_at=7)
    assert torch.equal(whole, one(tmp_path / "parts"))


def test_a_checkpoint_of_another_network_is_told(tmp_path):
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
    (path / "checkpoint.json").write_text(json.dumps({**manifest, "digest": checkpoints._digest(manifest)}))
    with pytest.raises(UserError, match=f"checkpoint of stage 0 does not fit .*{name}"):
        run_one(tmp_path / "run")


def test_noise_bins_sort_by_t(tmp_path):
    _, _, records = run_one(tmp_path / "run", updates=40, training=Training(batch_size=8, log_every=40))
    bins = records[0]["loss_by_noise"]
    assert bins[0] is None and all(b > 0 for b in bins[1:])  # t is 1/4, 1/2, 3/4 or 1: none in (0, 1/5]


def test_seeds_are_apart():
    seeds = {derived_seed(*parts) for parts in itertools.product(range(4), range(4), range(20), range(4))}
    assert len(seeds) == 4 * 4 * 20 * 4 and all(0 <= s < 2**63 for s in seeds)


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
    run = RunFolder(tmp_path / "run", {})
    with pytest.raises(UserError, match="gradient_checkpointing is not supported by Plain"):
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


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_networks_learn_the_same(tmp_path, monkeypatch):
    """As one graph each, by torch's reference compiler; what the real one makes of it is for a GPU to say."""
    monkeypatch.setattr(state, "COMPILER", "aot_eager")
    plain = run_one(tmp_path / "plain", updates=3)
    fast = run_one(tmp_path / "fast", updates=3, training=Training(batch_size=8, log_every=1, compile=True))
    for mine, theirs in zip(fast[2], plain[2], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    names = [name for name, _ in fast[0].network.named_parameters()]
    assert names == [name for name, _ in plain[0].network.named_parameters()]
