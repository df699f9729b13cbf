"""The stages of a run, planned before anything is trained."""

from __future__ import annotations

from diffkd.core.schedules import Schedule
from diffkd.runs import plans
from diffkd.runs.config import Distill
from tests.tiny import student


def test_stages_of_one_step_count_have_the_names_of_their_methods():
    """The best chains end with several students of one step, each the next one's start."""
    config = Distill.model_validate({
        "out": "run", "teacher": {"path": "teacher"}, "data": {"kind": "digits"}, "evaluation": None,
        "method": [
            {"name": "progressive", "steps": [4, 1]}, {"name": "dmd2"}, {"name": "dmd2"},
            {"name": "consistency", "steps": [4, 2]},
        ],
    })  # fmt: skip
    plan = plans.plan(config, student(4, "v_prediction", Schedule.cosine(64), steps=None))
    names = [one.name for _, stage in plan for one in stage.students]
    assert names == [
        "4-steps", "1-steps", "1-steps-dmd2", "1-steps-dmd2-2", "4-steps-consistency", "2-steps-consistency",
    ]  # fmt: skip
    assert [stage.teacher for _, stage in plan] == ["previous", "previous", *["original"] * 3]
