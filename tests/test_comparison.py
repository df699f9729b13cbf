"""scripts/compare_methods.py in its parts: what a run costs, how jobs end, what the table says."""

import json
import sys
import time
from pathlib import Path

import pytest

from diffkd.errors import UserError
from diffkd.methods.progressive import Progressive
from diffkd.methods.reflow import Reflow
from diffkd.training.config import Training
from tests.methods.conformance import COSINE, images
from tests.tiny import student

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from comparison import cost, plan, table  # noqa: E402
from comparison.jobs import Job, side_by_side  # noqa: E402
from comparison.merging import merged  # noqa: E402


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(cost, "BATCH", 8)


def teacher():
    made = student(4, "v_prediction", COSINE, steps=None, seed=1)
    made.num_classes, made.null_label = 3, 3
    return made


def passes(method):
    stages = method.stages(teacher())
    found = cost.passes([(method, stage) for stage in stages], teacher(), images(), Training(batch_size=8))
    return found


def test_a_pass_more_of_the_teacher_counts_as_one():
    """Whatever the rest of an update costs; guidance doubles the teacher's, and the student's are fewer than
    three, as its first layer needs no gradient of the images."""
    two, three, guided = (
        passes(Progressive(steps=[4], updates=10, **more))
        for more in ({}, {"substeps": 3}, {"guidance": 1.5})
    )
    assert 4 < two.update[0] < 5 and two.pairs == 0
    assert two.training == pytest.approx(10 * two.update[0])
    assert three.update[0] - two.update[0] == pytest.approx(1)
    assert guided.update[0] - two.update[0] == pytest.approx(2)


def test_drawing_pairs_is_part_of_the_cost():
    """24 pairs in 6 steps of heun, which takes 11 evaluations, two networks' worth with guidance, in batches
    of 8; then as many of the straight flow, in its own 2 steps."""
    method = Reflow(
        steps=[2, 1], pairs=24, pair_steps=6, sampler="heun", guidance=1.5, updates=4, distilling=2
    )
    found = passes(method)
    assert found.pairs == 3 * 11 * 2 + 3 * 2
    assert found.training == pytest.approx(4 * found.update[0] + 2 * found.update[1])


def test_seconds_are_of_the_updates_and_of_pairs_at_the_same_rate(tmp_path):
    records = [
        {"stage_index": 0, "update": 10, "cpu_seconds_per_update": 0.5},
        {"event": "spread", "stage_index": 0, "update": 10, "spread": 1.0},
        {"stage_index": 0, "update": 14, "cpu_seconds_per_update": 1.0},
        {"stage_index": 1, "update": 3, "cpu_seconds_per_update": 2.0},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert cost.cpu_seconds(log) == 5 + 4 + 6
    assert cost.seconds_with_pairs(log, cost.Passes(30.0, 10.0, (1.0,))) == pytest.approx(20)


def test_jobs_run_side_by_side_and_those_that_fail_are_told(tmp_path, capsys):
    meet = (
        "from pathlib import Path; import time; Path('{}').touch()\n"
        "while not Path('{}').exists(): time.sleep(.01)"
    )
    a, b = tmp_path / "a", tmp_path / "b"
    jobs = [
        Job(
            "first", [sys.executable, "-c", meet.format(a, b)], tmp_path / "1.log"
        ),  # each waits for the other
        Job("second", [sys.executable, "-c", meet.format(b, a)], tmp_path / "2.log"),
        Job("third", [sys.executable, "-c", "import sys; sys.exit('no such thing')"], tmp_path / "3.log"),
    ]
    assert [job.name for job in side_by_side(jobs, 2)] == ["third"]
    assert "third: failed (no such thing)" in capsys.readouterr().out


def test_when_the_time_is_up_no_job_begins(tmp_path):
    job = Job("late", [sys.executable, "-c", "print('begun')"], tmp_path / "log")
    assert side_by_side([job], 1, until=time.monotonic()) == [] and not job.log.exists()


def test_a_trial_shortens_every_method_of_a_chain():
    chain = [
        {"name": "progressive", "steps": [4, 1], "updates": [100, 200], "warmup": 5},
        {"name": "reflow", "pairs": 5000, "updates": 50, "distilling": 20},
    ]
    assert plan.shortened(chain) == [
        {"name": "progressive", "steps": [4, 1], "updates": [3, 3], "warmup": 5},
        {"name": "reflow", "pairs": 256, "updates": 3, "distilling": 3},
    ]


def row(model, steps, *fids, guidance=1.0):
    values = {"fid": list(fids), "kid": [0.01] * len(fids), "recall": [0.5] * len(fids)}
    return {"model": model, "steps": steps, "guidance": guidance, "of": {"digits": values}}


def test_the_table_has_means_spreads_and_ratios_to_both_teachers():
    """Of a chain, the last student of a step count; without one, nothing."""
    results = {
        "data": "digits", "features": ["digits"], "count": 1797, "seeds": [0, 1], "guidance": 1.5,
        "commit": "abc",
        "teacher": [
            row("teacher", 64, 0.2, guidance=1.5), row("teacher", 1, 9.0, guidance=1.5),
            row("teacher", 64, 0.4), row("teacher", 1, 8.0),
        ],
        "methods": {
            "progressive": {
                "seeds": [0], "seconds": [50.0], "passes": 2000.4, "students": [row("1-steps", 1, 0.8)],
            },
            "chain": {
                "seeds": [0, 1], "seconds": [100.0, 102.0], "passes": 4000.0,
                "students": [row("1-steps", 1, 5.0, 6.0), row("1-steps-dmd2", 1, 0.3, 0.5)],
            },
        },
    }  # fmt: skip
    lines = table.markdown_of(results).splitlines()
    assert "| chain | 0.400 ± 0.141 (2.00, 1.00) |  |  | 101 ± 1 (2.02) | 4,000 |" in lines
    assert "| progressive (1 of 2 seeds) | 0.800 (4.00, 2.00) |  |  | 50 (1.00) | 2,000 |" in lines
    assert "| teacher, w = 1.5 | 9.000 (45.00, 22.50) |  |  |  |  |" in lines
    assert (
        "| chain | 1-steps | 5.500 ± 0.707 (27.50, 13.75) | 0.0100 ± 0.0000 |  | 0.500 ± 0.000 |  |  |  |"
        in lines
    )
    assert table.least_steps(results["methods"]["chain"])["model"] == "1-steps-dmd2"


def part(seeds, **methods):
    """methods: the FID of each seed's one-step student."""
    return {
        "data": "digits", "features": ["digits"], "count": 1797, "seeds": seeds, "guidance": 1.0,
        "commit": f"c{seeds[0]}", "teacher": [row("teacher", 64, 0.4)],
        "methods": {
            name: {
                "seeds": seeds[: len(fids)], "seconds": [10.0 * k + 50 for k in range(len(fids))],
                "passes": 2000.0, "students": [row("1-steps", 1, *fids)],
            }
            for name, fids in methods.items()
        },
    }  # fmt: skip


def test_seeds_that_were_run_elsewhere_are_one_table():
    whole = merged([part([0], dmd2=[0.5], imm=[0.6]), part([1, 2], dmd2=[0.7, 0.9], lcm=[0.8])])
    assert whole["seeds"] == [0, 1, 2] and whole["commit"] == "c0, c1"
    assert whole["methods"]["dmd2"]["seeds"] == [0, 1, 2]
    lines = table.markdown_of(whole).splitlines()
    assert "| dmd2 | 0.700 ± 0.200 (1.75) |  |  | 53 ± 6 | 2,000 |" in lines
    assert "| imm (1 of 3 seeds) | 0.600 (1.50) |  |  | 50 | 2,000 |" in lines
    assert "| lcm (1 of 3 seeds) | 0.800 (2.00) |  |  | 50 | 2,000 |" in lines
    assert merged([whole]) == whole


def test_what_does_not_belong_together_is_not_merged():
    one, other = part([0], dmd2=[0.5]), part([1], dmd2=[0.6])
    with pytest.raises(UserError, match="dmd2 have a seed twice"):
        merged([one, one])
    with pytest.raises(UserError, match="differ in count"):
        merged([one, other | {"count": 100}])
    with pytest.raises(UserError, match=r"different teachers \(FID 0.4 and 0.5"):
        merged([one, other | {"teacher": [row("teacher", 64, 0.5)]}])
    other["methods"]["dmd2"]["students"] = [row("2-steps", 2, 0.6)]
    with pytest.raises(UserError, match="of other students"):
        merged([one, other])
