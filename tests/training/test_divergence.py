"""Updates whose losses are not finite, and losses that diverge."""

import json

import pytest
import torch

from diffkd.core.noise import derived_seed
from diffkd.errors import Interrupted
from diffkd.methods.base import Loss
from diffkd.methods.progressive import Progressive
from diffkd.training.config import Training
from diffkd.training.divergence import DivergenceMonitor, NonFinite
from tests.training.stages import Scale, run_one, weights


def broken(at, kind="loss", example=3):
    """Progressive whose loss is NaN at these updates (counted from 1), for one example of a batch."""

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
    """The images of an update (counted from 1) with one micro-batch."""
    rng = torch.Generator().manual_seed(derived_seed(0, 0, update - 1, 0))
    return torch.randint(64, (batch_size,), generator=rng).tolist()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_nonfinite_update_is_skipped(tmp_path, kind):
    """Weights, moments and average are as if the update had not happened; the learning rate moves on."""
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


def judged(at):
    """Progressive with a second network, whose loss is NaN at these updates (counted from 1); the student's
    weights and the second network's before each of its own updates."""
    judge, seen, shadow = Scale(), [], []

    class Two(Progressive):
        def networks(self, teacher, student):
            return {"judge": judge}

        def losses(self, nets, batch, step, rng):
            yield from super().losses(nets, batch, step, rng)
            seen.append(weights(nets["student"]).double())
            shadow.append(judge.scale.item())
            value = (judge.scale - 3).square().mean()
            yield Loss("judge", value * float("nan") if len(seen) in at else value)

    return Two(steps=[4], updates=12, learning_rate=1e-3), seen, shadow


def test_a_nonfinite_second_network_is_skipped_alone(tmp_path):
    """The student was updated before it, and so is its average. The second network stays as it was."""
    method, seen, shadow = judged({5})
    pupil, teacher, records = run_one(tmp_path / "run", method=method)
    skipped = [r for r in records if r.get("event") == "skipped"]
    assert [(r["update"], r["network"]) for r in skipped] == [(5, "judge")]
    average = weights(teacher).double()
    for n, value in enumerate(seen):
        decay = 0.0 if n == 0 else min(0.99, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * value
    assert (weights(pupil).double() - average).abs().max() < 1e-6
    assert shadow[5] == shadow[4] and shadow[6] != shadow[5]


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


def test_a_second_network_that_stays_nonfinite_stops_the_run(tmp_path):
    """Though the student's own losses are finite all the while."""
    method, seen, shadow = judged({3, 5, 6, 7, 8})
    with pytest.raises(NonFinite, match="network judge in stage 4-steps became NaN or infinite at update 8"):
        run_one(tmp_path / "run", method=method)
    assert len(seen) == 8 and shadow[4] == shadow[7] and not torch.equal(seen[4], seen[7])
    written = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    skipped = [(r["update"], r["network"]) for r in written if r.get("event") == "skipped"]
    assert skipped == [(update, "judge") for update in (3, 5, 6, 7, 8)]


def test_skipped_updates_are_counted_across_a_stop(tmp_path):
    whole = tmp_path / "whole"
    training = Training(batch_size=8, log_every=1, checkpoint_every=50)
    with pytest.raises(NonFinite, match="at update 6"):
        run_one(whole, method=broken({3, 4, 5, 6}), training=training)
    with pytest.raises(Interrupted):
        run_one(tmp_path / "parts", method=broken({3, 4, 5, 6}), training=training, stop_at=5)
    with pytest.raises(NonFinite, match="at update 6"):
        run_one(tmp_path / "parts", method=broken({1, 2, 3}), training=training)  # counted from the stop


def test_a_diverging_loss_gets_one_warning(caplog):
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


def test_losses_of_either_sign_are_told_by_their_size(caplog):
    """Those of sid and of adversarial are below zero in a good stage."""
    monitor = DivergenceMonitor("1-steps", 3)
    for update in range(1, 301):
        monitor.completed((-0.02, -0.01, 0.005)[update % 3], update, warn=True)
    assert not caplog.records
    for update in range(301, 351):
        monitor.completed(-0.3, update, warn=True)
    assert "more than 10 times its median (0.015) for 50 updates, up to update 350 (-0.3)" in caplog.text


def test_a_loss_that_is_large_from_the_start_gets_no_warning(caplog):
    monitor = DivergenceMonitor("4-steps", 3)
    for update in range(1, 300):
        monitor.completed(1e6 if update < 10 else 1e6 + update, update, warn=True)
    assert not caplog.records
